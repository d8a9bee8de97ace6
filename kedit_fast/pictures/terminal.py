"""A causal trace as a heat map in the terminal."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kedit_fast.pictures.labels import ascii, impact, layer_label, number, runs_line, scale, token_labels

if TYPE_CHECKING:
    from kedit_fast.tracing.results import TraceResult

# Five stops of the same color maps, and ten steps of ink for one without color.
STOPS = {
    "state": ("fcfbfd", "dadaeb", "9e9ac8", "6a51a3", "3f007d"),
    "mlp": ("f7fcf5", "c7e9c0", "74c476", "238b45", "00441b"),
    "attn": ("fff5f0", "fcbba1", "fb6a4a", "cb181d", "67000d"),
}
_SHADES = " .:-=+*#%@"
_NARROWEST, _WIDEST = 40, 100  # columns


@dataclass(frozen=True)
class TerminalHeatMap:
    """The heat map of a trace for a terminal, up to 100 columns wide: printed by rich with colored cells, or shaded by
    characters where there is no color. Layers that do not fit are pooled, neighbors together, by their highest value,
    and a line says so. ``str()`` gives the form without color, 80 columns wide.
    """

    result: TraceResult

    def __str__(self) -> str:
        return "\n".join(line.plain.rstrip() for line in self._lines(80, color=False, ascii_only=False))

    def __rich_console__(self, console, options):
        width = max(_NARROWEST, min(options.max_width, _WIDEST))
        color = console.color_system is not None and not console.no_color
        yield from self._lines(width, color, options.ascii_only)

    def _lines(self, width: int, color: bool, ascii_only: bool) -> list:
        """``rich.text.Text``s: the title, the layers, a line for each token, the scale, notes."""
        from rich.cells import cell_len
        from rich.text import Text

        result = self.result
        labels = token_labels(result, width // 4, ascii_only)
        maxima = [number(row.max(), result.metric) for row in result.p_restored]
        margin = max(len("layer"), *map(cell_len, labels)) + 1
        values, pool, cell = _pooled(result.p_restored, width - margin - 1 - max(map(len, maxima)))
        _, low, high = scale([result], normalized=False)
        least, most = number(low, result.metric), number(high, result.metric)
        painted = partial(_painted, cell=cell, kind=result.kind, color=color)
        lines = [Text(f"{'layer':>{margin - 1}} {_layer_axis(values.shape[1], pool, cell)} max")]
        for label, row, highest in zip(labels, values, maxima, strict=True):
            head = " " * (margin - 1 - cell_len(label)) + label + " "
            lines.append(painted(head, (row - low) / (high - low), f" {highest}"))
        steps = min(20, width - margin - len(least) - len(most) - 2) // cell
        lines.append(painted(f"{'scale':>{margin - 1}} {least} ", np.linspace(0, 1, steps), f" {most}"))
        title = [impact(result), runs_line(result)]
        notes = f"* subject; layer: {layer_label(result, '')}" + f"; a column: highest of {pool} layers" * (pool > 1)
        above, below = ([Text(t) for t in _wrapped(texts, width, ascii_only)] for texts in (title, [notes]))
        return above + lines + below


def _wrapped(texts: list[str], width: int, ascii_only: bool) -> list[str]:
    from rich.cells import cell_len

    texts = [ascii(text) if ascii_only else text for text in texts]
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

    text, stops = Text(head), np.array([list(bytes.fromhex(stop)) for stop in STOPS[kind]])
    for share in np.clip(shares, 0, 1):
        rgb = bytes(round(np.interp(4 * share, range(5), channel)) for channel in stops.T)
        shade = _SHADES[round(share * (len(_SHADES) - 1))]
        text.append(" " * cell if color else shade * cell, f"on #{rgb.hex()}" if color else "")
    return text.append(tail)
