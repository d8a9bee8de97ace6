"""What a column of values comes to: its mean with an interval; and the score of several."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval

SHARE, PROBABILITY, DIFFERENCE, COUNT = "share", "probability", "difference", "count"  # kinds of a metric
LOWEST = {SHARE: 0.0, PROBABILITY: 0.0, DIFFERENCE: -1.0, COUNT: 0.0}
HIGHEST = {SHARE: 1.0, PROBABILITY: 1.0, DIFFERENCE: 1.0, COUNT: math.inf}
SCORE = "score"

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


def paired(before: Tensor, after: Tensor) -> Interval:
    """Mean of after - before, values [n_cases] of the same cases, and its 95 % interval over cases.

    Of shares whose every value is 0 or 1 Agresti and Min's (2005), with half a case added to each of the four pairs of
    values: where no case changed it is not of width 0. Else mean ± 1.96 sd / sqrt(n); NaN bounds for n = 1.
    """
    changes = after.double() - before.double()
    n, mean = len(changes), float(changes.mean())
    if n and _is_binary(before) and _is_binary(after):
        gained, lost = (float((changes == sign).sum()) + 0.5 for sign in (1, -1))
        center = (gained - lost) / (n + 2)
        half = Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / (n + 2)) / (n + 2)
        return Interval(mean, max(center - half, -1.0), min(center + half, 1.0), n)
    half = Z95 * float(changes.std()) / math.sqrt(n) if n > 1 else math.nan
    return Interval(mean, mean - half, mean + half, n)


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
