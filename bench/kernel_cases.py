"""What ``bench.kernels`` times: for each op its inputs, its providers and its truth."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import SHAPES, Setup
from kedit_fast.kernels.attention import (
    attention,
    attention_backward,
    attention_backward_ref,
    attention_ref,
    backend_of,
    runs_on_triton,
)
from kedit_fast.kernels.linear import linear, linear_ref
from kedit_fast.kernels.lowrank import lowrank_add, lowrank_add_ref
from kedit_fast.kernels.pointwise import gated, gated_ref, rms_norm, rms_norm_ref
from kedit_fast.kernels.rows import add_noise, add_noise_ref, branch_rows, branch_rows_ref
from kedit_fast.kernels.second_moment import second_moment_, second_moment_ref
from kedit_fast.kernels.solve import memit_solve, memit_solve_ref
from kedit_fast.kernels.target_logprob import Head, target_logprob, target_logprob_ref

OURS, REFERENCE = "kedit_fast", "reference"
SUM32 = 1e-5  # relative RMS error of what is summed in fp32 and not rounded after
PROMPT, SUFFIX = 12, 6  # tokens of a traced prompt, and of them those that a branching run owns
TEXT = 1024  # tokens of a text
N_FACTS, RANK = 64, 64  # owners of factors, and factors
WEIGHT = 100.0  # λ of a solve
SOLVED = 100  # facts of a solve


@dataclass(frozen=True)
class Case:
    """One problem, and who solves it.

    backend: (op, dtype) to ask ``dispatch`` what runs for ours; providers: {name: work}, each giving the result
    error: relative RMS error of a result; flop, moved: the least FLOP and bytes of the problem
    tolerance: of ours and of the reference (None: the dtype's); marks: {metric: mark} of ours; prepare: before a check
    ran: what runs for ours, where the op's dtype does not say it
    """

    backend: tuple[str, torch.dtype]
    providers: dict[str, Callable[[], Any]]
    error: Callable[[Any], float]
    flop: float
    moved: float
    tolerance: float | None = None
    marks: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], object] = dict
    ran: str | None = None


def against(truth: Tensor) -> Callable[[Tensor], float]:
    """The relative RMS error of a result's first rows against ``truth``, which may have fewer."""

    def error(result: Tensor) -> float:
        wanted = truth.double()
        return float((result[: len(truth)].double() - wanted).norm() / wanted.norm())

    return error


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


# ---- rows


def noise_rows(setup: Setup) -> Case:
    """Noise on the four subject tokens of every prompt."""
    x = setup.random(setup.rows, setup.shape.d)
    index = torch.arange(setup.rows, device=setup.device).view(-1, PROMPT)[:, 1:5].reshape(-1)
    noise = setup.random(len(index), setup.shape.d, dtype=torch.float64, seed=1)
    return Case(
        ("rows", setup.dtype),
        {
            OURS: lambda: add_noise(x, noise, index),
            REFERENCE: lambda: add_noise_ref(x, noise, index),
            "torch.index_add": lambda: x.index_add(0, index, noise.to(x.dtype)),
        },
        against(x.double().index_add(0, index, noise)),
        flop=0,
        moved=2 * _bytes(x) + _bytes(noise, index),
    )


def branch(setup: Setup) -> Case:
    """As many new rows as there are."""
    h, source = setup.random(setup.rows, setup.shape.d), setup.integers(setup.rows, setup.rows)
    both = torch.cat([torch.arange(setup.rows, device=setup.device), source])
    return Case(
        ("rows", setup.dtype),
        {
            OURS: lambda: branch_rows([h], source),
            REFERENCE: lambda: branch_rows_ref([h], source),
            "torch.index_select": lambda: h.index_select(0, both),
        },
        against(h.double()[both]),
        flop=0,
        moved=4 * _bytes(h) + _bytes(source),
    )


# ---- between products


def norm(setup: Setup) -> Case:
    """A block's RMS norm; rivals: Hugging Face's steps, and torch's own norm."""
    x, weight, eps = setup.random(setup.rows, setup.shape.d), setup.random(setup.shape.d, seed=1), 1e-5

    def steps():
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    wide = x.double()
    return Case(
        ("pointwise", setup.dtype),
        {
            OURS: lambda: rms_norm(x, weight, eps),
            REFERENCE: lambda: rms_norm_ref(x, weight, eps),
            "Hugging Face": steps,
            "torch.rms_norm": lambda: F.rms_norm(x, (setup.shape.d,), weight, eps),
        },
        against(weight.double() * wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()),
        flop=0,
        moved=2 * _bytes(x) + _bytes(weight),
    )


def gate_silu(setup: Setup) -> Case:
    """What an MLP does between its products."""
    rows = setup.rows // 4
    gate, up = (setup.random(rows, setup.shape.d_ff, seed=seed) for seed in (0, 1))
    return Case(
        ("pointwise", setup.dtype),
        {
            OURS: lambda: gated(gate, up, "silu"),
            REFERENCE: lambda: gated_ref(gate, up, "silu"),
            "torch.silu": lambda: F.silu(gate) * up,
        },
        against(F.silu(gate[:64].double()) * up[:64].double()),
        flop=0,
        moved=3 * _bytes(gate),
    )


# ---- attention


def trace_attention(made: Callable[..., Case], setup: Setup) -> Case:
    """Runs that own the last SUFFIX tokens of a prompt and read the others from a parent; rival: SDPA on copies."""
    runs, parents = setup.rows // SUFFIX, max(1, setup.rows // SUFFIX // 16)
    shared = (torch.arange(runs) % parents)[:, None] * PROMPT + torch.arange(PROMPT - SUFFIX)
    own = parents * PROMPT + torch.arange(runs * SUFFIX).view(runs, SUFFIX)
    key_rows = torch.cat([shared, own], 1)
    run, pos = torch.arange(runs).repeat_interleave(SUFFIX), torch.arange(PROMPT - SUFFIX, PROMPT).repeat(runs)
    slots, mask = key_rows.to(setup.device), torch.ones(SUFFIX, PROMPT, dtype=torch.bool, device=setup.device)

    def rival(q, k, v, **options):
        q, k, v = (x.transpose(1, 2) for x in (q.unflatten(0, (runs, SUFFIX)), k[slots], v[slots]))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.tril(PROMPT - SUFFIX), **options)
        return mixed.transpose(1, 2).flatten(0, 1)

    return made(setup, key_rows, run, pos, parents * PROMPT, {"SDPA, keys copied": rival})


