"""Rows that begin: corrupted embeddings, and the rows a branching run starts from (batch restoration)."""

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


def branch_rows(h: Tensor, source: Tensor) -> Tensor:
    """h followed by the rows that new runs begin as: one launch for every (token, layer, draw) of every fact.

    h: [rows, d]; source: [m] int64 in [0, rows). The clean row at a restored position is one of the sources.
    """
    if dispatch.backend_for("rows", h.device, h.dtype) == "triton":
        from kedit_fast.kernels.triton import rows

        return rows.branch_rows(h, source)
    return branch_rows_ref(h, source)


def branch_rows_ref(h, source):
    """The same in plain torch."""
    return torch.cat([h, h[source]])
