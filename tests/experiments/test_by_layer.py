"""Edit success by layer, beside the trace of the same facts."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

import kedit_fast as kf
from kedit_fast.basics.intervals import Interval
from kedit_fast.experiments.by_layer import LAST, LayerStudy, edit_by_layer
from kedit_fast.tracing.results import AverageTrace
from tests.conftest import refused, tiny_lm
from tests.editors import cases
from tests.experiments.test_rounds import FACTS, counted_asks
from tests.make import killed_at

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
EDITOR = kf.Rome(layers=(1,), v_lr=1.0, v_num_grad_steps=4, clamp_norm_factor=0.5)
GIVEN = {"moments": cases.moments(), "contexts": cases.GROUPS}


def trace_of(effect, kind="state"):
    """An average trace with this effect [L] at the subject's last token."""
    mean = np.full((6, len(effect)), np.nan, dtype=np.float32)
    mean[LAST] = effect
    return AverageTrace(mean, np.full_like(mean, 0.01), np.array([4] * 6), 4, kind, "prob", 0.5)


TRACE = {"state": trace_of([0.1, 0.4, 0.3, 0.2]), "mlp": trace_of([0.0, 0.1, np.nan, 0.1], "mlp")}


def made_up(efficacies, layers=None):
    """A sweep with these efficacies."""
    layers = range(len(efficacies)) if layers is None else layers
    names = ("efficacy", "p_new", "paraphrase", "neighborhood", "score")

    def everywhere(value):
        return dict.fromkeys(names, Interval(value, value - 0.1, value + 0.1, 4))

    edited = {layer: everywhere(value) for layer, value in zip(layers, efficacies, strict=True)}
    return LayerStudy(edited, everywhere(0.5), TRACE, "rome", 4, model="tiny")


@pytest.mark.parametrize("editor", [EDITOR, kf.Memit(layers=(0, 1), mom2_update_weight=5.0, v_num_grad_steps=4)])
def test_each_fact_is_edited_alone_at_each_layer(editor):
    lm = tiny_lm("llama")
    found = edit_by_layer(lm, FACTS, editor, (2, 0), trace=TRACE, **GIVEN)
    assert found.layers == (0, 2) and found.method == editor.METHOD and found.n_facts == 4
    for layer in found.layers:
        alone = []
        for fact in FACTS:
            edit = replace(editor, layers=(layer,)).edit(lm, [fact], **GIVEN)
            alone.append(float(kf.evaluate(lm, [fact], edit).edited["p_new"][0]))
        assert found.edited[layer]["p_new"].mean == pytest.approx(np.mean(alone), rel=1e-3)
    assert found.edited[0]["p_new"].mean != pytest.approx(found.edited[2]["p_new"].mean, rel=1e-2)
    base = kf.evaluate(lm, FACTS).base["p_new"]
    assert found.base["p_new"].mean == pytest.approx(float(base.mean()), rel=1e-4)


def test_the_same_facts_are_traced():
    lm = tiny_lm("llama")
    found = edit_by_layer(lm, FACTS, EDITOR, (1,), samples=2, **GIVEN)
    expected = kf.average(kf.trace(lm, FACTS, kinds=("state", "mlp"), samples=2))
    assert list(found.traces) == ["state", "mlp"]
    for kind, average in expected.items():
        np.testing.assert_allclose(found.traces[kind].mean, average.mean, atol=1e-6)
        assert found.effect(kind) == pytest.approx(average.mean[LAST, [1]], abs=1e-6)
    results = kf.trace(lm, FACTS, kinds=("state",), samples=2)
    given = edit_by_layer(lm, FACTS, EDITOR, (1,), trace=results, **GIVEN)
    np.testing.assert_allclose(given.traces["state"].mean, expected["state"].mean, atol=1e-6)


def test_statistics_and_contexts_are_made_once_for_all_layers(monkeypatch):
    asked = counted_asks(monkeypatch, kf.Rome)
    found = edit_by_layer(tiny_lm("gpt2"), FACTS[:1], EDITOR, corpus="self", trace=TRACE)
    assert found.layers == (0, 1, 2, 3) and sorted(asked, key=str) == [(0, 1, 2, 3), "contexts"]


def test_a_line_for_each_layer(tmp_path):
    log = tmp_path / "log.jsonl"
    found = edit_by_layer(tiny_lm("llama"), FACTS[:2], EDITOR, (0, 3), trace=TRACE, log=log, **GIVEN)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["layer"] for line in lines] == [0, 3]
    assert lines[1]["edited"]["p_new"][0] == found.edited[3]["p_new"].mean


