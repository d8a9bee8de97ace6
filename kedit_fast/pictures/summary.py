"""Picture of an edit's scores: a bar each, with its interval, and the base model's behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedit_fast.basics import checks
from kedit_fast.pictures.figure import add_title, finish, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kedit_fast.experiments.edit_summary import EditSummary

_EDITED, _BASE = "#1b6ca8", "#b9bec6"


def plot_scores(summary: EditSummary, path: checks.AnyPath | None = None) -> Figure:
    """Bars from 0 to 1 of the scores that were measured, and of P of the two answers, gray for the unedited model.

    path: where to write it too. Gives a ``matplotlib.figure.Figure``, whose label is its alt text.
    """
    panels = [
        ("Is the edit real?", "with the edit (blue) and without (gray); 95 % intervals", summary.scores),
        ("P of the answers", "mean over the facts", summary.probabilities),
    ]
    told = [(*words, {name: one for name, one in found.items() if one.edited.n}) for *words, found in panels]
    told = [panel for panel in told if panel[-1]]
    with style():
        figure = new_figure(4.4, sum(0.9 + 0.42 * len(found) for *_, found in told))
        heights = [0.9 / 0.42 + len(found) for *_, found in told]
        for axes, (title, below, found) in zip(_stacked(figure, heights), told, strict=True):
            _bars(axes, found)
            add_title(axes, title, below)
    said = [
        f"{name} {one.base.mean:.2f} without and {one.edited.mean:.2f} with the edit"
        for *_, found in told
        for name, one in found.items()
    ]
    return finish(figure, path, f"Scores of the edit: {'; '.join(said)}.")


def _stacked(figure, heights: list[float]) -> list:
    return list(figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0])


def _bars(axes, found: dict) -> None:
    for i, score in enumerate(found.values()):
        for side, color, shift in ((score.base, _BASE, 0.19), (score.edited, _EDITED, -0.19)):
            axes.barh(i + shift, side.mean, 0.36, color=color)
            if side.low == side.low:
                around = [[max(side.mean - side.low, 0)], [max(side.high - side.mean, 0)]]
                axes.errorbar(side.mean, i + shift, xerr=around, fmt="none", ecolor="#333333", elinewidth=0.8)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, 1)
