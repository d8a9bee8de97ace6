"""Pictures of causal traces: heat maps in the published conventions, as figures, PNG bytes, HTML and terminal text.

The conventions are those of Meng et al. 2022 (ROME), figures 1 and 2: a row for each token from the top down, subject
tokens starred, a column for each layer, the colors beginning at the corrupted run's value; purple for states, green
for MLPs, red for attention. Figures are made and drawn without pyplot, so no backend is chosen, no figure stays
registered, and a caller's own style changes nothing.
"""

import base64
import html
import io
import struct
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from .traces import ROLES, AverageTrace, TraceResult

DPI = 200
TICK_EVERY = 5  # layers
Z95 = 1.96  # standard errors on either side in a 95 % band

_NAME = {"state": "state", "mlp": "MLP", "attn": "attention"}
_COLORMAP = {"state": "Purples", "mlp": "Greens", "attn": "Reds"}
_INK = {"state": "#54278f", "mlp": "#006d2c", "attn": "#a50f15"}
_METRIC = {"prob": "p({})", "logprob": "log p({})", "logit_diff": "logit difference ({})"}
_GRAY, _NO_DATA = "#666666", "#eeeeee"
_STYLE = {
    "figure.facecolor": "white", "savefig.facecolor": "white", "font.size": 8, "axes.linewidth": 0.6,
    "axes.titlesize": 9.5, "axes.labelsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 7.5,
}  # fmt: skip
# Tokens come in all scripts; the default font has Latin, Greek, Cyrillic and some Arabic.
_WIDE_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Devanagari", "Noto Sans Hebrew", "Noto Sans Thai",
    "Arial Unicode MS", "Hiragino Sans", "PingFang SC", "Malgun Gothic", "Yu Gothic", "Microsoft YaHei",
)  # fmt: skip
# In a terminal: five stops of the same color maps, and ten steps of ink for one without color.
_STOPS = {
    "state": ("fcfbfd", "dadaeb", "9e9ac8", "6a51a3", "3f007d"),
    "mlp": ("f7fcf5", "c7e9c0", "74c476", "238b45", "00441b"),
    "attn": ("fff5f0", "fcbba1", "fb6a4a", "cb181d", "67000d"),
}
_SHADES = " .:-=+*#%@"
_NARROWEST, _WIDEST = 40, 100  # columns


# ---- figures


def plot_trace(result: TraceResult, path=None, normalized: bool = False, model: str = ""):
    """Heat map [T tokens, L layers] of p_restored; colors run from p_corrupted to the highest cell, as published.

    path: where to write the figure too; PNG, or what its suffix says (.pdf, .svg)
    normalized: show (p_restored - p_corrupted) / (p_clean - p_corrupted) on a scale from 0 to at least 1 instead
    model: a name for the axis label

    Gives a ``matplotlib.figure.Figure``, whose label is its alt text. Values below the scale take its lightest color.
    Raises ValueError where ``normalized`` is asked for and corruption changed nothing.
    """
    values, low, high = _scale([result], normalized)
    with _style():
        figure = _figure(_label_width(result) + _map_width(result) + 1.0, 1.05 + _map_height(result))
        axes = figure.subplots()
        _draw_trace(axes, result, values[0], low, high, normalized)
        _title(axes, _impact(result), _runs_line(result))
        axes.set_xlabel(_layer_label(result, model))
    return _finish(figure, path, _trace_alt(result))


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
    values, low, high = _scale(results, normalized)
    width = _label_width(first) + len(results) * (_map_width(first) + 0.85)
    with _style():
        figure = _figure(width, 1.35 + _map_height(first))
        panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for axes, result, cells in zip(panels, results, values, strict=True):
            _draw_trace(axes, result, cells, low, high, normalized)
            axes.set_title(_restoring(result), loc="left")
            axes.set_xlabel(textwrap.fill(_layer_label(result, model), int(15 * _map_width(first))))
            axes.tick_params(axis="y", length=0)
        text = textwrap.shorten(" ".join(_readable(first.fact.text).split()), int(11 * width), placeholder=" …")
        figure.suptitle(f"{text}\n{_runs_line(first)}", fontsize=9.5, x=0.01, ha="left", parse_math=False)
    return _finish(figure, path, " ".join(_trace_alt(r) for r in results))


