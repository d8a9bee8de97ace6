"""Intervals by hand, and the harmonic mean."""

import math

import pytest
import torch

from kedit_fast.basics import intervals
from kedit_fast.basics.intervals import (
    DIFFERENCE,
    PROBABILITY,
    SHARE,
    harmonic_mean,
    interval,
    paired,
    paired_scores,
    wilson,
)

NAN = math.nan


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
    assert interval(torch.tensor([3.0, 9.0]), intervals.COUNT).high > 9


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


def test_a_summary_has_a_score_only_where_one_is_named():
    columns = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.25, NAN])}
    metrics = {"a": (SHARE, "a"), "b": (PROBABILITY, "b")}
    assert list(intervals.summarize(columns, metrics)) == ["a", "b"]
    got = intervals.summarize(columns, metrics, ("a", "b"))
    assert list(got) == ["score", "a", "b"] and got["score"].mean == pytest.approx(1 / 3) and got["score"].n == 2


# ---- differences


def column(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_differences_of_shares_by_hand():
    """Ten pairs: four won, one lost, five ties. With 1/2, -1/2 and two ties more: mean 3/12, mean square 6/12."""
    ours, theirs = column(1, 1, 1, 1, 0, 1, 1, 0, 0, 0), column(0, 0, 0, 0, 1, 1, 1, 0, 0, 0)
    half = 1.959964 * math.sqrt((6 / 12 - 1 / 16) / 12)
    assert paired(theirs, ours, SHARE) == pytest.approx((0.3, 0.25 - half, 0.25 + half, 10))
    ties = paired(ours, ours, SHARE)  # no difference seen is not none
    assert ties.mean == 0 and ties.high == -ties.low == pytest.approx(1.959964 * math.sqrt(1 / 12 / 12))


def test_differences_of_probabilities_by_hand():
    """Differences 0.1, 0.2, 0.3: t of 2 degrees of freedom is 4.303."""
    found = paired(column(0.1, 0.3, 0.6), column(0.2, 0.5, 0.9), PROBABILITY)
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert found == pytest.approx((0.2, 0.2 - half, 0.2 + half, 3), abs=1e-6)
    assert paired(column(0, 1), column(1, 0), PROBABILITY)[1:3] == (-1, 1)  # no farther than it can be


def test_only_pairs_count():
    ours, theirs = column(1, NAN, 0, 1), column(0, 1, NAN, 1)
    assert paired(theirs, ours, SHARE) == paired(column(0, 1), column(1, 1), SHARE)
    one = paired(column(0.25, 1), column(0.5, NAN), PROBABILITY)
    assert one[::3] == (0.25, 1) and math.isnan(one.low) and math.isnan(one.high)
    assert paired(column(0), column(1), SHARE).low < 0 < paired(column(0), column(1), SHARE).high
    none = paired(column(1), column(NAN), SHARE)
    assert none.n == 0 and all(map(math.isnan, none[:3]))


def test_paired_scores():
    """Harmonic means of the pairs: 2 / (1/1 + 1/0.5) and 2 / (1/0.5 + 1/0.5)."""
    ours, theirs = {"a": column(1, 1, NAN), "b": column(1, 0, 1)}, {"a": column(1, 0, 1), "b": column(1, 0, NAN)}
    found = paired_scores(theirs, ours, ("a", "b"))
    assert found.mean == pytest.approx(2 / 3 - 1 / 2) and found.n == 2
    assert found.low <= found.mean <= found.high
    assert paired_scores(theirs, ours, ("a", "b")) == found  # of one seed
    same = paired_scores(ours, ours, ("a", "b"))
    assert same.mean == 0 and math.isnan(same.low)
    one = paired_scores({"a": column(0.5)}, {"a": column(1)}, ("a",))
    assert one.mean == 0.5 and math.isnan(one.low)
    empty = paired_scores({"a": column(1, 1)}, {"a": column(NAN, NAN)}, ("a",))
    assert math.isnan(empty.mean) and empty.n == 0


@pytest.mark.parametrize("n", [10, 30, 100])
@pytest.mark.parametrize("won, lost", [(0.02, 0.01), (0.1, 0.02), (0.3, 0.1)])
def test_paired_intervals_cover_the_true_one(n, won, lost):
    generator = torch.Generator().manual_seed(n)
    covered = 0
    for _ in range(400):
        u, both = torch.rand(n, generator=generator), torch.rand(n, generator=generator) < 0.5
        ours = torch.where(u < won, 1.0, torch.where(u < won + lost, 0.0, both.float()))
        theirs = torch.where(u < won, 0.0, torch.where(u < won + lost, 1.0, both.float()))
        found = paired(theirs, ours, SHARE)
        covered += found.low <= won - lost <= found.high
    assert covered / 400 >= 0.93  # 95 % but for the simulation's own error; Student's t: 27 % of the first


def test_intervals_of_score_differences_cover_the_true_one(monkeypatch):
    """Two shares of 0.8 and 0.9 against two of 0.6 and 0.9, which go together over the cases."""
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    generator, n, covered = torch.Generator().manual_seed(0), 40, 0
    true = harmonic_mean((0.8, 0.9)) - harmonic_mean((0.6, 0.9))
    for _ in range(150):
        u, v = torch.rand(n, generator=generator), torch.rand(n, generator=generator)
        near = (v < 0.9).float()
        found = paired_scores({"a": (u < 0.6).float(), "b": near}, {"a": (u < 0.8).float(), "b": near}, ("a", "b"))
        covered += found.low <= true <= found.high
    assert covered / 150 >= 0.9


def test_a_change_of_the_same_cases():
    """Agresti and Min's formula by hand: 8 cases gained, 3 lost, of 40; nothing changed is no certainty."""
    before = torch.tensor([0.0] * 8 + [1.0] * 3 + [1.0] * 29)
    after = torch.tensor([1.0] * 8 + [0.0] * 3 + [1.0] * 29)
    mean, low, high, n = intervals.paired(before, after)
    center, half = 5 / 42, 1.959964 * math.sqrt(8.5 + 3.5 - 5 * 5 / 42) / 42
    assert (mean, n) == (pytest.approx(5 / 40), 40) and (low, high) == pytest.approx((center - half, center + half))
    assert intervals.paired(after, after)[1:3] == pytest.approx((-1.959964 / 42, 1.959964 / 42))
    assert intervals.paired(torch.zeros(2), torch.ones(2)).high == 1
    mean, low, high, _ = intervals.paired(before * 9, after * 7)
    changes = after.double() * 7 - before.double() * 9
    assert high - mean == pytest.approx(2.02269 * float(changes.std()) / math.sqrt(40)) == mean - low
    assert math.isnan(intervals.paired(torch.tensor([3.0]), torch.tensor([4.0])).low)
