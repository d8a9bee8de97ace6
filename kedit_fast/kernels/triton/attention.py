"""Attention through the row table on Triton: a program holds a few rows of one run and goes over the keys they see."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kedit_fast.basics.state import upload

_HEADS = 16  # heads of a group in one program at most: the least that a product takes
# Queries of a program: as many as an average run of the call has, within these bounds, the upper one by bytes of an
# element (64 spilled in fp32, whose products take no tensor cores). Not timed on a GPU yet.
_LEAST, _MOST = 16, {2: 64, 4: 32}
# By (bytes of an element, head size padded to a power of two): (keys at once, warps, stages). No spills on sm_80 and
# sm_90 with Triton 3.6 and 3.9 (tests/kernels/triton/test_compile.py), not timed on a GPU yet. In fp32 32 keys of 128
# spilled 916 bytes on sm_90 with 3.6, where 3.9 takes 110 registers for them.
_CONFIGS = {
    (2, 64): (64, 4, 2),
    (2, 128): (32, 4, 2),
    (2, 256): (32, 8, 2),
    (4, 64): (32, 4, 2),
    (4, 128): (16, 4, 2),
    (4, 256): (16, 8, 1),
}


@triton.jit
def attention_kernel(
    out, lse, query, key, value, table, pos, blocks, sinks,
    table_stride, query_stride, query_head, key_stride, key_head, value_stride, value_head, scale, window, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    SAVED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out = softmax(softcap(q kᵀ scale)) v for the rows of one block and up to HEADS heads of one key head's GROUP.

    out: [rows, H, DIM], contiguous; lse: [rows, H] fp32, the scores' log-sum-exp, where SAVED; blocks: [n, 3] of
    ``Plan``; sinks: [H] fp32; WIDTH: DIM padded to a power of two

    Grid (blocks, key heads x parts of a group). A program owns QUERIES = (rows of its block x HEADS) queries: query i
    is row i // HEADS and head i % HEADS, so the heads of a group share the keys that are read. It reads keys and values
    of positions that some row of the block sees, no other slot. Online softmax in fp32; 4 · queries · keys · DIM FLOP.
    UPCAST: products in fp32; the interpreter's products of bf16 are not products.
    """
    first, end, segment, of_key, row, head, mine = _owned(blocks, GROUP, HEADS, QUERIES)
    at, last, begin = _reach(pos, row, first, end, window, WINDOWED)
    column = tl.arange(0, WIDTH)
    inside = column < DIM
    queries = query + (row * query_stride + head * query_head)[:, None] + column[None, :]
    q = tl.load(queries, mask=inside[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    key += of_key.to(tl.int64) * key_head
    value += of_key.to(tl.int64) * value_head
    table += segment * table_stride
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    if SINKS:
        top = tl.load(sinks + head) * 1.4426950408889634  # log2 e, as scores have it
    weight = tl.full((QUERIES,), 1.0 if SINKS else 0.0, dtype=tl.float32)
    total = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    for start in range(begin, last + 1, KEYS):
        slot, seen = _visible(table, start + tl.arange(0, KEYS), at, last, window, WINDOWED)
        held = slot >= 0
        keys = key + (slot * key_stride)[None, :] + column[:, None]
        values = value + (slot * value_stride)[:, None] + column[None, :]
        k = tl.load(keys, mask=inside[:, None] & held[None, :], other=0.0)
        v = tl.load(values, mask=held[:, None] & inside[None, :], other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * _tanh(scores / softcap)
        p, fade, top = _softmax_step(tl.where(seen, scores, float("-inf")), top)
        weight = weight * fade + tl.sum(p, 1)
        total = tl.dot(p.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
    place = _place(row, head, GROUP, HEADS)
    stored = mine[:, None] & inside[None, :]
    tl.store(out + _cells(place, column, DIM), (total / weight[:, None]).to(out.dtype.element_ty), mask=stored)
    if SAVED:
        tl.store(lse + place, (top + tl.log2(weight)) * 0.6931471805599453, mask=mine)  # ln 2


@triton.jit
def _owned(blocks, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr):
    """What a program owns: its block (first row, the one behind its last, segment), its key head, and of each query the
    row, the head, and whether it is its own: one that is not repeats the last row and head, so it has keys to see."""
    block = blocks + tl.program_id(0).to(tl.int64) * 3
    first, end, segment = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    of_key, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    index = tl.arange(0, QUERIES)
    member = part * HEADS + index % HEADS
    mine = (first + index // HEADS < end) & (member < GROUP)
    row = tl.minimum(first + index // HEADS, end - 1)
    head = of_key * GROUP + tl.minimum(member, GROUP - 1)
    return first, end, segment, of_key, row, head, mine


@triton.jit
def _reach(pos, row, first, end, window, WINDOWED: tl.constexpr):
    """The queries' positions, the block's last one, and the first that one of its rows sees."""
    begin = tl.maximum(tl.load(pos + first).to(tl.int32) - window + 1, 0) if WINDOWED else 0
    return tl.load(pos + row).to(tl.int32), tl.load(pos + end - 1).to(tl.int32), begin


@triton.jit
def _place(row, head, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """Of each query its number in [rows, H]."""
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    return row * (tl.num_programs(1) // PARTS * GROUP) + head


@triton.jit
def _cells(place, column, DIM: tl.constexpr):
    """Where the elements of heads lie: [places, columns]."""
    return (place * DIM)[:, None] + column[None, :]


@triton.jit
def _visible(table, t, at, last, window, WINDOWED: tl.constexpr):
    """The slots of positions t (-1 for those that no row sees), and which of them a row at position ``at`` sees."""
    seen = t[None, :] <= at[:, None]
    wanted = t <= last
    if WINDOWED:  # rows with a gap between them may leave positions that none of them sees
        seen = seen & (t[None, :] > at[:, None] - window)
        wanted = wanted & (tl.max(seen.to(tl.int32), 0) > 0)
    slot = tl.load(table + t, mask=wanted, other=-1)
    return slot, seen & (slot >= 0)[None, :]


@triton.jit
def _softmax_step(scores, top):
    """exp of the scores over the highest so far, what earlier sums shrink by, and the new highest."""
    scores *= 1.4426950408889634  # log2 e
    higher = tl.maximum(top, tl.max(scores, 1))
    ground = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet: no inf - inf
    return tl.exp2(scores - ground[:, None]), tl.exp2(top - ground), higher


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


class Plan(NamedTuple):
    """Which rows a program holds, all on the device.

    blocks: [n, 3] int64: a block's first row, the one behind its last, and its segment; table: [segments, T] int64,
    the row of ``key_rows`` of each segment (rows of one run in ascending position); pos: [rows] int64; queries: how
    many a program has
    """

    blocks: Tensor
    table: Tensor
    pos: Tensor
    queries: int


def plan(key_rows: Tensor, run: Tensor, pos: Tensor, heads: int, most: int, device) -> Plan:
    """Cuts the rows into segments where a run ends or a position does not ascend, and those into blocks; no loop."""
    key_rows, run, pos = (x.cpu() for x in (key_rows, run, pos))
    new = torch.ones_like(run, dtype=torch.bool)
    new[1:] = (run[1:] != run[:-1]) | (pos[1:] <= pos[:-1])
    start = new.nonzero()[:, 0]
    stop = torch.cat([start[1:], start.new_tensor([len(run)])])
    queries = n_queries(len(run), len(start), heads, most)
    made = blocks(start, stop, torch.arange(len(start)), queries // heads)
    table = key_rows[run[start], : int(pos.max()) + 1]
    return Plan(*upload(torch.device(device), made, table, pos), queries)


def n_queries(n_rows: int, n_segments: int, heads: int, most: int) -> int:
    """Queries of a program: as many as an average segment has, of ``heads`` heads, and ``most`` at most."""
    return min(max(triton.next_power_of_2(triton.cdiv(n_rows, n_segments) * heads), _LEAST), most)


def blocks(start: Tensor, stop: Tensor, segment: Tensor, rows: int) -> Tensor:
    """[n, 3] int64: first row, the one behind the last, and segment of each block of at most ``rows`` rows, of segments
    [start, stop) that are called so."""
    count = (stop - start + rows - 1) // rows
    which = torch.arange(len(start), device=start.device).repeat_interleave(count)
    nth = torch.arange(len(which), device=start.device) - (count.cumsum(0) - count)[which]
    first = start[which] + nth * rows
    return torch.stack([first, torch.minimum(first + rows, stop[which]), segment[which]], 1)


def attention(
    query, key, value, key_rows, run, pos, *, scale, window=None, softcap=None, sinks=None, cut=None, lse=None
) -> Tensor:
    """``kernels.attention.attention`` on Triton for fp32, fp16 and bf16; without gradients.

    lse: [rows, H] fp32, contiguous: filled with the log-sum-exp, in nats, of each row's scores in each head, as the
    softmax has them: scaled, capped, a sink's logit among them; None: not computed
    """
    out = query.new_empty(query.shape)
    if not out.numel():
        return out
    most, (constexprs, options) = _MOST[query.element_size()], _config(query.element_size(), query.shape[2])
    where = {"key_rows": key_rows, "run": run, "pos": pos, "most": most, "cut": cut}
    grid, arguments = launch(query, key, value, **where, scale=scale, window=window, softcap=softcap)
    with torch.cuda.device_of(query):
        attention_kernel[grid](
            out=out, lse=out if lse is None else lse, SAVED=lse is not None, SINKS=sinks is not None,
            sinks=out if sinks is None else sinks.detach().float().contiguous(), **arguments, **constexprs, **options,
        )  # fmt: skip
    return out


def launch(query, key, value, *, key_rows, run, pos, most, cut, scale, window, softcap) -> tuple[tuple, dict]:
    """Grid and arguments of a launch over the rows in blocks of ``most`` queries at most."""
    n_heads, kv_heads = query.shape[1], key.shape[1]
    group = n_heads // kv_heads
    heads = min(group, _HEADS)
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    made = (cut and cut(heads, most)) or plan(key_rows, run, pos, heads, most, query.device)
    arguments = {"query": query, "key": key, "value": value, "table": made.table, "pos": made.pos}
    arguments |= {"blocks": made.blocks, "table_stride": made.table.stride(0)}
    for name, x in (("query", query), ("key", key), ("value", value)):
        arguments |= {f"{name}_stride": x.stride(0), f"{name}_head": x.stride(1)}
    arguments |= {"scale": scale, "window": window or 0, "softcap": softcap or 1.0}
    arguments |= {"GROUP": group, "HEADS": heads, "QUERIES": made.queries, "WINDOWED": window is not None}
    arguments |= {"CAPPED": softcap is not None, "UPCAST": not isinstance(attention_kernel, triton.JITFunction)}
    # Blocks on the first axis of the grid: it takes 2**31 - 1 programs, the second one 65,535.
    return (len(made.blocks), kv_heads * triton.cdiv(group, heads)), arguments


def _config(element_size: int, dim: int) -> tuple[dict, dict]:
    """Constexprs and options of the launch for a head size."""
    width = max(16, triton.next_power_of_2(dim))
    keys, warps, stages = _CONFIGS[element_size, max(64, width)]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return {"KEYS": keys, "DIM": dim, "WIDTH": width}, options


def compile_cases() -> list[tuple]:
    """See ``kedit_fast.kernels.triton``."""
    cases = []
    for dtype, dim, group, tall, windowed, capped, sunk, saved in (
        ("bf16", 64, 1, False, False, False, False, False),
        ("bf16", 64, 3, True, False, False, False, False),
        ("bf16", 128, 4, True, True, False, False, True),
        ("bf16", 64, 8, True, True, False, True, False),
        ("fp16", 80, 1, True, False, False, False, False),
        ("bf16", 256, 2, True, True, True, False, True),
        ("fp32", 64, 3, True, True, True, False, False),
        ("fp32", 128, 4, True, False, False, False, True),
        ("fp32", 256, 2, True, True, True, False, False),
    ):
        constexprs, options = _config(4 if dtype == "fp32" else 2, dim)
        queries = _MOST[4 if dtype == "fp32" else 2] if tall else _LEAST
        name, types, where = described(dtype, dim, group, queries, windowed, capped)
        where |= {"SINKS": sunk, "SAVED": saved}
        name += ", sinks" * sunk + ", log-sum-exp" * saved
        cases.append((f"attention {name}", attention_kernel, types, constexprs | where, options))
    return cases


def described(dtype: str, dim: int, group: int, queries: int, windowed: bool, capped: bool) -> tuple[str, dict, dict]:
    """Words for a case to compile, and the types and constexprs of what ``launch`` gives."""
    types = dict.fromkeys(("out", "query", "key", "value"), f"*{dtype}")
    types |= dict.fromkeys(("table", "pos", "blocks"), "*i64") | dict.fromkeys(("lse", "sinks"), "*fp32")
    types |= dict.fromkeys(("scale", "softcap"), "fp32") | dict.fromkeys(("window", "table_stride"), "i32")
    types |= {f"{name}_{what}": "i32:16" for name in ("query", "key", "value") for what in ("stride", "head")}
    constexprs = {"GROUP": group, "HEADS": min(group, _HEADS), "QUERIES": queries, "UPCAST": False}
    constexprs |= {"WINDOWED": windowed, "CAPPED": capped}
    about = f"{dtype}, head size {dim}, {group} heads a key head, {queries} queries"
    return about + ", window" * windowed + ", soft cap" * capped, types, constexprs
