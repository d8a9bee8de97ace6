"""Words and numbers that pictures of traces share: token labels, the scale, what was restored."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kedit_fast.tracing.results import AverageTrace, TraceResult

KIND_NAME = {"state": "state", "mlp": "MLP", "attn": "attention"}
LOCALIZATION_WARNING = (
    "where a fact is traced does not by itself predict where editing it works best (Hase et al. 2023); "
    "check the layers by editing"
)
METRIC_NAME = {"prob": "p({})", "logprob": "log p({})", "logit_diff": "logit difference ({})"}


def readable(text: str) -> str:
    """Text on one line: line ends, tabs and characters that do not print made visible."""
    marks = {"\n": "↵", "\t": "⇥"}
    return "".join(marks.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def ascii(text: str) -> str:
    return text.encode("unicode_escape").decode()


def token_labels(result: TraceResult, limit: int = 22, ascii_only: bool = False) -> list[str]:
    """A label for each token, spaces shown as a dot, tokens of the subject with a star."""
    labels = []
    for i, token in enumerate(result.tokens):
        label = ascii(token).replace(" ", "_") if ascii_only else readable(token).replace(" ", "·")
        labels.append((cut(label, limit) or "(empty)") + "*" * (result.subject_span[0] <= i < result.subject_span[1]))
    return labels


def metric(result: TraceResult, limit: int = 20) -> str:
    return METRIC_NAME[result.metric].format(cut(readable(result.answer.strip() or result.answer), limit))


def cut(text: str, limit: int) -> str:
    """At most ``limit`` terminal columns of the text; a Chinese character takes two."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= limit else set_cell_size(text, limit - 2).rstrip() + ".."


def number(value: float, metric: str = "prob") -> str:
    """A probability to three places, or to two digits where that shows nothing; nats to two places."""
    if metric != "prob":
        return f"{value:.2f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def impact(result: TraceResult) -> str:
    return f"Impact of {restoring(result)}" + " after corrupted input" * (result.sever is None) + estimated(result)


def estimated(result: TraceResult) -> str:
    """What a reader must know of cells that were not computed."""
    if result.exact is None:
        return ""
    if result.stride > 1:
        return f" (each noise draw at one layer in {result.stride}, interpolated between)"
    return f" (estimated, but for {int(result.exact.sum())} of {result.exact.size} cells)"


def reliable(reliability: float) -> str:
    """What is said of it behind other words; nothing where it is not known."""
    return "" if math.isnan(reliability) else f", reliability {reliability:.2f}"


def restoring(result: TraceResult) -> str:
    return f"restoring {KIND_NAME[result.kind]}" + (f" with {KIND_NAME[result.sever]} severed" if result.sever else "")


def runs_line(result: TraceResult) -> str:
    clean, corrupted = (number(p, result.metric) for p in (result.p_clean, result.p_corrupted))
    how = "subject replaced" if result.noise is None else f"noise {result.noise:.3g}"
    return f"{metric(result)}: clean {clean}, corrupted {corrupted} ({how})"


def within(what: str, model: str) -> str:
    return f"{what} within {model_label(model)}" if model else what


def model_label(model: str) -> str:
    """A model's name as a picture shows it: of a folder the last part of its path, a hub id (owner/name) as it is."""
    parts = PurePath(model).parts
    a_path = len(parts) > 2 or PurePath(model).is_absolute() or model.startswith((".", "~")) or "\\" in model
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] or model if a_path else model


def layer_label(result: TraceResult, model: str) -> str:
    if result.kind == "state":
        return within("single restored layer", model)
    return within(f"center of interval of {result.window} restored {KIND_NAME[result.kind]} layers", model)


def trace_alt(result: TraceResult) -> str:
    token, layer = np.unravel_index(np.nanargmax(result.p_restored), result.p_restored.shape)
    return (
        f"Heat map of {len(result.tokens)} tokens by {result.p_restored.shape[1]} layers: {metric(result)} after "
        f"{result.fact.text!r}, {restoring(result)}{estimated(result)}. {runs_line(result)}; highest "
        f"{number(result.p_restored[token, layer], result.metric)} at token {result.tokens[token]!r}, layer {layer}."
    )


def average_alt(average: AverageTrace) -> str:
    text = (
        f"Average indirect effect of restoring {KIND_NAME[average.kind]} over {average.n_facts} facts, by token role."
    )
    if not np.isfinite(average.mean).any():
        return text
    role, layer = np.unravel_index(np.nanargmax(average.mean), average.mean.shape)
    return f"{text} Highest {number(average.mean[role, layer], average.metric)} at the {ROLES[role]}, layer {layer}."


def scale(results: Sequence[TraceResult], normalized: bool) -> tuple[list[np.ndarray], float, float]:
    """Values [T, L] of each result and the ends of the scale they share."""
    if normalized:
        values = [r.normalized_effect for r in results]
        if not all(np.isfinite(v).any() for v in values):
            raise ValueError("corruption did not change the answer here, so there is no effect to normalize by")
        return values, 0.0, max(1.0, *(float(np.nanmax(v)) for v in values))
    low = results[0].p_corrupted
    return [r.p_restored for r in results], low, above(low, max(float(np.nanmax(r.p_restored)) for r in results))


def above(low: float, high: float) -> float:
    """The upper end of a scale: ``high``, or in a trace without effect, where rounding is all there is, more."""
    return high if high - low > 1e-5 * abs(high) else low + 0.01


ROLES = (
    "first subject token", "middle subject tokens", "last subject token",
    "first subsequent token", "further tokens", "last token",
)  # fmt: skip
