"""Picture of a study of layers: edit success by layer, and below it the causal trace of the same facts."""

import numpy as np

from kedit_fast.basics.words import counted
from kedit_fast.pictures.figure import GRAY, add_title, draw_band, finish, layer_ticks, layers_width, new_figure, style
from kedit_fast.pictures.labels import KIND_NAME, METRIC_NAME, within
from kedit_fast.pictures.traces import INK, draw_role

_INKS = {"efficacy": "#1b6ca8", "p_new": "#7fb2d9", "paraphrase": "#e08a1e", "neighborhood": "#444444"}
_NAMES = {"p_new": "P(new)"}
WARNING = "where a fact is traced does not by itself predict where editing it works (Hase et al. 2023)"


def plot_layers(study, path=None):
    """Efficacy, P(new), paraphrase and neighborhood by layer with 95 % bands; below, on the same layers, the average
    indirect effect (AIE) at the subject's last token, with its bands and its rank correlations with the edits' success.

    study: a ``LayerStudy``; path: where to write the figure too, PNG or what its suffix says. Dotted: the neighborhood
    without edits. Gives a ``matplotlib.figure.Figure``, whose label is its alt text.
    """
    averages = list(study.traces.values())
    n_layers = averages[0].mean.shape[1] if averages else max(study.layers) + 1
    with style():
        figure = new_figure(2.2 + 1.4 * layers_width(n_layers), 4.9)
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(6, 5))
        at = np.array(study.layers) + 0.5
        for metric, ink in _INKS.items():
            values = [study.edited[layer][metric] for layer in study.layers]
            draw_band(top, at, values, ink, "-", _NAMES.get(metric, metric), ".")
        base = study.base["neighborhood"].mean
        if np.isfinite(base):
            top.axhline(base, color=_INKS["neighborhood"], linestyle=":", linewidth=0.9, label="neighborhood, no edit")
        top.set_ylim(-0.03, 1.03)
        top.set_ylabel("share of prompts; probability")
        facts = counted(study.n_facts, "fact")
        add_title(top, f"Editing at each layer ({study.method})", f"{facts}, each edited alone; 95 % bands")
        for average in averages:
            n_lines = len(below.lines)
            draw_role(below, average, "last subject token", INK[average.kind], "-")
            for line in below.lines[n_lines:]:  # none where nothing was traced
                line.set_label("\n".join([KIND_NAME[average.kind], *_correlations(study, average.kind)]))
        below.axhline(0, color=GRAY, linewidth=0.6)
        if averages:
            below.set_ylabel(f"AIE on {METRIC_NAME[averages[0].metric].format('answer')}")
            add_title(below, "Causal trace of the same facts, last subject token", WARNING)
        for axes in (top, below):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        layer_ticks(below, n_layers)
        below.set_xlabel(within("layer", study.model))
    return finish(figure, path, _alt(study))


def _correlations(study, kind: str) -> list[str]:
    """Of efficacy and, because that is often the same at many layers, of P(new)."""
    found = {metric: study.rank_correlation(kind, metric) for metric in ("efficacy", "p_new")}
    return [f"ρ with {_NAMES.get(metric, metric)} {rho:+.2f}" for metric, rho in found.items() if np.isfinite(rho)]


def _alt(study) -> str:
    text = f"Edit success by layer ({study.method}, {study.n_facts} facts)."
    for metric in ("efficacy", "p_new"):
        means = {layer: study.edited[layer][metric].mean for layer in study.layers}
        finite = {layer: mean for layer, mean in means.items() if np.isfinite(mean)}
        if finite:
            best = max(finite, key=finite.get)
            text += f" Highest {_NAMES.get(metric, metric)} {finite[best]:.2f} at layer {best}."
    for kind in study.traces:
        effect = study.effect(kind)
        if np.isfinite(effect).any():
            where = study.layers[int(np.nanargmax(effect))]
            said = ", ".join([f"strongest at layer {where}", *_correlations(study, kind)])
            text += f" Trace of {KIND_NAME[kind]}: {said}."
    return f"{text} Note: {WARNING}."
