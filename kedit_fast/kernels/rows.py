"""Rows that begin: corrupted embeddings, and the rows a branching run starts from (batch restoration)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kedit_fast.kernels import dispatch


def add_noise(x: Tensor, noise: Tensor, index: Tensor) -> Tensor:
    """x with ``noise`` added at the rows ``index``: rounded once from fp64, as the published in-place add does.

    x: [rows, d]; noise: [k, d] fp64 (level times draw); index: [k] int64, different rows. Gives a new [rows, d] in
    x's dtype.
    """
    if dispatch.backend_for("rows", x.device, x.dtype) == "triton":
        from kedit_fast.kernels.triton import rows

        return rows.add_noise(x, noise, index)
    return add_noise_ref(x, noise, index)


def add_noise_ref(x, noise, index):
    """The same in plain torch."""
    out = x.clone()
    out[index] = (x[index].to(noise.dtype) + noise.to(x.device)).to(x.dtype)
    return out


def branch_rows(parts: Sequence[Tensor], source: Tensor) -> Tensor:
    """Rows, and behind them those that new runs begin as: one launch for every (token, layer, draw) of every fact.

    parts: of the rows, [_, d] each, in order; source: [m] int64 of their numbers. The clean row at a restored position
    is one of the sources. Each row is written once.
    """
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return branch_rows_ref(parts, source)
    n, d = sum(map(len, parts)), parts[0].shape[1]
    out = parts[0].new_empty(n + len(source), d)
    torch.cat(list(parts), out=out[:n])
    if dispatch.backend_for("rows", out.device, out.dtype) == "triton":
        from kedit_fast.kernels.triton import rows

        rows.branch_rows_(out, source)
    else:
        torch.index_select(out[:n], 0, source, out=out[n:])
    return out


def branch_rows_ref(parts, source):
    """The same in plain torch."""
    h = torch.cat(list(parts))
    return torch.cat([h, h[source]])
