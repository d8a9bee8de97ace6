"""A trace of eight facts on the shape of a large model: by the size of a call, then what a group of it is made of."""

import time
from collections.abc import Callable

from bench import flows
from bench.common import Peaks, Stopwatch, peak_memory, reset_peak_memory
from bench.gpu.session import Session
from bench.gpu.watch import call_rows, profiled, waits

FACTS = 8
GROUP = 3  # facts whose rows are one group of a trace (tracing.TOGETHER): what is looked into
DRY_ROWS = (64, 16)
RIVALS_NEED, PROFILE_NEEDS = 10, 15  # seconds; the profile's besides the work itself, to write and to read it


def trace(session: Session, model: str) -> None:
    """States of all layers and tokens with ten draws of noise. model: of ``flows.MODELS``."""
    watch, book = Stopwatch(session.device), session.book
    dry = flows.dry(model, session.device)
    plan = dry if session.dry else flows.Plan(model, session.device, facts=FACTS)
    made = watch.once(lambda: flows.opened(plan))
    ours, facts = made.result
    book.notes = [f"{model}: random weights, facts of {flows.TOKENS} tokens, {plan.samples} draws, states."]
    first, second = (watch.once(lambda: ours(facts[:1])) for _ in range(2))
    rows = [("model made", made.wall), ("first trace, which compiles", first.wall), ("second trace", second.wall)]
    book.tell(f"{model}, 1 fact", [(*row, "s") for row in rows])
    best = by_call_size(session, plan, ours, facts, watch)
    with call_rows(best):
        case, layer = f"{model}, {min(GROUP, len(facts))} facts, {best} rows a call", ours.lm.n_layers // 2
        look_inside(session, case, lambda: ours(facts[:GROUP]), watch, layer)
    if session.has(RIVALS_NEED, "the rivals"):
        rivals = flows.Rivals(ours, plan, facts[0], second.result[0])
        rivals.time(watch)
        book.tell(f"{model}, 1 fact", [(name, seconds, "s") for name, seconds in rivals.seconds.items()])


def by_call_size(session: Session, plan: flows.Plan, ours, facts: list, watch: Stopwatch) -> int:
    """The same trace with calls of each size; gives the fastest."""
    flop = flows.flop_of(ours, facts[0])
    peak = Peaks.measure(watch, [plan.dtype], session.dry).products[plan.dtype]
    walls: dict[int, float] = {}
    for rows in DRY_ROWS if session.dry else session.call_rows:
        if walls and not session.has(1.5 * max(walls.values()), f"{rows} rows a call"):
            continue
        reset_peak_memory(session.device)
        with call_rows(rows):
            walls[rows] = wall = watch.once(lambda: ours(facts)).wall
        rate = flop * len(facts) / wall
        found = [
            ("wall time", wall, "s"),
            ("facts a second", len(facts) / wall, "facts/s"),
            ("patches a second", len(facts) * ours.lm.n_layers * flows.TOKENS / wall, "patches/s"),
            ("FLOP a fact", 1e-12 * flop, "TFLOP"),
            ("product rate", 1e-12 * rate, "TFLOP/s"),
            ("share of product peak", 100 * rate / peak, "%"),
            *peak_memory(session.device),
        ]
        session.book.tell(f"{plan.model}, {len(facts)} facts, {rows} rows a call", found, n=len(facts))
    return min(walls, key=walls.get)


def look_inside(
    session: Session, case: str, work: Callable[[], object], watch: Stopwatch, layer: int | None = None
) -> None:
    """What some work waits for (in one layer, if one is given), and its profile: the readings, and the trace beside
    them under the part's name. Runs it three times."""
    if not session.has(PROFILE_NEEDS, f"a look into {case}"):
        return
    tell_waits(session, case, work, layer)
    wall = watch.once(work).wall
    if session.has(4 * wall + PROFILE_NEEDS, f"the profile of {case}"):
        began, name = time.perf_counter(), session.book.bench.removeprefix("gpu ")
        profile = profiled(work, session.device, wall, session.folder / f"{name}.json.gz")
        for what, rows in profile.readings().items():
            session.book.tell(f"{case}: {what}", rows)
        session.book.tell(f"{case}: the profile", [("seconds it took", time.perf_counter() - began, "s")])


def tell_waits(session: Session, case: str, work: Callable[[], object], layer: int | None) -> None:
    """The lines of the package at which the host waits for the GPU, the most frequent first."""
    with waits(session.device, layer) as found:
        work()
    where = "in all" if layer is None else f"in layer {layer}"
    rows = [("all lines", sum(found.values()), "times"), *((place, n, "times") for place, n in found.most_common())]
    session.book.tell(f"{case}: waits {where}", rows)
