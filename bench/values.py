"""Editing SmolLM2 against the published procedure, fact by fact, in the same run: z, MEMIT, independent ROME edits.

The rival (``bench.published``) is run on a few facts between ours, and what it would take for all of them follows from
its own seconds a unit of work: padded slots x iterations for a value, tokens for keys, padded slots for an evaluation;
its solves are taken once a layer. What was timed is also what is compared, or nothing is reported. Ratios are of CPU
time on one thread; statistics and contexts are given to both sides.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import kedit_fast as kf
from bench import edit as edit_bench
from bench.agreement import (
    FP64_TOLERANCE,
    VALUE_TOLERANCE,
    Agreement,
    check_values,
    check_ways,
    fp64_difference,
    our_values,
    relative,
)
from bench.common import CheckFailed, Figure, Measured, Timing, peak_matmul, timed
from bench.phases import phase_times, summed
from bench.published import KEY_ROWS, Loop, plain, scaled, written
from bench.trace import count_flop
from kedit_fast.editors.contexts import memit_contexts
from kedit_fast.facts.fact import Fact
from kedit_fast.jobs.values import Values, ValueSettings
from tests.oracle.memit import memit_update
from tests.oracle.rome import rome_update
from tests.oracle.values import Value

LAYERS = (6, 7, 8)  # z at 8, as in the measurements that the marks are from
SIZES, QUICK = {"z": 24, "memit": 100, "rome": 200}, {"z": 4, "memit": 4, "rome": 4}
MEASURED = 3  # facts that the rival is run on; of ROME, whose edits are evaluated too, one less
MARKS = {"z alone": ">= 3", "z": ">= 7", "memit": ">= 5", "rome": ">= 7"}
DELTA_TOLERANCE = 1e-3  # of Δ, which is of the difference of a value and what is there, relative to its norm
P_TOLERANCE = 1e-3  # of probabilities after an edit
LOOP = "published loop"


def run(options) -> Iterator[Measured]:
    """The parts that the command line asks for, each as soon as it is done. Raises Skipped without the data sets."""
    edit_bench.check_data()
    lm = kf.open_model("smollm2")
    sizes, measured, steps = (QUICK, 1, 8) if options.quick else (SIZES, MEASURED, 20)
    facts = [asked(fact) for fact in edit_bench.draw()]
    ground = Ground(
        lm=lm,
        memit=kf.Memit(layers=LAYERS, mom2_update_weight=float(lm.d_ff), v_num_grad_steps=steps),
        rome=dataclasses.replace(kf.Rome.for_model(lm), v_num_grad_steps=steps),
        groups=memit_contexts(lm),
        facts=[fact for fact in facts if fact.subject.casefold() not in " ".join(fact.neighborhood).casefold()],
        measured=measured,
    )
    for part in options.parts:
        yield PARTS[part](ground, sizes[part])


def asked(fact: Fact) -> Fact:
    """The fact with what the published evaluation asks of it: not the subject's other relations."""
    return dataclasses.replace(fact, same_subject=())


@dataclass(frozen=True)
class Ground:
    """What both sides work on. facts: the rival is run on the first ``measured`` of them."""

    lm: object
    memit: kf.Memit
    rome: kf.Rome
    groups: list[list[str]]
    facts: list[Fact]
    measured: int

    @cached_property
    def moments(self) -> dict[int, kf.SecondMoment]:
        return edit_bench.statistics_of(self.lm, {*self.memit.layers, *self.rome.layers})

    @cached_property
    def lm_fp64(self):
        return kf.open_model(self.lm.name, dtype=torch.float64)

    def in_fp64(self, loop: Loop, settings: ValueSettings) -> Callable[[Fact, Tensor, Tensor], float]:
        return lambda *differing: fp64_difference(self.lm_fp64, loop, settings, *differing)

    def loop(self, editor) -> Loop:
        options = {
            "lr": editor.v_lr, "steps": editor.v_num_grad_steps, "weight_decay": editor.v_weight_decay,
            "kl_factor": editor.kl_factor, "clamp": editor.clamp_norm_factor,
        }  # fmt: skip
        return Loop(self.lm, self.groups, options)

    def ours(self, facts: Sequence[Fact], steps: int | None = None) -> Values:
        """z of the facts."""
        editor = dataclasses.replace(self.memit, v_num_grad_steps=steps or self.memit.v_num_grad_steps)
        return our_values(self.lm, facts, self.groups, editor.z_settings(self.lm))


