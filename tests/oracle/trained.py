"""Trained editors' updates, a fact at a time: factors by hooks on a plain Hugging Face model, networks from formulas.

A network is given as the tensors of its file, {name: tensor}, and the matrices (layer, role, module path) in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Matrix(NamedTuple):
    """One changed matrix: its place in the network's names, and its module."""

    layer: int
    role: str
    path: str

    @property
    def name(self) -> str:
        return f"{self.role}-{self.layer}"


def nll(logits: Tensor, prompt: Sequence[int], target: Sequence[int]) -> Tensor:
    """-log p of the target's tokens behind the prompt, their mean, in nats; logits [tokens, V] of prompt + target."""
    return nn.functional.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(list(target)))


def factors(model: nn.Module, prompt: list[int], target: list[int], matrices: Sequence[Matrix]) -> dict:
    """{matrix: (x [t, in], δ [t, out])} of the tokens that the loss depends on there, by autograd through the model."""
    seen: dict[Matrix, tuple[Tensor, Tensor]] = {}

    def keep(matrix: Matrix) -> Callable:
        def hook(module, args, out):
            out.retain_grad()
            seen[matrix] = (args[0][0].detach(), out)

        return hook

    handles = [model.get_submodule(matrix.path).register_forward_hook(keep(matrix)) for matrix in matrices]
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(torch.tensor([prompt + target])).detach().requires_grad_()
        nll(model(inputs_embeds=embedded).logits[0], prompt, target).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    found = {}
    for matrix, (x, out) in seen.items():
        some = (out.grad[0] != 0).any(1)
        found[matrix] = (x[some], out.grad[0][some])
    return found


def standardized(rows: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    """(rows - mean) / deviation, which counts as at least a thousandth of the mean one."""
    deviation = (tensors[f"{name}.squares"] / (tensors[f"{name}.n"] - 1)).sqrt()
    return (rows - tensors[f"{name}.mean"]) / deviation.clamp(min=1e-3 * deviation.mean())


def pseudo(tensors, matrices, matrix, x: Tensor, delta: Tensor, late: bool) -> tuple[Tensor, Tensor]:
    """x̃ and δ̃ of MEND and MALMEN."""
    sizes = {other: tensors[f"of_x.{other.name}.mean"].shape + tensors[f"of_delta.{other.name}.mean"].shape
             for other in matrices}  # fmt: skip
    which = [other for other in matrices if sizes[other] == sizes[matrix]].index(matrix)
    z = torch.cat(
        [standardized(x, tensors, f"of_x.{matrix.name}"), standardized(delta, tensors, f"of_delta.{matrix.name}")], 1
    )
    net, block = f"nets.{delta.shape[1]}x{x.shape[1]}", 0
    while f"{net}.{block}.u" in tensors:
        u, v, bias, scale, shift = (tensors[f"{net}.{block}.{name}"] for name in ("u", "v", "bias", "scale", "shift"))
        inner = torch.stack([u @ (v @ row) for row in z]) + bias
        if late:
            z = z + torch.maximum(inner, torch.zeros(())) * scale[which] + shift[which]
        else:
            z = z + torch.maximum(inner * scale[which] + shift[which], torch.zeros(()))
        block += 1
    return z[:, : x.shape[1]], z[:, x.shape[1] :]


def mend(tensors, matrices, matrix, facts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """-α Σ δ̃ x̃ᵀ [out, in] over facts and their tokens."""
    alpha = tensors["scales.alpha"][list(matrices).index(matrix)]
    total = 0
    for x, delta in facts:
        x_, delta_ = pseudo(tensors, matrices, matrix, x, delta, late=False)
        total = total - alpha * sum(torch.outer(d, k) for d, k in zip(delta_, x_, strict=True))
    return total


def malmen(tensors, matrices, matrix, facts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """[out, in], of the normal equations over all tokens of all facts."""
    place = list(matrices).index(matrix)
    alpha, ridge = tensors["scales.alpha"][place], tensors["scales.ridge"][place].exp()
    h, v = [], []
    for x, delta in facts:
        x_, delta_ = pseudo(tensors, matrices, matrix, x, delta, late=True)
        for key, pseudo_key, value in zip(x, x_, delta_, strict=True):
            h.append(key)
            v.append(-alpha * (key @ pseudo_key) * value)
    h, v = torch.stack(h), torch.stack(v)
    return (torch.linalg.inv(h.T @ h + ridge * torch.eye(h.shape[1], dtype=h.dtype)) @ h.T @ v).T


def ke(tensors, matrices, matrix, facts, read: Sequence[tuple[Tensor, Tensor]], settings: dict[str, Any]) -> Tensor:
    """-max_scale σ(η) (G ∘ a + b) [out, in], summed over facts, all of it dense. read: those of the first matrix"""
    first, total = next(iter(matrices)), 0
    for (x, delta), (x_0, delta_0) in zip(facts, read, strict=True):
        z = torch.cat(
            [
                standardized(x_0, tensors, f"of_x.{first.name}"),
                standardized(delta_0, tensors, f"of_delta.{first.name}"),
            ],
            1,
        )
        weight = (z @ tensors["query"] / z.shape[1] ** 0.5).softmax(0)
        c = (tensors["pool.weight"] @ (weight @ z) + tensors["pool.bias"]).tanh()
        for layer, squash in (("first", torch.tanh), ("last", lambda y: y)):
            of_layer = f"matrices.{matrix.name}.{layer}"
            length, direction = (tensors[f"{of_layer}.parametrizations.weight.original{i}"] for i in (0, 1))
            c = squash(length * direction / direction.norm(dim=1, keepdim=True) @ c + tensors[f"{of_layer}.bias"])
        out, width = delta.shape[1], x.shape[1]
        r_a, r_b, c_a, c_b, eta = c.split([out, out, width, width, 1])
        start = settings["edit_lr"] * out
        a, b = torch.outer(r_a.softmax(0), start * (1 + c_a)), torch.outer(r_b.softmax(0), start * c_b)
        gradient = delta.T @ x / (size(tensors, f"of_x.{matrix.name}") * size(tensors, f"of_delta.{matrix.name}"))
        total = total - settings["max_scale"] * torch.sigmoid(eta) * (gradient * a + b)
    return total


def size(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The root mean square of the entries that a statistic has seen."""
    return (tensors[f"{name}.squares"] / tensors[f"{name}.n"] + tensors[f"{name}.mean"] ** 2).mean().sqrt()
