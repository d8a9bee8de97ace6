"""Picture of a logit lens: how high the old and the new answer rank after each layer, before and after an edit."""

import numpy as np

from kedit_fast.basics.words import counted
from kedit_fast.pictures.figure import GRAY, add_title, finish, layer_ticks, layers_width, new_figure, style
from kedit_fast.pictures.labels import readable, within

INK = {"old": "#a50f15", "new": "#006d2c"}
_LINE = {"before": "--", "after": "-"}


def plot_lens(lens, path=None, fact: int | None = None, model: str = ""):
    """Rank of the old (red) and new (green) answer by layer, 1 on top; dashed before the edit, solid after it.

    lens: a ``LogitLens``; fact: one fact's ranks instead of the median over all; path, model: as in ``plot_trace``.
    Gives a ``matplotlib.figure.Figure``, whose label is its alt text. Raises IndexError for a fact that is not there.
    """
    n_layers = lens.before.p_old.shape[1]
    what = f"Rank of the answers of {counted(len(lens.facts), 'fact')} (median)"
    if fact is not None:
        what = f"Rank of the answers to {readable(lens.facts[fact].text)!r}"
    with style():
        figure = new_figure(1.2 + 1.4 * layers_width(n_layers), 2.9)
        axes = figure.subplots()
        for side in ("before", "after"):
            values = getattr(lens, side)
            for name in ("old", "new"):
                ranks = None if values is None else _middle(getattr(values, f"rank_{name}").numpy(), fact)
                if ranks is not None:
                    label = f"{name} answer, {side}" if lens.after is not None else f"{name} answer"
                    axes.plot(np.arange(n_layers) + 0.5, ranks, _LINE[side], color=INK[name], label=label)
        axes.set_yscale("log")
        axes.invert_yaxis()
        axes.set_ylabel("rank among all tokens")
        layer_ticks(axes, n_layers)
        axes.set_xlabel(within("layer", model))
        edited = ""
        if lens.first_layer is not None:
            axes.axvline(lens.first_layer + 0.5, color=GRAY, linewidth=0.6)
            edited = f"; edited from layer {lens.first_layer} on (gray line)"
        add_title(axes, what, f"logit lens at the last token of the prompt{edited}")
        if axes.lines:
            axes.legend(loc="best")
    where = lens.where(fact) if fact is not None else f"{lens.summary()}"
    return finish(figure, path, f"{what} by layer, before and after an edit. {where}.")


def _middle(ranks: np.ndarray, fact: int | None) -> np.ndarray | None:
    """[L] of one fact, or the median over those that have such an answer; None where nobody has."""
    rows = ranks if fact is None else ranks[fact][None]
    rows = rows[np.isfinite(rows).any(1)]
    return np.nanmedian(rows, axis=0) if len(rows) else None
