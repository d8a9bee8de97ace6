"""UltraEdit and StableEdit on a plain Hugging Face model: one text a forward, numpy's means and covariances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.oracle.access import lookup, target_ids
from tests.oracle.values import Fact

EPSILON = float(np.finfo(np.float32).eps)
FLOOR = 1e-6


class Rows(NamedTuple):
    """h [t, in], g [t, out] of one matrix at the tokens whose next token is a target's."""

    h: np.ndarray
    g: np.ndarray


def rows(model: nn.Module, tok: Any, facts: Sequence[Fact], modules: Sequence[str], batch: int) -> dict[str, Rows]:
    """By hooks; the loss of each batch is the mean over its target tokens."""
    kept: dict[str, list[tuple]] = {name: [] for name in modules}
    for first in range(0, len(facts), batch):
        some = facts[first : first + batch]
        n_tokens = sum(len(target_ids(tok, fact.target_new)) for fact in some)
        for fact in some:
            prompt, _ = lookup(tok, fact.prompt, fact.subject)
            target = target_ids(tok, fact.target_new)
            seen: dict[str, tuple] = {}
            handles = [
                model.get_submodule(name).register_forward_hook(
                    lambda module, args, out, name=name, seen=seen: seen.update({name: (args[0], out.requires_grad_())})
                )
                for name in modules
            ]
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
            loss = nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum") / n_tokens
            gradients = torch.autograd.grad(loss, [seen[name][1] for name in modules])
            for handle in handles:
                handle.remove()
            at = slice(len(prompt) - 1, len(prompt) + len(target) - 1)
            for name, gradient in zip(modules, gradients, strict=True):
                kept[name].append((seen[name][0][0, at].detach().numpy(), gradient[0, at].numpy()))
    return {name: Rows(*map(np.concatenate, zip(*parts, strict=True))) for name, parts in kept.items()}


def deltas(
    now: dict[str, Rows], seen: Sequence[dict[str, Rows]], *, lr: float, alpha: float, whitens: bool
) -> dict[str, torch.Tensor]:
    """{module: Δ [out, in]}; seen: the rows of all turns up to now, of which those of one shape count together."""
    made = {}
    for name, (h, g) in now.items():
        alike = [
            turn[other]
            for turn in seen
            for other in turn
            if turn[other].h.shape[1] == h.shape[1] and turn[other].g.shape[1] == g.shape[1]
        ]
        every_h, every_g = (np.concatenate([getattr(one, part) for one in alike]) for part in ("h", "g"))
        n, width = every_g.shape
        h_normal = (h - every_h.mean(0)) / (every_h.std(0, ddof=1) + EPSILON)
        if whitens and n > width + 1:
            covariance = np.cov(every_g.T, ddof=width + 1)
            values, vectors = np.linalg.eigh(covariance)
            g_normal = (g - every_g.mean(0)) @ vectors @ np.diag(np.maximum(values, FLOOR) ** -0.5) @ vectors.T
        else:
            g_normal = (g - every_g.mean(0)) / (every_g.std(0, ddof=1) + EPSILON)
        v = -lr * (h_normal**2).sum(1)[:, None] * g_normal
        x = np.linalg.solve(h.T @ h + alpha * np.eye(h.shape[1]), h.T @ v)
        made[name] = torch.from_numpy(x.T.copy())
    return made


@torch.no_grad()
def add(model: nn.Module, changes: dict[str, torch.Tensor]) -> None:
    """W += Δ in place."""
    for name, delta in changes.items():
        module = model.get_submodule(name)
        module.weight += delta.T if isinstance(module, Conv1D) else delta
