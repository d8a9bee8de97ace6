"""Causal tracing against two rivals in the same run: the published loop, and a simple batched loop.

The published loop takes one forward a cell; the batched loop sends positions x draws up as one batch, through the
layers above the restoration only. Both are the tests' oracle, over the same Hugging Face model. Ratios are of CPU time
on one thread. What was timed is also what is compared: all cells must agree to ``TOLERANCE``, or by rounding alone, and
how far both are from our trace in fp64 is told; else nothing is reported.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from unittest.mock import patch

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import kedit_fast as kf
from bench.agreement import Ways, as_fp64, check_ways
from bench.common import Figure, Measured, Timing, peak_matmul, timed
from kedit_fast.facts.fact import OWN_FACTS, Fact
from kedit_fast.facts.tokens import fact_tokens
from kedit_fast.tracing.trace import noise_level
from tests.oracle.tracing import batched_loop, published_loop

KINDS = {"state": ">= 6", "mlp": ">= 4.5"}  # kind: the mark of its ratio to the published loop
RIVALS = {"published loop": published_loop, "batched loop": batched_loop}
TOLERANCE = 1e-5  # of p, in fp32
OFF = "kedit_fast, largest distance from fp64"
WINDOW, FACTS = 10, 8
# The fact alone: its article is no part of the subject, as in CounterFact's "The {} ...", so the first of 9 tokens is
# never restored: 159,270 rows x layers. With the article in it they are 198,720, and the ratio is 0.8 of this.
ALONE = Fact(prompt="The {} is in the city of", subject="Eiffel Tower")


def run(options) -> Measured:
    """The benchmark as the command line asks for it."""
    lm = kf.open_model("smollm2")
    facts = kf.load_facts(OWN_FACTS)
    if options.quick:
        facts = sorted(facts, key=lambda fact: len(_tokens(lm, fact).ids))[:2]
        return measure(lm, facts, samples=2)
    return measure(lm, [ALONE, *spread(facts, options.facts or FACTS)[1:]])


def spread(facts: list[Fact], n: int) -> list[Fact]:
    """n facts at even distances, the first one first ("The Eiffel Tower is in the city of")."""
    if not 1 <= n <= len(facts):
        raise ValueError(f"--facts {n}: expected 1 to {len(facts)}")
    return [facts[i * len(facts) // n] for i in range(n)]


def measure(lm, facts: list[Fact], *, samples: int = 10) -> Measured:
    """Each kind on the first fact, and, where there are more, on all of them in one call."""
    measured = [facts[0], _typical(lm, facts)] if len(facts) > 1 else facts
    noise = noise_level(lm, facts, "s3")[1]
    peaks, cases = [peak_matmul()], []
    for kind in KINDS:
        ground = Ground(lm, kind, samples, noise)
        cases.append(one_fact(ground, facts[0]))
        peaks.append(peak_matmul())
        if len(facts) > 1:
            cases.append(many_facts(ground, facts, measured, cases[-1]))
            peaks.append(peak_matmul())
    texts = " and ".join(f'"{fact.text}"' for fact in measured)
    notes = [f"{samples} noise draws of {noise:.3f}; windows of {WINDOW} layers; rivals measured on {texts}"]
    notes[0] += f", and scaled to {len(facts)} facts by tokens." if len(facts) > 1 else "."
    return Measured([figure for case in cases for figure in case.figures(max(peaks))], max(peaks), notes)


def _typical(lm, facts: list[Fact]) -> Fact:
    """The fact, not the first, on which the published loop's cost is nearest the mean over all facts."""
    costs = [COSTS["published loop"](lm, fact) for fact in facts]
    return min(zip(facts[1:], costs[1:], strict=True), key=lambda pair: abs(pair[1] - np.mean(costs)))[0]


# Work of a rival on one fact, up to a factor: cells or rows that grow with the T tokens, the subject beginning at b.
COSTS: dict[str, Callable[..., int]] = {
    "published loop": lambda lm, fact: len(_tokens(lm, fact).ids) ** 2,
    "batched loop": lambda lm, fact: (n := len(_tokens(lm, fact).ids)) * (n - _tokens(lm, fact).span[0]),
}


def _tokens(lm, fact: Fact):
    return fact_tokens(lm.tokenizer, fact)


@dataclass(frozen=True)
class Ground:
    """One kind of trace, set up the same for everyone."""

    lm: object
    kind: str
    samples: int
    noise: float

    def ours(self, facts: list[Fact], samples: int | None = None) -> list[kf.TraceResult]:
        return kf.trace(
            self.lm, facts, kinds=(self.kind,), window=WINDOW, samples=samples or self.samples, noise=self.noise
        )

    def rival(self, name: str, fact: Fact) -> dict:
        ids, span, *_ = _tokens(self.lm, fact)
        return RIVALS[name](
            self.lm.model, ids, span, self.kind, window=WINDOW, samples=self.samples, noise=self.noise, seed=1
        )

    @cached_property
    def in_fp64(self) -> "Ground":
        return Ground(as_fp64(self.lm), self.kind, self.samples, self.noise)

    @cached_property
    def exact(self) -> dict[str, np.ndarray]:
        """Our traces in fp64 by prompt, of those facts that were asked for."""
        return {}

    def check(self, fact: Fact, ours: kf.TraceResult, name: str, rival: dict) -> Ways:
        """Largest differences of p over all cells and the two runs. Raises CheckFailed where rounding does not explain
        them."""

        def exact() -> np.ndarray:
            if fact.text not in self.exact:
                self.exact[fact.text] = _read(self.in_fp64.ours([fact])[0])
            return self.exact[fact.text]

        return check_ways(
            f"{self.kind} trace of {fact.label}",
            _read(ours),
            _read_rival(rival),
            lambda a, b: float(np.abs(a - b).max()),
            TOLERANCE,
            exact,
            rival_exact=lambda: _read_rival(self.in_fp64.rival(name, fact)),
            always=True,
        )

    def flop_ours(self, facts: list[Fact]) -> float:
        """FLOP of the products in our trace: counted for one and two draws, and the rest is linear in the draws."""
        one, two = (count_flop(self.ours, facts, samples) for samples in (1, 2))
        return one + (self.samples - 1) * (two - one)

    def flop_published(self, fact: Fact) -> float:
        """FLOP of the products in the published loop: one forward's, times its forwards."""
        ids = torch.tensor([_tokens(self.lm, fact).ids] * (self.samples + 1))
        with torch.inference_mode():
            return count_flop(self.lm.model, ids) * (ids.shape[1] * self.lm.n_layers + 2)


