"""One style for every figure, and figures as bytes and as HTML."""

from __future__ import annotations

import base64
import io
import struct
from functools import cache
from pathlib import Path

import numpy as np

from kedit_fast.basics import checks
from kedit_fast.basics.files import replace_file
from kedit_fast.basics.printing import html_text

DPI = 200


TICK_EVERY = 5  # layers


GRAY = "#666666"


_STYLE = {
    "figure.facecolor": "white", "savefig.facecolor": "white", "font.size": 8, "axes.linewidth": 0.6,
    "axes.titlesize": 9.5, "axes.labelsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 7.5,
    "figure.titlesize": 9.5, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 1.4, "lines.markersize": 4,
}  # fmt: skip


# Tokens come in all scripts; the default font has Latin, Greek, Cyrillic and some Arabic.
_WIDE_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Devanagari", "Noto Sans Hebrew", "Noto Sans Thai",
    "Arial Unicode MS", "Hiragino Sans", "PingFang SC", "Malgun Gothic", "Yu Gothic", "Microsoft YaHei",
)  # fmt: skip


def figure_png(figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with style():
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
        f'<img alt="{html_text(alt)}" width="{width // 2}" height="{height // 2}" '
        f'style="max-width:100%;height:auto" src="data:image/png;base64,{data}">'
    )


def style():
    """The style of all figures, whatever the caller's own; put back on leaving."""
    from matplotlib import style

    return style.context(["default", _STYLE | {"font.family": _font_families()}])


@cache
def _font_families() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _WIDE_FONTS if name in installed)]


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # inches
    return figure


def finish(figure, path, alt: str):
    path = checks.optional(checks.path, "path", path)
    figure.set_label(alt)
    with style():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out twice, it moves: the second drawing gave other bytes
    if path is not None:
        _write(figure, path)
    return figure


def _write(figure, path) -> None:
    """The figure in the format that the path's suffix names (none: PNG), whole or not at all."""
    suffix = Path(path).suffix.lower().removeprefix(".") or "png"
    with replace_file(path) as unfinished:
        if suffix == "png":
            unfinished.write_bytes(figure_png(figure))
        else:
            with style():
                figure.savefig(unfinished, format=suffix)


def layers_width(n_layers: int) -> float:
    return max(3.0, n_layers * (0.11 if n_layers <= 48 else 0.085))  # inches


def layer_ticks(axes, n_layers: int):
    layers = np.arange(0, n_layers, TICK_EVERY)
    axes.set_xlim(0, n_layers)
    axes.set_xticks(layers + 0.5, layers)


def draw_band(axes, x, values, ink: str, line: str, label: str, marker: str = "") -> None:
    """A line over its 95 % band; nothing where no mean is a number. values: (mean, low, high, ...) at each x"""
    mean, low, high = np.array([value[:3] for value in values], dtype=float).T
    if np.isfinite(mean).any():
        axes.fill_between(x, low, high, color=ink, alpha=0.15, linewidth=0)
        axes.plot(x, mean, line, color=ink, marker=marker, label=label)


def add_title(axes, title: str, subtitle: str):
    axes.set_title(title, loc="left", pad=16)
    axes.annotate(
        subtitle, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=7.5, color=GRAY,
        parse_math=False,
    )  # fmt: skip
