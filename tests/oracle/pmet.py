"""PMET: a fact's two values by Adam over plain forwards, the layer loop that writes the MLP's (Li et al. 2024)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.oracle.access import add_delta, changing, embedding, frozen, layers, lookup, read_value, site_module
from tests.oracle.memit import before_norm
from tests.oracle.values import LOSS_GOAL, Fact, _adder, _pull_back, keys, nll, says_target, value_batch


class Pair(NamedTuple):
    """value, init: [d] of the MLP's output; attention: [d] the attention's value; n_iterations: forwards."""

    value: Tensor
    init: Tensor
    attention: Tensor
    n_iterations: int


def optimize_pair(
    model: nn.Module,
    tok: Any,
    fact: Fact,
    contexts: Sequence[str],
    layer: int,
    *,
    lr: float,
    steps: int,
    weight_decay: float,
    kl_factor: float,
    clamp: float,
    nll_factor: float = 1.0,
    relaxed: float = 0.1,
    calm: float = 0.01,
    goal: float = LOSS_GOAL,
) -> Pair:
    """δ at the attention's output and δ at the down projection's output, each within clamp times its start's norm.

    loss = factor NLL + kl_factor KL + weight_decay (sum over both of ||δ|| / ||start||^2). A forward that finds every
    target token the likeliest in all contexts makes the factor `relaxed` times nll_factor for the next one, and is the
    last where kl_factor KL < calm.
    """
    batch = value_batch(tok, fact, contexts, model.device)
    weight = embedding(model).weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    deltas = [torch.zeros(weight.shape[1], dtype=dtype, requires_grad=True) for _ in range(2)]
    adam = torch.optim.Adam(deltas, lr=lr)
    modules = [site_module(model, layer, site) for site in ("mlp_out", "attn_out")]
    changes = [_adder(delta, batch.lookups) for delta in deltas]
    factor = nll_factor
    edits = [(module, change) for module, (change, _) in zip(modules, changes, strict=True)]
    with frozen(model), torch.enable_grad(), changing(edits):
        for iteration in range(steps):
            log_p = model(input_ids=batch.ids, attention_mask=batch.mask).logits.log_softmax(-1)
            log_p_kl = log_p[-1, batch.lookups[-1]]
            if iteration == 0:
                starts, log_p_start = [seen[0] for _, seen in changes], log_p_kl.detach()
            kl = (log_p_kl.exp() * (log_p_kl - log_p_start)).sum()
            decay = sum(delta.norm() / start.norm() ** 2 for delta, start in zip(deltas, starts, strict=True))
            loss = factor * nll(log_p, batch) + kl_factor * kl + weight_decay * decay
            says = says_target(log_p, batch)
            factor = nll_factor * (relaxed if says else 1.0)
            if loss < goal or (says and kl_factor * kl < calm) or iteration == steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            for delta, start in zip(deltas, starts, strict=True):
                _pull_back(delta, clamp * start.norm())
    value, attention = ((start + delta).detach() for start, delta in zip(starts, deltas, strict=True))
    return Pair(value, starts[0], attention, iteration + 1)


def pmet_update(
    model: nn.Module,
    tok: Any,
    facts: Sequence[Fact],
    context_groups: Sequence[Sequence[str]],
    edit_layers: Sequence[int],
    moments: dict[int, Tensor],
    mom2_update_weight: float,
    *,
    post_norm: bool = False,
    **optimization: Any,
) -> tuple[list[Pair], dict[int, Tensor]]:
    """The pairs, and Δ by layer: (v* - v) / sqrt(layers left) at the facts' keys, v of the model edited so far.

    post_norm: the layers below the last are asked for what the last one's norm makes of v*, less what it makes of v.
    """
    flat = [context for group in context_groups for context in group]
    last, deltas = edit_layers[-1], {}
    pairs = [optimize_pair(model, tok, fact, flat, last, **optimization) for fact in facts]
    edited = copy.deepcopy(model)
    wanted = torch.stack([pair.value for pair in pairs])
    norm = layers(model)[last].post_feedforward_layernorm if post_norm else None
    for done, layer in enumerate(edit_layers):

        def now(where: int) -> Tensor:
            places = [lookup(tok, fact.prompt, fact.subject) for fact in facts]
            return torch.stack([read_value(edited, *place, where, "mlp_out") for place in places])

        missing = wanted.double() - now(last).double()
        if post_norm and layer != last:
            with torch.no_grad():
                missing = norm(wanted).double() - norm(now(last)).double()
        share = missing / (len(edit_layers) - done) ** 0.5
        if post_norm and layer != last:
            share = before_norm(model, layer, share, now(layer))
        K = torch.stack([keys(edited, tok, fact, context_groups, layer) for fact in facts]).double()
        system = mom2_update_weight * moments[layer].double() + K.T @ K
        deltas[layer] = share.T @ torch.linalg.solve(system, K.T).T
        add_delta(site_module(edited, layer, "mlp_out"), deltas[layer])
    return pairs, deltas
