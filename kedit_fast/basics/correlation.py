"""How well two sequences of values rank together."""

import math

import numpy as np


def spearman(a, b) -> float:
    """Spearman's rank correlation of two sequences, ties at their mean rank; NaN for fewer than three values, a NaN
    among them, or values that are all the same."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 3 or np.isnan(a).any() or np.isnan(b).any():
        return math.nan
    a, b = (each - each.mean() for each in (mean_ranks(a), mean_ranks(b)))
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else math.nan


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values at their mean rank."""
    below, up_to = (np.searchsorted(np.sort(values), values, side=side) for side in ("left", "right"))
    return (below + up_to + 1) / 2


def stepped_up(r: float, parts: tuple[int, int]) -> float:
    """The reliability of a mean over all n draws, from the correlation r between the means over two parts of them.

        2r / (sqrt(r² + 4pq(1 - r²)) + r),   p, q: the parts' shares of n

    Horst 1951, for parts of unequal size; for halves it is 2r / (1 + r) (Spearman 1910, Brown 1910). 0 where r is not
    above 0, for there the formula gives no reliability; NaN stays NaN.
    """
    if r <= 0:
        return 0.0
    p, q = (part / sum(parts) for part in parts)
    return 2 * r / (math.sqrt(r * r + 4 * p * q * (1 - r * r)) + r)
