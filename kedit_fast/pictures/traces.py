"""Pictures of causal traces: heat maps in the published conventions, as figures, PNG bytes and HTML.

The conventions are those of Meng et al. 2022 (ROME), figures 1 and 2: a row for each token from the top down, subject
tokens starred, a column for each layer, the colors beginning at the corrupted run's value; purple for states, green
for MLPs, red for attention. Figures are made and drawn without pyplot, so no backend is chosen, no figure stays
registered, and a caller's own style changes nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kedit_fast.basics.intervals import Z95
from kedit_fast.basics.words import counted
from kedit_fast.pictures.figure import GRAY, add_title, draw_band, finish, layer_ticks, layers_width, new_figure, style
from kedit_fast.pictures.labels import (
    KIND_NAME,
    METRIC_NAME,
    ROLES,
    above,
    average_alt,
    impact,
    layer_label,
    metric,
    number,
    readable,
    restoring,
    runs_line,
    scale,
    token_labels,
    trace_alt,
    within,
)

if TYPE_CHECKING:
    from kedit_fast.tracing.results import AverageTrace, TraceResult

_NO_DATA = "#eeeeee"
_COLORMAP = {"state": "Purples", "mlp": "Greens", "attn": "Reds"}
INK = {"state": "#54278f", "mlp": "#006d2c", "attn": "#a50f15"}


# ---- figures


def plot_trace(result: TraceResult, path=None, normalized: bool = False, model: str = ""):
    """Heat map [T tokens, L layers] of p_restored; colors run from p_corrupted to the highest cell, as published.

    path: where to write the figure too; PNG, or what its suffix says (.pdf, .svg)
    normalized: show (p_restored - p_corrupted) / (p_clean - p_corrupted) on a scale from 0 to at least 1 instead
    model: a name for the axis label

    Gives a ``matplotlib.figure.Figure``, whose label is its alt text. Values below the scale take its lightest color.
    Raises ValueError where ``normalized`` is asked for and corruption changed nothing.
    """
    values, low, high = scale([result], normalized)
    right = _map_width(result) + 1.0
    title = textwrap.fill(impact(result), int(14 * right))
    with style():
        figure = new_figure(_label_width(result) + right, 1.05 + 0.2 * title.count("\n") + _map_height(result))
        axes = figure.subplots()
        draw_trace(axes, result, values[0], low, high, normalized)
        add_title(axes, title, runs_line(result))
        axes.set_xlabel(layer_label(result, model))
    return finish(figure, path, trace_alt(result))


def plot_kinds(results: Sequence[TraceResult], path=None, normalized: bool = False, model: str = ""):
    """Traces of one fact side by side on one scale, each in its kind's color; arguments as in ``plot_trace``.

    Raises ValueError for no results, or for results of several facts or metrics.
    """
    results = list(results)
    if not results:
        raise ValueError("no trace results to plot; expected one or more of the same fact")
    if len({(r.fact.text, r.tokens, r.answer_id, r.metric, r.p_corrupted) for r in results}) > 1:
        raise ValueError(
            f"these {len(results)} traces differ in fact, answer, metric or corruption; plot_kinds shows one fact"
        )
    first = results[0]
    values, low, high = scale(results, normalized)
    width = _label_width(first) + len(results) * (_map_width(first) + 0.85)
    with style():
        figure = new_figure(width, 1.35 + _map_height(first))
        panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for axes, result, cells in zip(panels, results, values, strict=True):
            draw_trace(axes, result, cells, low, high, normalized)
            axes.set_title(restoring(result), loc="left")
            axes.set_xlabel(textwrap.fill(layer_label(result, model), int(15 * _map_width(first))))
            axes.tick_params(axis="y", length=0)
        text = textwrap.shorten(" ".join(readable(first.fact.text).split()), int(11 * width), placeholder=" …")
        figure.suptitle(f"{text}\n{runs_line(first)}", x=0.01, ha="left", parse_math=False)
    return finish(figure, path, " ".join(trace_alt(r) for r in results))


def plot_average(average: AverageTrace, path=None, model: str = ""):
    """Average indirect effect by token role and layer, clipped at 0 as published; below it, unclipped, the last
    subject token and the last token with 95 % bands (1.96 standard errors).

    A role that no fact has is a gray row. path, model: as in ``plot_trace``.
    """
    n_layers = average.mean.shape[1]
    effect = np.clip(average.mean, 0, None)
    labels = [f"{role} (n = {n:,})" for role, n in zip(ROLES, average.counts, strict=True)]
    facts = counted(average.n_facts, "fact")
    metric = METRIC_NAME[average.metric].format("answer")
    with style():
        figure = new_figure(2.9 + layers_width(n_layers), 4.3)
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(6, 5))
        high = float(np.nan_to_num(effect).max())
        heat_map(top, effect, average.kind, 0.0, above(0.0, high), f"AIE on {metric}")
        top.set_yticks(np.arange(len(ROLES)) + 0.5, labels)
        top.tick_params(length=0)
        add_title(
            top,
            f"Average indirect effect (AIE) of restoring {KIND_NAME[average.kind]}",
            f"{facts}, average total effect {number(average.total_effect, average.metric)}",
        )
        draw_role(below, average, "last subject token", INK[average.kind], "-")
        draw_role(below, average, "last token", GRAY, "--")
        below.axhline(0, color=GRAY, linewidth=0.6)
        below.set_ylabel(f"AIE on {metric}")
        bands = "with 95 % bands" if np.isfinite(average.stderr).any() else None
        below.legend(title=bands, title_fontsize=7.5, alignment="left", loc="best")
        layer_ticks(below, n_layers)
        below.set_xlabel(within("center of the restored interval" if average.kind != "state" else "layer", model))
    return finish(figure, path, average_alt(average))


# ---- parts of figures


def _map_width(result: TraceResult) -> float:
    return layers_width(result.p_restored.shape[1])


def _map_height(result: TraceResult) -> float:
    return max(1.1, 0.19 * len(result.tokens))


def _label_width(result: TraceResult) -> float:
    from rich.cells import cell_len

    return 0.15 + 0.075 * max(map(cell_len, token_labels(result)))


def draw_trace(axes, result: TraceResult, values, low, high, normalized):
    name = "share of total effect" if normalized else metric(result, limit=11)
    heat_map(axes, values, result.kind, low, high, name)
    axes.set_yticks(np.arange(len(values)) + 0.5, token_labels(result), parse_math=False)
    begin, end = result.subject_span
    for label in axes.get_yticklabels()[begin:end]:
        label.set_fontweight("bold")
    layer_ticks(axes, values.shape[1])


def heat_map(axes, values, kind, low, high, name):
    mesh = axes.pcolor(np.ma.masked_invalid(values), cmap=_COLORMAP[kind], vmin=low, vmax=high)
    axes.set_facecolor(_NO_DATA)
    axes.spines[["top", "right"]].set_visible(True)
    axes.set_ylim(len(values), 0)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=max(18, 1.8 * len(values)))
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.ax.set_title(textwrap.fill(name, 12, break_long_words=False), fontsize=7.5, parse_math=False)


def draw_role(axes, average: AverageTrace, role: str, ink: str, line: str):
    mean, half = average.mean[ROLES.index(role)], Z95 * average.stderr[ROLES.index(role)]
    values = list(zip(mean, mean - half, mean + half, strict=True))
    draw_band(axes, np.arange(len(mean)) + 0.5, values, ink, line, role)
