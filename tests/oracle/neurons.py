"""Knowledge neurons of a plain Hugging Face model: one forward and one backward pass for each layer and step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.oracle.access import changing, changing_input, frozen, layers, site_module


def probability(model: nn.Module, ids: list[int], answer: int, layer: int, factor: Any) -> tuple[float, Tensor, Tensor]:
    """(P(answer), key k, dP / dk at factor * k) with the key [d_ff] of one layer at the last token times a factor.

    A norm behind the down projection is the product with what it is for the key itself.
    """
    seen: list[Tensor] = []
    down, norm = site_module(model, layer, "mlp_out"), post_norm(layers(model)[layer])
    whole: dict[nn.Module, Tensor] = {}
    if norm is not None:
        keep = [(module, lambda out, module=module: whole.setdefault(module, out.detach())) for module in (down, norm)]
        with torch.no_grad(), changing(keep):
            model(torch.tensor([ids]))

    def multiplied(out: Tensor) -> Tensor:
        last = made[0][0, -1] * (whole[norm] / whole[down])[0, -1]
        return torch.cat([out[:, :-1], last[None, None]], 1)

    made: list[Tensor] = []
    held = [] if norm is None else [(down, lambda out: made.append(out) or out), (norm, multiplied)]

    def scaled(keys: Tensor) -> Tensor:
        key = keys[0, -1].detach()
        seen.extend([key, (factor * key).requires_grad_(True)])
        return torch.cat([keys[:, :-1], seen[1][None, None]], 1)

    with frozen(model), torch.enable_grad(), changing_input(down, scaled), changing(held):
        p = model(torch.tensor([ids])).logits[0, -1].softmax(-1)[answer]
        (gradient,) = torch.autograd.grad(p, seen[1])
    return p.item(), seen[0], gradient


def post_norm(block: nn.Module) -> nn.Module | None:
    """The norm between a block's down projection and the residual stream."""
    return getattr(block, "post_feedforward_layernorm", None)


def attributions(model: nn.Module, prompt: list[int], answer: list[int], steps: int) -> Tensor:
    """[L, d_ff] k / m * sum over s = 1..m of the gradient at s/m k; the mean over the answer's tokens, each after those
    before it."""
    by_token = []
    for i, token in enumerate(answer):
        ids, found = prompt + answer[:i], []
        for layer in range(len(layers(model))):
            points = [probability(model, ids, token, layer, s / steps) for s in range(1, steps + 1)]
            found.append(points[0][1] * torch.stack([gradient for _, _, gradient in points]).mean(0))
        by_token.append(torch.stack(found))
    return torch.stack(by_token).mean(0)


def strongest(found: Tensor, threshold: float) -> set[tuple[int, int]]:
    """(layer, neuron) above threshold times the largest attribution."""
    return {tuple(place) for place in (found > threshold * found.max()).nonzero().tolist()}


def shared(by_prompt: list[set], share: float) -> set:
    """What more than this share of the prompts have."""
    return {x for x in set.union(*by_prompt) if sum(x in some for some in by_prompt) > share * len(by_prompt)}
