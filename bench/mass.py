"""Mass editing on the shape of GPT-J, with random weights in bf16: z a second, and 10,000 edits with each phase timed.

Facts are prompts of nine random words whose subject is four of them, about as many rows as CounterFact's have. Random
weights reach no loss that ends an optimization early, so every fact takes all its steps. Values are checked against the
tests' oracle first, on the model's first layers in fp32. A GPU's figures only: without one nothing is shown.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

import kedit_fast as kf
from bench.agreement import as_fp64, check_ways, relative
from bench.common import (
    CheckFailed,
    Figure,
    Measured,
    Peaks,
    Skipped,
    Stopwatch,
    Timing,
    device_of,
    peak_memory,
    reset_peak_memory,
)
from bench.flows import CHECKED_LAYERS, CONFIGS, random_model, word_tokenizer
from bench.phases import phase_times, summed
from bench.published import plain
from bench.trace import count_flop
from kedit_fast.editors.contexts import memit_contexts
from kedit_fast.editors.located import Prompts
from kedit_fast.jobs.values import optimize_values
from tests.oracle.values import optimize_value

MODEL = "gpt-j"
BEFORE, SUBJECT, AFTER = 1, 4, 4  # words of a prompt
STEPS, DRY_STEPS = 25, 4  # published, and of a dry run
WINDOW = 256  # words of a text for the statistics
VALUES, EDITS = 512, 10_000  # facts of the two cases, fewer where time is short
PROBE = 64  # facts that the rate is taken from
TOLERANCE = 1e-3  # of a value in fp32, relative to its norm
MARK = ">= 20"  # facts a second, z
RESERVE = 45.0  # seconds that the layers' sweeps and solves get beside the values


@dataclass(frozen=True)
class Plan:
    """Where, and how much. until: time.monotonic() to be kept; tiny: the dry run's shapes; layers: None for all"""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    values: int = VALUES
    edits: int = EDITS
    probe: int = PROBE
    tiny: bool = False
    layers: int | None = None
    until: float = float("inf")
    model: str = MODEL


def run(options) -> Iterator[Measured]:
    """The benchmark as the command line asks for it. Raises Skipped without a GPU, unless the run is a quick one."""
    device = device_of(options.device)
    if device.type == "cpu" and not options.quick:
        raise Skipped("not shown: a model of this size needs a GPU; --quick goes through all the steps on a tiny one")
    for case in CASES.values():
        yield case(dry(device) if options.quick else Plan(device))


def dry(device: torch.device) -> Plan:
    """The plan of a dry run."""
    return Plan(device, torch.float32, values=3, edits=4, probe=2, tiny=True)


# ---- model and facts


