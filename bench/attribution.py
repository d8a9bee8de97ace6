"""The estimate of a trace (``method="attribution"``) against the exact one: how well it ranks, how much faster.

Over facts of the package's own set, for states and for MLP windows: Spearman's rank correlation over all cells from the
subject on, and how many of the 20 strongest cells are among the estimate's 20. The published loop is timed on the first
fact, beside the estimate of it.
"""

import numpy as np

import kedit_fast as kf
from bench.common import Figure, Measured, Timing, peak_matmul, timed
from bench.trace import WINDOW, Ground, spread
from kedit_fast.basics.correlation import spearman
from kedit_fast.facts.fact import OWN_FACTS
from kedit_fast.tracing.trace import noise_level

KINDS = ("state", "mlp")
TOP = 20
MARKS = {
    "ratio to the published loop": ">= 20",
    "mean rank correlation": ">= 0.85",
    f"mean top-{TOP} recall": ">= 0.75",
}


def run(options) -> Measured:
    """The benchmark as the command line asks for it."""
    lm = kf.open_model("smollm2")
    n, samples = (2, 2) if options.quick else (20, 10)
    return measure(lm, spread(kf.load_facts(OWN_FACTS), n), samples)


def measure(lm, facts, samples: int) -> Measured:
    """Each fact estimated and traced, one after the other, so that both meet the same machine."""
    peak, level = peak_matmul(), noise_level(lm, facts, "s3")[1]
    how = {"samples": samples, "noise": level, "window": WINDOW}
    figures = []
    for kind in KINDS:
        pairs = []
        for fact in facts:
            estimated, exact = (
                timed(kf.trace, lm, fact, kinds=kind, method=method, **how) for method in ("attribution", "exact")
            )
            pairs.append((estimated, exact))
            print(f"{kind}, {len(pairs)} of {len(facts)}: {estimated.cpu:.1f} s, exact {exact.cpu:.1f} s", flush=True)
        published = timed(Ground(lm, kind, samples, level).rival, "published loop", facts[0])
        ratio = published.seconds / pairs[0][0].seconds
        figures += _figures(kind, pairs, ratio)
    return Measured(figures, max(peak, peak_matmul()), [f"{samples} noise draws of {level:.3f}, windows of {WINDOW}."])


def _figures(kind: str, pairs: list[tuple[Timing, Timing]], to_published: float) -> list[Figure]:
    both = [(cells(a.result[0]), cells(b.result[0])) for a, b in pairs]
    times = [sum(t.seconds for t in side) for side in zip(*pairs, strict=True)]
    rows = [
        ("ratio to the published loop", to_published, "x"),
        ("ratio to the exact trace", times[1] / times[0], "x"),
        ("mean rank correlation", float(np.mean([spearman(*each) for each in both])), "correlation"),
        ("least rank correlation", float(np.min([spearman(*each) for each in both])), "correlation"),
        (f"mean top-{TOP} recall", float(np.mean([recall(*each) for each in both])), "share"),
        ("attribution, CPU time a fact", float(np.mean([a.cpu for a, _ in pairs])), "s"),
        ("exact trace, CPU time a fact", float(np.mean([b.cpu for _, b in pairs])), "s"),
    ]
    case = f"{kind}, {len(pairs)} facts"
    return [Figure(case, metric, value, unit, n=len(pairs), mark=MARKS.get(metric, "")) for metric, value, unit in rows]


def cells(result: kf.TraceResult) -> np.ndarray:
    """Effects of the cells that had to be found: from the subject on, without the last layer's states."""
    effect = result.indirect_effect[result.subject_span[0] :]
    return (effect[:, :-1] if result.kind == "state" else effect).ravel()


def recall(estimated: np.ndarray, exact: np.ndarray, n: int = TOP) -> float:
    """Share of the exact trace's n strongest cells that are among the estimate's."""
    return len(set(estimated.argsort()[-n:]) & set(exact.argsort()[-n:])) / n
