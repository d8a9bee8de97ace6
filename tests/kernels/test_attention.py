"""Attention through a row table in plain torch against one softmax a row in float64."""

import math

import pytest
import torch

from kedit_fast.kernels import attention as kernel
from kedit_fast.kernels.attention import DENSE_FROM, attention, attention_ref
from tests.conftest import close, relative_error

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Forces the reference; the extension has tests of its own."""
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "reference")


def naive(query, key, value, key_rows, run, pos, *, scale, window=None, softcap=None, sinks=None):
    """One row and one head at a time, in float64, reading only what the row may see."""
    query, key, value = query.double(), key.double(), value.double()
    out, group = torch.empty_like(query), query.shape[1] // key.shape[1]
    for i in range(len(query)):
        p = int(pos[i])
        slots = key_rows[int(run[i]), max(0, p + 1 - window) if window else 0 : p + 1]
        for head in range(query.shape[1]):
            scores = key[slots, head // group] @ query[i, head] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp() / (scores.exp().sum() + (0 if sinks is None else sinks[head].double().exp()))
            out[i, head] = weights @ value[slots, head // group]
    return out


def numbers(rows, slots, heads, kv_heads, dim, dtype, seed=0):
    """Query, key and value; keys large enough that a softmax is far from even."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, heads, dim), (slots, kv_heads, dim), (slots, kv_heads, dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def layout(kind):
    """(key_rows [R, T], run [rows], pos [rows]) of several ways that rows may lie."""
    if kind == "one row":
        return torch.tensor([[0]]), torch.tensor([0]), torch.tensor([0])
    if kind == "one run":
        return torch.arange(17)[None], torch.zeros(17, dtype=torch.int64), torch.arange(17)
    if kind == "ragged":  # five runs of 1 to 57 rows, 129 in all, slots in no order
        lengths = [57, 1, 31, 9, 31]
        table, order, at = torch.full((5, 57), -1), torch.randperm(140, generator=torch.Generator().manual_seed(1)), 0
        for r, n in enumerate(lengths):
            table[r, :n] = order[at : at + n]
            at += n
        run = torch.arange(5).repeat_interleave(torch.tensor(lengths))
        return table, run, torch.cat([torch.arange(n) for n in lengths])
    if kind == "shared":  # a prefix of 6; suffixes of 3, 3, 1 and 4; the last one again behind the third one's row
        table = torch.arange(6).repeat(5, 1)
        own = [[6, 7, 8, -1], [9, 10, 11, -1], [12, -1, -1, -1], [13, 14, 15, 16], [12, 17, -1, -1]]
        table = torch.cat([table, torch.tensor(own)], 1)
        run = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4])
        return table, run, torch.tensor([6, 7, 8, 6, 7, 8, 6, 6, 7, 8, 9, 7])
    if kind == "slabs":  # a cache: 7 slots a run, one row each at its own length
        return torch.arange(28).view(4, 7), torch.arange(4), torch.tensor([6, 2, 4, 0])
    assert kind == "gap"  # one run's rows at positions that do not follow each other, as in a last layer
    return torch.arange(12)[None], torch.zeros(5, dtype=torch.int64), torch.tensor([0, 1, 5, 6, 11])


def problem(kind, dtype=torch.float32, heads=(4, 2), dim=5):
    """(query, key, value, key_rows, run, pos) of a layout, with three slots that no row names."""
    key_rows, run, pos = layout(kind)
    return *numbers(len(run), int(key_rows.max()) + 4, *heads, dim, dtype), key_rows, run, pos


LAYOUTS = ("one row", "one run", "ragged", "shared", "slabs", "gap")
HOW = ({}, {"window": 1}, {"window": 5}, {"softcap": 1.5}, {"window": 4, "softcap": 0.8})


