"""Unlearning losses: Adam on down projections of a plain Hugging Face model, one forward for each answer."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracle.access import first, lookup, site_module, target_ids, weight_out_in
from tests.oracle.finetune import FineTuning


def unlearn(
    model: nn.Module,
    tok: Any,
    forget: list[tuple[str, str, str]],
    retain: list[tuple[str, str, str]],
    edit_layers: list[int],
    loss: str,
    *,
    lr: float,
    steps: int,
    retain_weight: float = 1.0,
    beta: float = 0.1,
    c: float = 6.5,
    alpha: float = 1200.0,
    read_layer: int | None = None,
    lens: tuple[int, ...] = (),
) -> FineTuning:
    """Trains a copy; forget, retain: (prompt, subject, answer). All answers make one batch.

    L = mean over forget of f + retain_weight * mean over retain of the answer's -log p, a mean over its tokens; of rmu
    both are of hidden states. losses: L before each step.
    """
    edited = copy.deepcopy(model).requires_grad_(False)
    downs = {layer: site_module(edited, layer, "mlp_out") for layer in edit_layers}
    adam = torch.optim.Adam([down.weight.requires_grad_(True) for down in downs.values()], lr=lr)
    sides = [[(lookup(tok, p, s)[0], target_ids(tok, answer)) for p, s, answer in side] for side in (forget, retain)]
    u = torch.rand(
        weight_out_in(downs[edit_layers[0]]).shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    u = c * u / u.norm()

    def look(of: nn.Module, prompt: list[int], target: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """(log-softmax [tokens, V] where the target's tokens are predicted, {layer: rows [T, d]})."""
        rows: dict[int, Tensor] = {}
        layers = {*lens, *([] if read_layer is None else [read_layer])}
        hooks = [
            site_module(of, i, "layer_out").register_forward_hook(lambda m, a, o, i=i: rows.__setitem__(i, first(o)[0]))
            for i in layers
        ]
        logits = of(torch.tensor([prompt + target[:-1]])).logits[0, len(prompt) - 1 :]
        for hook in hooks:
            hook.remove()
        return logits.log_softmax(-1), rows

    def nll(log_p: Tensor, target: list[int]) -> Tensor:
        return -log_p[range(len(target)), target]

    def lens_gap(row: Tensor) -> Tensor:
        """log V - H of the head's distribution of a row; the last layer's is the model's own."""
        inner = edited.model if hasattr(edited, "model") else edited.transformer
        norm = inner.norm if hasattr(inner, "norm") else inner.ln_f
        logits = edited.lm_head(norm(row))
        cap = getattr(edited.config, "final_logit_softcapping", None)
        log_p = (logits if cap is None else torch.tanh(logits / cap) * cap).log_softmax(-1)
        return math.log(len(log_p)) + (log_p.exp() * log_p).sum()

    def of_forgotten(prompt: list[int], target: list[int]) -> Tensor:
        log_p, rows = look(edited, prompt, target)
        each = nll(log_p, target)
        if loss == "bounded":
            return -torch.log(1 - torch.exp(-each.sum()))
        if loss == "npo":
            with torch.no_grad():
                start = nll(look(model, prompt, target)[0], target).sum()
            return 2 / beta * torch.log(1 + torch.exp(beta * (start - each.sum())))
        if loss == "rmu":
            return ((rows[read_layer] - u) ** 2).mean()
        if loss == "entropy":
            at = range(len(prompt) - 1, len(prompt) - 1 + len(target))
            return torch.stack([lens_gap(rows[i][t]) for i in lens for t in at]).mean()
        return -each.mean()

    def of_kept(prompt: list[int], target: list[int]) -> Tensor:
        log_p, rows = look(edited, prompt, target)
        if loss != "rmu":
            return nll(log_p, target).mean()
        with torch.no_grad():
            start = look(model, prompt, target)[1][read_layer]
        return alpha * ((rows[read_layer] - start) ** 2).mean()

    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            total = torch.stack([of_forgotten(*pair) for pair in sides[0]]).mean()
            if sides[1]:
                total = total + retain_weight * torch.stack([of_kept(*pair) for pair in sides[1]]).mean()
            adam.zero_grad()
            total.backward()
            adam.step()
            losses.append(total.item())
    starts = {layer: weight_out_in(site_module(model, layer, "mlp_out")) for layer in edit_layers}
    deltas = {layer: (weight_out_in(downs[layer]) - starts[layer]).detach() for layer in edit_layers}
    return FineTuning(deltas, losses, edited.requires_grad_(False))