# ---- z


def z(ground: Ground, n: int) -> Measured:
    """z of one fact and of n facts. The rival's facts and ours take turns."""
    facts, loop, layer = ground.facts[:n], ground.loop(ground.memit), ground.memit.layers[-1]
    peaks, one = [peak_matmul()], facts[:1]
    ground.ours(one, 2)  # warms up
    alone, rivals = [timed(ground.ours, one)], [loop.value(facts[0], layer, "layer_out", twice=True)]
    alone.append(timed(ground.ours, one))
    ours = timed(ground.ours, facts)
    peaks.append(peak_matmul())
    rivals += [loop.value(fact, layer, "layer_out", twice=True) for fact in facts[1 : ground.measured]]
    once = loop.value(facts[0], layer, "layer_out")
    alone.append(timed(ground.ours, one))
    in_fp64 = ground.in_fp64(loop, ground.memit.z_settings(ground.lm))
    agreed = check_values(facts, [r.result for r in rivals], ours.result.values, ours.result.steps, in_fp64)
    steps, single = ours.result.steps.tolist(), sorted(alone, key=lambda t: t.seconds)[1]
    agreed_alone = check_values(one, [rivals[0].result], single.result.values, single.result.steps, in_fp64)
    flop = _flop(ground, facts, sum(steps) / n)
    peak = max([*peaks, peak_matmul()])
    rival = scaled(rivals, lambda i: loop.value_slots(facts[i]) * steps[i], n)
    share = 100e-9 * flop / (ours.seconds / n) / peak
    figures = [
        *_compared("z, 1 fact", single, rivals[0], 1, MARKS["z alone"], agreed_alone),
        Figure("z, 1 fact", "ratio to the loop with one projection", once.seconds / single.seconds, "x"),
        *_compared(f"z, {n} facts", ours, rival, n, MARKS["z"], agreed),
        Figure(f"z, {n} facts", "mean iterations", sum(steps) / n, "mean"),
        Figure(f"z, {n} facts", "kedit_fast, FLOP a fact", 1e-12 * flop, "TFLOP"),
        Figure(f"z, {n} facts", "kedit_fast, share of peak", share, "%"),
    ]
    return Measured(figures, peak, [
        f"z: layer {layer}, {len(loop.contexts)} contexts, {ground.memit.v_num_grad_steps} steps. The published loop "
        "is the tests' oracle with the second projection to the vocabulary that the published code makes for the "
        f"target's loss (its own logits serve the KL row alone); run on {len(rivals)} of the facts and scaled by "
        "padded slots x iterations. The loop with one projection is the oracle as it is."
    ])  # fmt: skip


def _flop(ground: Ground, facts: list[Fact], steps: float) -> float:
    """Of a fact, in products: counted for one and two steps, and linear in them (the last has no backward pass)."""
    one, two = (count_flop(ground.ours, facts, n) for n in (1, 2))
    return (one + (two - one) * (steps - 1)) / len(facts)


def _compared(case: str, ours: Timing, rival: Timing, n: int, mark: str, agreed: Agreement) -> list[Figure]:
    """The figures that every part has; ours and rival: of all n facts."""
    rows = [
        (f"ratio to the {LOOP}", rival.seconds / ours.seconds, "x", mark),
        ("largest relative difference of a value", agreed.difference, "difference", f"<= {VALUE_TOLERANCE:g}"),
        ("the same in fp64", agreed.fp64, "difference", f"<= {FP64_TOLERANCE:g}"),
        ("kedit_fast, CPU time a fact", ours.cpu / n, "s", ""),
        ("kedit_fast, wall time a fact", ours.wall / n, "s", ""),
        (f"{LOOP}, CPU time a fact", rival.cpu / n, "s", ""),
    ]
    return [Figure(case, metric, value, unit, mark=mark) for metric, value, unit, mark in rows if value is not None]


# ---- MEMIT


