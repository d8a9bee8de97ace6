"""CounterFact's metrics by hand: the columns of a fact, and the score."""

import math

import pytest
import torch

from kedit_fast.basics.intervals import summarize
from kedit_fast.evaluation.benchmarks import counterfact
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT, METRICS
from kedit_fast.evaluation.probes import Answer, Probe

NAN = math.nan
TOP = 7  # the token that the base model finds likeliest


def reading(rewrite=((0.5, 0.2, 1, 0),), paraphrases=(), neighborhood=(), same=(), left_out=0):
    """(probes, answers) of rows (p_new, p_true, exact_new, exact_true); same: ((p, exact) or None, same top, p_top)"""
    rows = [(counterfact.REWRITE, row) for row in rewrite] + [(counterfact.PARAPHRASE, row) for row in paraphrases]
    rows += [(counterfact.NEIGHBORHOOD, row) for row in neighborhood]
    asked = [
        (Probe([1], "", tuple(None if math.isnan(p) else [2] for p in row[:2]), kind), Answer(row[:2], row[2:]))
        for kind, row in rows
    ]
    for own, same_top, p_top in same:
        p, exact = own or (NAN, NAN)
        one = Probe([1], "", (None, [2] if own else None), counterfact.SAME_SUBJECT, likeliest=True)
        asked.append((one, Answer((NAN, p), (NAN, exact), top=TOP + (not same_top), p_top=p_top)))
    asked += [(Probe([1], "", (), counterfact.LEFT_OUT), Answer())] * left_out
    return tuple(map(list, zip(*asked, strict=True)))


def columns(one, base=None):
    """Columns of a reading; base: the base model's answers, which its likeliest tokens are those of."""
    probes, answers = one
    asked = zip(*(base or one), strict=True)
    before = [answer._replace(top=TOP if probe.likeliest else None) for probe, answer in asked]
    return COUNTERFACT.values(None, probes, answers, before)


def test_columns_by_hand():
    one = reading(
        rewrite=[(0.5, 0.2, 1, 0)],
        paraphrases=[(0.3, 0.1, 1, 0), (0.2, 0.6, 0, 1)],
        neighborhood=[(0.1, 0.4, 0, 1), (0.3, 0.05, 0, 0), (0.02, 0.1, 0, 0), (0.2, 0.2, 0, 0)],
        same=[((0.4, 1), 1, 0.9), ((0.2, 0), 0, 0.1), (None, 1, 0.2)],
        left_out=3,
    )
    expected = {
        "efficacy": 1,
        "efficacy_magnitude": 0.3,
        "efficacy_exact": 1,
        "efficacy_match": math.nan,  # nothing was written
        "efficacy_contains": math.nan,
        "p_new": 0.5,
        "p_true": 0.2,
        "paraphrase": 0.5,
        "paraphrase_magnitude": (0.2 - 0.4) / 2,
        "paraphrase_exact": 0.5,
        "paraphrase_match": math.nan,
        "paraphrase_contains": math.nan,
        "paraphrase_p_new": 0.25,
        "neighborhood": 0.5,  # a tie is no success
        "neighborhood_magnitude": (0.3 - 0.25 + 0.08 + 0) / 4,
        "neighborhood_exact": 0.25,
        "neighborhood_p_true": 0.75 / 4,
        "known_neighbors_p_true": (0.4 + 0.1 + 0.2) / 3,
        "same_subject_same_top": 2 / 3,
        "same_subject_p_top": 0.4,
        "same_subject_exact": 0.5,
        "same_subject_p_true": 0.3,
        "neighborhood_left_out": 3,
    }
    got = columns(one)
    assert list(got) == list(METRICS) == list(expected)
    assert got == pytest.approx(expected, nan_ok=True)


def test_efficacy_is_strict():
    assert [columns(reading([(p_new, 0.2, 0, 0)]))["efficacy"] for p_new in (0.19, 0.2, 0.21)] == [0, 0, 1]


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
    no_true, no_new = (0.5, NAN, 1, NAN), (NAN, 0.5, NAN, 1)
    for asked, known in (
        ([(0.5, 0.2, 1, 0)], "efficacy efficacy_magnitude efficacy_exact p_new p_true"),
        ([no_true] * 3, "efficacy_exact p_new paraphrase_exact paraphrase_p_new"),
        ([no_new] * 3, "p_true neighborhood_exact neighborhood_p_true known_neighbors_p_true"),
    ):
        got = columns(reading(*([row] for row in asked))).items()
        assert {name for name, value in got if not math.isnan(value)} == {*known.split(), "neighborhood_left_out"}


def full(**values):
    """Columns of every metric, NaN but for those given."""
    n = len(next(iter(values.values())))
    return {name: torch.tensor(values.get(name, [NAN] * n)) for name in METRICS}


def summary(columns):
    return summarize(columns, METRICS, COUNTERFACT.score_of)


def test_score_is_of_the_data_sets_means():
    columns = full(efficacy=[1.0, 1.0], paraphrase=[1.0, 0.0], neighborhood=[0.5, NAN])
    got = summary(columns)
    assert got["score"].mean == pytest.approx(3 / (1 + 2 + 2))  # not the mean of each fact's
    assert math.isnan(got["score"].low)
    assert got["neighborhood"].n == 1
    columns = full(efficacy=[1.0, 1.0], paraphrase=[0.0, 0.0], neighborhood=[0.5, 0.5])
    assert summary(columns)["score"].mean == 0.0
    assert math.isnan(summary(full(efficacy=[1.0]))["score"].mean)
