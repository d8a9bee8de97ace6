"""Gradient factors of many tasks at once against autograd through Hugging Face's own forward, a task at a time."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import Dense
from kedit_fast.facts.tokens import fact_answer, fact_tokens
from kedit_fast.jobs import collect as collect_module
from kedit_fast.jobs import gradients as job_module
from kedit_fast.jobs.below import Below
from kedit_fast.jobs.gradients import GradientTask, gradient_factors
from kedit_fast.model.source import Resident
from tests.conftest import disk_and_resident, open_tiny, save_tiny, tiny_lm
from tests.editors.cases import FACTS, left_as_it_was, make_exact, relative
from tests.live import LiveBytes
from tests.make import lowrank, make_edit, watched
from tests.tiny import WINDOW, tiny_model, tiny_tokenizer

MODULES = {  # [out, in], but for gpt2's
    "gpt2": {"down": "transformer.h.{}.mlp.c_proj", "up": "transformer.h.{}.mlp.c_fc"},
    "phi3": {"down": "model.layers.{}.mlp.down_proj", "gate_up": "model.layers.{}.mlp.gate_up_proj"},
}
LLAMA = {role: f"model.layers.{{}}.mlp.{role}_proj" for role in ("down", "up", "gate")}


def tasks(facts=FACTS):
    return [GradientTask(list(fact_tokens(T, fact).ids), fact_answer(T, fact), fact.label) for fact in facts]


T = tiny_tokenizer()


def places_of(family, layers=(1, 3)):
    return [(layer, role) for layer in layers for role in MODULES.get(family, LLAMA)]


def mean_nll(task, logits):
    return cross_entropy(logits, torch.tensor(task.target))


def alone(model, family, task, places, loss=mean_nll):
    """{place: dL/dW [out, in]} of one task, and its loss, by autograd through the model's own forward."""
    weights = [model.get_submodule(MODULES.get(family, LLAMA)[role].format(layer)).weight for layer, role in places]
    flags = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    with torch.enable_grad():
        value = loss(task, model(torch.tensor([task.prompt + task.target])).logits[0, len(task.prompt) - 1 : -1])
        found = torch.autograd.grad(value, weights)
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
    return {p: g.T if family == "gpt2" else g for p, g in zip(places, found, strict=True)}, value.item()


def compare(got, model, family, given, places, tolerance=1e-8, loss=mean_nll):
    for i, task in enumerate(given):
        expected, value = alone(model, family, task, places, loss)
        assert got.losses[i].item() == pytest.approx(value, rel=tolerance)
        for place in places:
            assert relative(got.factors[place].dense(i), expected[place]) < tolerance, (place, task.name)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi3"])
def test_factors_are_autograd_s_gradient(family, monkeypatch):
    make_exact(monkeypatch)
    lm, places = tiny_lm(family, torch.float64), places_of(family)
    compare(gradient_factors(lm, tasks(), places), lm.model, family, tasks(), places)


def test_each_row_is_a_token_that_the_loss_depends_on():
    lm, given = tiny_lm("llama", torch.float64), tasks()
    found = gradient_factors(lm, given, [(1, "down"), (3, "down")]).factors
    rows = [(i, pos) for i, task in enumerate(given) for pos in range(task.n_rows)]
    read = [(i, pos) for i, pos in rows if pos >= len(given[i].prompt) - 1]
    for layer, expected in ((1, rows), (3, read)):  # above the last attention a token reaches itself alone
        factors = found[layer, "down"]
        assert list(zip(factors.task.tolist(), factors.pos.tolist(), strict=True)) == expected
        assert factors.x.shape == (len(expected), lm.d_ff) and factors.delta.shape == (len(expected), lm.d_model)


def test_a_token_that_no_loss_depends_on_has_no_row():
    """Behind the window of the one attention above, nothing looks."""
    lm, task = tiny_lm("mistral", torch.float64), tasks()[0]
    factors = gradient_factors(lm, [task], [(2, "down")]).factors[2, "down"]
    assert factors.pos.tolist() == list(range(task.n_rows))[-WINDOW:] and task.n_rows > WINDOW
    assert factors.delta.abs().amax(1).min() > 0


def test_another_loss(monkeypatch):
    """KL from given log-probabilities, of one task in twice the weight; logits of a task at a time."""
    monkeypatch.setattr(job_module, "logit_rows", lambda lm: 1)
    lm, given, places = tiny_lm("gpt2", torch.float64), tasks(), places_of("gpt2")
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(len(task.target), lm.n_vocab, generator=generator).double().log_softmax(-1) for task in given]

    def divergence(which, log_p):
        return (1 + (which == 1)) * kl_div(log_p, base[which], log_target=True, reduction="batchmean")

    got = gradient_factors(lm, given, places, divergence)
    names = [task.name for task in given]
    compare(
        got, lm.model, "gpt2", given, places,
        loss=lambda task, logits: divergence(names.index(task.name), logits.log_softmax(-1)),
    )  # fmt: skip