def plot_average(average: AverageTrace, path=None, model: str = ""):
    """Average indirect effect by token role and layer, clipped at 0 as published; below it, unclipped, the last
    subject token and the last token with 95 % bands (1.96 standard errors).

    A role that no fact has is a gray row. path, model: as in ``plot_trace``.
    """
    n_layers = average.mean.shape[1]
    effect = np.clip(average.mean, 0, None)
    labels = [f"{role} (n = {n:,})" for role, n in zip(ROLES, average.counts, strict=True)]
    facts = f"{average.n_facts:,} fact{'s' * (average.n_facts != 1)}"
    metric = _METRIC[average.metric].format("answer")
    with _style():
        figure = _figure(2.9 + _layers_width(n_layers), 4.3)
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(6, 5))
        high = float(np.nan_to_num(effect).max())
        _heat_map(top, effect, average.kind, 0.0, _above(0.0, high), f"AIE on {metric}")
        top.set_yticks(np.arange(len(ROLES)) + 0.5, labels)
        top.tick_params(length=0)
        _title(
            top,
            f"Average indirect effect (AIE) of restoring {_NAME[average.kind]}",
            f"{facts}, average total effect {_number(average.total_effect, average.metric)}",
        )
        _draw_band(below, average, "last subject token", _INK[average.kind], "-")
        _draw_band(below, average, "last token", _GRAY, "--")
        below.axhline(0, color=_GRAY, linewidth=0.6)
        below.set_ylabel(f"AIE on {metric}")
        below.spines[["top", "right"]].set_visible(False)
        bands = "with 95 % bands" if np.isfinite(average.stderr).any() else None
        below.legend(frameon=False, title=bands, title_fontsize=7.5, alignment="left", loc="best")
        _layer_ticks(below, n_layers)
        below.set_xlabel(_within("center of the restored interval" if average.kind != "state" else "layer", model))
    return _finish(figure, path, _average_alt(average))


