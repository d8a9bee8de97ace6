"""Traces as one page; what stands on it is ``pictures/trace_page.py``."""

from collections.abc import Iterable

from kedit_fast.basics import checks
from kedit_fast.pictures.trace_page import page_of_traces
from kedit_fast.tracing.doubts import doubts
from kedit_fast.tracing.results import TraceResult, average


def trace_page(
    results: TraceResult | Iterable[TraceResult], path: checks.AnyPath | None = None, *, most: int = 10, model: str = ""
) -> str:
    """The page of these traces, as text; with ``path`` also a file, whole or not at all. No script, no other files.

    Averages by the role of the token come first, as published, then heat maps fact by fact. A cell says its token, its
    layer, its value, and how reliable its trace is, where a pointer rests, a finger taps or the keyboard stops.

    results: as ``trace`` gives them, or ``read_log``; the averages are over all of them
    most: facts whose heat maps are drawn, the first ones, as far as they are of 12,000 cells or fewer together,
        1.6 MB of page (the first fact always)
    model: a name for the first line
    Raises ValueError for no results, or for results that cannot be averaged, as ``average`` does.
    """
    results = checks.listed("results", results, TraceResult, "TraceResults, as trace gives them")
    most, model = checks.whole("most", most, like=10), checks.text("model", model, blank=True)
    return page_of_traces(results, average(results), doubts(results), path, most, model)
