"""The estimate against gradients of Hugging Face's own forward, and the exact trace that a screen computes."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kedit_fast as kf
from kedit_fast import attribution, tracing
from kedit_fast.attribution import most
from kedit_fast.model.seam import frozen
from kedit_fast.trace_labels import impact
from kedit_fast.trace_tasks import KINDS
from tests.conftest import close, tiny_lm
from tests.oracle.access import changing, embedding, layers, site_module
from tests.oracle.tracing import SITES, _add_noise, restored_layers
from tests.tiny import tiny_model, tiny_tokenizer

EIFFEL = kf.Fact(prompt="{} is located in the city of", subject="The Eiffel Tower", target_new="Rome")
CAPITAL = kf.Fact(prompt="The capital of {} is", subject="France", target_new="Rome")
HOW = {"samples": 2, "noise": 0.5, "window": 3}


def oracle(model, result) -> np.ndarray:
    """[T, L] estimated values: the mean of seven first-order effects, added to the corrupted value."""
    effects = [step(model, result, i / 8) for i in range(7)]
    value = effects[0][0][:, None, None] + torch.stack([effect for _, effect in effects]).mean(0)  # [2, T, L]
    return (value.clamp(0, 1) if result.metric == "prob" else value).mean(0).numpy()


def step(model, result, share):
    """(p or log p [2], effects [2, T, L]), by autograd through a forward of one clean row and two on the way."""
    n_layers, kept = len(layers(model)), {}
    corrupt = _add_noise(result.subject_span, 0.5, 2, 1)

    def embed(hidden):
        hidden = corrupt(hidden)
        return hidden + share * (hidden[:1] - hidden)

    def keep(layer):
        def see(hidden):
            hidden.requires_grad_()
            hidden.retain_grad()
            kept[layer] = hidden
            return hidden

        return see

    ids = torch.tensor([model_ids(result)] * 3)
    changes = [(embedding(model), embed)]
    changes += [(site_module(model, layer, SITES[result.kind]), keep(layer)) for layer in range(n_layers)]
    with frozen(model), changing(changes):
        log_p = model(ids).logits[1:, -1].log_softmax(-1)[:, result.answer_id]
    value = log_p.exp() if result.metric == "prob" else log_p
    value.sum().backward()
    effect = [(kept[i].grad[1:] * (kept[i][:1] - kept[i][1:])).sum(-1) / (1 - share) for i in range(n_layers)]
    effect = torch.stack(effect).detach()
    windows = [restored_layers(result.kind, layer, 3, n_layers) for layer in range(n_layers)]
    return value.detach(), torch.stack([effect[list(window)].sum(0) for window in windows], 2)


def model_ids(result):
    return tiny_lm("llama").encode(result.fact.text)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["prob", "logprob"])
def test_equals_autograd_through_hugging_faces_forward(family, kind, metric):
    lm, how = tiny_lm(family), HOW | {"metric": metric}
    (got,) = kf.trace(lm, EIFFEL, kinds=kind, method="attribution", **how)
    want = oracle(lm.model, got)
    last = -1 if kind == "state" else want.shape[1]  # nothing stands above the last layer: those cells are known
    close(kind, torch.from_numpy(got.p_restored[:, :last]), torch.from_numpy(want[:, :last]))
    assert got.exact.sum() == (len(got.tokens) if kind == "state" else 0)
    (exact,) = kf.trace(lm, EIFFEL, kinds=kind, **how)
    assert exact.exact is None and np.abs(got.p_restored - exact.p_restored).max() > 1e-4  # it is an estimate
    assert (got.p_clean, got.p_corrupted) == pytest.approx((exact.p_clean, exact.p_corrupted), abs=1e-6)
    if kind == "state":
        assert got.p_restored[:, -1] == pytest.approx(exact.p_restored[:, -1], abs=1e-6)


def test_another_subject_corrupts():
    """Its embeddings are what the way begins at: a subject that is the same one leaves nothing to restore."""
    lm = tiny_lm("llama")
    how = {"method": "attribution", "kinds": "state"}
    (got,) = kf.trace(lm, CAPITAL, corrupt="England", **how)
    (same,) = kf.trace(lm, CAPITAL, corrupt="France", **how)
    assert np.abs(got.p_restored - got.p_corrupted).max() > 1e-4
    assert np.abs(same.p_restored - same.p_clean).max() < 1e-6


def test_facts_in_groups_are_facts_together(monkeypatch):
    lm, facts = tiny_lm("gpt2"), [EIFFEL, CAPITAL]
    together = kf.trace(lm, facts, method="attribution", metric="logit_diff", **HOW)
    monkeypatch.setattr(attribution, "SAVED", 1 << 40)  # every fact fills the memory
    apart = kf.trace(lm, facts, method="attribution", metric="logit_diff", **HOW)
    for a, b in zip(together, apart, strict=True):
        assert a.fact == b.fact and a.kind == b.kind
        close("estimate", torch.from_numpy(a.p_restored), torch.from_numpy(b.p_restored))


def test_layers_from_disk_give_the_same_bits(tmp_path):
    """Their backward pass reads each layer again."""
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    disk, resident = kf.open_model(tmp_path, memory=1), kf.open_model(tmp_path)
    assert disk.source.name == "disk"
    made, expected = (
        kf.trace(lm, [EIFFEL], kinds=("state", "mlp"), method="attribution", **HOW)
        for lm in (replace(disk, memory=resident.memory), resident)
    )
    assert [r.p_restored.tolist() for r in made] == [r.p_restored.tolist() for r in expected]


def test_the_model_and_the_gradient_mode_are_left_alone():
    lm = tiny_lm("llama")
    before = [p.requires_grad for p in lm.model.parameters()]
    kf.trace(lm, EIFFEL, method="attribution", **HOW)
    assert before == [p.requires_grad for p in lm.model.parameters()]
    assert all(p.grad is None for p in lm.model.parameters()) and torch.is_grad_enabled()


def test_a_screen_computes_the_cells_that_the_estimate_ranks_first():
    lm, facts = tiny_lm("llama"), [EIFFEL, CAPITAL]
    estimates = kf.trace(lm, facts, method="attribution", **HOW)
    exacts = kf.trace(lm, facts, **HOW)
    for got, estimated, exact in zip(
        kf.trace(lm, facts, method="screen", top=5, **HOW), estimates, exacts, strict=True
    ):
        known = got.exact & ~estimated.exact
        assert known.sum() == 5
        left = estimated.p_restored[~got.exact]
        assert estimated.p_restored[known].min() >= left.max()
        close("computed", torch.from_numpy(got.p_restored[known]), torch.from_numpy(exact.p_restored[known]))
        close("estimated", torch.from_numpy(got.p_restored[~got.exact]), torch.from_numpy(left))
        assert np.abs(estimated.p_restored[known] - exact.p_restored[known]).max() > 1e-5


def test_a_screen_of_everything_is_the_exact_trace():
    lm = tiny_lm("gpt2")
    for got, want in zip(
        kf.trace(lm, EIFFEL, method="screen", top=1000, **HOW), kf.trace(lm, EIFFEL, **HOW), strict=True
    ):
        assert got.exact.all()
        close(got.kind, torch.from_numpy(got.p_restored), torch.from_numpy(want.p_restored))


def test_what_is_exact_is_kept_in_files(tmp_path):
    (got,) = kf.trace(tiny_lm("gpt2"), CAPITAL, kinds="state", method="screen", top=3, log=tmp_path / "log", **HOW)
    got.save(tmp_path / "trace.npz")
    (logged,) = kf.tracing.read_log(tmp_path / "log")
    for read in (kf.TraceResult.load(tmp_path / "trace.npz"), logged):
        assert read.exact.dtype == bool and (read.exact == got.exact).all()


def test_pictures_say_what_is_estimated():
    lm = tiny_lm("gpt2")
    (got,) = kf.trace(lm, CAPITAL, kinds="mlp", method="screen", top=3, **HOW)
    assert impact(got).endswith(f"(estimated, but for 3 of {got.p_restored.size} cells)")
    (exact,) = kf.trace(lm, CAPITAL, kinds="mlp", **HOW)
    assert "estimated" not in impact(exact)


def test_the_largest_among_some():
    effect = torch.tensor([[5.0, 1.0], [3.0, 4.0]])
    among = torch.tensor([[False, True], [True, True]])
    assert most(effect, 2, among).tolist() == [[False, False], [True, True]]
    assert most(effect, 9, among).tolist() == among.tolist()


@pytest.mark.parametrize("method", ["exact", "attribution", "screen"])
def test_progress_reaches_the_number_of_facts(method, monkeypatch):
    """Layer by layer, over several groups; and a group ends where more rows would only make results come later."""
    told, groups, finish = [], [], tracing._trace_group

    @contextmanager
    def watched(label, total):
        yield SimpleNamespace(advance=lambda n: told.append(n / total))

    monkeypatch.setattr(tracing, "progress", watched)
    monkeypatch.setattr(tracing, "TOGETHER", 1)
    monkeypatch.setattr(
        tracing, "_trace_group", lambda lm, tasks, *a: groups.append(len(tasks)) or finish(lm, tasks, *a)
    )
    kf.trace(tiny_lm("gpt2"), [CAPITAL, EIFFEL], kinds="state", method=method, **HOW)
    assert sum(told) == pytest.approx(1) and len(told) >= 8 and groups == [1, 1]
