"""Low-rank update of rows: how an edit Δ = u vᵀ acts on a down projection's output without forming Δ."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kedit_fast.basics.state import wide
from kedit_fast.kernels import dispatch


def lowrank_add(
    y: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    row_owner: Tensor | None = None,
    factor_owner: Tensor | None = None,
) -> Tensor:
    """y + (x v) uᵀ, a new tensor; with owners, factor j acts only on the rows whose owner is factor j's.

    y: [rows, d] outputs of the down projection (mlp_out)
    x: [rows, d_ff] its inputs (mlp_key)
    u, v: [d, r] and [d_ff, r] factors of the update
    row_owner: [rows] int64, the fact that owns each row; any value that owns no factor (-1) leaves the row as it is
    factor_owner: [r] int64, the fact that owns each factor, in any order

    Returns [rows, d] in y's dtype, rounded once from fp32 (fp64 where y is fp64). Gradients pass through every
    floating argument. Cost: rows · r · (d + d_ff) multiply-adds; with owners only a row's own factors are counted.
    Raises ValueError where shapes disagree or only one of the owners is given.
    """
    _check(y, x, u, v, row_owner, factor_owner)
    if dispatch.backend_for("lowrank", y.device, y.dtype) == "triton":
        return _OnTriton.apply(y, x, u, v, row_owner, factor_owner)
    return lowrank_add_ref(y, x, u, v, row_owner, factor_owner)


class _OnTriton(torch.autograd.Function):
    """The kernels of triton/lowrank.py forward; backward the reference, whose products an optimization needs anyway."""

    @staticmethod
    def forward(ctx, y, x, u, v, row_owner, factor_owner):
        ctx.save_for_backward(x, u, v, row_owner, factor_owner)  # y only adds: its value is not needed
        from kedit_fast.kernels.triton import lowrank

        return lowrank.lowrank_add(y, x, u, v, row_owner, factor_owner)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        *floats, row_owner, factor_owner = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        floats = [torch.zeros_like(gradient), *(each.detach() for each in floats)]
        floats = [each.requires_grad_(need) for each, need in zip(floats, needed, strict=True)]
        with torch.enable_grad():
            out = lowrank_add_ref(*floats, row_owner, factor_owner)
        found = iter(torch.autograd.grad(out, [each for each in floats if each.requires_grad], gradient))
        return *(next(found) if need else None for need in needed), None, None


def lowrank_add_ref(y, x, u, v, row_owner=None, factor_owner=None):
    """``lowrank_add`` in plain torch."""
    sums = wide(y.dtype)
    u, v = u.to(sums), v.to(sums)
    if factor_owner is None:
        return (y.to(sums) + x.to(sums) @ v @ u.T).to(y.dtype)

    # One small product for each owner: a masked [rows, r] product would cost facts times as much, and a NaN in
    # one fact's factors would reach every other fact's rows as 0 * NaN.
    rows, factors = row_owner.argsort(stable=True), factor_owner.argsort(stable=True)
    owners = torch.unique(factor_owner)
    row_groups = _groups(row_owner[rows], owners)
    factor_groups = _groups(factor_owner[factors], owners)
    u, v = u[:, factors], v[:, factors]

    touched, update = [rows[:0]], [x[:0].to(sums) @ v @ u.T]  # no rows, but x, u and v are in the graph whoever owns
    for (row, row_end), (factor, factor_end) in zip(row_groups, factor_groups, strict=True):
        if row < row_end:
            mine = rows[row:row_end]
            touched.append(mine)
            update.append(x[mine].to(sums) @ v[:, factor:factor_end] @ u[:, factor:factor_end].T)
    return y.to(sums).index_add(0, torch.cat(touched), torch.cat(update)).to(y.dtype)


def _groups(sorted_owner, owners):
    """[(begin, end)] of each of ``owners`` in a sorted vector; empty where it does not occur."""
    begin = torch.searchsorted(sorted_owner, owners)
    end = torch.searchsorted(sorted_owner, owners, right=True)
    return list(zip(begin.tolist(), end.tolist(), strict=True))


def _check(y, x, u, v, row_owner, factor_owner):
    sizes = {name: tuple(tensor.shape) for name, tensor in (("y", y), ("x", x), ("u", u), ("v", v))}
    if any(len(size) != 2 for size in sizes.values()) or not (
        sizes["y"] == (sizes["x"][0], sizes["u"][0]) and sizes["v"] == (sizes["x"][1], sizes["u"][1])
    ):
        raise ValueError(f"expected y [rows, d], x [rows, d_ff], u [d, r], v [d_ff, r]; got {sizes}")
    if (row_owner is None) != (factor_owner is None):
        raise ValueError("row_owner and factor_owner go together: give both, or neither for an update of all rows")
    if row_owner is not None:
        for name, owner, n in (("row_owner", row_owner, len(y)), ("factor_owner", factor_owner, u.shape[1])):
            if owner.shape != (n,) or owner.dtype != torch.int64:
                raise ValueError(f"expected {name} [{n}] int64, got {list(owner.shape)} {owner.dtype}")