def memit_part(ground: Ground, n: int) -> Measured:
    """MEMIT of n facts from statistics and contexts to the Edit."""
    facts, loop, layers, lm = ground.facts[:n], ground.loop(ground.memit), ground.memit.layers, ground.lm
    moments, peak = ground.moments, peak_matmul()
    rivals = [loop.value(facts[0], layers[-1], "layer_out", twice=True)]
    with phase_times() as phases:
        ours = timed(ground.memit.edit, lm, facts, moments=moments, contexts=ground.groups)
    rivals += [loop.value(fact, layers[-1], "layer_out", twice=True) for fact in facts[1 : ground.measured]]
    made, steps = ours.result, torch.tensor(ours.result.provenance["found"]["steps"])
    in_fp64 = ground.in_fp64(loop, ground.memit.z_settings(lm))
    agreed = check_values(facts, [r.result for r in rivals], made.values.to(lm.device), steps, in_fp64)
    delta = _check_layer_loop(ground, facts, [r.result for r in rivals])
    spent = _loop_phases(ground, loop, facts, made, rivals)
    rival = summed(list(spent.values()))
    case = f"MEMIT, {n} facts"
    figures = _compared(case, ours, rival, n, MARKS["memit"], agreed)
    figures.append(Figure(case, "relative difference of Δ", delta, "difference", mark=f"<= {DELTA_TOLERANCE:g}"))
    shares = {"kedit_fast": (phases, ours.seconds), LOOP: (spent, rival.seconds)}
    figures += [
        Figure(case, f"{name}, share of {phase}", 100 * timing.seconds / whole, "%")
        for name, (parts, whole) in shares.items()
        for phase, timing in parts.items()
    ]
    return Measured(figures, max(peak, peak_matmul()), [
        f"MEMIT: layers {', '.join(map(str, layers))}, λ = {ground.memit.mom2_update_weight:g}; the loop's z as above, "
        f"its keys and current values of {_key_facts(ground, n)} facts ({KEY_ROWS} padded rows a forward), scaled by "
        "tokens, its solves once a layer by LU in fp64."
    ])  # fmt: skip


