"""The second moment on Triton: tiles of the lower triangle only, keys of 16 bits on tensor cores, sums in fp32."""

import torch
import triton
import triton.language as tl

# Not in CUDA C++: an sm_90a source of our own could gain no more than what Triton's products lack to the card's peak.
# Of MEMIT's six layers of GPT-J products of keys are 96 d² FLOP a token, of 312 d² with the forward pass; at 75 % of
# peak here that is 9 % of an estimate at the very most. fp32 keys are bound by fp32 units either way.
# By the keys' element size; (SIDE of a tile, STEP rows at once, warps, stages). Compiled without spills for sm_80 and
# sm_90 (tests/kernels/triton/test_compile.py), not timed on a GPU yet.
_TILES = {2: (128, 64, 8, 3), 4: (64, 32, 4, 3)}
_ALIGNED = 16  # what d and the stride of rows must be divisible by, for loads of 16 bytes and no spills
_CHUNK = 4096  # rows summed in fp32 before they are added to c, as in the reference


@triton.jit
def second_moment_kernel(c, keys, n, d, width, stride, SIDE: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr):
    """c += keysᵀ keys on one tile of the lower triangle; sums in fp32, added to c [d, d] in c's dtype.

    keys: [n, width], width from d on and, like the stride of rows, divisible by 16; columns behind d are not used.

    Grid: T (T + 1) / 2 programs for T = ceil(d / SIDE) tiles a side; program t owns tile (i, j), j <= i, with
    t = i (i + 1) / 2 + j. Tiles on the diagonal are written whole. Reads 2 n d T bytes of 16-bit keys at most, mostly
    from cache; reads and writes the triangle of c once. n d (d + SIDE) FLOP.

    UPCAST: products in fp32; the interpreter's products of bf16 are not products.
    """
    i, j = triangle_place(tl.program_id(0))
    row = i * SIDE + tl.arange(0, SIDE)
    column = j * SIDE + tl.arange(0, SIDE)
    step = tl.arange(0, STEP)

    # Columns behind the width are wrapped, not masked, and the pointers advance by a scalar: with masks and pointer
    # tiles of 64 bits the kernel spilled 240 bytes.
    left = step[:, None] * stride + (row % width)[None, :]
    right = step[:, None] * stride + (column % width)[None, :]
    total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for begin in range(0, n, STEP):
        inside = (step < n - begin)[:, None]
        a = tl.load(keys + left, mask=inside, other=0.0)
        b = tl.load(keys + right, mask=inside, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
        keys += STEP * stride.to(tl.int64)

    # In halves of the rows: at once, the addresses and an fp64 c are more than the registers hold (spilled 32 bytes).
    upper, lower = tl.split(tl.permute(tl.reshape(total, (2, SIDE // 2, SIDE)), (1, 2, 0)))
    half = i * SIDE + tl.arange(0, SIDE // 2)
    _add_tile(c, upper, half, column, d)
    _add_tile(c, lower, half + SIDE // 2, column, d)


@triton.jit
def triangle_place(t):
    """(i, j), j <= i, with t = i (i + 1) / 2 + j: place t of a lower triangle that is read row by row."""
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= t).to(tl.int32)  # the root is rounded: at most one off either way
    i -= (i * (i + 1) // 2 > t).to(tl.int32)
    return i, t - i * (i + 1) // 2


@triton.jit
def _add_tile(c, tile, row, column, d):
    """c[row, column] += tile where that is inside c [d, d]."""
    place = c + row.to(tl.int64)[:, None] * d + column[None, :]
    inside = (row < d)[:, None] & (column < d)[None, :]
    tl.store(place, tl.load(place, mask=inside) + tile.to(c.dtype.element_ty), mask=inside)


def second_moment_(c: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``kernels.second_moment.second_moment_`` on Triton, for finite keys fp32, fp16 or bf16."""
    with torch.cuda.device_of(keys):
        for chunk in keys.split(_CHUNK):
            _launch(c, _aligned(chunk))
    return c


def _aligned(keys: torch.Tensor) -> torch.Tensor:
    """The keys with rows that begin at multiples of 16 bytes and have a multiple of 16 elements; else a padded copy."""
    width = triton.cdiv(keys.shape[1], _ALIGNED) * _ALIGNED
    strides_fit = keys.stride(1) == 1 and keys.stride(0) % _ALIGNED == 0
    if strides_fit and keys.shape[1] == width and keys.data_ptr() % 16 == 0:
        return keys
    padded = keys.new_zeros(len(keys), width)
    padded[:, : keys.shape[1]] = keys
    return padded


def _launch(c, keys):
    d, (n, width) = len(c), keys.shape
    if not (n and d):
        return
    tile, options = _config(keys.element_size())
    tiles = triton.cdiv(d, tile["SIDE"])
    upcast = not isinstance(second_moment_kernel, triton.JITFunction)
    second_moment_kernel[(tiles * (tiles + 1) // 2,)](
        c, keys, n, d, width, keys.stride(0), **tile, UPCAST=upcast, **options
    )


def _config(element_size: int) -> tuple[dict, dict]:
    """Constexprs and options of the launch for keys of so many bytes."""
    side, step, warps, stages = _TILES[element_size]
    return {"SIDE": side, "STEP": step}, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def compile_cases() -> list[tuple]:
    """See ``kedit_fast.kernels.triton``."""
    cases = []
    for dtype, c, d in (
        ("bf16", "fp32", "i32:16"),
        ("fp16", "fp64", "i32:16"),
        ("fp32", "fp64", "i32"),
    ):
        tile, options = _config(4 if dtype == "fp32" else 2)
        types = {"c": f"*{c}", "keys": f"*{dtype}", "n": "i32", "d": d, "width": "i32:16", "stride": "i32:16"}
        constexprs = {**tile, "UPCAST": False}
        cases.append((f"second_moment {dtype} into {c}, d {d}", second_moment_kernel, types, constexprs, options))
    return cases