def figure_png(figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def figure_html(figure) -> str:
    """The figure as one <img> element that holds its own PNG data and an alt text."""
    return png_html(figure_png(figure), figure_alt(figure))


def figure_alt(figure) -> str:
    """What the figure shows, in words: its label (set by the functions above), else its titles."""
    titles = [figure.get_suptitle(), *(axes.get_title(loc) for axes in figure.axes for loc in ("left", "center"))]
    return str(figure.get_label()) or ". ".join(t for t in titles if t) or "figure"


def png_html(png: bytes, alt: str) -> str:
    """An <img> element that holds the PNG, at half its pixels (made for dense screens), never wider than the page.

    Raises ValueError for bytes that are no PNG.
    """
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        raise ValueError(f"{png[:8]!r}… is no PNG; make the bytes with figure_png(figure)")
    width, height = struct.unpack(">II", png[16:24])
    data = base64.b64encode(png).decode()
    return (
        f'<img alt="{html.escape(alt)}" width="{width // 2}" height="{height // 2}" '
        f'style="max-width:100%;height:auto" src="data:image/png;base64,{data}">'
    )


# ---- the terminal


def terminal_heatmap(result: TraceResult, width: int | None = None) -> "TerminalHeatMap":
    """The heat map for a terminal: printed by rich with colored cells, or shaded by characters where there is no color.

    width: columns, 40 or more; None: the console's, up to 100. Layers that do not fit are pooled, neighbors together,
        by their highest value, and a line says so.

    ``str()`` gives the form without color, 80 columns wide. Raises ValueError for a width below 40.
    """
    if width is not None and width < _NARROWEST:
        raise ValueError(f"width {width}: a heat map takes {_NARROWEST} columns or more")
    return TerminalHeatMap(result, width)


@dataclass(frozen=True)
class TerminalHeatMap:
    """What ``terminal_heatmap`` gives: a rich renderable that is text too."""

    result: TraceResult
    width: int | None

    def __str__(self) -> str:
        return "\n".join(line.plain.rstrip() for line in self._lines(self.width or 80, color=False, ascii_only=False))

    def __rich_console__(self, console, options):
        width = self.width or max(_NARROWEST, min(options.max_width, _WIDEST))
        color = console.color_system is not None and not console.no_color
        yield from self._lines(width, color, options.ascii_only)

    def _lines(self, width: int, color: bool, ascii_only: bool) -> list:
        """``rich.text.Text``s: the title, the layers, a line for each token, the scale, notes."""
        from rich.cells import cell_len
        from rich.text import Text

        result = self.result
        labels = _token_labels(result, width // 4, ascii_only)
        maxima = [_number(row.max(), result.metric) for row in result.p_restored]
        margin = max(len("layer"), *map(cell_len, labels)) + 1
        values, pool, cell = _pooled(result.p_restored, width - margin - 1 - max(map(len, maxima)))
        _, low, high = _scale([result], normalized=False)
        least, most = _number(low, result.metric), _number(high, result.metric)
        painted = partial(_painted, cell=cell, kind=result.kind, color=color)
        lines = [Text(f"{'layer':>{margin - 1}} {_layer_axis(values.shape[1], pool, cell)} max")]
        for label, row, highest in zip(labels, values, maxima, strict=True):
            head = " " * (margin - 1 - cell_len(label)) + label + " "
            lines.append(painted(head, (row - low) / (high - low), f" {highest}"))
        steps = min(20, width - margin - len(least) - len(most) - 2) // cell
        lines.append(painted(f"{'scale':>{margin - 1}} {least} ", np.linspace(0, 1, steps), f" {most}"))
        title = [_impact(result), _runs_line(result)]
        notes = f"* subject; layer: {_layer_label(result, '')}" + f"; a column: highest of {pool} layers" * (pool > 1)
        above, below = ([Text(t) for t in _wrapped(texts, width, ascii_only)] for texts in (title, [notes]))
        return above + lines + below


def _wrapped(texts: list[str], width: int, ascii_only: bool) -> list[str]:
    from rich.cells import cell_len

    texts = [_ascii(text) if ascii_only else text for text in texts]
    return [line for text in texts for line in textwrap.wrap(text, width + len(text) - cell_len(text))]


def _pooled(values: np.ndarray, room: int) -> tuple[np.ndarray, int, int]:
    """[T, L] as [T, columns] that fit the room: the highest of each ``pool`` layers; a column's width is 1 or 2."""
    pool = -(-values.shape[1] // room)
    starts = range(0, values.shape[1], pool)
    return np.maximum.reduceat(values, starts, axis=1), pool, min(2, room // len(starts))


def _layer_axis(columns: int, pool: int, cell: int) -> str:
    """Layer numbers over their columns, as often as they can be read."""
    every = next(n for n in (5, 10, 20, 50, 100) if n * cell >= 4 * pool)
    axis = ""
    for layer in range(0, columns * pool, every):
        axis = f"{axis:{layer // pool * cell}}{layer}"
    return f"{axis:{columns * cell}}"[: columns * cell]


def _painted(head: str, shares: np.ndarray, tail: str, *, cell: int, kind: str, color: bool):
    """``rich.text.Text``: a cell for each share of the scale, darker where it is higher, between head and tail."""
    from rich.text import Text

    text, stops = Text(head), np.array([list(bytes.fromhex(stop)) for stop in _STOPS[kind]])
    for share in np.clip(shares, 0, 1):
        rgb = bytes(round(np.interp(4 * share, range(5), channel)) for channel in stops.T)
        shade = _SHADES[round(share * (len(_SHADES) - 1))]
        text.append(" " * cell if color else shade * cell, f"on #{rgb.hex()}" if color else "")
    return text.append(tail)


# ---- parts of figures


def _style():
    """The style of all figures, whatever the caller's own; put back on leaving."""
    from matplotlib import style

    return style.context(["default", _STYLE | {"font.family": _font_families()}])


@cache
def _font_families() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _WIDE_FONTS if name in installed)]


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # inches
    return figure


def _finish(figure, path, alt: str):
    figure.set_label(alt)
    with _style():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out anew at each drawing, it would move by a pixel
    if path is not None and Path(path).suffix.lower() in ("", ".png"):
        Path(path).write_bytes(figure_png(figure))
    elif path is not None:
        with _style():
            figure.savefig(path)
    return figure


def _layers_width(n_layers: int) -> float:
    return max(3.0, n_layers * (0.11 if n_layers <= 48 else 0.085))  # inches


def _map_width(result: TraceResult) -> float:
    return _layers_width(result.p_restored.shape[1])


def _map_height(result: TraceResult) -> float:
    return max(1.1, 0.19 * len(result.tokens))


def _label_width(result: TraceResult) -> float:
    from rich.cells import cell_len

    return 0.15 + 0.075 * max(map(cell_len, _token_labels(result)))


def _scale(results: Sequence[TraceResult], normalized: bool) -> tuple[list[np.ndarray], float, float]:
    """Values [T, L] of each result and the ends of the scale they share."""
    if normalized:
        values = [r.normalized_effect for r in results]
        if not all(np.isfinite(v).any() for v in values):
            raise ValueError("corruption did not change the answer here, so there is no effect to normalize by")
        return values, 0.0, max(1.0, *(float(np.nanmax(v)) for v in values))
    low = results[0].p_corrupted
    return [r.p_restored for r in results], low, _above(low, max(float(np.nanmax(r.p_restored)) for r in results))


def _above(low: float, high: float) -> float:
    """The upper end of a scale: ``high`` where it is one, else a little above ``low`` (a trace without effect)."""
    return high if high > low else low + 0.01


def _draw_trace(axes, result: TraceResult, values, low, high, normalized):
    name = "share of total effect" if normalized else _metric(result, limit=11)
    _heat_map(axes, values, result.kind, low, high, name)
    axes.set_yticks(np.arange(len(values)) + 0.5, _token_labels(result), parse_math=False)
    begin, end = result.subject_span
    for label in axes.get_yticklabels()[begin:end]:
        label.set_fontweight("bold")
    _layer_ticks(axes, values.shape[1])


def _heat_map(axes, values, kind, low, high, name):
    mesh = axes.pcolor(np.ma.masked_invalid(values), cmap=_COLORMAP[kind], vmin=low, vmax=high)
    axes.set_facecolor(_NO_DATA)
    axes.set_ylim(len(values), 0)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=max(18, 1.8 * len(values)))
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.ax.set_title(textwrap.fill(name, 12, break_long_words=False), fontsize=7.5, parse_math=False)


def _layer_ticks(axes, n_layers: int):
    layers = np.arange(0, n_layers, TICK_EVERY)
    axes.set_xlim(0, n_layers)
    axes.set_xticks(layers + 0.5, layers)


def _title(axes, title: str, subtitle: str):
    axes.set_title(title, loc="left", pad=16)
    axes.annotate(
        subtitle, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=7.5, color=_GRAY,
        parse_math=False,
    )  # fmt: skip


def _draw_band(axes, average: AverageTrace, role: str, color: str, line: str):
    mean, stderr = average.mean[ROLES.index(role)], average.stderr[ROLES.index(role)]
    if not np.isfinite(mean).any():
        return
    x = np.arange(len(mean)) + 0.5
    axes.fill_between(x, mean - Z95 * stderr, mean + Z95 * stderr, color=color, alpha=0.18, linewidth=0)
    axes.plot(x, mean, line, color=color, linewidth=1.4, label=role)


# ---- words


def _readable(text: str) -> str:
    """Text on one line: line ends, tabs and characters that do not print made visible."""
    marks = {"\n": "↵", "\t": "⇥"}
    return "".join(marks.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def _ascii(text: str) -> str:
    return text.encode("unicode_escape").decode()


def _token_labels(result: TraceResult, limit: int = 22, ascii_only: bool = False) -> list[str]:
    """A label for each token, spaces shown as a dot, tokens of the subject with a star."""
    labels = []
    for i, token in enumerate(result.tokens):
        label = _ascii(token).replace(" ", "_") if ascii_only else _readable(token).replace(" ", "·")
        labels.append((_cut(label, limit) or "(empty)") + "*" * (result.subject_span[0] <= i < result.subject_span[1]))
    return labels


def _metric(result: TraceResult, limit: int = 20) -> str:
    return _METRIC[result.metric].format(_cut(_readable(result.answer.strip() or result.answer), limit))


def _cut(text: str, limit: int) -> str:
    """At most ``limit`` terminal columns of the text; a Chinese character takes two."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= limit else set_cell_size(text, limit - 2).rstrip() + ".."


def _number(value: float, metric: str = "prob") -> str:
    """A probability to three places, or to two digits where that shows nothing; nats to two places."""
    if metric != "prob":
        return f"{value:.2f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def _impact(result: TraceResult) -> str:
    return f"Impact of {_restoring(result)}" + " after corrupted input" * (result.sever is None)


def _restoring(result: TraceResult) -> str:
    return f"restoring {_NAME[result.kind]}" + (f" with {_NAME[result.sever]} severed" if result.sever else "")


def _runs_line(result: TraceResult) -> str:
    clean, corrupted = (_number(p, result.metric) for p in (result.p_clean, result.p_corrupted))
    how = "subject replaced" if result.noise is None else f"noise {result.noise:.3g}"
    return f"{_metric(result)}: clean {clean}, corrupted {corrupted} ({how})"


def _within(what: str, model: str) -> str:
    return f"{what} within {model}" if model else what


def _layer_label(result: TraceResult, model: str) -> str:
    if result.kind == "state":
        return _within("single restored layer", model)
    return _within(f"center of interval of {result.window} restored {_NAME[result.kind]} layers", model)


def _trace_alt(result: TraceResult) -> str:
    token, layer = np.unravel_index(np.nanargmax(result.p_restored), result.p_restored.shape)
    return (
        f"Heat map of {len(result.tokens)} tokens by {result.p_restored.shape[1]} layers: {_metric(result)} after "
        f"{result.fact.text!r}, {_restoring(result)}. {_runs_line(result)}; highest "
        f"{_number(result.p_restored[token, layer], result.metric)} at token {result.tokens[token]!r}, layer {layer}."
    )


def _average_alt(average: AverageTrace) -> str:
    text = f"Average indirect effect of restoring {_NAME[average.kind]} over {average.n_facts} facts, by token role."
    if not np.isfinite(average.mean).any():
        return text
    role, layer = np.unravel_index(np.nanargmax(average.mean), average.mean.shape)
    return f"{text} Highest {_number(average.mean[role, layer], average.metric)} at the {ROLES[role]}, layer {layer}."
