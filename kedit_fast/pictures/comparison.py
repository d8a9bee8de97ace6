"""Picture of a comparison: a group of bars for each metric, a bar with its 95 % interval for each side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from kedit_fast.basics import checks
from kedit_fast.pictures.figure import GRAY, add_title, finish, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kedit_fast.evaluation.compare import Comparison

_INKS = ("#1b6ca8", "#e08a1e", "#2a9d5c", "#c44536", "#8a4fbf", "#b8860b", "#4f7d8c")
_BASE = "#b9bec6"
_WIDTH, _BAR = 4.4, 0.105  # inches: a phone's page shows the whole width
_MOST = 1.0  # of a bar: what goes beyond, an entropy for instance, is in the table alone


def plot_comparison(
    comparison: Comparison, path: checks.AnyPath | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Horizontal bars of the means from 0 to 1, gray for the unedited model, with 95 % intervals.

    names: metrics (default: those that are shown); path: where to write the figure too, PNG or what its suffix says.
    Gives a ``matplotlib.figure.Figure``, whose label is its alt text.
    """
    means = {name: comparison.summary[name] for name in (comparison.shown() if names is None else names)}
    means = {name: sides for name, sides in means.items() if all(not abs(one.mean) > _MOST for one in sides.values())}
    sides = list(next(iter(comparison.summary.values())))
    inks = cycle(_INKS)
    ink = {side: _BASE if side == "base" else next(inks) for side in sides}
    step = 1 / (len(sides) + 1)
    with style():
        figure = new_figure(_WIDTH, 0.9 + 0.15 * len(sides) + _BAR * (len(sides) + 1) * len(means))
        axes = figure.subplots()
        for i, side in enumerate(sides):
            at = np.arange(len(means)) + (i - (len(sides) - 1) / 2) * step
            mean, low, high = np.array([one[side][:3] for one in means.values()], dtype=float).reshape(-1, 3).T
            around = np.stack([mean - low, high - mean]).clip(min=0)
            axes.barh(at, mean, step * 0.86, color=ink[side], label=side)
            axes.errorbar(mean, at, xerr=around, fmt="none", ecolor="#333333", elinewidth=0.7, capsize=1.2)
        axes.set_yticks(range(len(means)), [name.replace(".", "\n", 1) for name in means])
        axes.set_ylim(len(means) - 0.5, -0.5)
        lows = [one.low for each in means.values() for one in each.values() if one.low == one.low]
        axes.set_xlim(min([0.0, *lows]), 1.0)
        axes.axvline(0, color=GRAY, linewidth=0.6)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.3 / figure.get_figheight()), ncols=1)
        add_title(axes, "The same facts, edited in each way", "means with 95 % intervals over facts")
    return finish(figure, path, _alt(means))


def _alt(means) -> str:
    told = [
        f"{name}: {', '.join(f'{side} {one.mean:.2f}' for side, one in sides.items() if one.mean == one.mean)}"
        for name, sides in means.items()
    ]
    return f"Means of each side. {'; '.join(told)}."
