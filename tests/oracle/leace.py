"""LEACE from the paper's formula, and concept scrubbing of a plain Hugging Face model, one prompt a forward."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracle.access import first, site_module, with_first


def leace(X: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
    """(P [d, d], μ [d]) of rows X [n, d] and Z [n, k]: P = I - W⁺ (W Σ_xz)(W Σ_xz)⁺ W, W = (Σ_xx^(1/2))⁺."""
    mu = X.mean(0)
    A, B = X - mu, Z - Z.mean(0)
    Sxx, Sxz = A.T @ A / len(X), A.T @ B / len(X)
    root = _root(Sxx)
    W = torch.linalg.pinv(root, rtol=1e-6, hermitian=True)
    M = W @ Sxz
    return torch.eye(len(mu)).to(X) - root @ (M @ torch.linalg.pinv(M, rtol=1e-6)) @ W, mu


def _root(S: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(S)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def scrub(model: nn.Module, prompts: list[list[int]], Z: Tensor, layers: list[int], site: str) -> dict[int, Any]:
    """{layer: (P, μ)}: each of rows at the prompts' last tokens, the layers below already scrubbed."""
    found: dict[int, Any] = {}
    for layer in layers:
        rows: list[Tensor] = []
        with scrubbed(model, found, site), hooked(model, layer, site, lambda x, to=rows: to.append(x[0, -1])):
            for ids in prompts:
                model(torch.tensor([ids]))
        found[layer] = leace(torch.stack(rows).double(), Z)
    return found


@contextlib.contextmanager
def scrubbed(model: nn.Module, erasers: dict[int, Any], site: str):
    """Inside, every row at the site of these layers is P x + (I - P) μ."""
    with contextlib.ExitStack() as stack:
        for layer, (P, mu) in erasers.items():
            stack.enter_context(hooked(model, layer, site, lambda x, P=P, mu=mu: ((x - mu) @ P.T + mu).to(x.dtype)))
        yield


@contextlib.contextmanager
def hooked(model: nn.Module, layer: int, site: str, see):
    """Calls ``see`` with the site's value [1, T, width]; what it gives back takes its place."""
    if site in ("mlp_key", "mlp_in"):  # what a module reads
        module = site_module(model, layer, "mlp_out" if site == "mlp_key" else "mlp")

        def before(module, args):
            x = see(args[0])
            return None if x is None else (x, *args[1:])

        handle = module.register_forward_pre_hook(before)
    else:

        def behind(module, args, output):
            x = see(first(output))
            return None if x is None else with_first(output, x)

        handle = site_module(model, layer, site).register_forward_hook(behind)
    try:
        yield
    finally:
        handle.remove()