def test_at_the_weights_with_edits():
    """A dense and a low-rank one, at the places themselves; and independent ones, each for its task."""
    lm, places = open_tiny(tiny_model("llama", torch.float64)), [(1, "down"), (2, "up")]
    up = Dense(0.1 * torch.randn(80, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    down = lowrank(rank=4, dtype=torch.float64)
    edit = make_edit(lm.model, {1: down})
    edit = replace(edit, changes=(*edit.changes, WeightChange(2, up, "up")))
    got = gradient_factors(lm.with_edit(edit), tasks(), places)
    plain = gradient_factors(lm, tasks(), places)
    with edit.apply(lm.model):
        compare(got, lm.model, "llama", tasks(), places)
    assert relative(plain.factors[1, "down"].dense(0), got.factors[1, "down"].dense(0)) > 0.01
    owned = make_edit(lm.model, {1: down}, owners={1: torch.tensor([0, 1, 1, 0])})
    given = [replace(task, owner=i % 2) for i, task in enumerate(tasks())]
    got = gradient_factors(lm.with_edit(owned), given, places)
    for i, task in enumerate(given):
        only = gradient_factors(lm.with_edit(owned.only(i % 2)), [task], places)
        for place in places:
            assert relative(got.factors[place].dense(i), only.factors[place].dense(0)) < 1e-12


def test_what_lies_below_is_computed_once_and_has_no_graph(monkeypatch):
    calls = watched(monkeypatch, Resident, "call")
    gradient_factors(tiny_lm("llama"), tasks(), [(2, "gate"), (2, "up")])
    assert [layer for _, layer, *_ in calls] == [0, 1, 2, 3, 3]  # of the last one the rows that nobody reads are keys


def test_what_lies_below_can_be_kept_for_many_calls(monkeypatch):
    """Some of it, where the rest does not fit; not under an edit that acts there."""
    lm, places, given = tiny_lm("llama", torch.float64), [(2, "gate"), (3, "down")], tasks()
    plain = gradient_factors(lm, given, places)
    row = lm.d_model * lm.dtype.itemsize
    for most, layers in ((1 << 20, [2, 3, 3]), (len(given[0].ids) * row, [0, 1, 2, 3, 3])):
        below = Below(lm, [task.ids for task in given], 2, most)
        assert len(below.rows) == (len(given) if most > row * 100 else 1)
        with pytest.MonkeyPatch.context() as patch:
            calls = watched(patch, Resident, "call")
            got = gradient_factors(lm, given, places, below=below)
        assert [layer for _, layer, *_ in calls] == layers
        for i, place in ((i, place) for i in range(len(given)) for place in places):
            assert relative(got.factors[place].dense(i), plain.factors[place].dense(i)) < 1e-12
    with pytest.raises(ValueError, match="below which nothing may change"):
        gradient_factors(
            lm.with_edit(make_edit(lm.model, {1: lowrank(dtype=torch.float64)})), given, places, below=below
        )
    assert Below(lm, [], 0, 0)(lm, [None], 0) == [None]


def test_texts_that_begin_alike_share_rows_below_and_none_above(monkeypatch):
    """Their gradients stay their own; texts that share next to nothing go as they are."""
    lm, places = tiny_lm("llama", torch.float64), [(2, "down")]
    alike = [replace(FACTS[0], target_new=target) for target in ("Rome", "cheese boat", "London piano")]
    seen, entering = [], collect_module._sharing
    monkeypatch.setattr(collect_module, "_sharing", lambda runs: seen.append(entering(runs)) or seen[-1])
    together = gradient_factors(lm, tasks(alike), places)
    (made, _), n_rows = seen.pop(), sum(task.n_rows for task in tasks(alike))
    assert made.n_rows.sum() == n_rows - 2 * len(tasks(alike)[0].prompt)
    assert len(together.factors[2, "down"].x) == n_rows
    compare(together, lm.model, "llama", tasks(alike), places)
    owned = make_edit(lm.model, {1: lowrank(rank=4, dtype=torch.float64)}, owners={1: torch.tensor([0, 1, 1, 0])})
    given = [replace(task, owner=i % 2) for i, task in enumerate(tasks(alike))]
    beside = gradient_factors(lm.with_edit(owned), given, places)
    assert seen.pop()[0].n_rows.sum() == n_rows - len(given[0].prompt)  # two of them are under one edit
    for i, task in enumerate(given):
        alone = gradient_factors(lm.with_edit(owned.only(i % 2)), [task], places)
        assert relative(beside.factors[2, "down"].dense(i), alone.factors[2, "down"].dense(0)) < 1e-12
    seen.clear()
    gradient_factors(lm, tasks(), places)
    assert (seen[0][0].parent < 0).all()


# ---- memory, and where layers come from


@pytest.mark.parametrize("again", [False, True])
def test_packs_cut_by_memory_are_the_whole(again, monkeypatch):
    lm, places = tiny_lm("gpt2", torch.float64), places_of("gpt2", (0, 2))
    whole = gradient_factors(lm, tasks(), places)
    counted = job_module.held_bytes
    monkeypatch.setattr(
        job_module, "held_bytes",
        lambda lm, *given, recompute=False: counted(lm, *given) if recompute else lm.memory * (1 if again else 0.4),
    )  # fmt: skip
    cuts = list(job_module._cut(lm, tasks(), places, 0))
    assert cuts == ([([i], True) for i in range(4)] if again else [([0, 1], False), ([2, 3], False)])
    parts = gradient_factors(lm, tasks(), places)
    for place in places:
        assert torch.equal(parts.factors[place].task, whole.factors[place].task)
        assert relative(parts.factors[place].x, whole.factors[place].x) < 1e-12
        assert relative(parts.factors[place].delta, whole.factors[place].delta) < 1e-12
    assert relative(parts.losses, whole.losses) < 1e-12


def test_layers_from_disk_give_the_bits_of_layers_in_memory(tmp_path, monkeypatch):
    """One pack, and packs that go up and down side by side: as many passes."""
    lm, resident = disk_and_resident(save_tiny(tmp_path, tiny_model("gpt2", layers=6)))
    places, passes = places_of("gpt2", (2, 4)), []
    gradient_factors(lm, tasks(), places)  # so that what is held from before is the same for both
    for cut in (None, lambda lm, tasks, places, held: (([i], False) for i in range(len(tasks)))):
        if cut:
            monkeypatch.setattr(job_module, "_cut", cut)
        before = lm.source.fetched
        streamed, expected = (gradient_factors(each, tasks(), places) for each in (lm, resident))
        passes.append(lm.source.fetched - before)
        for place in places:
            for name in ("x", "delta", "task", "pos"):
                assert torch.equal(getattr(streamed.factors[place], name), getattr(expected.factors[place], name))
        assert torch.equal(streamed.losses, expected.losses)
    assert passes[0] == passes[1] and lm.source.missed == 0


@pytest.mark.parametrize("layers", [(0, 3), (3,)])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_task_is_counted_as_what_it_holds(family, layers):
    lm, places = tiny_lm(family), places_of(family, layers)
    texts = [f"{begin} piano is in the city of London. " * 6 + "{}" for begin in ("The", "Toyota", "Paris")]
    given = tasks([replace(FACTS[0], prompt=text) for text in texts])
    with LiveBytes(lm.model) as held:
        gradient_factors(lm, given, places)
    counted = sum(job_module.held_bytes(lm, task, places) for task in given)
    logits = job_module.LOGITS * sum(len(task.target) for task in given) * lm.n_vocab * 4
    assert held.peak <= counted + logits <= 4.5 * held.peak


# ---- what must not matter, and what is refused


def test_the_model_is_left_as_it_was():
    with left_as_it_was() as lm:
        gradient_factors(lm, tasks(), places_of("llama"))


def test_no_task_gives_no_rows():
    found = gradient_factors(tiny_lm("llama"), [], [(1, "down")])
    assert found.factors[1, "down"].x.shape == (0, 80) and found.losses.shape == (0,)


def test_what_cannot_be_done_is_refused(no_sweep):
    lm = tiny_lm("llama")
    for places, says in (([], "at least one"), ([(9, "down")], "out of range"), ([(1, "gate_up")], "'gate_up'")):
        with pytest.raises(ValueError, match=says):
            gradient_factors(lm, tasks(), places)
    with pytest.raises(ValueError, match=r"the factors of 4 gradients needs .* and memory allows"):
        gradient_factors(replace(lm, memory=1000), tasks(), [(1, "down")])
    with pytest.raises(ValueError, match=r"the gradient of .* needs .* and memory allows"):
        gradient_factors(replace(lm, memory=60_000), tasks()[:1], [(3, "up")])
    with pytest.raises(TypeError, match="open_model"):
        gradient_factors(lm.model, tasks(), [(1, "down")])


def test_what_is_not_finite_is_said():
    lm = tiny_lm("llama")

    def broken(which, log_p):
        return log_p.sum() * (torch.nan if which == 2 else 1.0)

    with pytest.raises(ValueError, match=f"the loss of {FACTS[2].label} is NaN"):
        gradient_factors(lm, tasks(), [(1, "down")], broken)
