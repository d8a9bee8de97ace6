"""Metrics by hand: columns of a fact, intervals, the harmonic mean; and the report's files and tables."""

import json
import math
import re

import pytest
import torch

from kedit_fast.evaluation.metrics import (
    COUNT,
    DIFFERENCE,
    METRICS,
    PROBABILITY,
    SHARE,
    Answers,
    Interval,
    Reading,
    fact_columns,
    harmonic_mean,
    interval,
    knew,
    summarize,
    wilson,
)
from kedit_fast.evaluation.report import EvalReport
from kedit_fast.facts.fact import Fact

NAN = math.nan


def answers(*rows):
    """Answers from rows (p_new, p_true, exact_new, exact_true)."""
    return Answers(*torch.tensor(rows, dtype=torch.float64).view(-1, 4).unbind(1))


def reading(rewrite=((0.5, 0.2, 1, 0),), paraphrases=(), neighborhood=(), same=(), others=()):
    same = torch.tensor(same, dtype=torch.float64).view(-1, 2)
    return Reading(answers(*rewrite), answers(*paraphrases), answers(*neighborhood), answers(*others), *same.unbind(1))


def columns(one, left_out=0, base=None):
    return fact_columns(one, knew(base or one), left_out)


def test_columns_by_hand():
    one = reading(
        rewrite=[(0.5, 0.2, 1, 0)],
        paraphrases=[(0.3, 0.1, 1, 0), (0.2, 0.6, 0, 1)],
        neighborhood=[(0.1, 0.4, 0, 1), (0.3, 0.05, 0, 0), (0.02, 0.1, 0, 0), (0.2, 0.2, 0, 0)],
        same=[(1, 0.9), (0, 0.1)],
        others=[(NAN, 0.4, NAN, 1), (NAN, 0.2, NAN, 0)],
    )
    expected = {
        "efficacy": 1,
        "efficacy_magnitude": 0.3,
        "efficacy_exact": 1,
        "p_new": 0.5,
        "p_true": 0.2,
        "paraphrase": 0.5,
        "paraphrase_magnitude": (0.2 - 0.4) / 2,
        "paraphrase_exact": 0.5,
        "paraphrase_p_new": 0.25,
        "neighborhood": 0.5,  # a tie is no success
        "neighborhood_magnitude": (0.3 - 0.25 + 0.08 + 0) / 4,
        "neighborhood_exact": 0.25,
        "neighborhood_p_true": 0.75 / 4,
        "known_neighbors_p_true": (0.4 + 0.1 + 0.2) / 3,
        "same_subject_same_top": 0.5,
        "same_subject_p_top": 0.5,
        "same_subject_exact": 0.5,
        "same_subject_p_true": 0.3,
        "neighborhood_left_out": 3,
    }
    got = columns(one, left_out=3)
    assert list(got) == list(METRICS) == list(expected)
    assert got == pytest.approx(expected)


def test_efficacy_is_strict():
    assert columns(reading(rewrite=[(0.2, 0.2, 0, 0)]))["efficacy"] == 0
    assert columns(reading(rewrite=[(0.19, 0.2, 0, 0)]))["efficacy"] == 0


def test_known_neighbors_are_the_base_models():
    base = reading(neighborhood=[(0, 0.5, 0, 0), (0, 0.05, 0, 0)])
    after = reading(neighborhood=[(0, 0.01, 0, 0), (0, 0.9, 0, 0)])
    assert columns(after, base=base)["known_neighbors_p_true"] == pytest.approx(0.01)
    none = reading(neighborhood=[(0, 0.05, 0, 0)])
    assert math.isnan(columns(none)["known_neighbors_p_true"])


def test_a_mean_is_over_the_prompts_that_have_a_value():
    """Of three neighbors one has no answer, and to one the new answer is its own."""
    got = columns(reading(neighborhood=[(0.1, 0.4, 0, 1), (0.1, NAN, 0, NAN), (NAN, 0.2, NAN, 0)]))
    assert got["neighborhood"] == 1 and got["neighborhood_p_true"] == pytest.approx(0.3)
    assert got["neighborhood_exact"] == 0.5 and got["known_neighbors_p_true"] == pytest.approx(0.3)


