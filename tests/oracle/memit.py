"""MEMIT: many facts spread over several layers by a regularized least-squares update (Meng et al. 2023)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.oracle.access import add_delta, lookup, read_value, site_module
from tests.oracle.values import Fact, Value, keys, optimize_value


class MemitUpdate(NamedTuple):
    """What MEMIT computed; all dictionaries are by layer.

    deltas: Δ [d, d_ff] (out, in) float64. z: [n, d]. keys: [n, d_ff], measured with the earlier layers edited.
    residual_before, residual_after: ||z - h|| [n], h the value at the last edit layer, around that layer's edit.
    values: each fact's optimization. edited: a copy of the model with all deltas in its weights.
    """

    deltas: dict[int, Tensor]
    z: Tensor
    keys: dict[int, Tensor]
    residual_before: dict[int, Tensor]
    residual_after: dict[int, Tensor]
    values: list[Value]
    edited: nn.Module


def memit_update(
    model: nn.Module,
    tok: Any,
    facts: Sequence[Fact],
    context_groups: Sequence[Sequence[str]],
    layers: Sequence[int],
    moments: dict[int, Tensor],
    mom2_update_weight: float,
    *,
    value_site: str = "layer_out",
    values: Sequence[Value] | None = None,
    **optimization: Any,
) -> MemitUpdate:
    """The layer loop of MEMIT, with weights really edited in a copy; the model is left as it is.

    For each layer in the order given: K the facts' keys, H their current values at the last layer of `layers` (bare
    prompt), Δ = (Z - H)^T / (layers left) K (λ C + K^T K)^-1, in float64, rounded once when it is added.

    context_groups: groups of templates, [["{}"], [...]]; keys are the mean of group means, z's loss is flat over all.
    moments: C = E[k k^T] [d_ff, d_ff] by layer; λ is `mom2_update_weight`.
    value_site: where z lives: layer_out as published, or mlp_out, for families whose MLP output passes a norm before
        it is added to the residual stream.
    values: optimizations done before; None does them on the unedited model, each fact alone, with `optimization` (lr,
        steps, weight_decay, kl_factor, clamp).
    """
    last = layers[-1]
    if values is None:
        flat = [context for group in context_groups for context in group]
        values = [optimize_value(model, tok, fact, flat, last, value_site, **optimization) for fact in facts]
    z = torch.stack([value.value for value in values])
    places = [lookup(tok, fact.prompt, fact.subject) for fact in facts]
    edited = copy.deepcopy(model)

    def residual() -> Tensor:
        """Z - H [n, d] of the model as it is edited so far."""
        return z - torch.stack([read_value(edited, *place, last, value_site) for place in places])

    update = MemitUpdate({}, z, {}, {}, {}, list(values), edited)
    for done, layer in enumerate(layers):
        R = residual()
        K = torch.stack([keys(edited, tok, fact, context_groups, layer) for fact in facts])
        update.keys[layer], update.residual_before[layer] = K, R.norm(dim=1)
        share = R.double() / (len(layers) - done)
        system = mom2_update_weight * moments[layer].double() + K.double().T @ K.double()
        update.deltas[layer] = share.T @ torch.linalg.solve(system, K.double().T).T
        add_delta(site_module(edited, layer, "mlp_out"), update.deltas[layer])
        update.residual_after[layer] = residual().norm(dim=1)
    return update
