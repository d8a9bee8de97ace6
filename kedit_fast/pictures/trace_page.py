"""Traces as one page: averages by the role of the token first, as published, then fact by fact.

A cell says its token, its layer, what the answer's probability is there, and how reliable its trace is (see
``pictures.heat_map``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import numpy as np

from kedit_fast.basics import checks
from kedit_fast.basics.files import write_text
from kedit_fast.basics.words import counted
from kedit_fast.pictures.heat_map import HeatMap
from kedit_fast.pictures.labels import (
    KIND_NAME,
    LOCALIZATION_WARNING,
    METRIC_NAME,
    ROLES,
    above,
    average_alt,
    impact,
    metric,
    model_label,
    number,
    readable,
    reliable,
    runs_line,
    scale,
    token_labels,
    trace_alt,
)
from kedit_fast.pictures.page import Details, Section, Table, render_report

if TYPE_CHECKING:
    from kedit_fast.tracing.results import AverageTrace, TraceResult

TITLE = "Where the facts are"
MOST_CELLS = 12_000  # of the facts that are drawn, 135 bytes each: 1.6 MB. Ten facts on SmolLM2 are about 9,000
MOST_ROWS = 100  # facts of the table
LAYERS = 5  # that the averages name, as many as MEMIT edits
HOW = (
    "The subject of each prompt is corrupted until the model loses the answer. Then one thing is put back to its clean "
    "value, at one token and one layer: dark cells (bright ones on a dark page) bring the answer back. Rest on a cell, "
    "tap it, or step to it with Tab and the arrow keys: it says what it is."
)
RELIABILITY = (
    "Reliability is the rank correlation that is to be expected between a trace's cells and those of a second trace "
    "with as many other noise draws. Differences that are smaller than that noise mean nothing."
)


def page_of_traces(
    results: Sequence[TraceResult],
    means: dict[str, AverageTrace],
    notes: Sequence[str],
    path: checks.AnyPath | None = None,
    most: int = 10,
    model: str = "",
) -> str:
    """The page as text; with ``path`` also a file. means: of all the results, by kind; notes: what a reader
    must know of them; most, model: as in
    ``tracing.page.trace_page``."""
    facts = [list(each) for _, each in groupby(results, key=lambda result: result.fact)]
    of = f" in {model_label(model)}" if model else ""
    first_line = f"{counted(len(results), 'trace')} of {counted(len(facts), 'fact')}{of}, {_how(results[0])}."
    text = render_report(TITLE, first_line, [_averages(results, means, notes, len(facts)), _facts(facts, most)])
    if (path := checks.optional(checks.path, "path", path)) is not None:
        write_text(path, text)
    return text


def _how(result: TraceResult) -> str:
    return "subjects replaced" if result.noise is None else f"noise {result.noise:.3g} on the subjects' embeddings"


# ---- averages


def _averages(
    results: Sequence[TraceResult], means: dict[str, AverageTrace], notes: Sequence[str], n_facts: int
) -> Section:
    rows = [
        (
            KIND_NAME[kind],
            mean.where(results, LAYERS),
            number(mean.total_effect, mean.metric),
            mean.reliability,
        )
        for kind, mean in means.items()
    ]
    table = Table(("what is put back", "where the answer comes back", "total effect", "reliability"), rows)
    maps = [_average_map(kind, mean) for kind, mean in means.items()] if n_facts > 1 else []
    return Section(
        "By the role of the token" if n_facts > 1 else "Where it is strongest",
        [HOW, table, *(f"Note: {note}." for note in notes), f"Mind that {LOCALIZATION_WARNING}.", *maps, RELIABILITY],
    )


def _average_map(kind: str, mean: AverageTrace) -> HeatMap:
    """Clipped at 0, as published and as ``plot_average`` draws it."""
    high = above(0.0, float(np.nan_to_num(mean.mean).max(initial=0.0)))
    says = [[_of_role(mean, role, layer) for layer in range(mean.mean.shape[1])] for role in range(len(ROLES))]
    facts = counted(mean.n_facts, "fact")
    return HeatMap(
        f"average-{kind}", kind, [f"{role} ({n:,})" for role, n in zip(ROLES, mean.counts, strict=True)],
        mean.mean / high, says, (number(0.0), number(high, mean.metric)), METRIC_NAME[mean.metric].format("answer"),
        f"Average indirect effect of restoring {KIND_NAME[kind]}, {facts}", average_alt(mean),
    )  # fmt: skip


def _of_role(mean: AverageTrace, role: int, layer: int) -> str:
    place, n = f"{ROLES[role]}, layer {layer}", int(mean.counts[role])
    if not n:
        return f"{place}: no fact has such a token"
    spread = mean.stderr[role, layer]
    error = "" if np.isnan(spread) else f" ± {number(spread, mean.metric)}"
    effect = number(mean.mean[role, layer], mean.metric)
    known = "" if math.isnan(mean.reliability) else f"; reliability of a fact's trace {mean.reliability:.2f}"
    return f"{place}: mean effect {effect}{error}, {counted(n, 'token')}{known}"


# ---- facts


def _facts(facts: Sequence[list[TraceResult]], most: int) -> Section:
    sizes = accumulate(sum(result.p_restored.size for result in kinds) for kinds in facts[:most])
    n = sum(i == 0 or size <= MOST_CELLS for i, size in enumerate(sizes))
    drawn = [Details(_line(kinds), fact_maps(kinds, i), open=not i) for i, kinds in enumerate(facts[:n])]
    if len(facts) == 1:
        return Section("The fact", [block for each in drawn for block in (each.summary, *each.blocks)])
    said = f"{n} of {len(facts)} facts are drawn, the first ones." if n < len(facts) else f"All {n} facts are drawn."
    return Section("Fact by fact", [said, *drawn, *_strongest(facts)])


def _line(kinds: Sequence[TraceResult]) -> str:
    first = kinds[0]
    return f"{readable(first.fact.text)} → {readable(first.answer.strip() or first.answer)}"


def fact_maps(kinds: Sequence[TraceResult], index: int = 0) -> list:
    """Blocks of a page: the maps of a fact on one scale, as ``plot_kinds`` draws them. index: of the fact on it"""
    values, low, high = scale(kinds, normalized=False)
    ends = number(low, kinds[0].metric), number(high, kinds[0].metric)
    maps = []
    for i, (result, each) in enumerate(zip(kinds, values, strict=True)):
        name, caption = f"fact-{index}-{i}", impact(result) + _window(result)
        shares, strong = (each - low) / (high - low), range(*result.subject_span)
        maps.append(HeatMap(
            name, result.kind, token_labels(result), shares, _cells(result), ends, metric(result), caption,
            trace_alt(result), strong,
        ))  # fmt: skip
    return [f"{runs_line(kinds[0])}{_reliabilities(kinds)}. Tokens of the subject have a star.", *maps]


def _window(result: TraceResult) -> str:
    return "" if result.kind == "state" else f", {counted(result.window, 'layer')} around each"


def _reliabilities(kinds: Sequence[TraceResult]) -> str:
    known = [f"{KIND_NAME[r.kind]} {r.reliability:.2f}" for r in kinds if not math.isnan(r.reliability)]
    return f"; reliability: {', '.join(known)}" if known else ""


def _cells(result: TraceResult) -> list[list[str]]:
    name, known = metric(result), reliable(result.reliability).replace(",", ";", 1) or "; reliability not known"
    begin, end = result.subject_span
    said = []
    for t, token in enumerate(result.tokens):
        place = f"“{readable(token)}”{' (subject)' * (begin <= t < end)}"
        said.append([
            f"{place}, layer {layer}: {name} {number(p, result.metric)}{_estimated(result, t, layer)}{known}"
            for layer, p in enumerate(result.p_restored[t])
        ])  # fmt: skip
    return said


def _estimated(result: TraceResult, token: int, layer: int) -> str:
    if result.exact is None or result.exact[token, layer]:
        return ""
    return " (partly between computed layers)" if result.stride > 1 else " (an estimate)"


def _strongest(facts: Sequence[list[TraceResult]]) -> list:
    """A table of where each fact is strongest, behind a line that opens it."""
    kinds = [KIND_NAME[result.kind] for result in facts[0]]
    if any([KIND_NAME[r.kind] for r in each] != kinds for each in facts):
        return []
    rows = []
    for each in facts[:MOST_ROWS]:
        first = each[0]
        ends = (number(first.p_clean, first.metric), number(first.p_corrupted, first.metric))
        rows.append((readable(first.fact.text), readable(first.answer.strip()), *ends, *map(_place, each)))
    caption = f"The first {MOST_ROWS} of {len(facts)} facts" if len(facts) > MOST_ROWS else ""
    headers = ("prompt", "answer", "clean", "corrupted", *(f"{kind} strongest at" for kind in kinds))
    return [Details("Where each fact is strongest", [Table(headers, rows, caption)])]


def _place(result: TraceResult) -> str:
    token, layer = np.unravel_index(int(np.nanargmax(result.p_restored)), result.p_restored.shape)
    return (
        f"“{readable(result.tokens[token])}”, layer {layer}: {number(result.p_restored[token, layer], result.metric)}"
    )
