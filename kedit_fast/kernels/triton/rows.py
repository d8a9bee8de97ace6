"""Rows that begin, on Triton: one pass over the rows for noise, one launch for the rows of branching runs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile is 8 rows of 512 elements: 32 elements a thread, so that a bf16 tile is four loads of 16 bytes for each.
# Not timed on a GPU yet.
_ROWS, _WIDTH = 8, 512
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def add_noise_kernel(
    x, noise, noise_row, out, n_rows, d, x_stride, noise_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """out[i] = round(x[i] + noise[noise_row[i]]), the sum made in fp64; x[i] to the bit where noise_row[i] is -1.

    Grid (row tiles, column tiles); a program owns ROWS x WIDTH of ``out`` [n_rows, d], contiguous.
    Reads x once and 8 bytes a noised element, writes out once; one fp64 addition a noised element.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    source = tl.load(noise_row + row, mask=row < n_rows, other=-1)
    inside = (row < n_rows)[:, None] & (column < d)[None, :]
    noised = inside & (source >= 0)[:, None]
    row = row.to(tl.int64)
    clean = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside)
    added = tl.load(noise + source[:, None] * noise_stride + column[None, :], mask=noised, other=0.0)
    total = clean.to(tl.float64) + added
    if x.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)  # torch goes from fp64 to 16 bits by way of fp32, and so does the published code
    value = tl.where(noised, total.to(x.dtype.element_ty), clean)
    tl.store(out + row[:, None] * d + column[None, :], value, mask=inside)


@triton.jit
def branch_rows_kernel(rows, source, n_rows, n_born, d, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """rows[n_rows + i] = rows[source[i]] for i < n_born; NaN where source is not below n_rows.

    Grid (row tiles, column tiles); a program owns ROWS x WIDTH of the born part of ``rows`` [n_rows + n_born, d],
    contiguous. Reads and writes n_born rows.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    born = row < n_born
    origin = tl.load(source + row, mask=born, other=0)
    known = (origin >= 0) & (origin < n_rows)
    width = (column < d)[None, :]
    value = tl.load(rows + origin[:, None] * d + column[None, :], mask=known[:, None] & width, other=float("nan"))
    place = (n_rows + row).to(tl.int64) * d
    tl.store(rows + place[:, None] + column[None, :], value, mask=born[:, None] & width)


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, noise, index):
        ctx.save_for_backward(index)
        ctx.noise_type = noise.dtype, noise.device
        return _add_noise(x, noise, index)

    @staticmethod
    def backward(ctx, gradient):
        (index,) = ctx.saved_tensors
        dtype, device = ctx.noise_type
        of_noise = gradient[index].to(device, dtype) if ctx.needs_input_grad[1] else None
        return gradient, of_noise, None


def add_noise(x: Tensor, noise: Tensor, index: Tensor) -> Tensor:
    """``kernels.rows.add_noise`` on Triton; gradients pass through x and noise."""
    return _AddNoise.apply(x, noise, index)


def branch_rows_(rows: Tensor, source: Tensor) -> None:
    """Fills the last rows of ``rows`` [n + m, d], contiguous, with those of the first n that ``source`` [m] names."""
    n, (total, d) = len(source), rows.shape
    if n and d:
        with torch.cuda.device_of(rows):
            branch_rows_kernel[_grid(n, d)](
                rows, source.contiguous().to(rows.device), total - n, n, d, ROWS=_ROWS, WIDTH=_WIDTH, **_OPTIONS
            )


def _add_noise(x: Tensor, noise: Tensor, index: Tensor) -> Tensor:
    rows, d = x.shape
    x, noise = _unit_stride(x), _unit_stride(noise.to(x.device, torch.float64))
    index = index.to(x.device)
    noise_row = index.new_full((rows,), -1).index_put_((index,), torch.arange(len(index), device=x.device))
    out = x.new_empty(rows, d)
    if not out.numel():
        return out
    with torch.cuda.device_of(x):
        add_noise_kernel[_grid(rows, d)](
            x, noise, noise_row, out, rows, d, x.stride(0), noise.stride(0), ROWS=_ROWS, WIDTH=_WIDTH, **_OPTIONS
        )
    return out


def _grid(rows: int, d: int) -> tuple[int, int]:
    # Rows on the first axis: it takes 2**31 - 1 programs, the second one 65,535 (33 million columns).
    return triton.cdiv(rows, _ROWS), triton.cdiv(d, _WIDTH)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def compile_cases() -> list[tuple]:
    """See ``kedit_fast.kernels.triton``."""
    sizes = {"n_rows": "i32", "n_born": "i32", "noise_row": "*i64", "source": "*i64", "noise": "*fp64"}
    tile = {"ROWS": _ROWS, "WIDTH": _WIDTH}
    cases = []
    for dtype, d in (("bf16", "i32:16"), ("fp64", "i32")):
        widths = dict.fromkeys(("d", "x_stride", "noise_stride"), d)
        types = sizes | widths | dict.fromkeys(("x", "rows", "out"), f"*{dtype}")
        cases += [
            (f"rows.{kernel.__name__} {dtype} {d}", kernel, types, tile, _OPTIONS)
            for kernel in (add_noise_kernel, branch_rows_kernel)
        ]
    return cases
