"""Which share of an edit each of MEMIT's phases takes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from bench.common import Timing, timed
from kedit_fast.editors import memit, spread
from kedit_fast.editors.located import Prompts

PHASES = (  # where a phase's work is called from, and its name
    (spread, "optimize_values", "z"),
    (Prompts, "read", "keys and current values"),
    (memit, "system", "solves"),
    (memit, "solved", "solves"),
)


@contextmanager
def phase_times(clock: Callable[..., Timing] = timed) -> Iterator[dict[str, Timing]]:
    """{phase: Timing} of all edits by MEMIT that are made while this is open; what is in none of them is not in it.

    clock: runs (work, *args, **options) to its end, on a GPU with a wait
    """
    spent: dict[str, Timing] = {}

    def clocked(phase: str, work: Callable) -> Callable:
        def run(*args, **options):
            timing = clock(work, *args, **options)
            spent[phase] = summed([timing, spent.get(phase, Timing(None, 0.0, 0.0))])
            return timing.result

        return run

    with ExitStack() as stack:
        for where, name, phase in PHASES:
            stack.enter_context(patch.object(where, name, clocked(phase, getattr(where, name))))
        yield spent


def summed(timings: Sequence[Timing], factors: Sequence[float] | None = None) -> Timing:
    """Σ factor x timing, without a result. factors: 1 where none are given."""
    pairs = list(zip(timings, factors or [1.0] * len(timings), strict=True))
    return Timing(None, sum(f * t.cpu for t, f in pairs), sum(f * t.wall for t, f in pairs))
