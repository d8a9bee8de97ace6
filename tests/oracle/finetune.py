"""FT and FT-L: Adam on the down projections of some layers of a plain Hugging Face model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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
    orders: Sequence[Sequence[int]] | None = None,
    end: int | None = None,
    by_token: bool = False,
    project: Callable[[int, Tensor], Tensor] | None = None,
) -> FineTuning:
    """Trains a copy, one fact a forward; the model is left as it is. Phrasings are facts behind the others.

    A step goes over all batches of facts. A batch's loss is the mean over its facts; at or above 0.01 nats Adam moves
    the weights once. With `eps` each weight is then put back into W_0 ± eps. A step whose mean loss over all facts,
    each as it was before its batch's update, is under 0.01 is the last one.

    objective: "target_new": each target token after the prompt and the target tokens before it; "prompt_last": all of
        them after the prompt alone.
    orders: of the facts in each step, as they are given without; end: a token behind each target
    by_token: a batch's loss is the mean over all its target tokens
    project: (layer, gradient [d, d_ff]) -> what Adam takes in its place
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
        for step in range(steps):
            summed = total = 0.0
            order = list(range(len(facts))) if orders is None else orders[step]
            for first in range(0, len(facts), batch_size):
                batch = [facts[i] for i in order[first : first + batch_size]]
                each = torch.stack([negative_log_p(edited, tok, fact, objective, end) for fact in batch])
                n_tokens = [len(target_ids(tok, fact.target_new)) + (end is not None) for fact in batch]
                weight = torch.tensor(n_tokens if by_token else [1] * len(batch), dtype=each.dtype)
                loss = (each * weight).sum() / weight.sum()
                summed, total = summed + loss.item() * weight.sum().item(), total + weight.sum().item()
                if loss.item() >= LOSS_GOAL:
                    adam.zero_grad()
                    loss.backward()
                    if project is not None:
                        project_gradients(downs, project)
                    adam.step()
                if eps is not None:
                    put_back(weights, before, eps)
            losses.append(summed / total)
            if losses[-1] < LOSS_GOAL:
                break
    starts = {layer: weight_out_in(site_module(model, layer, "mlp_out")) for layer in edit_layers}
    deltas = {layer: (weight_out_in(downs[layer]) - starts[layer]).detach() for layer in edit_layers}
    return FineTuning(deltas, losses, edited.requires_grad_(False))


@torch.no_grad()
def project_gradients(downs: dict[int, nn.Module], project: Callable[[int, Tensor], Tensor]) -> None:
    """Puts each weight's projected gradient in its place."""
    for layer, down in downs.items():
        turned = isinstance(down, Conv1D)
        gradient = project(layer, down.weight.grad.T if turned else down.weight.grad)
        down.weight.grad = (gradient.T if turned else gradient).contiguous()


def negative_log_p(model: nn.Module, tok: Any, fact: Fact, objective: str, end: int | None = None) -> Tensor:
    """-log p of the target's tokens, their mean, in nats. end: a token behind them"""
    prompt, _ = lookup(tok, fact.prompt, fact.subject)
    target = target_ids(tok, fact.target_new) + [end] * (end is not None)
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