def text_attention(made: Callable[..., Case], setup: Setup) -> Case:
    """Whole texts, no parents; rival: SDPA, causal, on the keys as they lie."""
    length = min(TEXT, setup.rows // 2)
    runs = max(1, setup.rows // 4 // length)
    run, pos = torch.arange(runs).repeat_interleave(length), torch.arange(length).repeat(runs)

    def rival(q, k, v, **options):
        q, k, v = (x.unflatten(0, (runs, length)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options).transpose(1, 2).flatten(0, 1)

    return made(setup, torch.arange(runs * length).view(runs, length), run, pos, 0, {"SDPA": rival})


def _tensors(setup, key_rows, run) -> tuple[Tensor, Tensor, Tensor]:
    shape, slots = setup.shape, int(key_rows.max()) + 1
    key, value = (setup.random(slots, shape.kv_heads, shape.head_dim, seed=seed) for seed in (1, 2))
    return setup.random(len(run), shape.heads, shape.head_dim), key, value


def forward(setup, key_rows, run, pos, base, rivals) -> Case:
    shape, (query, key, value) = setup.shape, _tensors(setup, key_rows, run)
    scale, grouped = shape.head_dim**-0.5, shape.heads != shape.kv_heads
    arguments = (query, key, value, key_rows, run, pos)
    providers = {
        OURS: lambda: attention(*arguments, scale=scale),
        REFERENCE: lambda: attention_ref(*arguments, scale=scale),
    }
    for name, rival in rivals.items():
        providers[name] = lambda rival=rival: rival(query, key, value, scale=scale, enable_gqa=grouped)
    n = min(len(run), 2 * key_rows.shape[1])  # rows that are checked: of the first runs
    wide = (query[:n].double(), key.double(), value.double(), key_rows, run[:n], pos[:n])
    return Case(
        ("attention", setup.dtype),
        providers,
        against(attention_ref(*wide, scale=scale)),
        flop=4 * shape.heads * shape.head_dim * int((pos + 1).sum()),
        moved=_bytes(query, query, key, value),
        ran=backend_of(query, key, value, run, pos, None),
    )


def backward(setup, key_rows, run, pos, base, rivals) -> Case:
    """Gradients of queries, and of keys and values from slot ``base`` on, each of which is one row's; rivals: autograd
    through what they are forward."""
    shape, (query, key, value) = setup.shape, _tensors(setup, key_rows, run)
    scale, grouped = shape.head_dim**-0.5, shape.heads != shape.kv_heads
    arguments, grad = (query, key, value, key_rows, run, pos), setup.random(*query.shape, seed=3)
    lse = torch.zeros(query.shape[:2], device=setup.device)
    out = attention(*arguments, scale=scale, lse=lse)
    sums = [torch.zeros(len(key) - base, *key.shape[1:], device=setup.device) for _ in range(2)]
    how = {"base": base, "scale": scale}
    providers = {
        OURS: lambda: (attention_backward(grad, out, lse, *arguments, *sums, **how), *sums),
        REFERENCE: lambda: (attention_backward_ref(grad, *arguments, *sums, **how), *sums),
    }

    @cache
    @torch.enable_grad()
    def recorded(rival):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        return rival(*leaves, scale=scale, enable_gqa=grouped), leaves

    def through(rival):
        of_query, *of_slots = torch.autograd.grad(*recorded(rival), grad, retain_graph=True)
        return of_query, *(x[base:] for x in of_slots)

    providers |= {name: partial(through, rival) for name, rival in rivals.items()}
    n = min(len(run), 2 * key_rows.shape[1])  # rows that are checked: of the first runs, with their slots
    wide, found = [x.double() for x in (query[:n], key, value)], [x.double() for x in sums]
    truth = attention_backward_ref(grad[:n].double(), *wide, key_rows, run[:n], pos[:n], *found, **how), *found
    seen = torch.arange(key_rows.shape[1]) <= pos[:, None]
    return Case(
        ("attention", setup.dtype),
        providers,
        lambda result: against(_rows(truth, n))(_rows(result, n)),
        flop=shape.heads * shape.head_dim * int(6 * seen.sum() + 4 * (seen & (key_rows[run] >= base)).sum()),
        moved=_bytes(query, query, grad, out, lse, key, value, *sums),
        prepare=lambda: [x.zero_() for x in sums],
        ran="triton" if runs_on_triton(query) else "reference",
    )


def _rows(tensors, n: int) -> Tensor:
    return torch.cat([x[:n].flatten() for x in tensors])


# ---- products


def head_logprob(setup: Setup) -> Case:
    """One target a row; rival: all logits, then torch's cross entropy in fp32."""
    shape, rows = setup.shape, setup.rows // 8
    h, weight = setup.random(rows, shape.d), setup.random(shape.vocab, shape.d, std=2 * shape.d**-0.5, seed=1)
    targets = setup.integers(shape.vocab, rows)

    def norm(x):
        return F.rms_norm(x, (shape.d,))

    head = Head(lambda x: F.linear(norm(x), weight), norm, weight)
    some = min(rows, 64)
    logits = F.linear(norm(h[:some]).double(), weight.double())
    return Case(
        ("target_logprob", setup.dtype),
        {
            OURS: lambda: target_logprob(h, head, targets, shape.vocab),
            REFERENCE: lambda: target_logprob_ref(h, head, targets, shape.vocab),
            "torch.cross_entropy": lambda: -F.cross_entropy(head(h).float(), targets, reduction="none"),
        },
        against(logits.log_softmax(1).gather(1, targets[:some, None])[:, 0]),
        flop=2 * rows * shape.d * shape.vocab,
        moved=_bytes(h, weight, targets) + 4 * rows,
    )


def shared_lowrank(setup: Setup) -> Case:
    """All rows take all factors."""
    return _lowrank(setup, None)


def owned_lowrank(setup: Setup) -> Case:
    """Facts own a factor and their rows each; rival: all factors for all rows, and a mask."""
    return _lowrank(setup, torch.arange(setup.rows // 4, device=setup.device) % N_FACTS)


def _lowrank(setup, row_owner) -> Case:
    shape, rows = setup.shape, setup.rows // 4
    y, x = setup.random(rows, shape.d), setup.random(rows, shape.d_ff, seed=1)
    u, v = setup.random(shape.d, RANK, seed=2), setup.random(shape.d_ff, RANK, std=shape.d_ff**-0.5, seed=3)
    owner = torch.arange(RANK, device=setup.device) % N_FACTS
    owners = () if row_owner is None else (row_owner, owner)
    mask = None if row_owner is None else (row_owner[:, None] == owner).to(setup.dtype)

    def rival():
        weight = x @ v
        return torch.addmm(y, weight if mask is None else weight * mask, u.T)

    weight = x.double() @ v.double()
    return Case(
        ("lowrank", setup.dtype),
        {
            OURS: lambda: lowrank_add(y, x, u, v, *owners),
            REFERENCE: lambda: lowrank_add_ref(y, x, u, v, *owners),
            "torch.addmm" if mask is None else "torch.addmm, masked": rival,
        },
        against(y.double() + (weight if mask is None else weight * mask) @ u.double().T),
        flop=2 * rows * (RANK if mask is None else RANK // N_FACTS) * (shape.d + shape.d_ff),
        moved=_bytes(y, y, x, u, v),
    )


def projection(setup: Setup) -> Case:
    """The first product of an MLP."""
    shape, rows = setup.shape, setup.rows // 4
    x, weight = setup.random(rows, shape.d), setup.random(shape.d_ff, shape.d, std=shape.d**-0.5, seed=1)
    return Case(
        ("linear", setup.dtype),
        {
            OURS: lambda: linear(x, weight),
            REFERENCE: lambda: linear_ref(x, weight),
            "torch.matmul": lambda: torch.matmul(x, weight.T),
        },
        against(x[:64].double() @ weight.double().T),
        flop=2 * rows * shape.d * shape.d_ff,
        moved=_bytes(x, weight) + rows * shape.d_ff * x.element_size(),
    )


def moment(setup: Setup) -> Case:
    """C in fp32; rivals: torch's fp32 product (keys converted), and bf16 products summed in fp32 where torch has it."""
    d_ff, rows = setup.shape.d_ff, setup.rows // 4
    keys, c = setup.random(rows, d_ff), torch.zeros(d_ff, d_ff, device=setup.device)
    providers = {OURS: lambda: second_moment_(c, keys), REFERENCE: lambda: second_moment_ref(c, keys)}
    if setup.dtype == torch.float32:
        providers["torch.addmm"] = lambda: c.addmm_(keys.T, keys)
    else:
        providers["torch.addmm, rounded sums"] = lambda: c.add_(keys.T @ keys)
        if setup.device.type == "cuda":
            providers["torch.addmm, fp32 sums"] = lambda: c.add_(torch.mm(keys.T, keys, out_dtype=torch.float32))
    some = torch.arange(0, d_ff, max(1, d_ff // 256), device=setup.device)
    below = torch.arange(d_ff, device=setup.device) <= some[:, None]
    truth = (keys[:, some].T.double() @ keys.double()) * below
    return Case(
        ("second_moment", setup.dtype),
        providers,
        lambda result: float((result[some].double() * below - truth).norm() / truth.norm()),
        flop=rows * d_ff * (d_ff + 1),
        moved=_bytes(keys) + _bytes(c),
        tolerance=SUM32,
        prepare=c.zero_,  # all providers add to one matrix: one for each would be 16 GB at the largest width
        marks={"share of product peak": ">= 60"} if setup.device.type == "cuda" else {},
    )


# ---- solve


def solve(setup: Setup) -> Case:
    """MEMIT's v = (λC + KᵀK)⁻¹ Kᵀ with C factored in the call; rival: the whole matrix, cholesky_ex, cholesky_solve."""
    d_ff, n = setup.shape.d_ff, min(SOLVED, setup.shape.d_ff // 2)
    scale = torch.logspace(0, -1, d_ff, device=setup.device, dtype=torch.float64)
    text = setup.random(min(2048, d_ff), d_ff) * scale
    c = text.T @ text / len(text)
    c.diagonal().add_(0.1 * scale**2)
    keys = 10 * setup.random(n, d_ff, seed=1) * scale
    residual = keys[:, :1].clone()

    def cholesky():
        matrix = (WEIGHT * c).addmm_(keys.T, keys)
        return torch.cholesky_solve(keys.T, torch.linalg.cholesky_ex(matrix).L)

    def error(v):
        left = WEIGHT * (c @ v) + keys.T @ (keys @ v) - keys.T
        return float(left.norm() / keys.norm())

    large = setup.device.type == "cuda" and d_ff == SHAPES["llama-3-70b"].d_ff
    return Case(
        ("solve", setup.dtype),
        {
            OURS: lambda: memit_solve(keys, residual, c, WEIGHT)[1],
            REFERENCE: lambda: memit_solve_ref(keys, residual, c, WEIGHT)[1],
            "torch Cholesky": cholesky,
        },
        error,
        flop=d_ff**3 / 3 + 2 * n * d_ff**2 + 4 * n**2 * d_ff + n**3 / 3,
        moved=2 * _bytes(c) + 2 * _bytes(keys),
        marks={"time": "<= 2000"} if large else {},
    )


class Op(NamedTuple):
    """Its cases, the dtypes they are made in, and the unit of their times with how many make a second."""

    cases: dict[str, Callable[[Setup], Case]]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    unit: str = "µs"
    in_a_second: float = 1e6


OPS = {  # in order of worth, should time be short
    "second_moment": Op({"": moment}),
    "solve": Op({"": solve}, (torch.float64,), "ms", 1e3),
    "attention": Op({"trace": partial(trace_attention, forward), "text": partial(text_attention, forward)}),
    "attention.backward": Op({"trace": partial(trace_attention, backward), "text": partial(text_attention, backward)}),
    "target_logprob": Op({"": head_logprob}),
    "lowrank": Op({"shared": shared_lowrank, "owned": owned_lowrank}),
    "rows.branch_rows": Op({"": branch}),
    "rows.add_noise": Op({"": noise_rows}),
    "pointwise.rms_norm": Op({"": norm}),
    "pointwise.gated": Op({"": gate_silu}),
    "linear": Op({"": projection}),
}