def count_flop(work: Callable, *args) -> int:
    """Counted by torch, so torch computes: what another library multiplies it does not see."""
    with patch.dict(os.environ, KEDIT_FAST_BACKEND="reference"), FlopCounterMode(display=False) as counter:
        work(*args)
    return counter.get_total_flops()


@dataclass(frozen=True)
class Case:
    """What was measured of one kind on one or several facts.

    ours, rivals: seconds a fact; ways: of each rival, the largest differences of p over all cells; flop,
    flop_published: of one fact, ours and the published loop's, where they were counted
    """

    name: str
    mark: str
    ours: Timing
    rivals: dict[str, Timing]
    ways: dict[str, Ways]
    flop: float = 0
    flop_published: float = 0

    def figures(self, peak: float) -> list[Figure]:
        """peak: of the machine, GFLOP/s."""
        rows = [(f"ratio to the {name}", t.seconds / self.ours.seconds, "x") for name, t in self.rivals.items()]
        rows.append(("largest difference of p", max(w.apart for w in self.ways.values()), "difference"))
        rows.append((OFF, max(w.ours for w in self.ways.values()), "difference"))
        rows += [(f"{name}, largest distance from fp64", w.rival, "difference") for name, w in self.ways.items()]
        for name, timing in {"kedit_fast": self.ours, **self.rivals}.items():
            rows += [(f"{name}, CPU time a fact", timing.cpu, "s"), (f"{name}, wall time a fact", timing.wall, "s")]
        if self.flop:
            rows += self._work(peak)
        marks = {"ratio to the published loop": self.mark, OFF: f"<= {TOLERANCE:g}"}
        return [Figure(self.name, metric, value, unit, mark=marks.get(metric, "")) for metric, value, unit in rows]

    def _work(self, peak: float) -> list[tuple[str, float, str]]:
        """The bound is the ratio if our products ran at the peak and nothing else took time."""
        published = self.rivals["published loop"].seconds
        rates = [1e-9 * self.flop / self.ours.seconds, 1e-9 * self.flop_published / published]
        return [
            ("kedit_fast, FLOP", 1e-12 * self.flop, "TFLOP"),
            ("published loop, FLOP", 1e-12 * self.flop_published, "TFLOP"),
            ("kedit_fast, share of peak", 100 * rates[0] / peak, "%"),
            ("published loop, share of peak", 100 * rates[1] / peak, "%"),
            ("bound of the ratio by FLOP", published * peak / (1e-9 * self.flop), "x"),
        ]


def one_fact(ground: Ground, fact: Fact) -> Case:
    """Both rivals on one fact, with ours before, between and after them."""
    flop = ground.flop_ours([fact])  # warms up, too
    ours, rivals, ways = [timed(ground.ours, [fact])], {}, {}
    for name in RIVALS:
        rivals[name] = timed(ground.rival, name, fact)
        ways[name] = ground.check(fact, ours[0].result[0], name, rivals[name].result)
        ours.append(timed(ground.ours, [fact]))
    return Case(
        name=f"{ground.kind}, 1 fact",
        mark=KINDS[ground.kind],
        ours=sorted(ours, key=lambda timing: timing.seconds)[1],
        rivals=rivals,
        ways=ways,
        flop=flop,
        flop_published=ground.flop_published(fact),
    )


def many_facts(ground: Ground, facts: list[Fact], measured: list[Fact], single: Case) -> Case:
    """All facts in one call of ours; the rivals on one more fact than ``single`` has already."""
    ours = timed(ground.ours, facts)
    rivals, ways = {}, {}
    for name in RIVALS:
        timings = [single.rivals[name], timed(ground.rival, name, measured[1])]
        checked = [
            ground.check(fact, ours.result[facts.index(fact)], name, timing.result)
            for fact, timing in zip(measured, timings, strict=True)
        ]
        ways[name] = Ways(*(max(column) for column in list(zip(*checked, strict=True))[:3]))
        costs = [COSTS[name](ground.lm, fact) for fact in measured]
        scale = np.mean([COSTS[name](ground.lm, fact) for fact in facts]) / sum(costs)
        rivals[name] = Timing(None, scale * sum(t.cpu for t in timings), scale * sum(t.wall for t in timings))
    return Case(
        name=f"{ground.kind}, {len(facts)} facts",
        mark=KINDS[ground.kind],
        ours=Timing(None, ours.cpu / len(facts), ours.wall / len(facts)),
        rivals=rivals,
        ways=ways,
    )


def _read(ours: kf.TraceResult) -> np.ndarray:
    """p of all cells and of the two runs."""
    return np.append(ours.p_restored.astype(np.float64).ravel(), [ours.p_clean, ours.p_corrupted])


def _read_rival(rival: dict) -> np.ndarray:
    return np.append(rival["scores"].double().numpy().ravel(), [rival["p_clean"], rival["p_corrupted"]])
