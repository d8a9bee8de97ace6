"""Picture of a fact's knowledge neurons: what each layer's neurons give to the answer, below its causal trace."""

import textwrap

import numpy as np

from kedit_fast.basics.words import counted
from kedit_fast.pictures.figure import add_title, finish, layer_ticks, layers_width, new_figure, style
from kedit_fast.pictures.labels import impact, readable, runs_line, scale, trace_alt
from kedit_fast.pictures.traces import draw_trace, heat_map

LABEL = 34  # characters of a wording


def plot_neurons(found, path=None, trace=None):
    """Heat map [wordings, layers] of what all neurons of a layer give to P(answer); above it, on the same layers, a
    causal trace of the fact where one is given. A figure in a layer's column above: how many of the fact's knowledge
    neurons are there.

    found: a ``NeuronAttribution``; trace: a ``TraceResult``. Gives a ``matplotlib.figure.Figure``, whose label is its
    alt text. Raises ValueError for a trace of another number of layers.
    """
    n_layers, n = found.by_layer.shape[1], len(found.prompts)
    if trace is not None and trace.p_restored.shape[1] != n_layers:
        raise ValueError(f"the trace has {trace.p_restored.shape[1]} layers, these neurons are of {n_layers}")
    heights = [max(1.1, 0.19 * len(trace.tokens))] if trace is not None else []
    heights.append(max(0.8, 0.19 * n))
    with style():
        figure = new_figure(3.4 + 1.3 * layers_width(n_layers), sum(heights) + 1.0 * len(heights))
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        if trace is not None:
            values, low, high = scale([trace], False)
            draw_trace(panels[0], trace, values[0], low, high, False)
            add_title(panels[0], impact(trace), runs_line(trace))
        axes, values = panels[-1], found.by_layer
        heat_map(axes, values, "mlp", min(0.0, float(values.min())), max(1e-6, float(values.max())), "P(answer)")
        labels = [textwrap.shorten(" ".join(readable(text).split()), LABEL, placeholder=" …") for text in found.prompts]
        axes.set_yticks(np.arange(n) + 0.5, labels, parse_math=False)
        for layer, count in enumerate(np.bincount(found.neurons[:, 0], minlength=n_layers)):
            if count:
                axes.annotate(str(count), (layer + 0.5, 0), (0, 1.5), textcoords="offset points", ha="center", size=6)
        title = f"What each layer's neurons give to {readable(found.answer)!r}"
        add_title(axes, title, "")
        layer_ticks(axes, n_layers)
        axes.set_xlabel(f"layer; above it, which of {counted(len(found.neurons), 'knowledge neuron')} it has")
    return finish(figure, path, _alt(found) + (f" {trace_alt(trace)}" if trace is not None else ""))


def _alt(found) -> str:
    mean, asked = found.by_layer.mean(0), f"{readable(found.answer)!r} after {readable(found.fact.text)!r}"
    return (
        f"What the neurons of each layer give to {asked}, in {counted(len(found.prompts), 'wording')}: most at layer "
        f"{int(mean.argmax())} ({mean.max():.3f} of P(answer)); {counted(len(found.neurons), 'knowledge neuron')}."
    )
