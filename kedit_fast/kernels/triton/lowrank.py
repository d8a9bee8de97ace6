"""The low-rank update of rows on Triton: two products through [rows, r] fp32, an owner's rows in tiles of its own."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a tile: 32 where all rows take all factors (64 spilled 8 bytes on sm_90); 16, the least that a product takes,
# where every fact has its few.
_ROWS_SHARED, _ROWS_OWNED = 32, 16
_FACTORS = 16  # factors at once
_STEP, _WIDTH = 64, 64  # elements of x, and of y, at once
# No spills on sm_80 and sm_90 (tests/kernels/triton/test_compile.py); not timed on a GPU yet.
_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


class Tiles(NamedTuple):
    """Rows and factors sorted by owner and cut into tiles that have one owner each.

    order: [rows] the row at each sorted place; bounds: [tiles, 4] the places of a tile's first row and of the one
    behind its last, the same of its factors (none for rows of nobody); factors: [r] the factor at each sorted place,
    or None for their own order; widest: the most factors a tile has; size: the most rows
    """

    order: Tensor
    bounds: Tensor
    factors: Tensor | None
    widest: int
    size: int


@triton.jit
def project_kernel(
    x, v, t, order, bounds, d_ff, widest, x_stride,
    ROWS: tl.constexpr, FACTORS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """t = x v for every tile's own rows and factors: t [rows, widest] fp32, in the tiles' order of rows.

    v: [r, d_ff], contiguous, in the tiles' order of factors.

    Grid (tiles, blocks of factors); a program owns ROWS x FACTORS of t. Reads x once a block of factors and a tile's
    factors once. 2 · rows · r · d_ff FLOP, in full fp32.
    """
    begin, end, first, last = _bounds(bounds)
    place = begin + tl.arange(0, ROWS)
    factor = tl.program_id(1) * FACTORS + tl.arange(0, FACTORS)
    mine, own = place < end, factor < last - first
    if tl.program_id(1) * FACTORS < last - first:
        row = tl.load(order + place, mask=mine, other=0)
        step = tl.arange(0, STEP)
        rows = x + (row * x_stride)[:, None] + step[None, :]
        factors = v + ((first + factor) * d_ff)[None, :] + step[:, None]
        total = tl.zeros((ROWS, FACTORS), dtype=tl.float32)
        for k in range(0, d_ff, STEP):
            inside = step < d_ff - k
            a = tl.load(rows, mask=mine[:, None] & inside[None, :], other=0.0).to(tl.float32)
            b = tl.load(factors, mask=inside[:, None] & own[None, :], other=0.0).to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
            rows += STEP
            factors += STEP
        tl.store(t + place[:, None] * widest + factor[None, :], total, mask=mine[:, None] & own[None, :])


@triton.jit
def expand_kernel(
    y, u, t, out, order, bounds, d, widest, y_stride,
    ROWS: tl.constexpr, FACTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = y + t uᵀ for every tile's own rows and factors, rounded once; a row of nobody is copied to the bit.

    u: [r, d], contiguous, in the tiles' order of factors.

    Grid (tiles, column tiles); a program owns WIDTH columns of ROWS rows of ``out`` [rows, d], contiguous. Reads y
    and writes out once, reads t once a column tile and a tile's factors once. 2 · rows · r · d FLOP, in full fp32.
    """
    begin, end, first, last = _bounds(bounds)
    place = begin + tl.arange(0, ROWS)
    mine = place < end
    row = tl.load(order + place, mask=mine, other=0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = mine[:, None] & (column < d)[None, :]
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for k in range(0, (last - first).to(tl.int32), FACTORS):
        factor = k + tl.arange(0, FACTORS)
        own = factor < last - first
        a = tl.load(t + place[:, None] * widest + factor[None, :], mask=mine[:, None] & own[None, :], other=0.0)
        factors = u + ((first + factor) * d)[:, None] + column[None, :]
        b = tl.load(factors, mask=own[:, None] & (column < d)[None, :], other=0.0).to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    before = tl.load(y + (row * y_stride)[:, None] + column[None, :], mask=inside)
    after = (before.to(tl.float32) + total).to(y.dtype.element_ty)
    tl.store(out + (row * d)[:, None] + column[None, :], tl.where(last > first, after, before), mask=inside)


@triton.jit
def _bounds(bounds):
    """The four bounds of this program's tile, int64: so are all offsets made of them."""
    tile = bounds + tl.program_id(0).to(tl.int64) * 4
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


def lowrank_add(y, x, u, v, row_owner=None, factor_owner=None) -> Tensor:
    """``kernels.lowrank.lowrank_add`` on Triton for rows of up to 32 bits; without gradients."""
    (rows, d), d_ff, rank = y.shape, x.shape[1], u.shape[1]
    if not (rows and d and rank):
        return y.clone()
    tiles = shared_tiles(rows, rank, y.device) if row_owner is None else owned_tiles(row_owner, factor_owner, y.device)
    if not tiles.widest:
        return y.clone()
    x, y = (each if each.stride(1) == 1 else each.contiguous() for each in (x, y))
    # A factor's elements side by side, [r, d] and [r, d_ff]: a copy of the factors, but the kernels read them whole.
    u, v = ((each.T if tiles.factors is None else each.T[tiles.factors]).contiguous() for each in (u, v))
    t = y.new_empty(rows, tiles.widest, dtype=torch.float32)
    out = y.new_empty(rows, d)
    order, bounds, widest, size = tiles.order, tiles.bounds, tiles.widest, tiles.size
    with torch.cuda.device_of(y):
        project_kernel[len(bounds), triton.cdiv(widest, _FACTORS)](
            x, v, t, order, bounds, d_ff, widest, x.stride(0),
            ROWS=size, FACTORS=_FACTORS, STEP=_STEP, **_OPTIONS,
        )  # fmt: skip
        expand_kernel[len(bounds), triton.cdiv(d, _WIDTH)](
            y, u, t, out, order, bounds, d, widest, y.stride(0),
            ROWS=size, FACTORS=_FACTORS, WIDTH=_WIDTH, **_OPTIONS,
        )  # fmt: skip
    return out


def shared_tiles(rows: int, rank: int, device) -> Tiles:
    """Tiles where every factor acts on every row."""
    begin = torch.arange(0, rows, _ROWS_SHARED, device=device)
    none = torch.zeros_like(begin)
    bounds = torch.stack([begin, (begin + _ROWS_SHARED).clamp(max=rows), none, none + rank], 1)
    return Tiles(torch.arange(rows, device=device), bounds, None, rank, _ROWS_SHARED)


def owned_tiles(row_owner: Tensor, factor_owner: Tensor, device) -> Tiles:
    """Tiles where factors act on the rows of their owner: no tile has rows of two, so none reads another's factors."""
    order, factors = row_owner.argsort(stable=True), factor_owner.argsort(stable=True)
    owner, factor_owner = row_owner[order], factor_owner[factors].to(row_owner.device)
    place = torch.arange(len(owner), device=owner.device)
    group = torch.searchsorted(owner, owner)
    begin = place[(place - group) % _ROWS_OWNED == 0]  # waits for a GPU: how many tiles there are, and below how wide
    owner, group_end = owner[begin], torch.searchsorted(owner, owner[begin], right=True)
    first, last = (torch.searchsorted(factor_owner, owner, right=right) for right in (False, True))
    bounds = torch.stack([begin, torch.minimum(begin + _ROWS_OWNED, group_end), first, last], 1)
    widest = int((last - first).max())
    return Tiles(order.to(device), bounds.to(device), factors.to(device), widest, _ROWS_OWNED)


def compile_cases() -> list[tuple]:
    """See ``kedit_fast.kernels.triton``."""
    cases = []
    for dtype, factor, rows, size in (
        ("bf16", "fp32", _ROWS_OWNED, "i32:16"),
        ("fp16", "fp16", _ROWS_SHARED, "i32:16"),
        ("fp32", "fp32", _ROWS_SHARED, "i32"),
    ):
        types = dict.fromkeys(("x", "y", "out"), f"*{dtype}") | dict.fromkeys(("u", "v"), f"*{factor}")
        types |= {"t": "*fp32", "order": "*i64", "bounds": "*i64", "widest": "i32"}
        types |= dict.fromkeys(("d", "d_ff", "x_stride", "y_stride"), size)
        tile = {"ROWS": rows, "FACTORS": _FACTORS}
        for kernel, block in ((project_kernel, {"STEP": _STEP}), (expand_kernel, {"WIDTH": _WIDTH})):
            title = f"lowrank.{kernel.__name__} {dtype}, factors {factor}, {rows} rows, sizes {size}"
            cases.append((title, kernel, types, tile | block, _OPTIONS))
    return cases
