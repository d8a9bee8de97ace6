"""RMS norms and gated activations on Triton: a program holds whole rows for a norm, a tile for an activation."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A norm's program holds as many rows as make up this many numbers, a row at least: 16 numbers a thread of 4 warps, and
# up to 32 a thread of 16 warps in the widest rows. Not timed on a GPU yet.
_NUMBERS, _MOST_WARPS = 2048, 16
# An activation's tile: 16 numbers a thread, so that a bf16 tile is two loads of 16 bytes for each. Not timed either.
_ROWS, _WIDTH = 4, 512
_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def rms_norm_kernel(out, x, weight, n_rows, d, x_stride, eps, offset, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out = (offset + weight) x / sqrt(mean(x²) + eps), in fp32 and rounded once; WIDTH: d padded to a power of two.

    Grid (row tiles,); a program owns ROWS whole rows of ``out`` [n_rows, d], contiguous.
    Reads x and writes out once, reads weight once a tile; 5 FLOP a number.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < n_rows)[:, None] & (column < d)[None, :]
    row = row.to(tl.int64)
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32) + offset
    scale = tl.rsqrt(tl.sum(value * value, 1) / d + eps)
    normed = factor[None, :] * (value * scale[:, None])
    tl.store(out + row[:, None] * d + column[None, :], normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    dx, dy, x, weight, n_rows, d, x_stride, eps, offset, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """dx = r (g - x r² mean(g x)) with g = (offset + weight) dy and r = 1 / sqrt(mean(x²) + eps).

    Grid (row tiles,); a program owns ROWS whole rows of ``dx`` [n_rows, d], contiguous as ``dy`` is.
    Reads x and dy and writes dx once, reads weight once a tile; 9 FLOP a number.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < n_rows)[:, None] & (column < d)[None, :]
    row = row.to(tl.int64)
    place = row[:, None] * d + column[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32) + offset
    g = factor[None, :] * tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / d + eps)
    share = scale * (scale * (tl.sum(g * value, 1) / d))
    tl.store(dx + place, (scale[:, None] * (g - value * share[:, None])).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(
    out, gate, up, n_rows, n, gate_stride, up_stride, TANH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """out = act(gate) up, in fp32 and rounded once; act is gelu_tanh with TANH, silu without.

    Grid (row tiles, column tiles); a program owns ROWS x WIDTH of ``out`` [n_rows, n], contiguous.
    Reads gate and up and writes out once; an exponential, a division and about 10 FLOP a number.
    """
    row, column, inside = _tile(n_rows, n, ROWS, WIDTH)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    above, _ = _sigmoids(_inner(g, TANH)[0])
    tl.store(out + row * n + column, (g * above * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(
    d_gate, d_up, d, gate, up, n_rows, n, gate_stride, up_stride,
    TANH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """d_up = d act(g), d_gate = d up (s + g u'(g) s (1 - s)) with s = sigmoid(u(g)): act(g) is g s.

    Grid (row tiles, column tiles); a program owns ROWS x WIDTH of ``d_gate`` and ``d_up`` [n_rows, n], contiguous as
    ``d`` is. Reads d, gate and up and writes both once; an exponential, two divisions and about 16 FLOP a number.
    """
    row, column, inside = _tile(n_rows, n, ROWS, WIDTH)
    place = row * n + column
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    pull = tl.load(d + place, mask=inside, other=0.0).to(tl.float32)
    u, slope = _inner(g, TANH)
    above, below = _sigmoids(u)
    tl.store(d_up + place, (pull * (g * above)).to(d_up.dtype.element_ty), mask=inside)
    of_gate = pull * factor * (above + g * (slope * (above * below)))
    tl.store(d_gate + place, of_gate.to(d_gate.dtype.element_ty), mask=inside)


@triton.jit
def _tile(n_rows, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [ROWS, 1] int64 and columns [1, WIDTH] of this program, and which of its places there are."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    return row.to(tl.int64), column, (row < n_rows) & (column < n)


@triton.jit
def _inner(g, TANH: tl.constexpr):
    """u and du/dg where the activation is g sigmoid(u): u = g for silu, 2 sqrt(2/π) (g + 0.044715 g³) for gelu_tanh."""
    u, slope = g, 1.0
    if TANH:
        h = tl.minimum(tl.maximum(g, -16.0), 16.0)  # further out the sigmoid is 0 or 1, and the slope stays finite
        u = h * (1.5957691216057308 + 0.07135481627159536 * h * h)
        slope = 1.5957691216057308 + 0.21406444881478606 * h * h
    return u, slope


@triton.jit
def _sigmoids(u):
    """sigmoid(u) and 1 - sigmoid(u), neither a difference; no power overflows."""
    e = tl.exp(-tl.abs(u))
    one = 1 / (1 + e)
    return tl.where(u < 0, e, 1.0) * one, tl.where(u < 0, 1.0, e) * one


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> None:
    """``kernels.pointwise.rms_norm`` of rows x [rows, d] into ``out``, both with numbers of a row side by side."""
    rows, d = x.shape
    tile = _row_tile(d)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            out, x, weight, rows, d, x.stride(0), eps, offset, **tile, **_norm_options(d)
        )


def rms_norm_backward(dx: Tensor, dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> None:
    """The gradient of x from that of ``rms_norm``'s result, into ``dx``."""
    rows, d = x.shape
    tile = _row_tile(d)
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            dx, dy, x, weight, rows, d, x.stride(0), eps, offset, **tile, **_norm_options(d)
        )


def gated(out: Tensor, gate: Tensor, up: Tensor, act: str) -> None:
    """``kernels.pointwise.gated`` of rows gate and up [rows, n] into ``out``."""
    with torch.cuda.device_of(gate):
        gated_kernel[_grid(*gate.shape)](
            out, gate, up, *gate.shape, gate.stride(0), up.stride(0),
            TANH=act == "gelu_tanh", ROWS=_ROWS, WIDTH=_WIDTH, num_warps=4, **_OPTIONS,
        )  # fmt: skip


def gated_backward(d_gate: Tensor, d_up: Tensor, d: Tensor, gate: Tensor, up: Tensor, act: str) -> None:
    """The gradients of gate and up from that of ``gated``'s result, into ``d_gate`` and ``d_up``."""
    with torch.cuda.device_of(gate):
        gated_backward_kernel[_grid(*gate.shape)](
            d_gate, d_up, d, gate, up, *gate.shape, gate.stride(0), up.stride(0),
            TANH=act == "gelu_tanh", ROWS=_ROWS, WIDTH=_WIDTH, num_warps=4, **_OPTIONS,
        )  # fmt: skip


def _row_tile(d: int) -> dict[str, int]:
    width = max(16, triton.next_power_of_2(d))
    return {"ROWS": max(1, _NUMBERS // width), "WIDTH": width}


def _norm_options(d: int) -> dict:
    return _OPTIONS | {"num_warps": min(_MOST_WARPS, max(4, triton.next_power_of_2(d) // 512))}


def _grid(rows: int, n: int) -> tuple[int, int]:
    # Rows on the first axis: it takes 2**31 - 1 programs, the second one 65,535 (33 million columns).
    return triton.cdiv(rows, _ROWS), triton.cdiv(n, _WIDTH)


def compile_cases() -> list[tuple]:
    """See ``kedit_fast.kernels.triton``."""
    cases = []
    for dtype, weight, d in (
        ("bf16", "bf16", 64),
        ("fp16", "fp32", 4096),
        ("fp32", "fp32", 16384),
        ("fp32", "fp32", 577),
    ):
        size = "i32:16" if d % 16 == 0 else "i32"
        types = dict.fromkeys(("x", "out", "dx", "dy", "gate", "up", "d_gate", "d_up"), f"*{dtype}")
        types |= {"weight": f"*{weight}", "n_rows": "i32", "eps": "fp32", "offset": "fp32"}
        types |= dict.fromkeys(("n", "x_stride", "gate_stride", "up_stride"), size)
        for kernel in (rms_norm_kernel, rms_norm_backward_kernel):
            title = f"pointwise.{kernel.__name__} {dtype}, weight {weight}, d {d}"
            cases.append((title, kernel, types | {"d": size}, _row_tile(d), _norm_options(d)))
        if d > 4096:
            continue
        for kernel, tanh in ((gated_kernel, False), (gated_backward_kernel, False), (gated_backward_kernel, True)):
            tile = {"TANH": tanh, "ROWS": _ROWS, "WIDTH": _WIDTH}
            title = f"pointwise.{kernel.__name__} {dtype}, sizes {size}{', tanh' if tanh else ''}"
            cases.append((title, kernel, types | {"d": f"*{dtype}"}, tile, _OPTIONS | {"num_warps": 4}))
    return cases
