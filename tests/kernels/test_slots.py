"""Gradients through the slots of a layer, call by call, against autograd of one softmax a row in float64."""

import pytest
import torch

from kedit_fast.kernels import slots as slots_module
from kedit_fast.kernels.attention import DENSE_FROM, attention
from kedit_fast.kernels.slots import Slots
from kedit_fast.sweep.store import KVStore
from tests.conftest import close
from tests.kernels.test_attention import HOW, SINKS, naive, numbers

LAYOUTS = ("stored prefix", "own parents", "long run")
CALLS = ([slice(0, 3), slice(3, 8), slice(8, 12)], [slice(0, 12)], [torch.tensor([0, 1, 2]), torch.tensor([3, 8])])


def layout(kind):
    """(key_rows, run, pos, base): 12 rows, and slots below ``base`` that are stored."""
    if kind == "stored prefix":  # of 4 positions, and two runs behind it; one run from its beginning
        table = torch.tensor([[0, 1, 2, 3, 5, 6, 7], [0, 1, 2, 8, 9, 10, 11], [12, 13, 14, 15, 16, -1, -1]])
        run = torch.tensor([0] * 3 + [1] * 4 + [2] * 5)
        return table, run, torch.tensor([4, 5, 6, 3, 4, 5, 6, 0, 1, 2, 3, 4]), 5
    if kind == "own parents":  # rows 3 to 7 and 8 to 11 go on from row 2: their calls read an earlier one's slots
        table = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 8, 9, 10, 11, -1]])
        return table, torch.tensor([0] * 8 + [1] * 4), torch.tensor([*range(8), *range(3, 7)]), 0
    return torch.arange(70)[None], torch.zeros(70, dtype=torch.int64), torch.arange(70), 0


def made(kind, dtype=torch.float64, seed=0):
    """(query, key, value of the rows, stored keys and values, layout)"""
    key_rows, run, pos, base = layout(kind)
    query, key, value = numbers(len(run), len(run), 4, 2, 5, dtype, seed)
    _, *stored = numbers(1, max(base, 1), 4, 2, 5, dtype, seed + 1)
    return query, key, value, [x[:base] for x in stored], (key_rows, run, pos, base)


def through_slots(kind, calls, how, dtype=torch.float64):
    """(what each call gives, gradients of the rows' query, key and value) of a weighted sum."""
    query, key, value, stored, (key_rows, run, pos, base) = made(kind, dtype)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    slots = Slots(*(torch.cat([old, old.new_full((len(run), 2, 5), 7.0)]) for old in stored), base)
    outs = []
    for call in calls:
        where = slice(base + call.start, base + call.stop) if isinstance(call, slice) else base + call
        slots.write(key[call] * 1.0, value[call] * 1.0, where)
        outs.append(slots.attend(query[call], key_rows, run[call], pos[call], scale=0.6, **how))
    sum((out.double() * weights(len(out))).sum() for out in outs).backward()
    return outs, [x.grad for x in leaves]


def by_autograd(kind, calls, how):
    """The same by one softmax a row, which autograd records as it is."""
    query, key, value, stored, (key_rows, run, pos, _) = made(kind)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    k, v = (torch.cat([old, new]) for old, new in zip(stored, (key, value), strict=True))
    outs = [naive(query[call], k, v, key_rows, run[call], pos[call], scale=0.6, **how) for call in calls]
    sum((out * weights(len(out))).sum() for out in outs).backward()
    return outs, [x.grad for x in leaves]