@pytest.mark.parametrize(
    "options, says",
    [
        ({"layers": (0, 9)}, "layers = 0, 9: this model has layers 0 to 3"),
        ({"layers": ()}, "layers is empty; expected layers"),
        ({"facts": []}, "facts is empty"),
        ({"facts": [replace(FACTS[0], target_new=None)]}, "no target_new"),
        ({"moments": None}, "second moments"),
        ({"moments": {0: cases.moments()[0]}}, "no second moment for layer 1"),
        ({"trace": {"state": trace_of([0.1, 0.2])}}, "has 2 layers, this model 4"),
        ({"trace": []}, "trace is empty; expected TraceResults or"),
        ({"trace": {"state": [1, 2]}}, "AverageTrace"),
        ({"contexts": ["none"]}, "bare prompt"),
    ],
)
def test_errors_come_before_work(options, says, no_sweep):
    arguments = {"facts": FACTS, "editor": EDITOR} | GIVEN | options
    error = TypeError if says == "AverageTrace" else ValueError
    refused(says, edit_by_layer, tiny_lm("llama"), **arguments, error=error)


# ---- rank correlation


def test_success_and_trace_are_ranked_over_the_edited_layers():
    found = made_up([0.2, 0.8, 0.6, 0.4])
    assert found.rank_correlation("state") == pytest.approx(1)
    assert math.isnan(found.rank_correlation("mlp"))  # one layer has no effect
    part = made_up([0.9, 0.2, 0.3], layers=(0, 1, 3))  # effects 0.1, 0.4, 0.2
    assert part.rank_correlation("state", "p_new") == pytest.approx(-1)
    assert part.correlations()["paraphrase"]["state"] == pytest.approx(-1)


# ---- files and the picture


def test_what_is_saved_is_loaded(tmp_path):
    found = made_up([0.2, math.nan, 0.6, 0.4])
    found.save(tmp_path / "layers.json")
    text = (tmp_path / "layers.json").read_text()
    assert "NaN" not in text and "Hase et al. 2023" in text
    (tmp_path / "older.json").write_text(text.replace("layer_study", "layer_sweep"))
    assert LayerStudy.load(tmp_path / "older.json").to_record() == found.to_record()
    read = LayerStudy.load(tmp_path / "layers.json")
    assert read.to_record() == found.to_record() and read.model == "tiny"
    np.testing.assert_array_equal(read.traces["mlp"].mean, TRACE["mlp"].mean)
    assert math.isnan(read.edited[1]["efficacy"].mean)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{}", "is no study of layers"),
        ("[]", "holds an array; expected a saved study of layers"),
        ("x", r"is not JSON \(line 1, column 1.*expected a saved study of layers"),
        ('{"format": "kedit_fast.layer_study", "version": 2}', "is no study of layers"),
    ],
)
def test_other_files_are_refused(tmp_path, text, says):
    (tmp_path / "other.json").write_text(text)
    refused(f"other.json {says}", LayerStudy.load, tmp_path / "other.json")


def test_the_picture(tmp_path):
    found = made_up([0.9, 0.2, 0.3], layers=(0, 1, 3))
    figure = found.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    top, below = figure.axes
    lines = {line.get_label(): line for line in top.lines}
    assert list(lines["efficacy"].get_xdata()) == [0.5, 1.5, 3.5]
    assert list(lines["efficacy"].get_ydata()) == [0.9, 0.2, 0.3]
    assert {"P(new)", "paraphrase", "neighborhood", "neighborhood, no edit"} <= set(lines)
    assert len(top.collections) == 4  # a band each
    drawn = {line.get_label(): line for line in below.lines}
    state = drawn["state\nρ with efficacy -1.00\nρ with P(new) -1.00"]
    np.testing.assert_allclose(state.get_ydata(), [0.1, 0.4, 0.3, 0.2], rtol=1e-6)
    assert "MLP\nρ with efficacy -0.87\nρ with P(new) -0.87" in drawn
    shown = " ".join(text.get_text() for text in below.texts)
    assert "does not by itself predict" in shown and "Hase et al. 2023" in shown
    assert "Highest efficacy 0.90 at layer 0" in figure.get_label()
    assert "img" in found._repr_html_()
    unknown = made_up([math.nan] * 4)  # facts whose old answer nobody gave
    assert "fficacy" not in unknown.plot().get_label() and unknown.plot().axes[0].get_legend() is not None
    drawn = [line.get_label() for line in made_up([0.9, 0.2, 0.3, 0.4]).plot().axes[1].lines]
    assert "MLP" in drawn  # one layer has no effect


def test_a_killed_study_goes_on_to_the_same_bits(tmp_path):
    options = {"layers": (0, 2), "samples": 2} | GIVEN
    whole = kf.edit_by_layer(tiny_lm("llama"), FACTS, EDITOR, log=tmp_path / "whole.jsonl", **options)
    kept = {"log": tmp_path / "log.jsonl", "checkpoint": tmp_path / "run"} | options
    for n in (2, 5):
        with killed_at(n):
            kf.edit_by_layer(tiny_lm("llama"), FACTS, EDITOR, **kept)
    again = kf.edit_by_layer(tiny_lm("llama"), FACTS, EDITOR, **kept)
    assert again.to_record() == whole.to_record()
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    other = kept | {"samples": 3}
    refused("holds other work: its traced is", kf.edit_by_layer, tiny_lm("llama"), FACTS, EDITOR, **other)
