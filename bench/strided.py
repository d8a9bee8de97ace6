"""Strided traces (``method="strided"``) against the exact ones, and how reliable the exact ones are.

Facts that SmolLM2 knows, none of them among those that the way of interpolating was chosen on. Over all cells from the
subject on: Spearman's rank correlation of a strided trace with the exact one by the same noise draws, and its share of
the exact one's rows times layers. Beside it how well two exact traces agree: as the halves of one's draws say, and as
one by other draws shows. A strided trace that agrees as well as that loses nothing that was known.
"""

import gzip
import json

import numpy as np

import kedit_fast as kf
from bench.attribution import cells
from bench.common import DATA, CheckFailed, Figure, Measured, Skipped, Timing, peak_matmul, timed
from bench.trace import TOLERANCE, WINDOW, spread
from kedit_fast.basics.correlation import spearman
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import fact_tokens
from kedit_fast.tracing.trace import noise_level

KNOWN = "smollm2_known.json.gz"
KINDS, STRIDES = ("mlp", "state"), (3, 5, 6, 7)
LONGEST = 7  # tokens of a fact: four exact traces of each are made
SEEDS = 1, 2  # of the draws that are strided, and of others
AGREES, LEAST = "mean rank correlation with the exact trace", "least rank correlation with the exact trace"
COST = "rows x layers, share of the exact trace's"
OTHER = "exact traces by other draws, mean rank correlation"


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped where the public data sets are not at hand."""
    if not (DATA / KNOWN).exists():
        raise Skipped(f"{DATA} lacks {KNOWN}")
    lm = kf.open_model("smollm2")
    _, held_out = two_sets(lm)
    n, samples = (2, 2) if options.quick else (len(held_out), 10)
    return measure(lm, held_out[:n], samples)


def two_sets(lm, n: int = 20) -> tuple[list[Fact], list[Fact]]:
    """(facts to choose on, n others to measure) of those the model knows: at even distances from the surest to the
    least sure, in turn."""
    with gzip.open(DATA / KNOWN, "rt", encoding="utf-8") as file:
        records = [record for record in json.load(file) if record["subject"] in record["prompt"]]
    facts = [Fact(record["prompt"].replace(record["subject"], "{}", 1), record["subject"]) for record in records]
    both = spread([fact for fact in facts if len(fact_tokens(lm.tokenizer, fact).ids) <= LONGEST], 2 * n)
    return both[::2], both[1::2]


def measure(lm, facts: list[Fact], samples: int) -> Measured:
    """Each fact traced exactly, by other draws, and strided, one after the other, so that all meet the same machine."""
    peak, level = peak_matmul(), noise_level(lm, facts, "s3")[1]
    how = {"samples": samples, "noise": level, "window": WINDOW}
    check(lm, facts[0], level)
    figures = []
    for kind in KINDS:
        exact: list[Timing] = []
        other: list[Timing] = []
        strided: dict[int, list[Timing]] = {stride: [] for stride in STRIDES}
        for fact in facts:
            for seed, made in zip(SEEDS, (exact, other), strict=True):
                made.append(timed(kf.trace, lm, fact, kinds=kind, seed=seed, **how))
            for stride, made in strided.items():
                options = {"method": "strided", "stride": stride, "seed": SEEDS[0]}
                made.append(timed(kf.trace, lm, fact, kinds=kind, **options, **how))
            print(f"{kind}, {len(exact)} of {len(facts)}: {exact[-1].cpu:.1f} s", flush=True)
        for stride, made in strided.items():
            figures += _figures(f"{kind}, one layer in {stride}", exact, other, made)
    notes = [
        f"{len(facts)} facts of up to {LONGEST} tokens, {samples} noise draws of {level:.3f}, windows of {WINDOW}; "
        "correlations are over the cells of a fact."
    ]
    return Measured(figures, max(peak, peak_matmul()), notes)


def check(lm, fact: Fact, level: float) -> None:
    """Raises CheckFailed where what a strided trace computed is not what the exact one has there: of one draw, whose
    mean it is itself."""
    for kind in KINDS:
        how = {"kinds": kind, "samples": 1, "noise": level, "window": WINDOW}
        (exact,), (strided,) = (
            kf.trace(lm, fact, method=method, stride=STRIDES[0], **how) for method in ("exact", "strided")
        )
        apart = float(np.abs(exact.p_restored - strided.p_restored)[strided.exact].max())
        if not apart <= TOLERANCE:
            raise CheckFailed(f"{kind} trace of {fact.label}: strided and exact cells are {apart:.1e} apart")


def _figures(case: str, exact: list[Timing], other: list[Timing], strided: list[Timing]) -> list[Figure]:
    ours, theirs, again = ([timing.result[0] for timing in made] for made in (strided, exact, other))
    agree = [spearman(cells(a), cells(b)) for a, b in zip(ours, theirs, strict=True)]
    apart = [spearman(cells(a), cells(b)) for a, b in zip(theirs, again, strict=True)]
    seconds = [sum(timing.seconds for timing in made) for made in (strided, exact)]
    rows = [
        (AGREES, np.mean(agree), "correlation"),
        (LEAST, np.min(agree), "correlation"),
        (COST, np.mean([trace.cost for trace in ours]), "share"),
        ("time, share of the exact trace's", seconds[0] / seconds[1], "share"),
        (OTHER, np.mean(apart), "correlation"),
        ("exact traces by other draws, least rank correlation", np.min(apart), "correlation"),
        (
            "exact trace, mean reliability by its halves",
            np.mean([trace.reliability for trace in theirs]),
            "correlation",
        ),
        ("strided trace, mean reliability by its halves", np.mean([t.reliability for t in ours]), "correlation"),
        ("exact trace, CPU time a fact", np.mean([timing.cpu for timing in exact]), "s"),
    ]
    marks = {AGREES: f">= {np.mean(apart):.3f}"}  # as well as two exact traces
    return [Figure(case, metric, float(x), unit, n=len(ours), mark=marks.get(metric, "")) for metric, x, unit in rows]
