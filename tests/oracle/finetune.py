"""FT and FT-L: Adam on the down projections of some layers of a plain Hugging Face model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.oracle.access import lookup, site_module, target_ids, weight_out_in
from tests.oracle.values import Fact

LOSS_GOAL = 1e-2  # nats


class FineTuning(NamedTuple):
    """deltas: {layer: W - W_0 [d, d_ff]}; losses: mean over facts in each step, nats; edited: the tuned copy."""

    deltas: dict[int, Tensor]
    losses: list[float]
    edited: nn.Module


def fine_tune(
    model: nn.Module,
    tok: Any,
    facts: Sequence[Fact],
    edit_layers: Sequence[int],
    *,
    lr: float = 5e-4,
    steps: int = 25,
    eps: float | None = None,
    weight_decay: float = 0.0,
    batch_size: int = 128,
    objective: str = "target_new",
) -> FineTuning:
    """Trains a copy, one fact a forward; the model is left as it is. Phrasings are facts behind the others.

    A step goes over all batches of facts. A batch's loss is the mean over its facts; at or above 0.01 nats Adam moves
    the weights once. With `eps` each weight is then put back into W_0 ± eps. A step whose mean loss over all facts,
    each as it was before its batch's update, is under 0.01 is the last one.

    objective: "target_new": each target token after the prompt and the target tokens before it; "prompt_last": all of
        them after the prompt alone.
    Differs: the published code also trains the bias of the down projection, where there is one.
    """
    facts = [*facts, *(fact._replace(prompt=phrasing) for fact in facts for phrasing in fact.phrasings)]
    edited = copy.deepcopy(model).requires_grad_(False)
    downs = {layer: site_module(edited, layer, "mlp_out") for layer in edit_layers}
    weights = [down.weight.requires_grad_(True) for down in downs.values()]
    before = [weight.detach().clone() for weight in weights]
    adam = torch.optim.Adam(weights, lr=lr, weight_decay=weight_decay)
    losses: list[float] = []
    with torch.enable_grad():
        for _ in range(steps):
            summed = 0.0
            for first in range(0, len(facts), batch_size):
                batch = facts[first : first + batch_size]
                loss = torch.stack([negative_log_p(edited, tok, fact, objective) for fact in batch]).mean()
                summed += loss.item() * len(batch)
                if loss.item() >= LOSS_GOAL:
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
                if eps is not None:
                    put_back(weights, before, eps)
            losses.append(summed / len(facts))
            if losses[-1] < LOSS_GOAL:
                break
    starts = {layer: weight_out_in(site_module(model, layer, "mlp_out")) for layer in edit_layers}
    deltas = {layer: (weight_out_in(downs[layer]) - starts[layer]).detach() for layer in edit_layers}
    return FineTuning(deltas, losses, edited.requires_grad_(False))


def negative_log_p(model: nn.Module, tok: Any, fact: Fact, objective: str) -> Tensor:
    """-log p of the target's tokens, their mean, in nats."""
    prompt, _ = lookup(tok, fact.prompt, fact.subject)
    target = target_ids(tok, fact.target_new)
    if objective == "prompt_last":
        logits = model(torch.tensor([prompt])).logits[0, -1].expand(len(target), -1)
    elif objective == "target_new":
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    else:
        raise ValueError(f"objective is {objective!r}; it must be 'target_new' or 'prompt_last'")
    return nn.functional.cross_entropy(logits, torch.tensor(target))


@torch.no_grad()
def put_back(weights: Sequence[Tensor], before: Sequence[Tensor], eps: float) -> None:
    """Clamp each weight to its start ± eps, in place."""
    for weight, start in zip(weights, before, strict=True):
        weight.copy_(torch.minimum(torch.maximum(weight, start - eps), start + eps))