class Bed:
    """A random model with its editor, facts and contexts. made: the seconds that the model took."""

    def __init__(self, plan: Plan, n: int):
        self.plan, self.watch = plan, Stopwatch(plan.device)
        model, _, self.made = self.watch.once(lambda: random_model(plan))
        vocab = model.config.vocab_size
        memory = torch.cuda.get_device_properties(plan.device).total_memory // 2 if plan.device.type == "cuda" else None
        self.lm = kf.open_model(model, tokenizer=word_tokenizer(vocab), memory=memory)
        self.editor = replace(editor_for(self.lm), v_num_grad_steps=DRY_STEPS if plan.tiny else STEPS)
        self.facts = random_edits(n, vocab)
        self.contexts = self.watch.once(lambda: memit_contexts(self.lm))

    def values(self, facts, steps: int | None = None):
        """z of the facts."""
        editor = replace(self.editor, v_num_grad_steps=steps or self.editor.v_num_grad_steps)
        tasks = Prompts.of(self.lm, facts, self.contexts.result).value_tasks(self.lm)
        return optimize_values(self.lm, tasks, editor.z_settings(self.lm))

    def statistics(self) -> dict[int, kf.SecondMoment]:
        """Second moments over random words, twice as many as a key is wide."""
        words = np.random.RandomState(1).randint(1, self.lm.n_vocab, (2 * self.lm.d_ff // WINDOW + 1, WINDOW))
        texts = [" ".join(f"w{i}" for i in row) for row in words]
        return kf.second_moments(self.lm, self.editor.layers, texts, n_tokens=2 * self.lm.d_ff)

    def clock(self, work, *args, **options) -> Timing:
        """``timed``, to the end of the work on the device."""
        return self.watch.once(lambda: work(*args, **options))


def editor_for(lm) -> kf.Memit:
    """The layers and weights published for GPT-J, as many of them as this model has."""
    layers = tuple(layer for layer in (3, 4, 5, 6, 7, 8) if layer < lm.n_layers - 1) or (0, 1)
    return kf.Memit(layers=layers, mom2_update_weight=15_000)


def random_edits(n: int, n_words: int, seed: int = 0) -> list[kf.Fact]:
    """Prompts of random words, and a word for each to be told."""
    words = np.random.RandomState(seed).randint(1, n_words, (n, BEFORE + SUBJECT + AFTER + 1))
    texts = [[f"w{i}" for i in row] for row in words]
    end = BEFORE + SUBJECT
    return [
        kf.Fact(" ".join([*t[:BEFORE], "{}", *t[end:-1]]), " ".join(t[BEFORE:end]), target_new=t[-1], id=f"{i}")
        for i, t in enumerate(texts)
    ]


# ---- cases


def values(plan: Plan) -> Measured:
    """z a second. Raises CheckFailed where the oracle's differs in fp32."""
    checked = check(replace(plan, dtype=torch.float32, layers=CHECKED_LAYERS))
    bed = Bed(plan, plan.values)
    peaks = Peaks.measure(bed.watch, [plan.dtype], plan.tiny)
    seconds = _seconds_a_fact(bed, plan)
    facts = bed.facts[: _affordable(plan, len(bed.facts), seconds)]
    reset_peak_memory(plan.device)
    made = bed.clock(bed.values, facts)
    steps = float(made.result.steps.double().mean())
    one, two = (count_flop(bed.values, facts[:2], steps) / 2 for steps in (1, 2))
    flop, peak = one + (two - one) * (steps - 1), peaks.products[plan.dtype]
    rows = [
        ("facts a second", len(facts) / made.wall, "facts/s"),
        ("wall time", made.wall, "s"),
        ("mean iterations", steps, "mean"),
        ("FLOP a fact", 1e-12 * flop, "TFLOP"),
        ("share of product peak", 100 * flop * len(facts) / made.wall / peak, "%"),
        ("relative difference in fp32", checked, "difference"),
        *peak_memory(plan.device),
    ]
    marks = {"relative difference in fp32": f"<= {TOLERANCE:g}"}
    marks |= {"facts a second": MARK} if plan.device.type == "cuda" else {}
    return _measured(plan, f"z, {_name(plan)}, {len(facts)} facts", rows, marks, len(facts), peak)


def edits(plan: Plan) -> Measured:
    """MEMIT end to end: contexts, statistics, values, layers, solves; as many of the facts as there is time for."""
    bed = Bed(plan, plan.edits)
    peak = Peaks.measure(bed.watch, [plan.dtype], plan.tiny).products[plan.dtype]
    statistics = bed.clock(bed.statistics)
    seconds = _seconds_a_fact(bed, plan)
    facts = bed.facts[: _affordable(plan, len(bed.facts), seconds)]
    reset_peak_memory(plan.device)
    with phase_times(bed.clock) as phases:
        made = bed.clock(bed.editor.edit, bed.lm, facts, moments=statistics.result, contexts=bed.contexts.result)
    rest = made.wall - summed(list(phases.values())).wall
    n, whole = len(facts), made.wall + bed.contexts.wall
    rows = [
        ("wall time without statistics", whole, "s"),
        ("facts a second", n / whole, "facts/s"),
        ("contexts", bed.contexts.wall, "s"),
        *((phase, timing.wall, "s") for phase, timing in phases.items()),
        ("the rest", rest, "s"),
        ("statistics", statistics.wall, "s"),
        *peak_memory(plan.device),
    ]
    measured = _measured(plan, f"MEMIT, {_name(plan)}, {n} facts", rows, {}, n, peak)
    if n < plan.edits:
        measured.notes.append(f"Of {plan.edits} facts asked for: time was short.")
    return measured


CASES = {"values": values, "edits": edits}


def check(plan: Plan) -> float:
    """The relative difference of one fact's z from the oracle's. Raises CheckFailed where it is not small, and not by
    rounding."""
    bed = Bed(plan, 1)
    fact = bed.facts[0]
    ours, want = bed.values([fact]), _oracle(bed, fact)
    if abs(int(ours.steps[0]) - want.n_iterations) > 1:
        raise CheckFailed(f"{plan.model}: {int(ours.steps[0])} iterations in fp32, the oracle's {want.n_iterations}")

    def wide() -> Bed:
        made = copy.copy(bed)
        made.lm = as_fp64(bed.lm)
        return made

    return check_ways(
        f"{plan.model}, {plan.layers} layers: z",
        ours.values[0],
        want.value,
        relative,
        TOLERANCE,
        exact=lambda: wide().values([fact]).values[0],
        rival_exact=lambda: _oracle(wide(), fact).value,
    ).apart


def _oracle(bed: Bed, fact: kf.Fact):
    settings = bed.editor
    return optimize_value(
        bed.lm.model, bed.lm.tokenizer, plain(fact), [t for group in bed.contexts.result for t in group],
        settings.layers[-1], "layer_out", lr=settings.v_lr, steps=settings.v_num_grad_steps,
        weight_decay=settings.v_weight_decay, kl_factor=settings.kl_factor, clamp=settings.clamp_norm_factor,
    )  # fmt: skip


def _seconds_a_fact(bed: Bed, plan: Plan) -> float:
    """Of the values; the first facts warm up."""
    some = bed.facts[: plan.probe]
    bed.values(some, 2)
    return bed.clock(bed.values, some).wall / len(some)


def _affordable(plan: Plan, n: int, seconds_a_fact: float) -> int:
    """Facts that fit the time that is left; as many as were probed at least."""
    left = plan.until - time.monotonic() - RESERVE
    return int(max(min(plan.probe, n), min(n, 0.8 * left / seconds_a_fact, 1e9)))


def _name(plan: Plan) -> str:
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[plan.dtype]
    return f"{plan.model}{' shrunk' * plan.tiny}, {dtype}"


def _measured(plan: Plan, case: str, rows, marks: dict[str, str], n: int, peak: float) -> Measured:
    figures = [Figure(case, metric, value, unit, n=n, mark=marks.get(metric, "")) for metric, value, unit in rows]
    layers = CONFIGS[plan.model].full["n_layer"] if not plan.tiny else CONFIGS[plan.model].tiny["n_layer"]
    about = (
        f"{plan.model}: {layers} layers of random weights; prompts of {BEFORE + SUBJECT + AFTER} words, subject "
        f"{SUBJECT}, 6 contexts, {DRY_STEPS if plan.tiny else STEPS} steps, the published layers."
    )
    return Measured(figures, 1e-9 * peak, [about], plan.device.type)
