"""What a column of values comes to: its mean with an interval; the score of several; and how two columns differ."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval

# Kinds of a metric.
SHARE, PROBABILITY, DIFFERENCE, COUNT, AMOUNT = "share", "probability", "difference", "count", "amount"
LOWEST = {SHARE: 0.0, PROBABILITY: 0.0, DIFFERENCE: -1.0, COUNT: 0.0, AMOUNT: 0.0}
HIGHEST = {SHARE: 1.0, PROBABILITY: 1.0, DIFFERENCE: 1.0, COUNT: math.inf, AMOUNT: math.inf}
SCORE = "score"
RESAMPLES, SEED = 2_000, 0  # of cases, for the interval of a difference of scores

Metrics = Mapping[str, tuple[str, str]]  # {name: (kind, what it says of a case)}, in the order reports show them


class Interval(NamedTuple):
    """A mean over n cases and its 95 % interval; NaN bounds where there is none."""

    mean: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: 45 of 50 -> (0.786, 0.957). Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"an interval of a share needs at least one trial, got {n}")
    p, z2 = successes / n, Z95**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def interval(column: Tensor, kind: str) -> Interval:
    """Mean of a column [n_cases] and its 95 % interval over cases; NaN entries are left out and not counted.

    Wilson's for a share whose every value is 0 or 1; else mean ± 1.96 sd / sqrt(n), as published, cut to the values
    the metric can take (NaN bounds for n = 1).
    Differs: the published code takes the second for all shares, which gives [1, 1] where every fact succeeds.
    """
    values = column[~column.isnan()].double()
    n = len(values)
    mean = float(values.mean())
    if n and kind == SHARE and _is_binary(values):
        return Interval(mean, *wilson(float(values.sum()), n), n)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = Z95 * float(values.std()) / math.sqrt(n)
    return Interval(mean, max(mean - half, LOWEST[kind]), min(mean + half, HIGHEST[kind]), n)


def _is_binary(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def harmonic_mean(values) -> float:
    """n / Σ 1/v; 0 where any is 0, NaN where any is NaN or none is given."""
    values = list(values)
    if not values or any(math.isnan(v) for v in values):
        return math.nan
    return 0.0 if 0 in values else len(values) / sum(1 / v for v in values)


def summarize(columns: Mapping[str, Tensor], metrics: Metrics, score_of: Sequence[str] = ()) -> dict[str, Interval]:
    """{metric: Interval}; before them, where ``score_of`` names metrics, "score": the harmonic mean of their means,
    without an interval. It is NaN where no case has one of them, and 0 where one of the means is 0."""
    summary = {name: interval(columns[name], kind) for name, (kind, _) in metrics.items()}
    if not score_of:
        return summary
    score = harmonic_mean(summary[name].mean for name in score_of)
    return {SCORE: Interval(score, math.nan, math.nan, summary[score_of[0]].n)} | summary


# ---- how two columns of the same cases differ


def paired(before: Tensor, after: Tensor, kind: str | None = None) -> Interval:
    """Mean of after - before, values [n_cases] of the same cases where both have one, and its 95 % interval.

    Of shares (kind; None: where every value is 0 or 1) as if there were two pairs more, half of one each way and one
    that agrees: ± 1.96 sd / sqrt(n + 2) around the mean of all these; for outcomes of 0 and 1 that is Agresti and
    Min's (2005). Of anything else Student's t; NaN bounds for one pair.
    Shares mostly agree, so that most differences are 0. Of 30 pairs where 2 % and 1 % of the outcomes differ, t has the
    true difference inside 59 times in 100 and the bootstrap 45 times; this always. Of 100 shares of neighbors that
    rarely differ: 92, 93, 96 times. Probabilities differ in every case: t 95 times in 100, and the two pairs would make
    it up to half as wide again.
    """
    missing = before.isnan() | after.isnan()
    before, after = before[~missing].double(), after[~missing].double()
    changes, n = after - before, len(before)
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(changes.mean())
    if kind == SHARE or (kind is None and _is_binary(before) and _is_binary(after)):
        center = float(changes.sum()) / (n + 2)
        half = Z95 * math.sqrt((float((changes**2).sum()) + 1) / (n + 2) - center**2) / math.sqrt(n + 2)
        return Interval(mean, max(center - half, -1.0), min(center + half, 1.0), n)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = student(n - 1) * float(changes.std()) / math.sqrt(n)
    widest = math.inf if kind is None else HIGHEST[kind] - LOWEST[kind]
    return Interval(mean, max(mean - half, -widest), min(mean + half, widest), n)


def paired_scores(before: Mapping[str, Tensor], after: Mapping[str, Tensor], score_of: Sequence[str]) -> Interval:
    """Score after - score before, of the cases where both have a value, and its 95 % interval.

    By resampling the cases, the same for both and for all metrics (2,000 times, seed 0); the percentiles are those that
    make up for few cases (Hesterberg 2015, section 5.3). NaN bounds for one case. n: pairs of the first metric
    """
    both = [_both(before[name], after[name]) for name in score_of]
    n, n_first = len(both[0][0]), int((~both[0][0].isnan()).sum())
    mean = float(_score(both, 1) - _score(both, 0))
    if n < 2 or math.isnan(mean):
        return Interval(mean, math.nan, math.nan, n_first)
    generator = torch.Generator().manual_seed(SEED)
    drawn = []
    for _ in range(RESAMPLES):
        rows = torch.randint(n, (n,), generator=generator)
        again = [(a[rows], b[rows]) for a, b in both]
        drawn.append(_score(again, 1) - _score(again, 0))
    found = torch.tensor(drawn, dtype=torch.float64)
    found = found[~found.isnan()]
    tail = 0.5 * math.erfc(student(n - 1) * math.sqrt(n / (n - 1)) / math.sqrt(2))
    low, high = found.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    if low == high:  # cases that are all alike say nothing of others
        low = high = math.nan
    return Interval(mean, low, high, n_first)


def student(degrees: int) -> float:
    """Student's t quantile of a two-sided 95 % interval."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def _both(column: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The columns as fp64, NaN where either has no value."""
    missing = column.isnan() | other.isnan()
    return column.double().masked_fill(missing, math.nan), other.double().masked_fill(missing, math.nan)


def _score(both: Sequence[tuple[Tensor, Tensor]], side: int) -> float:
    return harmonic_mean(float(pair[side].nanmean()) for pair in both)
