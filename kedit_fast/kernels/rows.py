"""Rows that begin: corrupted embeddings, and the rows a branching run starts from (batch restoration)."""

import torch
from torch import Tensor


def add_noise(x: Tensor, noise: Tensor, index: Tensor) -> Tensor:
    """x with ``noise`` added at the rows ``index``: rounded once from fp64, as the published in-place add does.

    x: [rows, d]; noise: [k, d] fp64 (level times draw); index: [k] int64 rows. Gives a new [rows, d] in x's dtype.
    """
    return add_noise_ref(x, noise, index)


def add_noise_ref(x, noise, index):
    """The same in plain torch."""
    out = x.clone()
    out[index] = (x[index].to(noise.dtype) + noise.to(x.device)).to(x.dtype)
    return out


def branch_rows(h: Tensor, source: Tensor) -> Tensor:
    """h followed by the rows that new runs begin as: one launch for every (token, layer, draw) of every fact.

    h: [rows, d]; source: [m] int64. The clean row at a restored position is one of the sources.
    """
    return branch_rows_ref(h, source)


def branch_rows_ref(h, source):
    """The same in plain torch."""
    return torch.cat([h, h[source]])
