"""Gradients of attention through the row table on Triton: the blocks of the forward kernel, their weights once more."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kedit_fast.kernels.triton.attention import (
    _LEAST,
    _cells,
    _owned,
    _place,
    _reach,
    _tanh,
    _visible,
    described,
    launch,
)  # fmt: skip

# By (bytes of an element, head size padded to a power of two): (queries of a program at most, keys at once, warps,
# stages). No spills on sm_80 and sm_90 with Triton 3.6 and 3.9 in the cases of tests/kernels/triton/test_compile.py;
# for a few other groups, windows and caps ptxas gives up 4 to 28 bytes to stay at 80, 96, 128 or 168 registers, by
# which one more block can run. Not timed on a GPU yet.
_CONFIGS = {
    (2, 64): (64, 32, 4, 2),
    (2, 128): (64, 32, 8, 2),
    (2, 256): (32, 16, 8, 2),
    (4, 64): (32, 32, 8, 2),
    (4, 128): (32, 16, 8, 2),
    (4, 256): (16, 16, 8, 2),
}


# Not specialised on the numbers of slots: their divisors change from call to call and help no load.
@triton.jit(do_not_specialize=["base", "n_own"])
def attention_backward_kernel(
    query_grad, key_grad, value_grad, grad, out, lse, query, key, value, table, pos, blocks, base, n_own,
    table_stride, query_stride, query_head, key_stride, key_head, value_stride, value_head, scale, window, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """query_grad = the gradient of the queries; key_grad, value_grad += those of slots base to base + n_own.

    query_grad, grad, out: [rows, H, DIM]; lse: [rows, H] fp32; key_grad, value_grad: [n_own, key heads, DIM] fp32; all
    contiguous. The others as the forward kernel has them.

    Grid and what a program owns: as the forward kernel. With p = exp(s - lse), s the scores behind scale and cap, and
    dp = grad vᵀ: ds = p (dp - sum(grad out)) slope scale, slope: of the cap; query_grad = ds k, key_grad += dsᵀ q,
    value_grad += pᵀ grad. Reads what the forward kernel reads, and grad, out and lse once; 6 · queries · keys · DIM
    FLOP, and 4 more for tiles of keys with an own slot, which go to fp32 atomics: the order of those sums is not fixed.
    """
    first, end, segment, of_key, row, head, mine = _owned(blocks, GROUP, HEADS, QUERIES)
    at, last, begin = _reach(pos, row, first, end, window, WINDOWED)
    place = _place(row, head, GROUP, HEADS)
    column = tl.arange(0, WIDTH)
    inside = column < DIM
    mine = mine[:, None] & inside[None, :]
    q = tl.load(query + (row * query_stride + head * query_head)[:, None] + column[None, :], inside[None, :], other=0.0)
    cells = _cells(place, column, DIM)
    g = tl.load(grad + cells, mask=mine, other=0.0)  # none of a query that is not ours, so that it adds nothing
    delta = tl.sum(g.to(tl.float32) * tl.load(out + cells, mask=mine, other=0.0).to(tl.float32), 1)
    ground = tl.load(lse + place) * 1.4426950408889634  # log2 e
    if UPCAST:
        q, g = q.to(tl.float32), g.to(tl.float32)
    key += of_key.to(tl.int64) * key_head
    value += of_key.to(tl.int64) * value_head
    table += segment * table_stride
    total = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    for start in range(begin, last + 1, KEYS):
        slot, seen = _visible(table, start + tl.arange(0, KEYS), at, last, window, WINDOWED)
        there = (slot >= 0)[:, None] & inside[None, :]
        k = tl.load(key + (slot * key_stride)[:, None] + column[None, :], mask=there, other=0.0)
        v = tl.load(value + (slot * value_stride)[:, None] + column[None, :], mask=there, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            flat = _tanh(scores / softcap)
            scores = softcap * flat
        p = tl.where(seen, tl.exp2(scores * 1.4426950408889634 - ground[:, None]), 0.0)
        ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
        if CAPPED:
            ds *= 1 - flat * flat
        ds = ds.to(k.dtype)
        total = tl.dot(ds, k, total, input_precision="ieee")
        own = (slot >= base) & (slot < base + n_own)
        if tl.max(own.to(tl.int32), 0) > 0:
            cell = _cells((slot - base) * (tl.num_programs(1) // tl.cdiv(GROUP, HEADS)) + of_key, column, DIM)
            summed = own[:, None] & inside[None, :]
            _add(value_grad + cell, p.to(g.dtype), g, 1.0, summed)
            _add(key_grad + cell, ds, q, scale, summed)
    # Asked once more: what is held through the loop for the store spilled up to 32 bytes.
    first, end, segment, of_key, row, head, mine = _owned(blocks, GROUP, HEADS, QUERIES)
    cells, mine = _cells(_place(row, head, GROUP, HEADS), column, DIM), mine[:, None] & inside[None, :]
    tl.store(query_grad + cells, (total * scale).to(query_grad.dtype.element_ty), mask=mine)


@triton.jit
def _add(total, weight, x, scale, mask):
    """total += weightᵀ x scale."""
    product = tl.dot(tl.trans(weight), x, input_precision="ieee") * scale
    tl.atomic_add(total, product, mask=mask, sem="relaxed")


def attention_backward(
    grad, out, lse, query, key, value, key_rows, run, pos, key_grad, value_grad,
    *, base, scale, window=None, softcap=None, sinks=None, cut=None,
) -> Tensor:  # fmt: skip
    """The gradient of the queries, [rows, H, D] in their dtype; those of keys and values are added where they belong.

    grad, out: [rows, H, D] dL/d out, and what the forward gave; lse: [rows, H] fp32, contiguous, what it saved; the
    others as it had them
    key_grad, value_grad: [n, Hkv, D] fp32, contiguous; to row i is added the gradient of slot base + i. The other slots
    are constants (a stored prefix). Rows, runs and heads that read one slot add to it by atomics: the order of those
    sums is not fixed, so two calls differ by rounding
    sinks: taken part in ``lse``; constants
    """
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not result.numel():
        return result
    most, constexprs, options = _config(query.element_size(), query.shape[2])
    where = {"key_rows": key_rows, "run": run, "pos": pos, "most": most, "cut": cut}
    grid, arguments = launch(query, key, value, **where, scale=scale, window=window, softcap=softcap)
    with torch.cuda.device_of(query):
        attention_backward_kernel[grid](
            query_grad=result, key_grad=key_grad, value_grad=value_grad, grad=grad.contiguous(), out=out.contiguous(),
            lse=lse, base=base, n_own=len(key_grad), **arguments, **constexprs, **options,
        )  # fmt: skip
    return result


def _config(element_size: int, dim: int) -> tuple[int, dict, dict]:
    """Queries of a program at most, constexprs and options of the launch for a head size."""
    width = max(16, triton.next_power_of_2(dim))
    most, keys, warps, stages = _CONFIGS[element_size, max(64, width)]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return most, {"KEYS": keys, "DIM": dim, "WIDTH": width}, options


def compile_cases() -> list[tuple]:
    """See ``kedit_fast.kernels.triton``."""
    cases = []
    for dtype, dim, group, tall, windowed, capped in (
        ("bf16", 64, 1, False, False, False),
        ("bf16", 64, 3, True, True, False),
        ("bf16", 64, 8, True, True, False),
        ("fp16", 80, 1, True, False, False),
        ("bf16", 128, 4, True, True, True),
        ("bf16", 128, 8, True, False, False),
        ("bf16", 256, 2, True, True, True),
        ("fp32", 64, 3, True, True, True),
        ("fp32", 128, 4, True, False, False),
        ("fp32", 256, 4, True, True, True),
    ):
        most, constexprs, options = _config(4 if dtype == "fp32" else 2, dim)
        about, types, where = described(dtype, dim, group, most if tall else _LEAST, windowed, capped)
        types |= dict.fromkeys(("query_grad", "grad"), f"*{dtype}") | dict.fromkeys(("base", "n_own"), "i32")
        types |= dict.fromkeys(("key_grad", "value_grad"), "*fp32")
        cases.append((f"attention_backward {about}", attention_backward_kernel, types, constexprs | where, options))
    return cases
