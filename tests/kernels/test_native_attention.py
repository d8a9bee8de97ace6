"""Attention by the extension, in every instruction set, against one softmax a row in float64; and who is sent there."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from kedit_fast.kernels import attention as module
from kedit_fast.kernels import dispatch
from kedit_fast.kernels.attention import attention, attention_ref
from tests.compare import close, refused, relative_error
from tests.conftest import tiny_lm
from tests.kernels.test_attention import HOW, LAYOUTS, naive, numbers, problem

WHY = dispatch.why_not_native()
pytestmark = pytest.mark.skipif(bool(WHY), reason=f"no extension: {WHY}")
SETS = [] if WHY else dispatch.native().instruction_sets()
HEADS = [(2, 2), (4, 2), (6, 2), (4, 1), (7, 1)]  # groups of 1, 2, 3, 4 and 7
SHAPES = [(heads, dim) for heads in HEADS for dim in (5, 64)] + [((6, 2), dim) for dim in (16, 80, 128)]
ALL_HOW = [*HOW, {"sinks": True}, {"sinks": True, "window": 4, "softcap": 0.8}]


def counting(monkeypatch, **options) -> list[str]:
    """Lets the extension run, with these options; -> a word for each time that it did."""
    monkeypatch.delenv("KEDIT_FAST_BACKEND", raising=False)
    real, ran = dispatch.native(), []

    def run(*arguments):
        ran.append("ran")
        real.attention(*arguments, **options)

    monkeypatch.setattr(module.dispatch, "native", lambda: SimpleNamespace(**vars(real) | {"attention": run}))
    return ran


@pytest.fixture
def native(monkeypatch):
    """Says when the extension ran."""
    return counting(monkeypatch)


@pytest.fixture(params=SETS)
def each_set(request, monkeypatch):
    """The same for every instruction set."""
    return counting(monkeypatch, instruction_set=request.param)


def options(how, heads, dim):
    """The keywords of ``attention``."""
    sinks = torch.linspace(-1.5, 2.5, heads) if "sinks" in how else None
    return {"scale": 1.3 / dim**0.5} | how | {"sinks": sinks}


@cache
def wanted(kind, heads, dim, which):
    return naive(*problem(kind, heads=heads, dim=dim), **options(ALL_HOW[which], heads[0], dim))


def seen(key_rows, run, pos, window=None):
    """[slots that some row sees]"""
    spans = [key_rows[r, max(0, p + 1 - window) if window else 0 : p + 1] for r, p in zip(run, pos, strict=True)]
    return torch.cat(spans).unique()


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_against_one_softmax_a_row(kind, heads, dim, n_threads, each_set, threads):
    threads(n_threads)
    for which, how in enumerate(ALL_HOW):
        got = attention(*problem(kind, heads=heads, dim=dim), **options(how, heads[0], dim))
        close(f"{kind} {how}", got, wanted(kind, heads, dim, which))
    assert len(each_set) == len(ALL_HOW)


@pytest.mark.parametrize("how", [{}, {"softcap": 1.0}, {"softcap": 30.0}, {"softcap": 1e4}, {"window": 70}], ids=str)
def test_as_near_as_the_reference(how, each_set):
    """Prefixes and texts of several hundred keys, with scores that a cap bends much, little or not at all."""
    key_rows = torch.stack([torch.arange(300), torch.cat([torch.arange(100), torch.arange(300, 500)])])
    run = torch.arange(2).repeat_interleave(torch.tensor([250, 200]))
    pos = torch.cat([torch.arange(50, 300), torch.arange(100, 300)])
    given = *numbers(450, 500, 6, 2, 64, torch.float32), key_rows, run, pos
    truth = attention_ref(*(x.double() for x in given[:3]), key_rows, run, pos, scale=0.4, **how)
    got, theirs = (relative_error(f(*given, scale=0.4, **how), truth) for f in (attention, attention_ref))
    assert got < 1.5 * theirs and each_set == ["ran"]


@pytest.mark.parametrize("kind", ["ragged", "shared"])
def test_strides(kind, native):
    """Heads, rows and slots apart; heads first; a view of the table; a last axis with gaps."""
    q, k, v, key_rows, run, pos = problem(kind, heads=(6, 2), dim=20)
    want = attention(q, k, v, key_rows, run, pos, scale=0.5)
    wide = [torch.full((len(x), 8, 48), torch.nan) for x in (q, k, v)]
    views = [w[:, 1 : 1 + x.shape[1], 3:23].copy_(x) for w, x in zip(wide, (q, k, v), strict=True)]
    table = torch.full((len(key_rows), key_rows.shape[1] + 3), -7)
    table[:, 2:-1] = key_rows
    first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    last = [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in (q, k, v)]
    for given in (views, first, last, [q, views[1], first[2]]):
        got = attention(*given, table[:, 2:-1], run, pos, scale=0.5)
        assert torch.equal(got, want) and got.is_contiguous()
    one = q[:1].expand(len(q), 6, 20)
    assert torch.equal(
        attention(one, k, v, key_rows.T.contiguous().T, run, pos, scale=0.5),
        attention(one.contiguous(), k, v, key_rows, run, pos, scale=0.5),
    )
    assert len(native) == 7


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_no_row_sees_may_be_anything(kind, window, heads, each_set):
    q, k, v, key_rows, run, pos = problem(kind, heads=heads, dim=20)
    how = {"scale": 1.0, "window": window, "softcap": 2.0}
    want = attention(q, k, v, key_rows, run, pos, **how)
    unseen = torch.ones(len(k), dtype=torch.bool)
    unseen[seen(key_rows, run, pos, window)] = False
    assert unseen.any()
    k[unseen], v[unseen] = torch.nan, torch.inf
    beyond = torch.where(torch.isin(key_rows, unseen.nonzero()) | (key_rows < 0), 10**12, key_rows)
    for table in (key_rows, beyond):
        assert torch.equal(attention(q, k, v, table, run, pos, **how), want)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2)])
@pytest.mark.parametrize("window", [None, 4])
def test_what_is_not_finite_reaches_those_that_see_it(window, heads, each_set):
    """Also where rows are taken together: none before it, and none that it is out of sight of."""
    q, k, v, key_rows, run, pos = problem("one run", heads=heads, dim=20)
    want = attention(q, k, v, key_rows, run, pos, scale=1.0, window=window)
    for x, value in ((k, torch.nan), (v, torch.nan), (v, torch.inf)):
        for at in range(17):
            kept, x[at] = x[at].clone(), value
            got = attention(q, k, v, key_rows, run, pos, scale=1.0, window=window)
            x[at] = kept
            hit = (pos >= at) & (pos < at + (window or 99))
            assert torch.equal(got[~hit], want[~hit]) and not got[hit].isfinite().any()


def test_positions_without_a_slot_are_not_seen(each_set):
    q, k, v = numbers(3, 6, 6, 2, 20, torch.float32)
    holes, run, pos = torch.tensor([[0, -1, 2, 99, 4, 5]]), torch.zeros(3, dtype=torch.int64), torch.tensor([2, 4, 5])
    got = attention(q, k, v, holes, run, pos, scale=1.0)
    close("holes", got, naive(q, k, v, torch.tensor([[0, 2, 4, 5]]), run, torch.tensor([1, 2, 3]), scale=1.0))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2), (5, 1)])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_bits_depend_on_no_thread_and_no_neighbor(window, heads, each_set, threads):
    q, k, v, key_rows, run, pos = problem("ragged", heads=heads, dim=70)
    q, k, v = (torch.cat([x] * 5) for x in (q, k, v))  # enough that threads share them
    key_rows, run, pos = key_rows.repeat(5, 1), torch.cat([run + 5 * i for i in range(5)]), pos.repeat(5)
    how = {"scale": 0.4, "window": window}
    whole = attention(q, k, v, key_rows, run, pos, **how)
    threads(3)
    assert torch.equal(attention(q, k, v, key_rows, run, pos, **how), whole)
    for row in range(0, 129, 4):
        alone = attention(q[row : row + 1], k, v, key_rows, run[row : row + 1], pos[row : row + 1], **how)
        assert torch.equal(alone[0], whole[row])


def test_extreme_scores(each_set):
    """Large ones overflow nowhere; where one is far above all others its value is what comes out."""
    given = problem("ragged", heads=(6, 2), dim=20)
    for scale in (1e-30, 50.0, 3000.0):
        truth = attention_ref(*(x.double() for x in given[:3]), *given[3:], scale=scale)
        got = attention(*given, scale=scale)
        assert got.isfinite().all()
        close("scores", got, truth, torch.float32 if scale < 1000 else torch.float16)
    sinks = torch.tensor([-torch.inf, -1e30, 0.0, 80.0, 1e30, -200.0])
    got, truth = (attention(*given, scale=1.0, sinks=sinks), naive(*given, scale=1.0, sinks=sinks))
    close("sinks", got[:, [0, 1, 2, 3, 5]], truth[:, [0, 1, 2, 3, 5]])
    assert got[:, 4].abs().max() == 0


def test_one_wrong_row_is_seen(native):
    *qkv, key_rows, run, pos = problem("shared")
    truth = naive(*qkv, key_rows, run, pos, scale=1.0)
    for place in ((0, 2), (4, 6), (3, 9)):
        wrong = key_rows.clone()
        wrong[place] += 1
        assert relative_error(attention(*qkv, wrong, run, pos, scale=1.0), truth) > 1e-2
    assert len(native) == 3


# ---- who is sent there


def test_long_texts_go_to_the_reference(native, monkeypatch):
    """A run of so many rows from position 0, wherever it stands; with a cap or a prefix it stays."""
    monkeypatch.setattr(module, "NATIVE_BELOW", 9)
    key_rows = torch.arange(40).view(4, 10)

    def ran(runs, softcap=None):
        """Of (run, first position, end)"""
        native.clear()
        run = torch.cat([torch.full((end - first,), r) for r, first, end in runs])
        pos = torch.cat([torch.arange(first, end) for _, first, end in runs])
        given = *numbers(len(run), 40, 4, 2, 5, torch.float32), key_rows, run, pos
        got = attention(*given, scale=1.0, softcap=softcap)
        close("either", got, naive(*given, scale=1.0, softcap=softcap))
        return bool(native)

    assert ran([(0, 0, 8)]) and ran([(0, 0, 8), (1, 8, 10)]) and ran([(0, 1, 10), (1, 1, 10)])
    assert not ran([(0, 0, 9)]) and not ran([(2, 5, 7), (1, 0, 10), (3, 0, 1)]) and not ran([(0, 0, 4), (1, 0, 9)])
    assert ran([(0, 0, 10)], softcap=1.0)


def test_what_is_left_to_torch(native, monkeypatch):
    q, k, v, *where = problem("shared")
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        given = *(x.to(dtype) for x in (q, k, v)), *where
        for forced in ("native", None):
            monkeypatch.delenv("KEDIT_FAST_BACKEND", raising=False)
            if forced:
                monkeypatch.setenv("KEDIT_FAST_BACKEND", forced)
            assert torch.equal(attention(*given, scale=1.0), attention_ref(*given, scale=1.0))
    truth = naive(q, k, v, *where, scale=1.0)
    close("keys of another dtype", attention(q, k.double(), v.double(), *where, scale=1.0), truth)
    assert attention(q[:0], k, v, where[0], where[1][:0], where[2][:0], scale=1.0).shape == (0, 4, 5)
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "reference")
    assert torch.equal(attention(q, k, v, *where, scale=1.0), attention_ref(q, k, v, *where, scale=1.0))
    assert not native
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "native")
    half = torch.tensor([0.5, 0.25, 0.0, 1.0], dtype=torch.bfloat16)
    close("sinks", attention(q, k, v, *where, scale=1.0, sinks=half), naive(q, k, v, *where, scale=1.0, sinks=half))
    assert native == ["ran"]


def test_the_extension_checks_what_could_crash():
    real, x, table = dispatch.native(), torch.zeros(64), torch.zeros(64, dtype=torch.int64)
    addresses = [x.data_ptr()] * 4 + [table.data_ptr()] * 3 + [0]
    sizes, strides = [1, 4, 2, 5, 3, 1, 4], [20, 5, 10, 5, 10, 5, 4]

    def call(addresses=addresses, sizes=sizes, strides=strides, softcap=0.0, window=4, threads=1, name=""):
        real.attention(addresses, sizes, strides, 1.0, softcap, window, threads, name)

    call()
    for i in range(7):
        refused("attention: sizes", call, sizes=[*sizes[:i], 0, *sizes[i + 1 :]])
        refused("attention: sizes", call, strides=[*strides[:i], -1, *strides[i + 1 :]])
        refused("null address", call, addresses=[*addresses[:i], 0, *addresses[i + 1 :]])
    for wrong in ({"window": 0}, {"threads": 0}, {"softcap": -1.0}, {"sizes": [1, 3, *sizes[2:]]}):
        refused("attention: sizes", call, **wrong)
    refused("no instruction set 'sse'", call, name="sse")
    for run, pos in ((1, 0), (-1, 0), (0, 4), (0, -1)):
        outside = torch.tensor([run]), torch.tensor([pos])
        given = [*addresses[:5], *(t.data_ptr() for t in outside), 0]
        refused("attention: row 0 is not in the table", call, addresses=given)


def test_a_sweep_comes_here(native):
    lm = tiny_lm("gpt2")
    lm.top_tokens("The Eiffel Tower", 3)
    assert len(native) == lm.n_layers
