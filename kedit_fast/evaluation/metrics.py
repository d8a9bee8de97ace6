"""CounterFact's metrics: from the probabilities of one fact's probes to columns, from columns to means and intervals.

For a prompt x and a target y of n tokens, a(x, y) = -1/n Σ log p(y_t | x, y_<t) and P(y) = exp(-a). "new" and "true"
are the fact's target_new (o*) and target_true (o^c). Meng et al. 2022 (ROME), section 3.3; Meng et al. 2023 (MEMIT),
section 5.2.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

KNOWN = 0.1  # base P(true) from which on a neighbor counts as known to the model
Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval

SHARE, PROBABILITY, DIFFERENCE, COUNT = "share", "probability", "difference", "count"
LOWEST = {SHARE: 0.0, PROBABILITY: 0.0, DIFFERENCE: -1.0, COUNT: 0.0}
HIGHEST = {SHARE: 1.0, PROBABILITY: 1.0, DIFFERENCE: 1.0, COUNT: math.inf}

# Columns in the order reports show them: {name: (kind, what it says of a fact)}. A fact's value is the mean over its
# prompts of the kind; neighborhood prompts that name an edited subject are left out. P(true) of a neighbor with an
# answer of its own is that answer's.
METRICS = {
    "efficacy": (SHARE, "P(new) > P(true) on the rewrite prompt (ES)"),
    "efficacy_magnitude": (DIFFERENCE, "P(new) - P(true) on the rewrite prompt (EM)"),
    "efficacy_exact": (SHARE, "all tokens of target_new are the likeliest, rewrite prompt"),
    "p_new": (PROBABILITY, "P(new) on the rewrite prompt"),
    "p_true": (PROBABILITY, "P(true) on the rewrite prompt"),
    "paraphrase": (SHARE, "paraphrases with P(new) > P(true) (PS)"),
    "paraphrase_magnitude": (DIFFERENCE, "P(new) - P(true) on paraphrases (PM)"),
    "paraphrase_exact": (SHARE, "all tokens of target_new are the likeliest, paraphrases"),
    "paraphrase_p_new": (PROBABILITY, "P(new) on paraphrases"),
    "neighborhood": (SHARE, "neighborhood prompts with P(true) > P(new) (NS)"),
    "neighborhood_magnitude": (DIFFERENCE, "P(true) - P(new) on neighborhood prompts (NM)"),
    "neighborhood_exact": (SHARE, "all tokens of target_true are the likeliest, neighborhood prompts"),
    "neighborhood_p_true": (PROBABILITY, "P(true) on neighborhood prompts"),
    "known_neighbors_p_true": (PROBABILITY, "the same where the base model's P(true) >= 0.1"),
    "same_subject_same_top": (SHARE, "the subject's other prompts whose likeliest token is the base model's"),
    "same_subject_p_top": (PROBABILITY, "probability of the base model's likeliest token there"),
    "same_subject_exact": (SHARE, "all tokens of the answer are the likeliest, the subject's other prompts with one"),
    "same_subject_p_true": (PROBABILITY, "P(answer) there"),
    "neighborhood_left_out": (COUNT, "neighborhood prompts left out: they name an edited subject"),
}
SCORE = "score"
SCORE_OF = ("efficacy", "paraphrase", "neighborhood")


class Answers(NamedTuple):
    """One model's answers to the m prompts of one kind: [m] each, NaN only where the fact has no such target.

    p_new, p_true: P of the target; exact_new, exact_true: 1 where all its tokens are the likeliest, else 0. All are 0
    where the model answered NaN: such a prompt counts against it and is not left out.
    """

    p_new: Tensor
    p_true: Tensor
    exact_new: Tensor
    exact_true: Tensor


class Reading(NamedTuple):
    """One model's answers to all probes of one fact.

    same_subject: of the subject's other prompts whose answer is known; same_top (0 or 1), p_top: [m], of all of them
    """

    rewrite: Answers
    paraphrases: Answers
    neighborhood: Answers
    same_subject: Answers
    same_top: Tensor
    p_top: Tensor


def fact_columns(reading: Reading, known: Tensor, left_out: int) -> dict[str, float]:
    """{metric: value} of one fact; NaN where it has no such probe or target.

    known: [m] bool, the neighborhood prompts whose answer the base model knew (``knew``)
    """
    rewrite, paraphrases, neighbors, others = reading[:4]
    values = {
        "efficacy": _greater(rewrite.p_new, rewrite.p_true),
        "efficacy_magnitude": rewrite.p_new - rewrite.p_true,
        "efficacy_exact": rewrite.exact_new,
        "p_new": rewrite.p_new,
        "p_true": rewrite.p_true,
        "paraphrase": _greater(paraphrases.p_new, paraphrases.p_true),
        "paraphrase_magnitude": paraphrases.p_new - paraphrases.p_true,
        "paraphrase_exact": paraphrases.exact_new,
        "paraphrase_p_new": paraphrases.p_new,
        "neighborhood": _greater(neighbors.p_true, neighbors.p_new),
        "neighborhood_magnitude": neighbors.p_true - neighbors.p_new,
        "neighborhood_exact": neighbors.exact_true,
        "neighborhood_p_true": neighbors.p_true,
        "known_neighbors_p_true": neighbors.p_true[known],
        "same_subject_same_top": reading.same_top,
        "same_subject_p_top": reading.p_top,
        "same_subject_exact": others.exact_true,
        "same_subject_p_true": others.p_true,
    }
    # Over the prompts that have a value: some neighbors may have an answer, others none. The mean of nothing is NaN.
    columns = {name: float(value.nanmean()) for name, value in values.items()}
    return columns | {"neighborhood_left_out": float(left_out)}


def knew(base: Reading) -> Tensor:
    """[m] bool: the neighborhood prompts to which the base model gave P(true) >= 0.1."""
    return base.neighborhood.p_true >= KNOWN


def _greater(a: Tensor, b: Tensor) -> Tensor:
    """1 where a > b, 0 where not, NaN where either is."""
    return torch.where((a - b).isnan(), torch.nan, (a > b).to(a.dtype))


class Interval(NamedTuple):
    """A mean over n facts and its 95 % interval; NaN bounds where there is none."""

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
    """Mean of a column [n_facts] and its 95 % interval over facts; NaN entries are left out and not counted.

    Wilson's for a share whose every value is 0 or 1; else mean ± 1.96 sd / sqrt(n), as published, cut to the values
    the metric can take (NaN bounds for n = 1).
    Differs: the published code takes the second for all shares, which gives [1, 1] where every fact succeeds.
    """
    values = column[~column.isnan()].double()
    n = len(values)
    mean = float(values.mean())
    if n and kind == SHARE and bool(((values == 0) | (values == 1)).all()):
        return Interval(mean, *wilson(float(values.sum()), n), n)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = Z95 * float(values.std()) / math.sqrt(n)
    return Interval(mean, max(mean - half, LOWEST[kind]), min(mean + half, HIGHEST[kind]), n)


def harmonic_mean(values) -> float:
    """n / Σ 1/v; 0 where any is 0, NaN where any is NaN or none is given."""
    values = list(values)
    if not values or any(math.isnan(v) for v in values):
        return math.nan
    return 0.0 if 0 in values else len(values) / sum(1 / v for v in values)


def summarize(columns: dict[str, Tensor]) -> dict[str, Interval]:
    """{metric: Interval}, and "score": S, the harmonic mean of the data set's means ES, PS and NS, without an interval.

    S is NaN where no fact has paraphrases or neighbors, and 0 where one of the three is 0.
    """
    summary = {name: interval(columns[name], kind) for name, (kind, _) in METRICS.items()}
    s = harmonic_mean(summary[name].mean for name in SCORE_OF)
    return {SCORE: Interval(s, math.nan, math.nan, summary["efficacy"].n)} | summary