def weights(n):
    return torch.randn(n, 4, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@pytest.mark.parametrize("how", [HOW[0], *HOW[2:], {"sinks": SINKS}, {"sinks": SINKS, "window": 4}], ids=str)
@pytest.mark.parametrize("calls", CALLS[:2], ids=["three calls", "one call"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_gradients(kind, calls, how):
    if kind == "long run":
        assert len(layout(kind)[1]) >= DENSE_FROM
        calls = [slice(0, 70)]
    for name, got, want in zip("qkv", *(f(kind, calls, how)[1] for f in (through_slots, by_autograd)), strict=True):
        close(f"gradient of {name}", got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    made, wanted = (through_slots("own parents", CALLS[0], {}, dtype), by_autograd("own parents", CALLS[0], {}))
    for got, want in zip(made[1], wanted[1], strict=True):
        assert got.dtype == dtype
        close("gradient", got, want, dtype)


def test_rows_that_do_not_stand_together():
    for got, want in zip(*(f("own parents", CALLS[2], {})[1] for f in (through_slots, by_autograd)), strict=True):
        close("gradient", got, want)


def test_all_rows_of_one_call_are_the_slots():
    query, key, value, _, (key_rows, run, pos, _) = made("own parents")
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = Slots.of(key * 1.0, value * 1.0).attend(query, key_rows, run, pos, scale=0.6)
    (out * weights(len(out))).sum().backward()
    for got, want in zip((x.grad for x in leaves), by_autograd("own parents", CALLS[1], {})[1], strict=True):
        close("gradient", got, want)


def test_rows_that_nobody_reads_get_no_gradient_and_do_no_harm():
    query, key, value, _, (key_rows, run, pos, _) = made("own parents")
    key.requires_grad_()
    slots = Slots(*(x.new_zeros(12, 2, 5) for x in (key, value)))
    slots.write(key[:3] * 1.0, value[:3], slice(0, 3))
    assert slots.attend(query[:3], key_rows, run[:3], pos[:3], scale=0.6).requires_grad
    slots.write(key[3:] * 1.0, value[3:], slice(3, 12))
    out = slots.attend(query[8:], key_rows, run[8:], pos[8:], scale=0.6)
    out.sum().backward()
    assert key.grad[3:8].abs().max() == 0 and key.grad[:3].abs().max() > 0 and key.grad[8:].abs().max() > 0


def test_without_gradients_nothing_is_recorded():
    query, key, value, _, (key_rows, run, pos, _) = made("own parents")
    for grad, needs in ((True, False), (False, True)):
        with torch.set_grad_enabled(grad):
            slots = Slots.of(key.requires_grad_(needs), value)
            out = slots.attend(query, key_rows, run, pos, scale=0.6)
        assert not out.requires_grad and torch.equal(out, attention(query, key, value, key_rows, run, pos, scale=0.6))


def own_slots(seed=0, dtype=torch.float64):
    """(leaves, what they give through slots): one run of 5 rows."""
    query, key, value = (x.requires_grad_() for x in numbers(5, 5, 4, 2, 5, dtype, seed))
    where = torch.arange(5)[None], torch.zeros(5, dtype=torch.int64), torch.arange(5)
    return (query, key, value), Slots.of(key * 1.0, value * 1.0).attend(query, *where, scale=0.6)


def test_a_graph_that_is_kept_goes_down_again_from_zero():
    leaves, out = own_slots()
    loss = (out * weights(5)).sum()
    first = [x.clone() for x in torch.autograd.grad(loss, leaves, retain_graph=True)]
    torch.autograd.grad(loss, leaves[0], retain_graph=True)  # which reads the keys' gradients and gives none on
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b)


def test_an_earlier_sweep_over_the_same_memory_cannot_go_down_any_more():
    store, losses = KVStore(), []
    for seed in (0, 1):
        query, key, value = (x.requires_grad_() for x in numbers(5, 5, 4, 2, 5, torch.float64, seed))
        slots = Slots.again(*store.room(0, 5, query, (2, 5)), 0)
        slots.write(key * 1.0, value * 1.0, slice(0, 5))
        where = torch.arange(5)[None], torch.zeros(5, dtype=torch.int64), torch.arange(5)
        losses.append((slots.attend(query, *where, scale=0.6).sum(), key))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(*losses[0])
    assert torch.autograd.grad(*losses[1])[0].isfinite().all()


class _View(torch.autograd.Function):
    """A copy, given as a view of what it made: as the native product gives its rows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone().view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_keys_that_are_views_of_what_a_product_made():
    query, key, value = (x.requires_grad_() for x in numbers(5, 5, 4, 2, 5, torch.float64, 0))
    where = torch.arange(5)[None], torch.zeros(5, dtype=torch.int64), torch.arange(5)
    found = []
    for made in (_View.apply, torch.clone):
        slots = Slots.of(made(key), made(value))
        out = slots.attend(query, *where, scale=0.6)
        found.append(torch.autograd.grad((out * weights(5)).sum(), (query, key, value)))
    assert all(map(torch.equal, *found))


def test_gradients_of_a_layer_are_held_no_longer_than_the_way_down(monkeypatch):
    made, begin = [], slots_module._Gradients.__init__
    monkeypatch.setattr(
        slots_module._Gradients, "__init__", lambda self, base: (begin(self, base), made.append(self))[0]
    )
    leaves, out = own_slots()
    loss = out.sum()
    loss.backward()
    assert made and all(one.key is None and one.value is None for one in made) and leaves[1].grad.any()


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_not_finite_stays_in_its_own_run(backward):
    """Shorter runs are filled up to the longest one's length, and 0 * NaN is NaN: what fills them is their own."""
    table = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, -1]])
    run, pos = torch.tensor([0] * 4 + [1] * 4 + [2] * 3), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2])
    for some in (torch.arange(11), torch.tensor([2, 3, 6, 7, 9, 10])):
        query, key, value = (x.requires_grad_() for x in numbers(11, 11, 4, 2, 5, torch.float64))
        bad = torch.cat([key[:1] * torch.inf, key[1:]])
        with torch.set_grad_enabled(backward):
            out = Slots.of(bad, value * 1.0).attend(query[some], table, run[some], pos[some], scale=0.6)
        others = run[some] > 0
        assert out[others].isfinite().all()
        if backward:
            out[others].sum().backward()
            assert query.grad[4:].isfinite().all() and value.grad[4:].isfinite().all()
