"""GRACE on a plain Hugging Face model: a codebook by its rules, values one fact at a time, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.oracle.access import frozen, site_module

LOSS_GOAL = 0.05  # nats: below it a value is good enough


class Entry(NamedTuple):
    """key [d_ff], radius, value [d] of one entry; label: the answer's tokens."""

    key: Tensor
    radius: float
    value: Tensor
    label: list[int]


@torch.no_grad()
def last_input(model: nn.Module, layer: int, ids: Sequence[int]) -> Tensor:
    """[d_ff] what enters the down projection at the last token."""
    seen: list[Tensor] = []
    hook = site_module(model, layer, "mlp_out").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(torch.tensor([list(ids)]))
    finally:
        hook.remove()
    return seen[0][0, -1].clone()


def logits_with(model: nn.Module, layer: int, ids: Sequence[int], at: int, value: Tensor | None) -> Tensor:
    """[tokens, V] where the projection's output at one position is the value (None: as it is)."""

    def put(module, args, out):
        return torch.cat([out[:, :at], value[None, None].to(out), out[:, at + 1 :]], 1)

    if value is None:
        return model(torch.tensor([list(ids)])).logits[0]
    hook = site_module(model, layer, "mlp_out").register_forward_hook(put)
    try:
        return model(torch.tensor([list(ids)])).logits[0]
    finally:
        hook.remove()


def train_value(model, layer: int, prompt: list[int], target: list[int], lr: float, n_iter: int) -> Tensor:
    """[d] found by Adam from the model's own row; n_iter updates at most."""
    seen: list[Tensor] = []
    hook = site_module(model, layer, "mlp_out").register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(torch.tensor([prompt]))
    hook.remove()
    value = seen[0][0, -1].clone().requires_grad_()
    adam = torch.optim.Adam([value], lr=lr)
    ids, at = prompt + target[:-1], len(prompt) - 1
    with frozen(model), torch.enable_grad():
        for _ in range(n_iter):
            log_p = logits_with(model, layer, ids, at, value)[at:].log_softmax(-1)
            loss = -log_p[range(len(target)), target].mean()
            if loss < LOSS_GOAL:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
    return value.detach()


def codebook(model, layer: int, prompts, targets, eps: float, lr: float, n_iter: int) -> list[Entry]:
    """The entries of prompts that come one after the other."""
    book: list[Entry] = []
    for prompt, target in zip(prompts, targets, strict=True):
        key = last_input(model, layer, prompt)
        away = [float((key - entry.key).norm()) for entry in book]
        near = min(range(len(book)), key=away.__getitem__, default=None)
        if near is not None and away[near] <= book[near].radius + eps:
            if book[near].label == target:
                book[near] = book[near]._replace(radius=max(book[near].radius, away[near]))
                continue
            book[near] = book[near]._replace(radius=min(book[near].radius, away[near] / 2 - 1e-5))
            radius = away[near] / 2
        else:
            radius = eps
        book.append(Entry(key, radius, train_value(model, layer, prompt, target, lr, n_iter), target))
    return book


@torch.no_grad()
def answer(model, layer: int, book: list[Entry], prompt: list[int], behind: Sequence[int] = ()) -> Tensor:
    """[1 + behind, V] logits after the prompt and after each token behind it, with the entry that the prompt hits."""
    key = last_input(model, layer, prompt)
    away = [float((key - entry.key).norm()) for entry in book]
    near = min(range(len(book)), key=away.__getitem__)
    value = book[near].value if away[near] <= book[near].radius else None
    return logits_with(model, layer, [*prompt, *behind], len(prompt) - 1, value)[len(prompt) - 1 :]
