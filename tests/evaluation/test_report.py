"""The report: its files and tables, of CounterFact's metrics."""

import json
import math
import re

import pytest
import torch

from kedit_fast.basics.intervals import Interval
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT
from kedit_fast.evaluation.report import EvalReport
from kedit_fast.facts.fact import Fact
from tests.evaluation.benchmarks.test_counterfact import full

NAN = math.nan


FACTS = (
    Fact("{} is in", "<b>Zürich</b>", "Rome", "Paris", neighborhood=("a", "b"), id="0"),
    Fact("{} plays", "Miles Davis", "piano", "trumpet", provenance={"who": "me"}),
)


def make_report(**changes):
    fields = dict(
        base=full(efficacy=[0.0, 1.0], p_new=[0.1, 0.3], paraphrase=[NAN, 0.5], neighborhood_left_out=[1.0, 0.0]),
        edited=full(efficacy=[1.0, 1.0], p_new=[1 / 3, 0.9], paraphrase=[NAN, 1.0], neighborhood_left_out=[1.0, 0.0]),
        facts=FACTS,
        meta={"model": "tiny", "method": "memit", "n": 2, "note": "a note & more", "text": {"n_predicted": 99}},
        perplexity=(40.0, 50.0),
        generations=(("<b>Zürich</b> is in", " Paris", " Rome"), ("Miles Davis plays", " a", " b")),
    )
    return EvalReport.of(COUNTERFACT, **fields | changes)


def test_a_saved_report_comes_back_bit_for_bit(tmp_path):
    path = tmp_path / "report.json"
    report = make_report()
    report.save(path)
    again = EvalReport.load(path)
    for side in ("base", "edited"):
        before, after = getattr(report, side), getattr(again, side)
        assert list(before) == list(after)
        for name in before:
            assert after[name].dtype == torch.float32
            assert torch.equal(before[name].nan_to_num(-5), after[name].nan_to_num(-5)), name
    for name in ("facts", "meta", "perplexity", "generations"):
        assert getattr(again, name) == getattr(report, name)
    assert str(again) == str(report)
    assert "NaN" not in path.read_text()


def test_a_report_without_an_edit_comes_back(tmp_path):
    path = tmp_path / "report.json"
    make_report(edited=None, perplexity=(40.0, None), generations=()).save(path)
    again = EvalReport.load(path)
    assert again.edited is None and again.perplexity == (40.0, None) and again.drift is None
    assert again.summary()["efficacy"]["edited"] is None
    assert again.to_records()[0]["edited"] is None
    assert "edited" not in str(again).splitlines()[1]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "report.json"
    make_report().save(path)
    record = json.loads(path.read_text())
    for broken, says in (
        ("[1]", "holds an array; expected a saved report"),
        ("{}", "is not a saved report"),
        ("not json", "is not JSON (line 1, column 1: Expecting value); expected a saved report"),
        (json.dumps(record | {"version": 2}), "is not a saved report"),
        (json.dumps(record | {"base": 3}), "is not a saved report"),
        (json.dumps(record | {"base": record["base"] | {"efficacy": [1.0]}}), "is not a saved report ('efficacy': exp"),
        (
            json.dumps(record | {"edited": record["base"] | {"other": [1.0, 0.0]}}),
            "is not a saved report ('other': exp",
        ),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=re.escape(f"{path} {says}")):
            EvalReport.load(path)


def test_records_are_json():
    records = json.loads(json.dumps(make_report().to_records(), allow_nan=False))
    assert len(records) == 2
    assert Fact.from_record(records[1]["fact"]) == FACTS[1]
    assert records[0]["base"]["efficacy"] == 0.0 and records[0]["edited"]["efficacy"] == 1.0
    assert records[0]["base"]["paraphrase"] is None
    assert records[1]["generation"] == ["Miles Davis plays", " a", " b"]


def test_summary_and_drift():
    report = make_report()
    assert report.drift == pytest.approx(0.25)
    got = report.summary()["p_new"]
    assert isinstance(got["base"], Interval)
    assert got["base"].mean == pytest.approx(0.2) and got["edited"].mean == pytest.approx((1 / 3 + 0.9) / 2)
    assert report.summary()["paraphrase"]["edited"].n == 1
    assert make_report(perplexity=None).drift is None


def test_text_table():
    lines = str(make_report()).splitlines()
    assert lines[0] == "tiny: 2 facts, edited by memit"
    assert lines[1].split() == ["metric", "base", "edited", "facts"]
    starts = [line.index(line.split()[1]) for line in lines[1:5]]
    assert len(set(starts)) == 1  # aligned
    efficacy = next(line for line in lines if line.startswith("efficacy "))
    assert "0.500 [0.095, 0.905]" in efficacy and "1.000 [0.342, 1.000]" in efficacy
    assert not any(line.startswith("neighborhood_p_true") for line in lines)  # no fact has it
    assert "perplexity 40.00 -> 50.00 (+25.0%) over 99 tokens" in lines
    assert "1 of 2 neighborhood prompts left out: they name an edited subject" in lines
    assert lines[-1] == "a note & more"


def test_what_no_fact_has_is_not_shown():
    """Neither in the table nor as the score of it; a metric that only one side has is."""
    report = make_report(
        base=full(efficacy=[0.0, 1.0], neighborhood=[1.0, 0.5]), edited=full(efficacy=[1.0, 1.0], p_true=[0.5, NAN])
    )
    for text in (str(report), report.to_html()):
        assert "nan" not in text and "paraphrase" not in text and "score" not in text
    assert "p_true" in str(report) and "–" in str(report) and "p_true" in report.to_html()


def test_the_number_of_facts_is_said_of_each_side_where_they_differ():
    values = dict(efficacy=[0.0, 1.0], p_new=[0.5, 0.25])
    report = make_report(base=full(**values), edited=full(efficacy=[1.0, 1.0], p_new=[NAN, 0.5]))
    shown = {line.split()[0]: line.split("  ")[-1].strip() for line in str(report).splitlines()[2:4]}
    assert shown == {"efficacy": "2", "p_new": "2 -> 1"}
    assert report.to_html().count(">2 -&gt; 1</td>") == 1
    alone = make_report(base=full(**values), edited=None)
    assert all(line.endswith("  2") for line in str(alone).splitlines()[2:4])


def test_html(tmp_path):
    report, path = make_report(), tmp_path / "report.html"
    fragment = report.to_html(path)
    page = path.read_text(encoding="utf-8")
    assert fragment in page and 'charset="utf-8"' in page
    what = COUNTERFACT.metrics["efficacy"][1].replace(">", "&gt;")
    assert "What each line is" in fragment and what in fragment.rpartition("<details>")[2]
    assert fragment == report._repr_html_()
    assert "0.500 [0.095, 0.905]" in fragment and "a note &amp; more" in fragment
    assert "&lt;b&gt;Zürich&lt;/b&gt;" in fragment and "<b>Zürich" not in fragment
    assert "script" not in fragment and "http" not in fragment
