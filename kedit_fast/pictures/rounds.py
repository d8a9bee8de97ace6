"""Picture of editing in rounds: what becomes of new and earlier facts, neighbors, language and weights."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from kedit_fast.basics import checks
from kedit_fast.pictures.figure import GRAY, draw_band, finish, new_figure, style
from kedit_fast.pictures.labels import model_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kedit_fast.experiments.rounds import Round

_INKS = ("#1b6ca8", "#c44536", "#2a9d5c", "#8a4fbf", "#b8860b", "#555555")
_GUARD = 1e-9  # on a log scale zero has no place


def plot_rounds(
    rounds: "Mapping[str, Sequence[Round]]", path: checks.AnyPath | None = None, model: str = ""
) -> "Figure":
    """Four panels over the number of edited facts, a color for each method: efficacy of the round's facts (solid) and
    of earlier ones (dashed), with 95 % bands; neighborhood; perplexity; ‖ΣΔ‖ / ‖W‖ of the most changed layer.

    rounds: {name of the method: its Rounds}; path: where to write the figure too, PNG or what its suffix says; model: a
    name for the title. Dotted gray: the model without edits. Gives a ``matplotlib.figure.Figure``, whose label is its
    alt text. Raises ValueError where there is no round.
    """
    checks.instance("rounds", rounds, Mapping, "{method: [Round, ...]}, as edit_in_rounds gives them")
    rounds = {name: list(of_one) for name, of_one in rounds.items() if of_one}
    if not rounds:
        raise ValueError("no rounds to plot; expected {method: [Round, ...]} as edit_in_rounds gives them")
    with style():
        figure = new_figure(7.2, 5.2)
        (efficacy, neighborhood), (perplexity, growth) = figure.subplots(2, 2, sharex=True)
        for (name, of_one), ink in zip(rounds.items(), cycle(_INKS), strict=False):
            _draw(efficacy, of_one, lambda r: r.new["efficacy"], ink, "-", f"{name}, new")
            _draw(efficacy, of_one, lambda r: r.old["efficacy"], ink, "--", f"{name}, earlier")
            _draw(neighborhood, of_one, _neighborhood, ink, "-", name)
            _line(perplexity, of_one, lambda r: r.perplexity and r.perplexity[1], ink, name)
            _line(growth, of_one, lambda r: max(r.growth.values(), default=math.nan), ink, name)
        longest = max(rounds.values(), key=len)
        _line(neighborhood, longest, lambda r: r.base["neighborhood"].mean, GRAY, "without edits", ":")
        _line(perplexity, longest, lambda r: r.perplexity and r.perplexity[0], GRAY, "without edits", ":")
        _finish_panels(efficacy, neighborhood, perplexity, growth)
        figure.suptitle(_title(rounds, model), x=0.01, ha="left", parse_math=False)
    return finish(figure, path, _alt(rounds))


def _neighborhood(r):
    """Of all facts that the round asked: its own where there are no earlier ones."""
    return r.old["neighborhood"] if r.old["neighborhood"].n else r.new["neighborhood"]


def _draw(axes, rounds, value_of, ink: str, line: str, label: str) -> None:
    """A line over edited facts with its 95 % band; rounds without a value leave a gap."""
    draw_band(axes, [r.n_facts for r in rounds], [value_of(r) for r in rounds], ink, line, label, ".")


def _line(axes, rounds, value_of, ink: str, label: str, line: str = "-") -> None:
    values = [value_of(r) for r in rounds]
    shown = [(r.n_facts, value) for r, value in zip(rounds, values, strict=True) if _is_finite(value)]
    if shown:
        marker = "" if line == ":" else "."
        axes.plot(*zip(*shown, strict=True), line, color=ink, marker=marker, label=label)


def _is_finite(value) -> bool:
    return value is not None and math.isfinite(value)


def _finish_panels(efficacy, neighborhood, perplexity, growth) -> None:
    efficacy.set_ylabel("efficacy, P(new) > P(true)")
    neighborhood.set_ylabel("neighborhood, P(true) > P(new)")
    perplexity.set_ylabel("perplexity")
    growth.set_ylabel("‖ΣΔ‖ / ‖W‖, most changed layer")
    for axes in (efficacy, neighborhood):
        axes.set_ylim(-0.03, 1.03)
    for axes in (perplexity, growth):
        # A collapse is orders of magnitude; a healthy chain is not.
        values = [y for line in axes.lines for y in line.get_ydata()]
        if values and min(values) > 0 and max(values) / max(min(values), _GUARD) > 10:
            axes.set_yscale("log")
        axes.set_xlabel("facts edited")
    if not perplexity.lines:
        perplexity.text(0.5, 0.5, "no text given", ha="center", color=GRAY, transform=perplexity.transAxes)
    for axes in (efficacy, neighborhood, perplexity, growth):
        axes.set_xlim(left=0)
        if axes.lines:
            axes.legend(loc="best", fontsize=6.5)


def _title(rounds, model: str) -> str:
    last = max((of_one[-1] for of_one in rounds.values()), key=lambda r: r.n_facts)
    per_round = next(iter(rounds.values()))[0].n_facts
    within = f" in {model_label(model)}" if model else ""
    return f"Editing {last.n_facts:,} facts{within} in rounds of {per_round}, each on top of those before"


def _alt(rounds) -> str:
    ends = []
    for name, of_one in rounds.items():
        r = of_one[-1]
        text = f"{name} after {r.n_facts} facts: efficacy of new facts {r.new['efficacy'].mean:.2f}"
        if r.old["efficacy"].n:
            text += f", of earlier ones {r.old['efficacy'].mean:.2f}"
        text += f", neighborhood {_neighborhood(r).mean:.2f}"
        if _is_finite(r.drift):
            text += f", perplexity {r.drift:+.1%}"
        ends.append(text)
    return f"Efficacy, neighborhood, perplexity and norm growth over edited facts. {'; '.join(ends)}."
