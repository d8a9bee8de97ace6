"""WISE and MEMOIR on a plain Hugging Face model: a memory beside a down projection, one sequence a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tests.oracle.access import frozen, site_module

LOSS_GOAL = 0.01  # nats


@contextmanager
def beside(model: nn.Module, layer: int, made: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the down projection gives W x + made(x)."""
    hook = site_module(model, layer, "mlp_out").register_forward_hook(lambda m, args, out: out + made(args[0]))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def inputs(model: nn.Module, layer: int, ids: Sequence[int]) -> Tensor:
    """[tokens, d_ff] what enters the down projection."""
    seen: list[Tensor] = []
    module = site_module(model, layer, "mlp_out")
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.tensor([list(ids)]))
    hook.remove()
    return seen[0][0]


def nll(model: nn.Module, prompt: list[int], target: list[int]) -> Tensor:
    """Mean over the target's tokens, teacher-forced."""
    log_p = model(torch.tensor([prompt + target[:-1]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
    return -log_p[range(len(target)), target].mean()


def activation(x: Tensor, delta: Tensor) -> Tensor:
    """Mean over tokens of the norm of what Δ makes of x [tokens, d_ff]."""
    return torch.stack([(delta @ row).norm() for row in x]).mean()


def wise_batch(model, layer, delta, tasks, whose, others, mask, *, lr, n_iter, margins, limit) -> tuple[Tensor, int]:
    """(Δ after gradient descent on one batch, the steps taken). tasks: (prompt, target); whose: the fact of each;
    others: an irrelevant prompt for each fact."""
    alpha, beta, gamma = margins
    delta, steps = delta.clone().requires_grad_(), 0
    own = [inputs(model, layer, prompt) for prompt, _ in tasks]
    strange = [inputs(model, layer, prompt) for prompt in others]

    def kept(values: list[Tensor]) -> Tensor | float:
        positive = [value for value in values if value > 0]
        return torch.stack(positive).mean() if positive else 0.0

    with frozen(model), torch.enable_grad():
        for _ in range(n_iter):
            with beside(model, layer, lambda x, delta=delta: x @ delta.T):
                loss = torch.stack([nll(model, *task) for task in tasks]).mean()
            near, far = [activation(x, delta) for x in own], [activation(x, delta) for x in strange]
            loss = loss + kept([d - alpha for d in far]) + kept([beta - d for d in near])
            loss = loss + kept([gamma - (d - far[i]) for d, i in zip(near, whose, strict=True)])
            steps += 1
            if loss < LOSS_GOAL:
                break
            (gradient,) = torch.autograd.grad(loss, delta)
            with torch.no_grad():
                delta -= lr * gradient * mask
                delta.clamp_(-limit, limit)
    return delta.detach(), steps


def top_hash(model, layer, prompt, background: Tensor, k: int, permutation: Tensor) -> list[int]:
    """The columns of a prompt's mask, ascending."""
    away = (inputs(model, layer, prompt).mean(0) - background).abs()
    largest = sorted(range(len(away)), key=lambda i: -float(away[i]))[:k]
    return sorted(int(permutation[i]) for i in largest)


def memoir_batch(model, layer, weight, tasks, masks, *, lr, n_iter, clip) -> Tensor:
    """W' after gradient descent on one batch. masks: the columns that each task sees"""
    weight = weight.clone().requires_grad_()
    with frozen(model), torch.enable_grad():
        for _ in range(n_iter):
            losses = []
            for task, mask in zip(tasks, masks, strict=True):
                with beside(model, layer, lambda x, mask=mask, weight=weight: x[..., mask] @ weight[:, mask].T):
                    losses.append(nll(model, *task))
            loss = torch.stack(losses).mean()
            if loss < LOSS_GOAL:
                break
            (gradient,) = torch.autograd.grad(loss, weight)
            with torch.no_grad():
                weight -= lr * gradient * min(1.0, clip / (float(gradient.norm()) + 1e-6))
    return weight.detach()
