"""Rank correlation and the Spearman-Brown formula, by hand and against scipy."""

import math

import numpy as np
import pytest

from kedit_fast.basics.correlation import mean_ranks, spearman, stepped_up


def test_spearman_by_hand():
    assert spearman([1, 2, 3], [10, 20, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # tied ranks 1, 2.5, 2.5, 4
    assert mean_ranks(np.array([0.1, 0.4, 0.4, 0.9, -1.0])).tolist() == [2, 3.5, 3.5, 5, 1]


def test_spearman_of_what_cannot_be_ranked():
    assert math.isnan(spearman([1, 2], [1, 2]))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([1, math.nan, 3], [1, 2, 3]))


@pytest.mark.parametrize("values", [4, 1000])
def test_spearman_is_scipys(values):
    """With many ties and with hardly any."""
    stats, draw = pytest.importorskip("scipy.stats"), np.random.RandomState(0)
    a, b = draw.randint(values, size=(2, 57))
    b = a + 2 * b
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize(
    ("r", "parts", "full"),
    [
        (0.6, (5, 5), 0.75),  # 2 r / (1 + r)
        (1.0, (5, 5), 1.0),
        (1.0, (2, 1), 1.0),
        (0.0, (5, 5), 0.0),
        (-0.5, (2, 1), 0.0),  # no agreement is no reliability; the formula gives -2 for halves
    ],
)
def test_stepped_up_by_hand(r, parts, full):
    assert stepped_up(r, parts) == pytest.approx(full)
    assert math.isnan(stepped_up(math.nan, parts))


@pytest.mark.parametrize("parts", [(2, 1), (3, 2), (5, 5), (1, 1)])
def test_stepped_up_is_what_parallel_draws_have(parts):
    """Draws that share a variance s, each with noise of its own: the mean of n has the reliability n s / (n s + 1)."""
    s, n = 0.3, sum(parts)
    between = s / math.sqrt(math.prod(s + 1 / part for part in parts))
    assert stepped_up(between, parts) == pytest.approx(n * s / (n * s + 1))
