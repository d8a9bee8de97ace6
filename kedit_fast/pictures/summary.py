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
    """Bars from 0 to 1 of the scores that were measured, gray for the unedited model. path: where to write it too.

    Gives a ``matplotlib.figure.Figure``, whose label is its alt text.
    """
    scores = {name: score for name, score in summary.scores.items() if score.edited.n}
    with style():
        figure = new_figure(4.4, 0.7 + 0.42 * len(scores))
        axes = figure.subplots()
        for i, score in enumerate(scores.values()):
            for side, color, shift in ((score.base, _BASE, 0.19), (score.edited, _EDITED, -0.19)):
                axes.barh(i + shift, side.mean, 0.36, color=color)
                if side.low == side.low:
                    around = [[max(side.mean - side.low, 0)], [max(side.high - side.mean, 0)]]
                    axes.errorbar(side.mean, i + shift, xerr=around, fmt="none", ecolor="#333333", elinewidth=0.8)
        axes.set_yticks(range(len(scores)), list(scores))
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        add_title(axes, "Is the edit real?", "with the edit (blue) and without (gray); 95 % intervals")
    told = [
        f"{name} {one.base.mean:.2f} without and {one.edited.mean:.2f} with the edit" for name, one in scores.items()
    ]
    return finish(figure, path, f"Scores of the edit: {'; '.join(told)}.")
