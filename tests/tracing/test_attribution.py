"""The estimate against gradients of Hugging Face's own forward, and the exact trace that a screen computes."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kedit_fast as kf
from kedit_fast.model.seam import frozen
from kedit_fast.pictures.labels import impact
from kedit_fast.tracing import attribution
from kedit_fast.tracing import tasks as trace_tasks
from kedit_fast.tracing import trace as tracing
from kedit_fast.tracing.attribution import most
from kedit_fast.tracing.results import read_log
from kedit_fast.tracing.tasks import KINDS, tasks_of
from tests import tiny
from tests.conftest import close, disk_and_resident, open_tiny, save_tiny, tiny_lm
from tests.live import LiveBytes
from tests.make import watched
from tests.oracle.access import changing, embedding, layers, site_module
from tests.oracle.tracing import SITES, _add_noise, restored_layers
from tests.tiny import tiny_model

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


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2", "gpt_oss"])
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
    assert (got.p_clean, got.p_corrupted) == pytest.approx((exact.p_clean, exact.p_corrupted), abs=3e-6)
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


def prepared(lm, facts, metric="prob"):
    level = trace_tasks.noise_level(lm, facts, HOW["noise"])
    how = trace_tasks.TraceSettings(KINDS, HOW["window"], metric, None, HOW["samples"], level, 1)
    return tasks_of(lm, facts, None, "noise", metric), how


def counted(lm, task, ways, recomputes=False):
    return attribution.held_bytes(lm, task, ways, KINDS, recomputes)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("cut", ["facts apart", "draws and steps apart", "layers computed again"])
def test_cut_by_memory_is_the_whole(cut, family, monkeypatch):
    """Facts in groups, one fact's runs in groups, one run at a time."""
    lm = tiny_lm(family)
    tasks, how = prepared(lm, [EIFFEL, CAPITAL], "logit_diff")
    whole = attribution.estimate(lm, tasks, how)
    memory = {
        "facts apart": max(counted(lm, task, 14) for task in tasks),
        "draws and steps apart": max(counted(lm, task, 5) for task in tasks),
        "layers computed again": max(counted(lm, task, 1) for task in tasks) - 1,
    }[cut]
    calls, told = watched(monkeypatch, attribution, "_effects"), []
    parts = attribution.estimate(replace(lm, memory=memory), tasks, how, told.append)
    calls = [(len(ways), recompute) for _, _, _, ways, _, recompute in calls]
    assert sum(n for n, _ in calls) == 28 and (len(calls) == 2 if cut == "facts apart" else len(calls) >= 4)
    assert any(again for _, again in calls) == (cut == "layers computed again")
    assert sum(told) == pytest.approx(1)
    for a, b in zip(whole, parts, strict=True):
        for kind in KINDS:
            close("estimate", b.restored[kind], a.restored[kind])


def test_what_does_not_fit_in_any_parts_is_refused():
    lm = tiny_lm("gpt2")
    tasks, how = prepared(lm, [EIFFEL])
    small = replace(lm, memory=counted(lm, tasks[0], 1, True) - 1)
    with pytest.raises(ValueError, match=r"fact .*Eiffel.*, one noise draw at a time, needs .*B and memory allows"):
        attribution.estimate(small, tasks, how)


@pytest.mark.parametrize("d_ff", [48, 384])
@pytest.mark.parametrize("family, dtype", [("gpt2", torch.float32), ("gemma3_text", torch.bfloat16)])
@pytest.mark.parametrize("recomputes", [False, True])
def test_runs_are_counted_as_what_they_hold(recomputes, family, dtype, d_ff, monkeypatch):
    """Narrow MLPs and wide ones, of the families that keep most of each."""
    monkeypatch.setattr(tiny, "D_FF", d_ff)
    lm = open_tiny(tiny_model(family, dtype))
    tasks, how = prepared(lm, [replace(EIFFEL, prompt="{} is in the city of" + " London, the city of" * 8)])
    with LiveBytes(lm.model) as held:
        attribution._effects(lm, tasks, how, torch.arange(14), None, recomputes)
    assert held.peak <= counted(lm, tasks[0], 14, recomputes) <= 3 * held.peak


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_native_products_of_many_rows_give_the_same(family, monkeypatch):
    """All rows in one call, by the products that serve many rows."""
    lm = tiny_lm(family)
    facts, how = [EIFFEL, CAPITAL], {"method": "attribution"} | HOW
    wanted = kf.trace(lm, facts, **how)
    monkeypatch.setattr("kedit_fast.kernels.linear.FEWEST", 1)
    for got, want in zip(kf.trace(lm, facts, **how), wanted, strict=True):
        assert np.allclose(got.p_restored, want.p_restored, rtol=1e-4, atol=1e-8)


def test_layers_from_disk_give_the_same_bits(tmp_path):
    """Their backward pass reads each layer again."""
    pair = disk_and_resident(save_tiny(tmp_path, tiny_model("llama")))
    made, expected = (kf.trace(lm, [EIFFEL], kinds=("state", "mlp"), method="attribution", **HOW) for lm in pair)
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
    screened = kf.trace(lm, facts, method="screen", top=5, **HOW)
    for got, estimated, exact in zip(screened, estimates, exacts, strict=True):
        known = got.exact & ~estimated.exact
        assert known.sum() == 5
        left = estimated.p_restored[~got.exact]
        assert estimated.p_restored[known].min() >= left.max()
        close("computed", torch.from_numpy(got.p_restored[known]), torch.from_numpy(exact.p_restored[known]))
        close("estimated", torch.from_numpy(got.p_restored[~got.exact]), torch.from_numpy(left))
        assert np.abs(estimated.p_restored[known] - exact.p_restored[known]).max() > 1e-5


def test_a_screen_of_everything_is_the_exact_trace():
    lm = tiny_lm("gpt2")
    screened, whole = kf.trace(lm, EIFFEL, method="screen", top=1000, **HOW), kf.trace(lm, EIFFEL, **HOW)
    for got, want in zip(screened, whole, strict=True):
        assert got.exact.all()
        close(got.kind, torch.from_numpy(got.p_restored), torch.from_numpy(want.p_restored))


def test_what_is_exact_is_kept_in_files(tmp_path):
    (got,) = kf.trace(tiny_lm("gpt2"), CAPITAL, kinds="state", method="screen", top=3, log=tmp_path / "log", **HOW)
    got.save(tmp_path / "trace.npz")
    (logged,) = read_log(tmp_path / "log")
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
    told = []

    @contextmanager
    def progress(label, total):
        yield SimpleNamespace(advance=lambda n: told.append(n / total), resume=lambda n: told.append(n / total))

    monkeypatch.setattr(tracing, "progress", progress)
    monkeypatch.setattr(tracing, "TOGETHER", 0)
    groups = watched(monkeypatch, tracing, "_trace_group")
    kf.trace(tiny_lm("gpt2"), [CAPITAL, EIFFEL], kinds="state", method=method, **HOW)
    assert sum(told) == pytest.approx(1) and len(told) >= 8
    assert [len(tasks) for _, tasks, *_ in groups] == [1, 1]
