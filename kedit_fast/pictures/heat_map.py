"""A heat map of a page whose cells say what they are: where a pointer rests, a finger taps, or the keyboard stops.

It needs no script. A cell is a radio button, a row of cells a group of them: Tab steps from row to row, the arrow keys
from cell to cell, and what a cell says is its accessible name, which a style sheet shows beside it. On a screen of up
to 600 pixels the map lies on its side, layers from the top down, where its cells are wide enough for a finger, and what
is said stands at the foot of the screen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kedit_fast.basics.printing import html_text
from kedit_fast.pictures.figure import TICK_EVERY
from kedit_fast.pictures.terminal import STOPS

SHADES = 24  # of a scale: a class of two letters a cell where a color of its own would be a third of the page
DARK = "1d2128"  # where the scale begins on dark paper: its --band
_NONE = "sx"  # of a cell without a number


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells, a column a layer.

    name: of this map alone on its page, letters and digits
    kind: whose colors, a key of ``terminal.STOPS``
    labels: a text a row; strong: the rows whose labels are bold
    shares: [rows, layers] places on the scale, 0 to 1, beyond which the last color stays; NaN: no value
    says: [rows][layers] what each cell says
    ends: texts of the scale's two ends; measure: of what it is
    caption: stands above it; alt: what it shows, in words
    """

    name: str
    kind: str
    labels: Sequence[str]
    shares: np.ndarray
    says: Sequence[Sequence[str]]
    ends: tuple[str, str]
    measure: str = ""
    caption: str = ""
    alt: str = ""
    strong: Sequence[int] = ()

    def markup(self) -> str:
        """The map as one <figure> element."""
        caption = f"<figcaption>{html_text(self.caption)}</figcaption>\n" if self.caption else ""
        n_rows, n_layers = self.shares.shape
        rows = "\n".join(map(self._row, range(n_rows)))
        return (
            f'<figure class="map {self.kind}">\n{caption}'
            f'<div class="cells" role="group" aria-label="{html_text(self.alt or self.caption or "heat map")}" '
            f'style="--rows:{n_rows};--layers:{n_layers}">\n{rows}\n{_axis(n_layers)}\n</div>\n{self._scale()}\n</figure>'
        )

    def _row(self, row: int) -> str:
        strong = " strong" * (row in self.strong)
        n_layers = self.shares.shape[1]
        cells = [f'<span class="label{strong}" aria-hidden="true">{html_text(self.labels[row])}</span>']
        for layer, (share, says) in enumerate(zip(self.shares[row], self.says[row], strict=True)):
            side = " r" * (2 * layer >= n_layers)  # what it says stands to the left of it
            cells.append(
                f'<input type="radio" name="{self.name}-{row}" class="{_shade(float(share))}{side}" '
                f'aria-label="{html_text(says)}">'
            )
        return "".join(cells)

    def _scale(self) -> str:
        low, high = map(html_text, self.ends)
        colors = "".join(f'<i class="{_shade(place / 7)}"></i>' for place in range(8))
        return f'<p class="scale">{html_text(self.measure)} <span>{low}</span>{colors}<span>{high}</span></p>'


def map_style(body: str) -> str:
    """What a page's style needs for the heat maps that its body has: nothing where there is none."""
    kinds = [kind for kind in STOPS if f'<figure class="map {kind}">' in body]
    if not kinds:
        return ""
    light, dark = ("".join(_colors(kind, dark) for kind in kinds) for dark in (False, True))
    paper = f"@media print {{ {light}}}\n"  # of a browser that is dark
    return f"{_STYLE}{light}\n@media (prefers-color-scheme: dark) {{ {dark}}}\n{paper}"


def _shade(share: float) -> str:
    return _NONE if math.isnan(share) else f"s{round(min(1.0, max(0.0, share)) * (SHADES - 1))}"


def _colors(kind: str, dark: bool) -> str:
    """A rule for each shade. On dark paper the scale goes the other way: what is much stands out from the paper."""
    colors = (DARK, *STOPS[kind][-2::-1]) if dark else STOPS[kind]
    stops = np.array([list(bytes.fromhex(color)) for color in colors], dtype=float)
    places = np.linspace(0, len(stops) - 1, SHADES)
    ramp = np.stack([np.interp(places, range(len(stops)), channel) for channel in stops.T], 1).round().astype(np.uint8)
    return "".join(f".{kind} .s{shade}{{background:#{bytes(rgb).hex()}}}" for shade, rgb in enumerate(ramp))


def _axis(n_layers: int) -> str:
    spans = [
        f'<span class="axis" style="--span:{min(TICK_EVERY, n_layers - first)}">{first}</span>'
        for first in range(0, n_layers, TICK_EVERY)
    ]
    return f'<span class="axis corner">layer</span>{"".join(spans)}'


_STYLE = """
.map figcaption { margin: 0 0 .5rem; color: var(--ink); }
.cells { display: grid; grid-template-columns: max-content repeat(var(--layers), minmax(0, 1fr));
  grid-auto-rows: 1.25rem; max-width: calc(12rem + 1.75rem * var(--layers)); border: 0; font-size: .8rem; }
.label { padding-right: .5rem; text-align: right; white-space: pre; line-height: 1.25rem; }
.strong { font-weight: 700; }
.axis { grid-column: span var(--span, 1); color: var(--soft); line-height: 1.4rem; }
.corner { padding-right: .5rem; text-align: right; }
.cells input { appearance: none; -webkit-appearance: none; position: relative; min-width: 0; width: 100%; height: 100%;
  margin: 0; border: 0; border-radius: 0; cursor: crosshair; forced-color-adjust: none; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.cells .sx { background: repeating-linear-gradient(45deg, var(--line) 0 1px, transparent 1px 5px); }
.cells input:hover, .cells input:focus { z-index: 2; outline: 2px solid var(--ink); outline-offset: -1px; }
.cells input:hover { z-index: 3; }
.cells input:hover::after, .cells input:focus::after { content: attr(aria-label); position: absolute; left: 0;
  bottom: calc(100% + .3rem); box-sizing: border-box; width: max-content; max-width: min(28rem, 42vw);
  padding: .3rem .6rem; border: 1px solid var(--line); border-radius: 4px; background: var(--paper); color: var(--ink);
  font: .85rem/1.4 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; white-space: pre-wrap;
  overflow-wrap: anywhere; pointer-events: none; box-shadow: 0 2px 8px rgb(0 0 0 / .2); }
.cells .r::after { left: auto !important; right: 0; }
.scale { display: flex; flex-wrap: wrap; align-items: center; margin: .4rem 0 0; color: var(--soft); font-size: .8rem; }
.scale i { width: 1rem; height: .8rem; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.scale span { margin: 0 .4rem; }
@media (max-width: 37.5rem) {
  .cells { grid-auto-flow: column; grid-template: max-content repeat(var(--layers), 1rem) / max-content;
    grid-auto-columns: minmax(1rem, 1fr); overflow-x: auto; max-width: none; }
  .label { writing-mode: vertical-rl; rotate: 180deg; padding: .4rem 0 0; text-align: left; justify-self: center; }
  .axis { order: -1; grid-column: auto; grid-row: span var(--span, 1); padding-right: .4rem; text-align: right;
    line-height: 1rem; position: sticky; left: 0; z-index: 1; background: var(--paper); }
  .corner { align-self: end; }
  .cells input:hover::after, .cells input:focus::after, .cells .r::after { position: fixed; left: 0 !important;
    right: 0; bottom: 0; width: auto; max-width: none; border-width: 1px 0 0; border-radius: 0;
    padding: .75rem 1.25rem; font-size: 1rem; }
}
"""
