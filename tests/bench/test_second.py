"""The benchmark of a second real model, on tiny ones: what it tells, and that it refuses figures that differ."""

import dataclasses

import pytest
import torch

import kedit_fast as kf
from bench import edit, report, second
from bench.common import CheckFailed, Skipped
from kedit_fast.sweep.sites import Site
from tests.conftest import disk_and_resident, tiny_lm
from tests.oracle import access
from tests.tiny import PROMPTS, TEXT

FACTS = [
    kf.Fact(p.template, p.subject, target_new=new, target_true=p.answer.strip())
    for p, new in zip(PROMPTS[:4], ("Rome", "London", "Madrid", "English"), strict=True)
]


@pytest.fixture
def ground(monkeypatch):
    """A model with a norm behind its MLPs."""
    monkeypatch.setattr(second, "peak_matmul", lambda: 100.0)
    monkeypatch.setattr(edit, "peak_matmul", lambda: 100.0)
    lm = tiny_lm("gemma3_text")
    moments = kf.second_moments(lm, range(lm.n_layers), [TEXT], n_tokens=200)
    monkeypatch.setattr(edit, "statistics_of", lambda lm, layers: {layer: moments[layer] for layer in layers})
    return second.Ground(lm, "tiny", "Tiny", FACTS)


def test_traces_are_told_by_kind_as_shares_of_the_total_effect(ground):
    figures = {figure.metric: figure for figure in second.traced(ground, FACTS[:2], samples=2).figures}
    window = round(ground.lm.n_layers * 10 / 48)
    kinds = tuple(second.PLACES)  # in one sweep, for the same rounding
    made = kf.average(kf.trace(ground.lm, FACTS[:2], kinds=kinds, samples=2, window=window))["mlp"]
    effect = made.mean[second.ROLES.index("last subject token")] / made.total_effect
    line = "mlp, last subject token: largest effect, of the total"
    assert figures[line].value == pytest.approx(100 * effect.max())
    assert figures["mlp, last subject token: its layer, of the depth"].value == pytest.approx(
        100 * effect.argmax() / ground.lm.n_layers
    )
    assert figures["total effect"].value == pytest.approx(made.total_effect)
    assert {figure.unit for figure in figures.values()} <= set(report.FORMATS)


def test_edits_are_told_with_what_their_layers_leave_of_the_way(ground):
    measured = second.edited(ground, "memit", {2: 2}, TEXT)
    figures = {figure.metric: figure for figure in measured.figures}
    assert {figure.case for figure in measured.figures} == {"Tiny, MEMIT, n = 2, 2 edits"}
    assert not any(figure.mark for figure in measured.figures)
    editor = kf.Memit.for_model(ground.lm)
    n = len(editor.layers)
    left = [figures[f"||z - h|| behind {i} of {n} layers"].value for i in range(1, n + 1)]
    assert all(x > 0 for x in left)
    rome = second.edited(ground, "rome", {1: 2}, TEXT).figures
    assert rome[0].case == "Tiny, ROME, n = 1, 2 edits" and not any("||z" in figure.metric for figure in rome)


def test_what_is_left_is_measured_on_the_edited_model(ground):
    editor = kf.Memit.for_model(ground.lm)
    made = editor.edit(ground.lm, FACTS[:2], moments=edit.statistics_of(ground.lm, editor.layers))
    left = second.left(ground.lm, FACTS[:2], made)
    top = editor.layers[-1]
    places = [access.lookup(ground.lm.tokenizer, fact.prompt, fact.subject) for fact in FACTS[:2]]

    def missing(changes) -> tuple[float, float]:
        """||z - h||, and the same behind the model's last norm, with these changes written into the weights."""
        with dataclasses.replace(made, changes=changes).apply(ground.lm.model):
            h = torch.stack([access.read_value(ground.lm.model, *place, top, Site.layer_out) for place in places])
        norm = ground.lm.model.get_submodule("model.norm")
        return tuple(apart.norm(dim=1).mean().item() for apart in (made.values - h, norm(made.values) - norm(h)))

    first, *behind = (missing(made.changes[:n]) for n in range(len(editor.layers) + 1))
    expected = [100 * after[i] / first[i] for i in (0, 1) for after in behind]
    assert list(left.values()) == pytest.approx(expected, rel=1e-4)
    n = len(editor.layers)
    lines = [
        f"{what} behind {i} of {n} layers" for what in ("||z - h||", "||norm(z) - norm(h)||") for i in range(1, n + 1)
    ]
    assert list(left) == lines


def test_the_streamed_model_has_to_say_the_same(ground, monkeypatch, tmp_path):
    ground.lm.model.save_pretrained(tmp_path)
    ground.lm.tokenizer.save_pretrained(tmp_path)
    disk, resident = disk_and_resident(tmp_path)
    monkeypatch.setattr(kf, "open_model", lambda path, memory: disk)
    monkeypatch.setitem(second.MEMORY, "tiny", "1GB")
    here = ground._replace(lm=resident)
    (figure,) = second.streamed(here, FACTS[:2]).figures
    assert 0 <= figure.value <= second.APART
    monkeypatch.setattr(second, "APART", -1.0)
    with pytest.raises(CheckFailed, match="Tiny: P\\(new\\) from disk and in memory"):
        second.streamed(here, FACTS[:2])


def test_without_the_model_nothing_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(second, "GEMMA3", dataclasses.replace(second.GEMMA3, size="nowhere"))
    with pytest.raises(Skipped, match="accept-licence"):
        second.check_at_hand()
