"""Every op of ``kedit_fast.kernels`` on the shapes of four models: checked against fp64, then timed beside its rivals.

Providers of a case: kedit_fast (with the backend that ran), its plain torch reference, and the best that torch has for
the same result. Rates count the work of the problem, whoever does more of it: of a second moment one triangle, of
attention the keys that a row sees, and of bytes each input read once and each output written once. The peaks are of a
plain product and a plain copy in the same run. On the CPU shapes and rows are scaled down, as the case names say.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from bench.common import CheckFailed, Figure, Measured, Peaks, Stopwatch, Times, device_of
from bench.kernel_cases import OPS, OURS, REFERENCE, Case, Op
from bench.shapes import SHAPES, Setup
from kedit_fast.kernels.dispatch import backend_for

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}  # relative RMS, as the tests have it
ROWS = {"cuda": 32_768 // 12 * 12, "cpu": 1536}  # of a large call; whole prompts of 12 tokens
SMALLER = {"cuda": 1, "cpu": 16}  # what widths are divided by
QUICK = {"models": ("llama-3-8b",), "smaller": 64, "rows": 96}
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Plan(NamedTuple):
    """What to measure. smaller: what widths are divided by; quick: few repeats, small peaks; until: time.monotonic()
    after which no case is begun; lenient: a case that fails is noted and the others are measured.
    """

    ops: tuple[str, ...] = tuple(OPS)
    models: tuple[str, ...] = tuple(SHAPES)
    device: torch.device = torch.device("cpu")
    rows: int = ROWS["cpu"]
    smaller: int = SMALLER["cpu"]
    quick: bool = False
    until: float = float("inf")
    lenient: bool = False

    @classmethod
    def of(cls, device: torch.device, quick: bool, **changes) -> "Plan":
        """The plan for a device."""
        sizes = QUICK if quick else {"rows": ROWS[device.type], "smaller": SMALLER[device.type]}
        return cls(device=device, quick=quick, **sizes)._replace(**changes)


class Problem(NamedTuple):
    """A case before its tensors are made."""

    name: str
    op: Op
    kind: str
    setup: Setup

    def made(self) -> Case:
        return self.op.cases[self.kind](self.setup)


def problems(plan: Plan) -> Iterator[Problem]:
    """Model by model, of each the ops in order of worth, in all their dtypes."""
    for model in plan.models:
        for name in plan.ops:
            shape = SHAPES[model].smaller(plan.smaller)
            for kind in OPS[name].cases:
                for dtype in OPS[name].dtypes:
                    words = [name, kind, shape.name, NAMES[dtype]]
                    setup = Setup(shape, dtype, plan.device, plan.rows)
                    yield Problem(", ".join(filter(None, words)), OPS[name], kind, setup)


def run(options) -> Measured:
    """The benchmark as the command line asks for it."""
    return measure(Plan.of(device_of(options.device), options.quick))


def measure(plan: Plan, keep: Callable[..., None] | None = None) -> Measured:
    """Every problem of the plan. Raises CheckFailed at the first wrong result, unless the plan is lenient.

    keep: is given the figures of each problem when they are made
    """
    watch = Stopwatch(plan.device, *((0.01, 3, 5) if plan.quick else ()))
    dtypes = {dtype for name in plan.ops for dtype in OPS[name].dtypes} | {torch.float32}
    peaks, figures, notes, late = Peaks.measure(watch, dtypes, plan.quick), [], [_about(plan)], []
    for problem in problems(plan):
        if time.monotonic() > plan.until:
            late.append(problem.name)
            continue
        try:
            found, missing = _measured(problem, watch, peaks)
        except Exception as error:
            if not plan.lenient:
                raise
            notes.append(f"FAILED: {problem.name}: {type(error).__name__}: {_first_line(error)}")
        else:
            figures += found
            notes += missing
            if keep is not None:
                keep(*found)
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    if late:
        notes.append(f"NOT RUN for want of time: {'; '.join(late)}.")
    best = peaks.products.get(torch.bfloat16 if plan.device.type == "cuda" else torch.float32)
    return Measured(figures, 1e-9 * (best or peaks.products[torch.float32]), notes, plan.device.type)


def _about(plan: Plan) -> str:
    scaled = f"widths of the models divided by {plan.smaller}" if plan.smaller > 1 else "widths of the models"
    clock = "GPU time with a cold L2 cache" if plan.device.type == "cuda" else "CPU time of one thread"
    return f"{scaled}, {plan.rows} rows in a large call; {clock}, median with 20th and 80th percentile."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _measured(problem: Problem, watch: Stopwatch, peaks: Peaks) -> tuple[list[Figure], list[str]]:
    """Figures of one problem, and why a rival has none."""
    case, notes = problem.made(), []
    errors, times = {}, {}
    with torch.no_grad():
        for name, work in case.providers.items():
            try:
                errors[name] = checked(problem, case, name)
                times[name] = watch(work)
            except (RuntimeError, TypeError) as error:
                if name in (OURS, REFERENCE):
                    raise
                notes.append(f"{problem.name}: {name} cannot run here: {_first_line(error)}.")
    return _figures(problem, case, errors, times, peaks), notes


def checked(problem: Problem, case: Case, name: str) -> float:
    """The relative error of a provider. Raises CheckFailed where it is not small.

    Rivals may round between their steps, so that of them no more is asked than the dtype gives.
    """
    allowed = TOLERANCE[problem.setup.dtype]
    if name in (OURS, REFERENCE) and case.tolerance is not None:
        allowed = min(allowed, case.tolerance)
    case.prepare()
    error = case.error(case.providers[name]())
    if not error <= allowed:
        raise CheckFailed(f"{problem.name}: {name}: relative error {error:.1e}, allowed {allowed:g}")
    return error


def _figures(problem: Problem, case: Case, errors: dict, times: dict[str, Times], peaks: Peaks) -> list[Figure]:
    op, dtype = case.backend
    ran = case.ran or backend_for(op, problem.setup.device, dtype)
    labels = {name: name for name in times} | {OURS: f"{OURS} ({ran})"}
    rivals = [time.middle for name, time in times.items() if name not in (OURS, REFERENCE)]
    figures = []
    for name, taken in times.items():
        label = f"{problem.name}, {labels[name]}"
        low, middle, high = (problem.op.in_a_second * seconds for seconds in taken[:3])
        figures.append(Figure(label, "time", middle, problem.op.unit, low, high, taken.n))
        figures += [
            Figure(label, metric, value, unit, n=taken.n) for metric, value, unit in _rates(case, dtype, taken, peaks)
        ]
        if name == OURS and rivals:
            figures.append(Figure(label, "ratio to the best rival", min(rivals) / taken.middle, "x"))
        figures.append(Figure(label, "relative error", errors[name], "difference"))
        if name == OURS:
            figures = [_marked(figure, label, case.marks) for figure in figures]
    return figures


def _rates(case: Case, dtype: torch.dtype, taken: Times, peaks: Peaks) -> list[tuple[str, float, str]]:
    rates = [
        ("bytes", 1e-6 * case.moved, "MB"),
        ("copy rate", 1e-9 * case.moved / taken.middle, "GB/s"),
        ("share of copy peak", 100 * case.moved / taken.middle / peaks.copy, "%"),
    ]
    if case.flop:
        rates += [
            ("FLOP", 1e-9 * case.flop, "GFLOP"),
            ("product rate", 1e-12 * case.flop / taken.middle, "TFLOP/s"),
            ("share of product peak", 100 * case.flop / taken.middle / peaks.products[dtype], "%"),
        ]
    return rates


def _marked(figure: Figure, label: str, marks: dict[str, str]) -> Figure:
    """The figure with its mark, if it has one and belongs to the provider of this label."""
    mark = marks.get(figure.metric, "") if figure.case == label else ""
    return replace(figure, mark=mark)
