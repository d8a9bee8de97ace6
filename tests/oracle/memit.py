"""MEMIT: many facts spread over several layers by a regularized least-squares update (Meng et al. 2023)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.oracle.access import add_delta, layers, lookup, read_value, site_module
from tests.oracle.values import Fact, Value, keys, optimize_value


class MemitUpdate(NamedTuple):
    """What MEMIT computed; all dictionaries are by layer.

    deltas: Δ [d, d_ff] (out, in) float64. z: [n, d]. keys: [n, d_ff], measured with the earlier layers edited.
    shares: [n, d] float64, what each layer was asked to add to its down projection's output.
    residual_before, residual_after: ||z - h|| [n], h the value at the last edit layer, around that layer's edit.
    values: each fact's optimization. edited: a copy of the model with all deltas in its weights.
    """

    deltas: dict[int, Tensor]
    z: Tensor
    keys: dict[int, Tensor]
    shares: dict[int, Tensor]
    residual_before: dict[int, Tensor]
    residual_after: dict[int, Tensor]
    values: list[Value]
    edited: nn.Module


def memit_update(
    model: nn.Module,
    tok: Any,
    facts: Sequence[Fact],
    context_groups: Sequence[Sequence[str]],
    edit_layers: Sequence[int],
    moments: dict[int, Tensor],
    mom2_update_weight: float,
    *,
    pull_back: bool = False,
    values: Sequence[Value] | None = None,
    inverse: Callable[[Tensor, Tensor], Tensor] | None = None,
    boundary: bool = False,
    **optimization: Any,
) -> MemitUpdate:
    """The layer loop of MEMIT, with weights really edited in a copy; the model is left as it is.

    For each layer in the order given: K the facts' keys, H their current values at the last edit layer (bare prompt),
    Δ = (Z - H)^T / (layers left) K (λ C + K^T K)^-1, in float64, rounded once when it is added.

    context_groups: groups of templates, [["{}"], [...]]; keys are the mean of group means, z's loss is flat over all.
    moments: C = E[k k^T] [d_ff, d_ff] by layer; λ is `mom2_update_weight`.
    pull_back: for families whose MLP output passes an RMSNorm before it is added to the residual stream: each layer's
        share of the residual is taken back through that norm, see `before_norm`.
    values: optimizations done before; None does them on the unedited model, each fact alone, with `optimization` (lr,
        steps, weight_decay, kl_factor, clamp).
    inverse: (C, K) -> [d_ff, n] in the place of (λ C + K^T K)^-1 K^T: another method's system.
    boundary: each layer is asked for all that is missing at its own output (BLUE), for values optimized there on the
        model as it is edited so far.
    """
    flat = [context for group in context_groups for context in group]

    def optimized(model: nn.Module, layer: int) -> list[Value]:
        return [optimize_value(model, tok, fact, flat, layer, "layer_out", **optimization) for fact in facts]

    last = edit_layers[-1]
    if values is None:
        values = optimized(model, last)
    z = torch.stack([value.value for value in values])
    places = [lookup(tok, fact.prompt, fact.subject) for fact in facts]
    edited = copy.deepcopy(model)

    def bare(layer: int, site: str) -> Tensor:
        """The site's values [n, d] of the model as it is edited so far, at the bare prompts' lookup tokens."""
        return torch.stack([read_value(edited, *place, layer, site) for place in places])

    update = MemitUpdate({}, z, {}, {}, {}, {}, list(values), edited)
    for done, layer in enumerate(edit_layers):
        if boundary:
            last, left = layer, 1
            values = optimized(edited, layer)
            z = torch.stack([value.value for value in values])
        else:
            left = len(edit_layers) - done
        R = z - bare(last, "layer_out")
        K = torch.stack([keys(edited, tok, fact, context_groups, layer) for fact in facts])
        share = R.double() / left / getattr(model.config, "residual_multiplier", 1.0)  # granite: h + factor · MLP
        if pull_back:
            share = before_norm(model, layer, share, bare(layer, "mlp_out"))
        update.keys[layer], update.shares[layer], update.residual_before[layer] = K, share, R.norm(dim=1)
        if inverse is None:
            system = mom2_update_weight * moments[layer].double() + K.double().T @ K.double()
            solved = torch.linalg.solve(system, K.double().T)
        else:
            solved = inverse(moments[layer].double(), K.double())
        update.deltas[layer] = share.T @ solved.T
        add_delta(site_module(edited, layer, "mlp_out"), update.deltas[layer])
        update.residual_after[layer] = (z - bare(last, "layer_out")).norm(dim=1)
    return update._replace(z=z, values=list(values))


def before_norm(model: nn.Module, layer: int, share: Tensor, mlp_out: Tensor) -> Tensor:
    """What an MLP output m should change by, [n, d] float64, for RMSNorm(m) = W ∘ m / rms(m) to change by `share`.

    rms(m) is held at its value for the m [n, d] given, so that a change r of m comes out as s ∘ r, s = W / rms(m); r is
    the ridge solution of s ∘ r = share, with 0.01 of the mean of s^2 as its ridge. W is the norm's weight in olmo2 and
    one more than it in gemma.
    """
    norm = layers(model)[layer].post_feedforward_layernorm
    is_gemma = model.config.model_type.startswith("gemma")
    W = norm.weight.double() + 1 if is_gemma else norm.weight.double()
    eps = norm.eps if is_gemma else norm.variance_epsilon
    rms = (mlp_out.double().square().mean(dim=1, keepdim=True) + eps).sqrt()
    solutions = []
    for s, wanted in zip(W / rms, share, strict=True):
        A = torch.cat([torch.diag(s), (0.01 * s.square().mean()).sqrt() * torch.eye(len(s), dtype=s.dtype)])
        solutions.append(torch.linalg.lstsq(A, torch.cat([wanted, torch.zeros_like(wanted)])).solution)
    return torch.stack(solutions)