SINKS = torch.tensor([-1.5, 0.0, 0.7, 2.5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense_from", [64, 1])
@pytest.mark.parametrize("window", [None, 4])
def test_sinks(window, dense_from, dtype, monkeypatch):
    """A logit of each head that has no value: gathered and dense."""
    monkeypatch.setattr(kernel, "DENSE_FROM", dense_from)
    for kind in LAYOUTS:
        given, how = problem(kind, dtype), {"scale": 0.6, "window": window}
        close(kind, attention_ref(*given, **how, sinks=SINKS), naive(*given, **how, sinks=SINKS), dtype)
        assert relative_error(attention_ref(*given, **how), naive(*given, **how, sinks=SINKS)) > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (4, 1)], ids=["1", "4 on 2", "4 on 1"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_against_one_softmax_a_row(kind, heads, dtype):
    for dim in (5, 64):
        given = problem(kind, dtype, heads, dim)
        for how in HOW:
            how = {"scale": 1.3 / math.sqrt(dim)} | how
            got = attention(*given, **how)
            assert got.dtype == dtype and torch.equal(got, attention_ref(*given, **how))
            close(f"{kind} {heads} {dim} {how}", got, naive(*given, **how))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("window", [None, 1, 30, 500])
def test_long_runs_take_the_dense_path(window, dtype, monkeypatch):
    """Whole texts from position 0: the same as gathered, and as one softmax a row."""
    n = DENSE_FROM + 1
    key_rows = torch.arange(3 * n).view(3, n)[:, torch.arange(n)] + torch.tensor([[0], [5], [9]])
    run, pos = torch.arange(3).repeat_interleave(n), torch.arange(n).repeat(3)
    given = *numbers(3 * n, 3 * n + 9, 4, 2, 5, dtype), key_rows, run, pos
    dense_calls, dense = [], kernel._dense
    monkeypatch.setattr(kernel, "_dense", lambda *a: dense_calls.append(1) or dense(*a))
    wanted = naive(*given, scale=0.7, window=window)
    close("dense", attention(*given, scale=0.7, window=window), wanted)
    assert dense_calls == [1]
    monkeypatch.setattr(kernel, "DENSE_FROM", 10**9)
    close("gathered", attention(*given, scale=0.7, window=window), wanted)
    assert dense_calls == [1]


def test_long_suffixes_and_capped_scores_do_not_take_it(monkeypatch):
    """SDPA knows neither a prefix behind the diagonal nor a cap."""
    monkeypatch.setattr(kernel, "_dense", lambda *a: pytest.fail("dense"))
    n = DENSE_FROM + 3
    key_rows = torch.arange(2 * n).view(2, n)
    for run, first, softcap in ((1, 2, None), (0, 0, 1.0)):
        where = key_rows, torch.full((n - first,), run), torch.arange(first, n)
        given = *numbers(n - first, 2 * n, 2, 1, 5, torch.float32), *where
        how = {"scale": 1.0, "softcap": softcap}
        close("suffix or cap", attention(*given, **how), naive(*given, **how))


def take(x, slots):
    """x at slots [n, T], as the reference reads them."""
    group = kernel.Group(slots, slots, kernel._there(slots, len(x) + 9), False, kernel._slab(slots), int(slots.max()))
    return kernel._take(x, group, slice(0, len(slots)))


def test_equal_slabs_are_read_where_they_lie():
    store = torch.randn(30, 2, 5)
    slabs = torch.arange(30).view(3, 10)[:, :7]
    with torch.no_grad():
        view = take(store, slabs)
        assert view.untyped_storage().data_ptr() == store.untyped_storage().data_ptr()
        assert torch.equal(view, store[slabs])
        part = store[2:]  # a view of its own
        assert torch.equal(take(part, slabs[:2] + 3), part[slabs[:2] + 3])
        for slots in (slabs.flip(0), slabs[:, [0, 2, 1]], slabs[[0, 0]], torch.tensor([[0, 1], [1, 2], [4, 5]])):
            assert torch.equal(take(store, slots), store[slots])
        assert torch.equal(take(store, torch.tensor([[3, -1]])), store[torch.tensor([[3, 3]])])
        assert torch.equal(take(store, torch.tensor([[3, 31]])), store[torch.tensor([[3, 3]])]), "not there yet"


def test_many_runs_are_gathered_a_few_at_a_time(monkeypatch):
    given = problem("ragged")
    whole = attention(*given, scale=1.0)
    monkeypatch.setattr(kernel, "GATHERED", 1)
    close("one at a time", attention(*given, scale=1.0), whole)


def test_scores_count_as_memory_held_at_once(monkeypatch):
    """Long runs beside prefixes: 70 rows x 70 keys x 4 heads of scores are more than the keys they came from."""
    held = []
    gathered = kernel._gathered
    monkeypatch.setattr(kernel, "_gathered", lambda q, *a: held.append(q.shape[0]) or gathered(q, *a))
    monkeypatch.setattr(kernel, "GATHERED", 2 * 70 * 4 * 71)
    key_rows = torch.arange(6 * 71).view(6, 71)
    run, pos = torch.arange(6).repeat_interleave(70), torch.arange(1, 71).repeat(6)
    q, k, v = numbers(len(run), 6 * 71, 4, 1, 5, torch.float32)
    attention(q, k, v, key_rows, run, pos, scale=1.0)
    assert max(held) <= 2 and sum(held) == 6


def test_slots_that_no_row_may_see_are_not_read_into_it():
    """What lies behind a run's end, or belongs to later rows, may be anything that is finite."""
    q, k, v, *where = problem("shared")
    got = attention(q, k, v, *where, scale=1.0)
    assert len(k) > 18
    k[18:], v[18:] = 1e30, -1e30
    assert torch.equal(attention(q, k, v, *where, scale=1.0), got)


def test_one_wrong_row_is_seen():
    *qkv, key_rows, run, pos = problem("shared")
    wanted = naive(*qkv, key_rows, run, pos, scale=1.0)
    for place in ((0, 2), (4, 6), (3, 9)):
        wrong = key_rows.clone()
        wrong[place] += 1
        assert relative_error(attention(*qkv, wrong, run, pos, scale=1.0), wanted) > 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"value": torch.zeros(6, 2, 4)},  # narrower than its key
        {"key": torch.zeros(6, 2, 7)},
        {"value": torch.zeros(5, 2, 5)},
        {"value": torch.zeros(6, 1, 5)},
        {"key": torch.zeros(6, 3, 5), "value": torch.zeros(6, 3, 5)},  # 4 heads on 3
        {"sinks": torch.zeros(3)},
        {"key_rows": torch.arange(6, dtype=torch.int32)[None]},
        {"run": torch.zeros(5, dtype=torch.int64)},
        {"pos": torch.arange(5)},
        {"window": 0},
        {"softcap": 0.0},
        {"softcap": -1.0},
        {"value": torch.zeros(6, 2, 5, device="meta")},
    ],
    ids=lambda change: ", ".join(change),
)
def test_what_a_kernel_would_read_beside_is_refused(change):
    """The extension has addresses alone: each of these it answered with what lay behind, or wrote there."""
    query, key, value = numbers(6, 6, 4, 2, 5, torch.float32)
    given = {"query": query, "key": key, "value": value, "key_rows": torch.arange(6)[None]}
    given |= {"run": torch.zeros(6, dtype=torch.int64), "pos": torch.arange(6)}
    attention(**given, scale=1.0)
    with pytest.raises(ValueError, match=r"expected|are to be|is on|window is"):
        attention(**given | change, scale=1.0)
