"""What a reader of traces must know of their facts: which answer was traced, and whether corruption took it away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kedit_fast.basics.words import counted, first_few

if TYPE_CHECKING:
    from kedit_fast.tracing.results import TraceResult

NAMED = 3  # facts that a sentence names


def doubts(results: Sequence[TraceResult]) -> list[str]:
    """What a reader of these traces must know of their facts: sentences."""
    first = list({id(r.fact): r for r in results}.values())
    other = [r for r in first if r.fact.target_true and not _begins(r.fact.target_true, r.answer)]
    still = [r for r in first if not r.p_clean > r.p_corrupted]
    said = (
        ("traced is not target_true:", other, lambda r: f"{r.answer!r}, not {r.fact.target_true!r}"),
        (
            "corruption takes nothing from the answer, so cells say nothing:",
            still,
            lambda r: f"{r.answer!r} {r.p_clean:.3g}, corrupted {r.p_corrupted:.3g}",
        ),
    )
    return [_of(some, len(first), what, each) for what, some, each in said if some]


def _begins(target: str, answer: str) -> bool:
    """Whether a traced token can be the beginning of an answer."""
    return bool(answer.strip()) and target.strip().startswith(answer.strip())


def _of(some: list[TraceResult], n: int, what: str, each: Callable[[TraceResult], str]) -> str:
    named = first_few((f"{r.fact.label}: {each(r)}" for r in some), NAMED)
    return f"{len(some)} of {counted(n, 'fact')}: {what} {named}"
