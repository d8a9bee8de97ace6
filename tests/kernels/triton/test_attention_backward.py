"""Gradients of attention on Triton against autograd through one softmax a row in float64."""

import math

import pytest
import torch

from tests.conftest import TOLERANCE, close, relative_error
from tests.kernels.test_attention import HOW, LAYOUTS, SINKS, naive, numbers
from tests.kernels.triton import DEVICE, DTYPES, random
from tests.kernels.triton.test_attention import made

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def saved(q, k, v, *where, **how):
    """The log-sum-exp as the forward kernel saves it, and its result as a GPU rounds it: the interpreter cuts bf16 off,
    which the gradients show."""
    from kedit_fast.kernels.triton.attention import attention

    lse = torch.full(q.shape[:2], torch.nan, device=q.device)
    attention(q, k, v, *where, **how, lse=lse)
    return truth(q, k, v, *where, **how).to(q), lse


def truth(*given, sinks=None, **how):
    given = (x.cpu() for x in given)
    return naive(*given, **how, sinks=None if sinks is None else sinks.cpu())


def wanted(grad, q, k, v, *where, own, **how):
    """The gradients by autograd, in float64."""
    leaves = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(truth(*leaves, *where, **how), leaves, grad.cpu().double())
    return dq, dk[own.start : own.stop], dv[own.start : own.stop]


def gradients(grad, out, lse, q, k, v, *where, own, **how):
    """The kernel's gradients of query, and of key and value in the slots ``own``; what lies around those stays."""
    from kedit_fast.kernels.triton.attention_backward import attention_backward

    room = len(k)  # before and behind, as many as a wrong slot may be off by
    sums = [random(2 * room + len(own), *k.shape[1:], seed=seed) for seed in (1, 2)]
    before = [x.clone() for x in sums]
    key_grad, value_grad = (x[room : room + len(own)] for x in sums)
    dq = attention_backward(grad, out, lse, q, k, v, *where, key_grad, value_grad, base=own.start, **how)
    assert dq.dtype == q.dtype and dq.is_contiguous()
    for x, was in zip(sums, before, strict=True):
        x -= was
        assert not x[:room].any() and not x[room + len(own) :].any(), "a constant has a gradient"
    return dq, key_grad, value_grad


def compare(name, got, want, dtype):
    """Each of the three gradients; one that cancels, since its rows see one key each, by the size of the values'."""
    for of, x, true in zip("qkv", got, want, strict=True):
        if true.abs().max() < 1e-12:
            assert x.abs().max() <= TOLERANCE[dtype] * want[2].abs().max(), f"{name}, d{of}"
        else:
            close(f"{name}, d{of}", x, true, dtype)


def check(name, given, own=None, **how):
    """own: slots that are no constants; all by default."""
    how, own = {"scale": 1} | how, own or range(len(given[1]))
    grad = random(*given[0].shape, dtype=given[0].dtype, seed=3)
    got = gradients(grad, *saved(*given, **how), *given, own=own, **how)
    compare(name, got, wanted(grad, *given, own=own, **how), grad.dtype)


