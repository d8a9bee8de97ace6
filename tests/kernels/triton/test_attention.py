"""Attention on Triton against one softmax a row in float64; every way that rows may lie, and what may not be read."""

import math

import pytest
import torch

from kedit_fast.kernels import attention as op
from kedit_fast.kernels import slots
from kedit_fast.kernels.attention import attention, attention_backward_ref, attention_ref
from tests.conftest import TOLERANCE, close, relative_error
from tests.kernels.test_attention import HOW, LAYOUTS, SINKS, naive, numbers, problem
from tests.kernels.triton import DEVICE, DTYPES

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory")


@pytest.fixture(autouse=True)
def no_reference(monkeypatch):
    """The kernel computes: a test that passes by the reference says nothing."""
    monkeypatch.setattr(op, "attention_ref", lambda *a, **k: pytest.fail("the reference ran"))


def made(kind, heads=(4, 2), dim=5, dtype=torch.float32):
    """The arguments of a layout, numbers on the device; slots that the table does not name hold NaN."""
    q, k, v, key_rows, *where = problem(kind, dtype, heads, dim)
    free = torch.ones(len(k), dtype=torch.bool)
    free[key_rows[key_rows >= 0]] = False
    k[free] = v[free] = torch.nan
    return *(x.to(DEVICE) for x in (q, k, v)), key_rows, *where


def wanted(q, k, v, *where, **how):
    return naive(q.cpu(), k.cpu(), v.cpu(), *where, **how)


def check(name, given, **how):
    how = {"scale": 1} | how
    got = attention(*given, **how)
    assert got.dtype == given[0].dtype
    close(name, got, wanted(*given, **how))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_against_one_softmax_a_row(kind, dtype):
    for heads, dim, how in (((1, 1), 5, HOW[0]), ((4, 2), 64, HOW[2]), ((3, 1), 24, HOW[3]), ((4, 4), 16, HOW[4])):
        check(f"{kind} {heads} {dim} {how}", made(kind, heads, dim, dtype), scale=1.3 / math.sqrt(dim), **how)


def log_sum_exp(q, k, key_rows, run, pos, *, scale, window=None, softcap=None, sinks=None):
    """Of each row's scores in each head, [rows, H], in float64."""
    q, k, slots = q.cpu().double(), k.cpu().double(), key_rows[run]
    scores = torch.einsum("rhd,rthd->rht", q, k[slots].repeat_interleave(q.shape[1] // k.shape[1], 2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    t = torch.arange(slots.shape[1])
    unseen = (t > pos[:, None]) | (t <= pos[:, None] - (window or len(t)))
    scores = scores.masked_fill(unseen[:, None], -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.cpu().double().expand(len(q), -1)[..., None]], -1)
    return scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_log_sum_exp(how, sinks, dtype):
    """Saved beside the same result to the bit."""
    from kedit_fast.kernels.triton.attention import attention

    for kind in LAYOUTS:
        q, k, v, *where = made(kind, dim=16, dtype=dtype)
        how = how | {"scale": 0.6, "sinks": None if sinks is None else sinks.to(DEVICE)}
        lse = torch.full(q.shape[:2], torch.nan, device=DEVICE)
        out = attention(q, k, v, *where, **how, lse=lse)
        assert torch.equal(out, attention(q, k, v, *where, **how))
        close(kind, lse, log_sum_exp(q, k, *where, **how))


@pytest.mark.parametrize("how", [{}, {"window": 4}], ids=str)
@pytest.mark.parametrize("kind", ["one row", "ragged", "shared"])
def test_sinks(kind, how):
    check(kind, made(kind), scale=0.6, sinks=SINKS.to(DEVICE), **how)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("dim", [80, 96, 256])
def test_head_sizes(dim, how):
    check(str(dim), made("shared", (2, 1), dim), scale=1 / math.sqrt(dim), **how)


@pytest.mark.parametrize("heads", [(7, 1), (14, 2), (21, 1), (40, 2)], ids=str)
def test_groups_of_heads_that_fill_no_tile(heads):
    """Sizes that divide no tile; more than 16 heads are two programs, the second with fewer heads."""
    check(str(heads), made("shared", heads))


@pytest.mark.parametrize("how", [{}, {"window": 30}], ids=str)
def test_long_runs_are_many_blocks_and_key_tiles(how):
    where = torch.arange(150).flip(0)[None], torch.zeros(129, dtype=torch.int64), torch.arange(21, 150)
    check("long", (*(x.to(DEVICE) for x in numbers(129, 150, 2, 1, 16, torch.float32)), *where), scale=0.3, **how)


def test_rows_far_from_each_other_under_a_window():
    """Tiles of keys that some row of the block does not see, or none does."""
    key_rows, run, pos = torch.arange(150)[None], torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 70, 149])
    q, k, v = (x.to(DEVICE) for x in numbers(4, 150, 2, 1, 16, torch.float32))
    truth = wanted(q, k, v, key_rows, run, pos, scale=1, window=5)
    unseen = torch.ones(150, dtype=torch.bool)
    unseen[:2] = unseen[66:71] = unseen[145:] = False
    k[unseen], v[unseen] = torch.nan, torch.nan
    close("far", attention(q, k, v, key_rows, run, pos, scale=1, window=5), truth)


