"""The summary of an edit is what its parts say, and is refused before any of them works."""

import json
import math

import pytest

import kedit_fast as kf
from kedit_fast.basics import progress
from kedit_fast.commands import cli
from kedit_fast.experiments import edit_summary as module
from kedit_fast.experiments.edit_summary import evaluate_edit
from tests.conftest import refused, save_tiny, tiny_lm
from tests.evaluation.test_evaluate import make_edit, make_lm
from tests.tiny import tiny_model

FACTS = (
    kf.Fact(
        "{} is in the city of", "Big Ben", "Rome", "London", paraphrases=("Big Ben is in",),
        neighborhood=(("The capital of Spain is", "Madrid"), "Toyota is in"), same_subject=("The sport of Big Ben is",),
        provenance={"relation_id": "P131"},
    ),
    kf.Fact("The capital of {} is", "Spain", "Paris", "Madrid"),
)  # fmt: skip


@pytest.fixture(scope="module")
def made():
    lm = make_lm()
    return lm, evaluate_edit(lm, make_edit(lm, FACTS), tasks=(), generate=4)


def test_scores_are_those_of_the_parts(made):
    lm, found = made
    edit = make_edit(lm, FACTS)
    report = kf.evaluate(lm, FACTS, edit, benchmark=kf.BENCHMARKS["questions"], generate=4, both_forms=False)
    for name, metric in module.READ_FROM.items():
        for side in ("base", "edited"):
            wanted, got = report.summary()[metric][side], getattr(found.scores[name], side)
            assert got == pytest.approx(wanted, nan_ok=True), name
    p_new, p_old = found.probabilities["new answer"], found.probabilities["old answer"]
    columns = kf.evaluate(lm, FACTS, edit, both_forms=False)  # CounterFact's
    for side, wanted in (("base", columns.base), ("edited", columns.edited)):
        means = getattr(p_new, side).mean, getattr(p_old, side).mean
        assert means == pytest.approx((wanted["p_new"].mean().item(), wanted["p_true"].mean().item()), rel=1e-4)
    follows = kf.consistency(lm, edit)
    assert found.consistency.implied == follows.implied and follows.implied
    assert found.scores["consistency"].edited == follows.summary()["implied"]["exact"]["edited"]
    assert found.moved.measures == kf.what_moved(lm, edit).measures
    with pytest.warns(UserWarning, match="too few"):
        judged = kf.gate(lm, edit)
    assert [check.value for check in found.gate.checks] == [check.value for check in judged.checks]
    assert found.scores["capability"].edited.n == 0 and "capability: no tasks were given" in found.not_measured


def test_the_harmonic_mean_is_of_what_was_measured_and_0_where_one_is(made):
    _, found = made
    means = [score.edited.mean for score in found.scores.values() if score.edited.n]
    assert len(means) == 4 and 0 in means and found.harmonic_mean == 0
    assert "harmonic mean of efficacy, generalisation, specificity, consistency: 0.00" in found.verdict
    assert "is held back" in found.verdict and not found.gate.passed


def test_what_is_shown_and_kept(made, tmp_path):
    _, found = made
    shown = str(found)
    for line in ("not written: 'Big Ben is in the city of' -> 'Rome', but", "not measured: capability", "specificity"):
        assert line in shown
    found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for heading in (
        "In short",
        "Worst cases",
        "What else moved",
        "The facts in every reading",
        "What was not measured",
    ):
        assert f">{heading}</h2>" in page
    assert page.count("<img") >= 1 and "Scores of the edit: efficacy 0.00 without" in page
    found.save(tmp_path / "summary.json")
    record = json.loads((tmp_path / "summary.json").read_text())
    assert record["format"] == "kedit_fast.summary" and record["passed"] is False and record["harmonic_mean"] == 0
    assert record["scores"]["capability"]["edited"] == [None, None, None, 0] and len(record["worst"]) == 2
    assert len(record["probabilities"]["old answer"]["base"]) == 4 and "old, paraphrases" in shown and "P of" in page
    assert found._repr_html_() == found.to_html() and "EditSummary(the edit is held back" in repr(found)


def test_capability_is_a_share_of_the_base_models():
    from kedit_fast.evaluation.scores import Capability, Score

    def score(base, edited):
        return Score(base, 0.0, edited, 0.0, None, 50)

    found = object.__new__(module.EditSummary)
    for accuracy, wanted in ((0.4, 0.8), (0.6, 1.0), (0.0, 0.0)):
        object.__setattr__(found, "capability", Capability({"task": {"acc": score(0.5, accuracy)}}, {}))
        assert found._capable().edited.mean == pytest.approx(wanted) and found._capable().edited.n == 50
    object.__setattr__(found, "capability", Capability({"task": {"acc": score(0.0, 0.3)}}, {}))
    assert math.isnan(found._capable().edited.mean), "no share of nothing"


@pytest.mark.parametrize(
    ("how", "message"),
    [({"suite": 3}, "suite"), ({"thresholds": 0.9}, "thresholds"), ({"tasks": [3]}, "tasks"), ({"texts": "a"}, "texts"),
     ({"relations": 3}, "table of relations"), ({"generate": 0}, "generate"), ({"seed": -1}, "seed")],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_any_work(how, message, monkeypatch):
    lm = tiny_lm("llama")
    monkeypatch.setattr(module, "evaluate", lambda *args, **options: pytest.fail("work began"))
    refused(message, lambda: evaluate_edit(lm, make_edit(lm, FACTS), **how))


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", tiny_model("llama"))
    lm = kf.open_model("model")
    make_edit(lm, FACTS).save("edit.safetensors")
    monkeypatch.setattr(module, "capability", lambda *args, **options: (_ for _ in ()).throw(ImportError("not there")))
    line = ["summary", "edit.safetensors", "--model", "model", "--generate", "3", "-o", "s.json", "--html", "s.html"]
    assert cli.main(line) == 1, "the gate refuses it"
    shown = capsys.readouterr().out
    assert "harmonic mean of" in shown and "not measured: capability: not there" in shown
    assert json.loads((tmp_path / "s.json").read_text())["meta"]["n"] == 2 and (tmp_path / "s.html").exists()


def test_progress_says_which_part_of_how_many(caplog, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", -1.0)
    lm = make_lm()
    with kf.show_progress(), caplog.at_level("INFO", logger="kedit_fast"):
        evaluate_edit(lm, make_edit(lm, FACTS), tasks=(), generate=4)
    said = [record.getMessage() for record in caplog.records]
    starts = {name: i for i, name in enumerate(("facts", "what else moved", "what follows", "gate"))}
    for name, done in starts.items():
        assert any(line.startswith(f"{name} ({done} of 4 done") for line in said), (name, said)