OWN = {"ragged": range(40, 100), "shared": range(6, 18), "slabs": range(2, 28), "gap": range(4, 7)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_against_autograd(kind, dtype):
    """Stored prefixes, and runs that read the slots of others."""
    for heads, dim, how in (((1, 1), 5, HOW[0]), ((4, 2), 64, HOW[2]), ((3, 1), 24, HOW[3]), ((4, 4), 16, HOW[4])):
        given = made(kind, heads, dim, dtype)
        check(f"{kind} {heads} {dim} {how}", given, OWN.get(kind), scale=1.3 / math.sqrt(dim), **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOW, ids=str)
def test_several_runs_read_one_slot(how, dtype):
    """Gradients of a prefix that all runs share, with its first slots stored, and of all of it."""
    for own in (range(3, 18), range(21), range(13)):
        check(f"{own}", made("shared", (4, 1), 16, dtype), own, scale=0.4, **how)


@pytest.mark.parametrize("how", [{}, {"window": 4}, {"softcap": 1.5}], ids=str)
@pytest.mark.parametrize("kind", ["one row", "ragged", "shared"])
def test_sinks(kind, how):
    check(kind, made(kind), OWN.get(kind), scale=0.6, sinks=SINKS.to(DEVICE), **how)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("dim", [80, 96, 256])
def test_head_sizes(dim, how):
    check(str(dim), made("shared", (2, 1), dim), OWN["shared"], scale=1 / math.sqrt(dim), **how)


@pytest.mark.parametrize("heads", [(7, 1), (14, 2), (21, 1), (40, 2)], ids=str)
def test_groups_of_heads_that_fill_no_tile(heads):
    """Sizes that divide no tile; more than 16 heads are two programs, which add to one slot."""
    check(str(heads), made("shared", heads), OWN["shared"])


@pytest.mark.parametrize("how", [{}, {"window": 30}], ids=str)
@pytest.mark.parametrize("own", [range(150), range(50, 61), range(149, 150)], ids=str)
def test_long_runs_are_many_blocks_and_key_tiles(own, how):
    """Tiles of keys that are all constants, some of which are, and none."""
    where = torch.arange(150).flip(0)[None], torch.zeros(129, dtype=torch.int64), torch.arange(21, 150)
    given = *(x.to(DEVICE) for x in numbers(129, 150, 2, 1, 16, torch.float32)), *where
    check("long", given, own, scale=0.3, **how)


def test_a_run_in_two_stretches():
    key_rows = torch.tensor([[0, 2, 3, -1], [0, 1, 4, 5]])
    run, pos = torch.tensor([1, 0, 0, 1, 1]), torch.tensor([1, 1, 2, 2, 3])
    given = *(x.to(DEVICE) for x in numbers(5, 6, 2, 2, 5, torch.float32)), key_rows, run, pos
    check("stretches", given, range(1, 6))


def test_all_keys_are_constants():
    given, how = made("shared"), {"scale": 0.5}
    grad = random(*given[0].shape, seed=3)
    for own in (range(0), range(18, 21)):  # none at all, and slots that no row sees
        dq, *none = gradients(grad, *saved(*given, **how), *given, own=own, **how)
        close("dq", dq, wanted(grad, *given, own=own, **how)[0])
        assert not any(x.any() for x in none)


def test_strides_of_the_arguments():
    """Queries as transformers hands them over, a cache that is part of a larger one, the gradient of a sum."""
    q, k, v, *where = made("ragged", dim=8)
    grad = random(1, 1, 8, seed=3).expand(q.shape)
    how = {"own": OWN["ragged"], "scale": 0.5}
    want = wanted(grad, q, k, v, *where, **how)
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    k, v = torch.stack([k, v], 1).unbind(1)
    got = gradients(grad, *saved(q, k, v, *where, scale=0.5), q, k, v, *where, **how)
    compare("strides", got, want, q.dtype)


def test_blocks_that_are_at_hand_are_taken():
    """What was cut for a whole call serves all its layers; asked for with this kernel's own bound."""
    from kedit_fast.kernels.triton.attention import plan

    q, k, v, *where = made("ragged", dim=16)
    how, asked = {"own": OWN["ragged"], "scale": 0.5}, []

    def cut(heads, most):
        asked.append((heads, most))
        return plan(*where, heads, 16, q.device)

    grad = random(*q.shape, seed=3)
    got = gradients(grad, *saved(q, k, v, *where, scale=0.5), q, k, v, *where, **how, cut=cut)
    compare("cut", got, wanted(grad, q, k, v, *where, **how), q.dtype)
    assert asked == [(2, 32)]


def test_no_rows():
    q, k, v, key_rows, run, pos = made("shared")
    given = q[:0], k, v, key_rows, run[:0], pos[:0]
    dq, *none = gradients(q[:0], *saved(*given, scale=1), *given, own=range(6, 18), scale=1)
    assert dq.shape == (0, 4, 5) and not any(x.any() for x in none)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_number_is_seen(dtype):
    """Each mistake leaves the tolerance by far: what was saved, the slots, another scale, window or cap."""
    q, k, v, key_rows, run, pos = made("shared", dim=16, dtype=dtype)
    how = {"scale": 0.5, "window": 5, "softcap": 1.5, "own": range(4, 18)}
    grad, where = random(*q.shape, dtype=dtype, seed=3), (key_rows, run, pos)
    out, lse = saved(q, k, v, *where, scale=0.5, window=5, softcap=1.5)
    want = wanted(grad, q, k, v, *where, **how)

    def off(out=out, lse=lse, where=where, **change):
        got = gradients(grad, out, lse, q, k, v, *where, **how | change)
        return [relative_error(x, true) / TOLERANCE[dtype] for x, true in zip(got, want, strict=True)]

    swapped = key_rows.clone()
    swapped[3, [5, 9]] = key_rows[3, [9, 5]]
    assert max(off()) <= 1
    for name, errors, wrong in (
        ("out", off(out=out.roll(1, 0)), (0, 1)),
        ("log-sum-exp", off(lse=lse + 0.1), (0, 1, 2)),
        ("key row", off(where=(swapped, run, pos)), (0, 1, 2)),
        ("base", off(own=range(5, 19)), (1, 2)),
        ("window", off(window=6), (0, 1, 2)),
        ("no cap", off(softcap=None), (0, 1, 2)),
        ("scale", off(scale=0.75), (0, 1, 2)),
    ):
        assert min(errors[i] for i in wrong) > 2, f"{name}: {errors}"