def _key_facts(ground: Ground, n: int) -> int:
    """Facts whose keys fill one forward of the loop."""
    return min(n, KEY_ROWS // sum(map(len, ground.groups)))


def _check_layer_loop(ground: Ground, facts: list[Fact], values: list[Value]) -> float:
    """Largest relative difference of Δ when the measured facts alone are edited, by us and by the oracle."""
    some, layers, moments = facts[: len(values)], ground.memit.layers, ground.moments

    def ours(lm) -> list[Tensor]:
        made = ground.memit.edit(lm, some, moments=moments, contexts=ground.groups)
        return [made.deltas[layer].dense().cpu() for layer in layers]

    def loops(lm, values: list[Value]) -> list[Tensor]:
        made = memit_update(
            lm.model, lm.tokenizer, [plain(f) for f in some], ground.groups, layers,
            {layer: moments[layer].matrix for layer in layers}, ground.memit.mom2_update_weight, values=values,
        )  # fmt: skip
        return [made.deltas[layer].cpu() for layer in layers]

    def loops_in_fp64() -> list[Tensor]:
        loop = dataclasses.replace(ground.loop(ground.memit), lm=ground.lm_fp64)
        return loops(ground.lm_fp64, [loop.value(fact, layers[-1], "layer_out").result for fact in some])

    return check_ways(
        f"Δ of {len(some)} facts",
        ours(ground.lm),
        loops(ground.lm, values),
        lambda a, b: max(map(relative, a, b)),
        DELTA_TOLERANCE,
        exact=lambda: ours(ground.lm_fp64),
        rival_exact=loops_in_fp64,
    ).apart


def _loop_phases(ground: Ground, loop: Loop, facts, made: kf.Edit, rivals: list[Timing]) -> dict[str, Timing]:
    """Seconds of each phase of the published procedure for all facts."""
    layers, some, n = ground.memit.layers, facts[: _key_facts(ground, len(facts))], len(facts)
    steps = made.provenance["found"]["steps"]
    reads = [timed(loop.keys, some, layers[0]), timed(loop.current, some, layers[-1])]
    parts, whole = loop.read_slots(some), loop.read_slots(facts)
    factors = [len(layers) * w / p for p, w in zip(parts, whole, strict=True)]
    solves = [timed(_lu, ground, made.keys[layer], layer) for layer in layers]
    return {
        "z": scaled(rivals, lambda i: loop.value_slots(facts[i]) * steps[i], n),
        "keys and current values": summed(reads, factors),
        "solves": summed(solves),
    }


def _lu(ground: Ground, keys: Tensor, layer: int) -> Tensor:
    """(λ C + KᵀK)⁻¹ Kᵀ as published."""
    keys = keys.double()
    system = ground.memit.mom2_update_weight * ground.moments[layer].matrix.double() + keys.T @ keys
    return torch.linalg.solve(system, keys.T)


# ---- ROME


def rome_part(ground: Ground, n: int) -> Measured:
    """n independent ROME edits computed and evaluated, against one after the other."""
    facts, lm, peak = ground.facts[:n], ground.lm, peak_matmul()
    layer, groups = ground.rome.layers[0], [ground.loop(ground.rome).contexts]
    loop = dataclasses.replace(ground.loop(ground.rome), groups=groups)
    measured = facts[: max(1, ground.measured - 1)]
    rivals = [_one_by_one(ground, loop, measured[0])]
    made = timed(ground.rome.edit, lm, facts, moments=ground.moments, contexts=groups, independent=True)
    judged = timed(kf.evaluate, lm, facts, made.result)
    rivals += [_one_by_one(ground, loop, fact) for fact in measured[1:]]
    steps = made.result.provenance["found"]["steps"]
    values = [rival.edit.result.value for rival in rivals]
    in_fp64 = ground.in_fp64(loop, ground.rome.v_settings(lm, layer))
    agreed = check_values(facts, values, made.result.values.to(lm.device), torch.tensor(steps), in_fp64)
    moved = max(_check_probabilities(judged.result, i, rival.after) for i, rival in enumerate(rivals))
    edits = scaled([r.edit for r in rivals], lambda i: loop.value_slots(facts[i]) * steps[i], n)
    evaluations = scaled([r.evaluation for r in rivals], lambda i: loop.probe_slots(facts[i]), n)
    case = f"ROME, {n} independent edits"
    figures = _compared(case, summed([made, judged]), summed([edits, evaluations]), n, MARKS["rome"], agreed)
    figures += [
        Figure(case, "largest difference of p after the edit", moved, "difference", mark=f"<= {P_TOLERANCE:g}"),
        Figure(case, "ratio of computing", edits.seconds / made.seconds, "x"),
        Figure(case, "ratio of evaluating", evaluations.seconds / judged.seconds, "x"),
    ]
    return Measured(figures, max(peak, peak_matmul()), [
        f"ROME: layer {layer}, {len(loop.contexts)} contexts, each edit evaluated before and after on its rewrite "
        f"prompt, paraphrase and neighborhood prompts; the loop was run on {len(rivals)} of the facts, scaled by "
        "padded slots x iterations and by padded slots."
    ])  # fmt: skip


@dataclass(frozen=True)
class _OneByOne:
    """One fact edited and evaluated by the loop. edit: its result is the RomeUpdate; after: [prompts, 2]"""

    edit: Timing
    evaluation: Timing
    after: Tensor


def _one_by_one(ground: Ground, loop: Loop, fact: Fact) -> _OneByOne:
    """The published order: update, write, evaluate, put back; and the same evaluation of the unedited model."""
    layer, lm, editor = ground.rome.layers[0], ground.lm, ground.rome
    matrix = ground.moments[layer].matrix
    update = timed(
        rome_update, lm.model, lm.tokenizer, plain(fact), loop.contexts, layer, matrix,
        key={"published": "bare"}.get(editor.key, editor.key), **loop.options,
    )  # fmt: skip
    before = timed(loop.probabilities, fact)
    with written(lm.model, layer, update.result.delta):
        after = timed(loop.probabilities, fact)
    return _OneByOne(update, summed([before, after]), after.result)


def _check_probabilities(report: kf.EvalReport, i: int, want: Tensor) -> float:
    """Largest difference of a fact's columns of probabilities. Raises CheckFailed where it is not small."""
    n = len(report.facts[i].paraphrases)
    columns = {
        "p_new": want[0, 0],
        "p_true": want[0, 1],
        "paraphrase_p_new": want[1 : 1 + n, 0].mean(),
        "neighborhood_p_true": want[1 + n :, 1].mean(),
    }
    differences = [abs(float(report.edited[name][i] - value)) for name, value in columns.items() if value == value]
    if not max(differences) <= P_TOLERANCE:
        raise CheckFailed(f"p of {report.facts[i].label} differs by {max(differences):.1e}, allowed {P_TOLERANCE:g}")
    return max(differences)


PARTS: dict[str, Callable[[Ground, int], Measured]] = {"z": z, "memit": memit_part, "rome": rome_part}
