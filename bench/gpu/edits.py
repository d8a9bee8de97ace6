"""Values of 128 facts, and MEMIT of 1,000, five steps each, on the shape of GPT-J in bf16 (see ``bench.mass``)."""

from dataclasses import replace

from bench import mass
from bench.common import Peaks, peak_memory, reset_peak_memory
from bench.gpu.session import Session
from bench.gpu.traces import look_inside, tell_waits
from bench.phases import phase_times, summed
from bench.trace import count_flop

STEPS, PROFILED_STEPS = 5, 2
VALUES = 128
EDITS = (100, 1000)  # facts, one after the other: what a fact costs, and what a call
DRY_VALUES, DRY_EDITS = 3, (2, 3)


def _bed(session: Session, n: int) -> mass.Bed:
    """A model with facts and contexts."""
    plan = mass.dry(session.device) if session.dry else mass.Plan(session.device)
    bed = mass.Bed(plan, n)
    session.book.notes = [
        f"{plan.model}: random weights, prompts of {mass.BEFORE + mass.SUBJECT + mass.AFTER} words, subject "
        f"{mass.SUBJECT}, {sum(map(len, bed.contexts.result))} contexts, {STEPS} steps."
    ]
    session.book.tell(plan.model, [("model made", bed.made, "s"), ("contexts", bed.contexts.wall, "s")])
    return bed


def values(session: Session) -> None:
    """z of all facts in one call; what it waits for; its profile."""
    bed = _bed(session, DRY_VALUES if session.dry else VALUES)
    name = f"z, {bed.plan.model}, {len(bed.facts)} facts"
    first, second = (bed.clock(bed.values, bed.facts[:4], PROFILED_STEPS) for _ in range(2))
    rows = [("first, which compiles", first.wall, "s"), ("second", second.wall, "s")]
    session.book.tell(f"z, {bed.plan.model}, 4 facts, {PROFILED_STEPS} steps", rows)
    reset_peak_memory(session.device)
    made = bed.clock(bed.values, bed.facts, STEPS)
    one, two = (count_flop(bed.values, bed.facts[:2], steps) / 2 for steps in (1, 2))
    rate = (one + (two - one) * (STEPS - 1)) * len(bed.facts) / made.wall
    peak = Peaks.measure(bed.watch, [bed.plan.dtype], session.dry).products[bed.plan.dtype]
    rows = [
        ("wall time", made.wall, "s"),
        ("facts a second", len(bed.facts) / made.wall, "facts/s"),
        ("product rate", 1e-12 * rate, "TFLOP/s"),
        ("share of product peak", 100 * rate / peak, "%"),
        *peak_memory(session.device),
    ]
    session.book.tell(f"{name}, {STEPS} steps", rows, n=len(bed.facts))
    layer = (bed.editor.layers[-1] + bed.lm.n_layers) // 2
    tell_waits(session, f"{name}, 1 step", lambda: bed.values(bed.facts, 1), layer)
    look_inside(session, f"{name}, {PROFILED_STEPS} steps", lambda: bed.values(bed.facts, PROFILED_STEPS), bed.watch)


def memit(session: Session) -> None:
    """A whole edit with each phase timed, of few facts first."""
    sizes = DRY_EDITS if session.dry else EDITS
    bed = _bed(session, sizes[-1])
    statistics = bed.clock(bed.statistics)
    case = f"MEMIT, {bed.plan.model}"
    session.book.tell(case, [("statistics", statistics.wall, "s")])
    editor = replace(bed.editor, v_num_grad_steps=STEPS)
    options = {"moments": statistics.result, "contexts": bed.contexts.result}
    first = bed.clock(editor.edit, bed.lm, bed.facts[:2], **options)
    session.book.tell(f"{case}, 2 facts", [("first, which compiles", first.wall, "s")])
    n, by_fact = sizes[0], 0.0
    for size in sizes:
        n = min(size, n + int(max(0.8 * session.left / by_fact, 0))) if by_fact else n
        reset_peak_memory(session.device)
        with phase_times(bed.clock) as phases:
            made = bed.clock(editor.edit, bed.lm, bed.facts[:n], **options)
        by_fact = phases["z"].wall / n  # nearly all that grows with the facts
        rest = made.wall - summed(list(phases.values())).wall
        walls = {"wall time": made.wall, **{phase: timing.wall for phase, timing in phases.items()}, "the rest": rest}
        rows = [*((name, wall, "s") for name, wall in walls.items()), ("facts a second", n / made.wall, "facts/s")]
        session.book.tell(f"{case}, {n} facts, {STEPS} steps", rows + peak_memory(session.device), n=n)
    if n < sizes[-1]:
        session.left_out.append(f"{sizes[-1]} facts (it took {n})")
