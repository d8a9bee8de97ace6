"""Log-probabilities of targets on Triton: head and log-sum-exp over tiles of the vocabulary, logits never stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# (rows, tokens, elements of d at once, warps, stages) for numbers of 16 bits in rows of a multiple of 16; and for the
# rest, fp32 and odd sizes, which spill in the larger tile. No spills on sm_80 and sm_90
# (tests/kernels/triton/test_compile.py), not timed on a GPU yet.
_TILE, _SMALL_TILE = (64, 128, 64, 8, 3), (32, 64, 32, 4, 2)
_PROGRAMS = 512  # the vocabulary is split until there are so many: two to four for each processor of an A100 or H100
_GRADIENTS = 1 << 24  # gradients of logits held at once in the backward pass: 32 MB in bf16


@triton.jit
def target_logprob_kernel(
    found, lse, h, weight, bias, targets, n_rows, n_vocab, n_targets, d, h_stride, weight_stride, softcap, tiles_each,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """found = the logits of the targets [n_rows, n_targets]; lse = log-sum-exp of each part of the vocabulary.

    found and lse [parts, n_rows] are fp32.
    h: [n_rows, d] behind the final norm; weight: [n_vocab, d]; targets: [n_rows, n_targets] int64. A target outside of
    the vocabulary is found nowhere: its place in ``found`` is not written.

    Grid (row tiles, parts of the vocabulary); a program owns ROWS rows and ``tiles_each`` tiles of TOKENS tokens.
    Programs beside each other read the same weights. Reads the weight once a row tile, mostly from cache, and h once a
    tile of tokens; writes n_rows (parts + n_targets) numbers. 2 · n_rows · n_vocab · d FLOP, sums in fp32.

    UPCAST: products in fp32; the interpreter's products of bf16 are not products.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mine = row < n_rows
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((ROWS,), dtype=tl.float32)
    begin = tl.program_id(1) * tiles_each
    for tile in range(begin, tl.minimum(begin + tiles_each, (n_vocab + TOKENS - 1) // TOKENS)):
        token = tile * TOKENS + tl.arange(0, TOKENS)
        logits = _logits(
            h, weight, bias, row, token, n_rows, n_vocab, d, h_stride, weight_stride, ROWS, TOKENS, STEP, BIASED, UPCAST
        )
        if CAPPED:
            logits = softcap * _tanh(logits / softcap)
        logits = tl.where((token < n_vocab)[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
        for j in range(0, n_targets):
            target = tl.load(targets + row * n_targets + j, mask=mine, other=-1)
            hit = token[None, :] == target[:, None]
            here = (target >= tile * TOKENS) & (target < tl.minimum((tile + 1) * TOKENS, n_vocab))
            tl.store(found + row * n_targets + j, tl.sum(tl.where(hit, logits, 0.0), 1), mask=here)
    tl.store(lse + tl.program_id(1).to(tl.int64) * n_rows + row, top + tl.log(mass), mask=mine)


@triton.jit
def logit_gradient_kernel(
    out, h, weight, bias, targets, lse, gradient, n_rows, n_vocab, n_targets, d, h_stride, weight_stride, softcap,
    first, end,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[i, v - first] = sum_j gradient[i, j] (1[v = targets[i, j]] - p[i, v]) slope[i, v] for v in [first, end).

    The gradient of the logits before the soft cap, which are computed again; slope: of the cap. lse: [n_rows] the whole
    log-sum-exp; gradient: [n_rows, n_targets] fp32; out: [n_rows, end - first], contiguous.

    Grid (row tiles, token tiles of the part); a program owns ROWS x TOKENS of ``out``. Reads as the forward kernel.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mine = row < n_rows
    token = first + tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    logits = _logits(
        h, weight, bias, row, token, n_rows, n_vocab, d, h_stride, weight_stride, ROWS, TOKENS, STEP, BIASED, UPCAST
    )
    slope = tl.full((ROWS, TOKENS), 1.0, dtype=tl.float32)
    if CAPPED:
        flat = _tanh(logits / softcap)
        logits = softcap * flat
        slope = 1 - flat * flat
    p = tl.exp(logits - tl.load(lse + row, mask=mine, other=0.0)[:, None])
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for j in range(0, n_targets):
        target = tl.load(targets + row * n_targets + j, mask=mine, other=-1)
        g = tl.load(gradient + row * n_targets + j, mask=mine, other=0.0)[:, None]
        total += g * (tl.where(token[None, :] == target[:, None], 1.0, 0.0) - p)
    place = out + row[:, None] * (end - first) + (token - first)[None, :]
    tl.store(place, (total * slope).to(out.dtype.element_ty), mask=mine[:, None] & (token < end)[None, :])


@triton.jit
def _logits(
    h, weight, bias, row, token, n_rows, n_vocab, d, h_stride, weight_stride,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, BIASED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """h[row] weight[token]ᵀ + bias[token], fp32, before any cap. Behind the ends: the last ones."""
    step = tl.arange(0, STEP)
    token = tl.minimum(token, n_vocab - 1)
    rows = h + (tl.minimum(row, n_rows - 1) * h_stride)[:, None] + step[None, :]
    weights = weight + (token.to(tl.int64) * weight_stride)[None, :] + step[:, None]
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for k in range(0, d, STEP):
        inside = step < d - k
        a = tl.load(rows, mask=inside[None, :], other=0.0)
        b = tl.load(weights, mask=inside[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        rows += STEP
        weights += STEP
    if BIASED:
        total += tl.load(bias + token).to(tl.float32)[None, :]
    return total


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


class _TargetLogprob(torch.autograd.Function):
    """Gradients for h alone: what an optimization over a frozen model needs."""

    @staticmethod
    def forward(ctx, h, weight, bias, softcap, targets):
        found, lse = _forward(h, weight, bias, softcap, targets)
        ctx.save_for_backward(h, weight, bias, targets, lse)
        ctx.softcap = softcap
        return found - lse[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        h, weight, bias, targets, lse = ctx.saved_tensors
        return _backward(h, weight, bias, ctx.softcap, targets, lse, gradient.contiguous()), None, None, None, None


def target_logprob(h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, targets: Tensor) -> Tensor:
    """log softmax(softcap(h weightᵀ + bias))[i, targets[i, j]] in nats: [rows, k] fp32; gradients pass through h, once.

    h: [rows, d] behind the final norm, weight: [V, d], bias: [V], all fp32, fp16 or bf16 alike; targets: [rows, k]
    int64 on h's device; NaN for one outside of the vocabulary.
    """
    return _TargetLogprob.apply(h, weight, bias, softcap, targets)


def _forward(h, weight, bias, softcap, targets):
    """(logits of the targets [rows, k], log-sum-exp [rows]), fp32."""
    h, weight, targets = _unit_stride(h), _unit_stride(weight), targets.contiguous()
    tile, options = _config(h, weight)
    row_tiles, token_tiles = triton.cdiv(len(h), tile["ROWS"]), triton.cdiv(len(weight), tile["TOKENS"])
    found = torch.full(targets.shape, torch.nan, dtype=torch.float32, device=h.device)
    if not len(h):
        return found, found.new_zeros(0)
    each = triton.cdiv(token_tiles, min(token_tiles, triton.cdiv(_PROGRAMS, row_tiles)))
    lse = found.new_empty(triton.cdiv(token_tiles, each), len(h))
    # Row tiles on the first axis of the grid: it takes 2**31 - 1 programs, the second one 65,535.
    with torch.cuda.device_of(h):
        target_logprob_kernel[row_tiles, len(lse)](
            found, lse, h, weight, h if bias is None else bias, targets, len(h), len(weight), targets.shape[1],
            h.shape[1], h.stride(0), weight.stride(0), softcap or 1.0, each,
            **tile, **_switches(target_logprob_kernel, bias, softcap), **options,
        )  # fmt: skip
    return found, lse.logsumexp(0)


def _backward(h, weight, bias, softcap, targets, lse, gradient):
    """Gradient of h: the gradient of a part of the logits at a time, times the weight; parts are summed in fp32."""
    h, weight, targets = _unit_stride(h), _unit_stride(weight), targets.contiguous()
    tile, options = _config(h, weight)
    total = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    if not len(h):
        return total.to(h.dtype)
    row_tiles, tokens = triton.cdiv(len(h), tile["ROWS"]), tile["TOKENS"]
    part = max(1, min(_GRADIENTS // len(h), len(weight)) // tokens) * tokens
    for first in range(0, len(weight), part):
        end = min(first + part, len(weight))
        logits = h.new_empty(len(h), end - first)
        with torch.cuda.device_of(h):
            logit_gradient_kernel[row_tiles, triton.cdiv(end - first, tokens)](
                logits, h, weight, h if bias is None else bias, targets, lse, gradient, len(h), len(weight),
                targets.shape[1], h.shape[1], h.stride(0), weight.stride(0), softcap or 1.0, first, end,
                **tile, **_switches(logit_gradient_kernel, bias, softcap), **options,
            )  # fmt: skip
        total += logits @ weight[first:end]
    return total.to(h.dtype)


def _switches(kernel, bias, softcap) -> dict:
    upcast = not isinstance(kernel, triton.JITFunction)
    return {"BIASED": bias is not None, "CAPPED": softcap is not None, "UPCAST": upcast}


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _config(*matrices: Tensor) -> tuple[dict, dict]:
    """Constexprs and options of a launch that multiplies the rows of these."""
    aligned = all(x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 for x in matrices)
    rows, tokens, step, warps, stages = _TILE if aligned and matrices[0].element_size() == 2 else _SMALL_TILE
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return {"ROWS": rows, "TOKENS": tokens, "STEP": step}, options


def compile_cases() -> list[tuple]:
    """See ``kedit_fast.kernels.triton``."""
    cases = []
    for dtype, size, biased, capped in (
        ("bf16", "i32:16", False, False),
        ("bf16", "i32:16", True, True),
        ("fp16", "i32", True, False),
        ("fp32", "i32:16", False, True),
    ):
        d, kind = 16 if size == "i32:16" else 17, torch.float32 if dtype == "fp32" else torch.bfloat16
        tile, options = _config(torch.empty(1, d, dtype=kind))
        types = dict.fromkeys(("h", "weight", "bias", "out"), f"*{dtype}") | {"targets": "*i64", "softcap": "fp32"}
        types |= dict.fromkeys(("found", "lse", "gradient"), "*fp32")
        types |= dict.fromkeys(("n_rows", "n_vocab", "n_targets", "tiles_each", "first", "end"), "i32")
        types |= dict.fromkeys(("d", "h_stride", "weight_stride"), size)
        switches = {"BIASED": biased, "CAPPED": capped, "UPCAST": False}
        for kernel in (target_logprob_kernel, logit_gradient_kernel):
            title = f"target_logprob.{kernel.__name__} {dtype}, sizes {size}" + ", bias" * biased + ", cap" * capped
            cases.append((title, kernel, types, tile | switches, options))
    return cases