def test_a_run_in_two_stretches():
    """A run's first row stands in front of another run's rows and the others behind it."""
    key_rows = torch.tensor([[0, 2, 3, -1], [0, 1, 4, 5]])
    run, pos = torch.tensor([1, 0, 0, 1, 1]), torch.tensor([1, 1, 2, 2, 3])
    q, k, v = (x.to(DEVICE) for x in numbers(5, 6, 2, 2, 5, torch.float32))
    check("stretches", (q, k, v, key_rows, run, pos))
    run, pos = torch.ones(4, dtype=torch.int64), torch.tensor([2, 3, 1, 2])  # one run, but its rows begin again
    check("again", (q[:4], k, v, key_rows, run, pos))


def test_strides_and_devices_of_the_arguments():
    """Queries as transformers hands them over, a cache that is part of a larger one."""
    q, k, v, key_rows, run, pos = made("ragged", dim=8)
    truth = wanted(q, k, v, key_rows, run, pos, scale=1)
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    k, v = torch.stack([k, v], 1).unbind(1)
    got = attention(q, k, v, key_rows.to(DEVICE), run.to(DEVICE), pos.to(DEVICE), scale=1)
    assert got.is_contiguous()
    close("strides", got, truth)
    apart = torch.stack([q, q], -1)[..., 0]
    close("element strides", attention(apart, k, v, key_rows, run, pos, scale=1), truth)


def test_slots_that_no_row_sees_are_not_read():
    """NaN ahead of every row, behind runs' ends, and where windows leave a gap between the rows of one block."""
    q, k, v, key_rows, run, pos = made("gap")
    truth = wanted(q, k, v, key_rows, run, pos, scale=1, window=2)
    k[[2, 3, 7, 8, 9]], v[[2, 3, 7, 8, 9]] = torch.nan, torch.nan  # rows at 0, 1, 5, 6, 11 see 0, 1, 4, 5, 6, 10, 11
    close("gap", attention(q, k, v, key_rows, run, pos, scale=1, window=2), truth)
    k[2:], v[2:] = torch.nan, torch.nan
    check("ahead", (q[:2], k, v, key_rows, run[:2], pos[:2]))


def test_no_rows():
    q, k, v, key_rows, run, pos = made("shared")
    got = attention(q[:0], k, v, key_rows, run[:0], pos[:0], scale=1)
    assert got.shape == (0, 4, 5) and got.dtype == q.dtype


def test_gradients_through_slots_are_the_kernels(monkeypatch):
    """As autograd has them of the reference; which does not run."""
    q, k, v, key_rows, run, pos = made("shared")
    weight = torch.arange(5, device=DEVICE)

    def gradients():
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        out = slots.Slots.of(given[1] * 1, given[2] * 1).attend(given[0], key_rows, run, pos, scale=0.7)
        return torch.autograd.grad((out * weight).sum(), given)

    with monkeypatch.context() as patched:
        patched.setattr(slots, "runs_on_triton", lambda q: False)
        patched.setattr(slots, "attention", lambda *a, lse, **how: attention_ref(*a, **how))
        patched.setattr(
            slots, "attention_backward", lambda g, out, lse, *a, **how: attention_backward_ref(g, *a, **how)
        )
        wanted = gradients()
    monkeypatch.setattr(op, "attention_backward_ref", lambda *a, **k: pytest.fail("the reference ran"))
    found = wanted, gradients()
    for name, want, got in zip("qkv", *found, strict=True):
        close(f"gradient of {name}", got, want)


def test_a_large_pack_is_cut_without_a_loop():
    from kedit_fast.kernels.triton.attention import plan

    n, generator = 100_000, torch.Generator().manual_seed(0)
    length = torch.randint(1, 9, (n,), generator=generator)
    run = torch.arange(n).repeat_interleave(length)
    pos = torch.arange(len(run)) - (length.cumsum(0) - length)[run]
    table = torch.arange(n * 8).view(n, 8)
    cut = plan(table, run, pos, heads=4, most=64, device="cpu")
    first, end, segment = cut.blocks.T
    assert torch.equal(first[1:], end[:-1]) and first[0] == 0 and end[-1] == len(run), "each row once, in order"
    assert (end > first).all() and (end - first).max() * 4 <= cut.queries
    assert torch.equal(run[first], run[end - 1]) and torch.equal(cut.table[segment], table[run[first]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_number_is_seen(dtype):
    """Each mistake leaves the tolerance by far: another key row, a window off by one, no cap, another scale."""
    *qkv, key_rows, run, pos = made("shared", dim=16, dtype=dtype)
    how = {"scale": 0.5, "window": 5, "softcap": 1.5}
    truth = wanted(*qkv, key_rows, run, pos, **how)
    close("right", attention(*qkv, key_rows, run, pos, **how), truth)
    swapped = key_rows.clone()
    swapped[3, [4, 9]] = key_rows[3, [9, 4]]
    for name, table, change in (
        ("key row", swapped, {}),
        ("window + 1", key_rows, {"window": 6}),
        ("window - 1", key_rows, {"window": 4}),
        ("no cap", key_rows, {"softcap": None}),
        ("scale", key_rows, {"scale": 0.75}),
    ):
        assert relative_error(attention(*qkv, table, run, pos, **how | change), truth) > 2 * TOLERANCE[dtype], name