def test_what_a_fact_lacks_is_nan():
    bare = columns(reading())
    assert {name for name, value in bare.items() if not math.isnan(value)} == {
        *("efficacy", "efficacy_magnitude", "efficacy_exact", "p_new", "p_true", "neighborhood_left_out")
    }
    row = (0.5, NAN, 1, NAN)  # no target_true
    only_new = columns(reading([row], [row], [row]))
    assert {name for name, value in only_new.items() if not math.isnan(value)} == {
        *("efficacy_exact", "p_new", "paraphrase_exact", "paraphrase_p_new", "neighborhood_left_out")
    }
    row = (NAN, 0.5, NAN, 1)  # no target_new
    only_true = columns(reading([row], [row], [row]))
    assert {name for name, value in only_true.items() if not math.isnan(value)} == {
        *("p_true", "neighborhood_exact", "neighborhood_p_true", "known_neighbors_p_true", "neighborhood_left_out")
    }


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(45, 50, 0.786, 0.957), (47, 50, 0.838, 0.979), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)],
)
def test_wilson(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-4)


@pytest.mark.parametrize(("successes", "n"), [(50, 50), (96, 100), (189, 200), (464, 500)])
def test_wilson_lower_bounds_of_90_percent(successes, n):
    assert wilson(successes, n)[0] >= 0.9 > wilson(successes - 1, n)[0]


def test_wilson_needs_a_trial():
    with pytest.raises(ValueError, match="at least one trial, got 0"):
        wilson(0, 0)


def test_interval_of_a_share_of_zeros_and_ones_is_wilsons():
    column = torch.tensor([1.0] * 45 + [0.0] * 5 + [NAN] * 7)
    got = interval(column, SHARE)
    assert got == pytest.approx((0.9, *wilson(45, 50), 50))
    assert interval(torch.ones(10), SHARE).low == pytest.approx(0.7225, abs=5e-4)


def test_interval_of_other_columns_is_normal():
    values = torch.tensor([0.0, 0.2, NAN, 0.7])
    mean, sd = 0.3, math.sqrt((0.09 + 0.01 + 0.16) / 2)
    half = 1.959964 * sd / math.sqrt(3)
    assert interval(values, DIFFERENCE) == pytest.approx((mean, mean - half, mean + half, 3), abs=1e-6)
    assert interval(values, PROBABILITY) == pytest.approx((mean, 0.0, mean + half, 3), abs=1e-6)  # cut at 0
    assert interval(torch.tensor([-1.0, 0.9]), DIFFERENCE)[1:3] == (-1.0, 1.0)
    halves = interval(torch.tensor([0.5, 1.0, 1.0]), SHARE)
    assert halves.low > 0.4 and halves.high == 1.0
    assert interval(torch.tensor([3.0, 9.0]), COUNT).high > 9


def test_interval_of_few():
    assert interval(torch.tensor([NAN]), SHARE)[3] == 0
    assert all(map(math.isnan, interval(torch.tensor([]), SHARE)[:3]))
    one = interval(torch.tensor([0.25]), PROBABILITY)
    assert one.mean == 0.25 and one.n == 1 and math.isnan(one.low) and math.isnan(one.high)


def test_harmonic_mean():
    assert harmonic_mean([0.5, 1.0, 0.25]) == pytest.approx(3 / 7)
    assert harmonic_mean([0.5, 0.0, 1.0]) == 0.0
    assert math.isnan(harmonic_mean([0.5, NAN]))
    assert math.isnan(harmonic_mean([]))


def full(**values):
    """Columns of every metric, NaN but for those given."""
    n = len(next(iter(values.values())))
    return {name: torch.tensor(values.get(name, [NAN] * n)) for name in METRICS}


def test_score_is_of_the_data_sets_means():
    columns = full(efficacy=[1.0, 1.0], paraphrase=[1.0, 0.0], neighborhood=[0.5, NAN])
    got = summarize(columns)
    assert got["score"].mean == pytest.approx(3 / (1 + 2 + 2))  # not the mean of each fact's
    assert math.isnan(got["score"].low)
    assert got["neighborhood"].n == 1
    columns = full(efficacy=[1.0, 1.0], paraphrase=[0.0, 0.0], neighborhood=[0.5, 0.5])
    assert summarize(columns)["score"].mean == 0.0
    assert math.isnan(summarize(full(efficacy=[1.0]))["score"].mean)


# --- report ----------------------------------------------------------------------------------------------------------

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
    return EvalReport(**fields | changes)


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
    assert fragment == report._repr_html_()
    assert "0.500 [0.095, 0.905]" in fragment and "a note &amp; more" in fragment
    assert "&lt;b&gt;Zürich&lt;/b&gt;" in fragment and "<b>Zürich" not in fragment
    assert "script" not in fragment and "http" not in fragment
