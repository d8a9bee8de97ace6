"""ROME for one fact: a rank-one update that makes one key's value the optimized one (Meng et al. 2022, eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.oracle.access import lookup, read_key, read_value, site_module
from tests.oracle.values import Fact, Value, keys, optimize_value


class RomeUpdate(NamedTuple):
    """delta: Δ [d, d_ff] (out, in) float64; key: the k with (W + Δ) k + b = v*, [d_ff]; value: v* and its history."""

    delta: Tensor
    value: Value
    key: Tensor


def rome_update(
    model: nn.Module,
    tok: Any,
    fact: Fact,
    contexts: Sequence[str],
    layer: int,
    moment: Tensor | None,
    *,
    key: str = "bare",
    value: Value | None = None,
    **optimization: Any,
) -> RomeUpdate:
    """Δ = (v* - m) u^T / (k u), with u = C^-1 k*, k* the mean key over all contexts; the model is left as it is.

    contexts: templates with {} for the prompt, flat, "{}" first.
    moment: C = E[k k^T] [d_ff, d_ff], or None for u = k*.
    key: "bare" as published: k and m are the bare prompt's key and value, so W'k_0 + b = v*. "averaged" (R-ROME):
        k = k* and m = W k* + b, so W'k* + b = v*.
    value: a v* found before; None optimizes it, with `optimization` (lr, steps, weight_decay, kl_factor, clamp).
    Differs: solved in float64; the published code inverts C in float32.
    """
    value = value or optimize_value(model, tok, fact, contexts, layer, "mlp_out", **optimization)
    k_star = keys(model, tok, fact, [contexts], layer)
    u = k_star.double() if moment is None else torch.linalg.solve(moment.double(), k_star.double())
    if key == "bare":
        place = lookup(tok, fact.prompt, fact.subject)
        k, m = read_key(model, *place, layer), read_value(model, *place, layer, "mlp_out")
    elif key == "averaged":
        with torch.no_grad():
            k, m = k_star, site_module(model, layer, "mlp_out")(k_star)
    else:
        raise ValueError(f"key is {key!r}; it must be 'bare' or 'averaged'")
    delta = torch.outer(value.value.double() - m.double(), u) / (k.double() @ u)
    return RomeUpdate(delta, value, k)
