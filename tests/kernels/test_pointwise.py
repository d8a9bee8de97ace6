"""RMS norms and gated activations: the extension against fp64 in every instruction set, and who is sent there."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kedit_fast.kernels import dispatch
from kedit_fast.kernels import pointwise as module
from kedit_fast.kernels.pointwise import ACTS, gated, gated_ref, log_sum_exp, log_sum_exp_ref, rms_norm, rms_norm_ref
from tests.compare import close, refused
from tests.kernels import normal

WHY = dispatch.why_not_native()
native_only = pytest.mark.skipif(bool(WHY), reason=f"no extension: {WHY}")
SETS = [] if WHY else dispatch.native().instruction_sets()
OPS = ("rms_norm", "rms_norm_backward", "gated", "gated_backward", "log_sum_exp")
SHAPES = [(1, 1), (1, 5), (3, 7, 17), (2, 64), (129, 48), (17, 129), (5, 576), (2, 4999)]
EPS = 1e-6
EXTREMES = [0.0, 1e-40, 1e-30, 1e-3, 0.5, 3.0, 17.0, 86.0, 88.0, 89.0, 100.0, 1e4, 1e20, 3e38, float("inf")]


def numbers(*shape, seed=0):
    return normal(*shape, seed=seed, dtype=torch.float32)


def norm_truth(x, weight, eps, offset=0.0):
    x, weight = x.double(), weight.double()
    return (offset + weight) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def gated_truth(gate, up, act):
    """In fp64, by a sigmoid: 1 + tanh would cancel."""
    g = gate.double()
    u = g if act == "silu" else 2 * (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)
    return g * torch.sigmoid(u) * up.double()


def counting(monkeypatch, **options) -> list[str]:
    """Forces the extension, with these options; -> the ops that it ran."""
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "native")
    real, ran = dispatch.native(), []

    def run(op):
        return lambda *arguments: (ran.append(op), getattr(real, op)(*arguments, **options))

    monkeypatch.setattr(module.dispatch, "native", lambda: SimpleNamespace(**{op: run(op) for op in OPS}))
    return ran


@pytest.fixture
def native(monkeypatch):
    """Forces the extension; the ops that it ran."""
    return counting(monkeypatch)


@pytest.fixture(params=SETS)
def each_set(request, monkeypatch):
    """The same for every instruction set."""
    return counting(monkeypatch, instruction_set=request.param)


@native_only
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_in_fp64(shape, n_threads, each_set, threads):
    threads(n_threads)
    x, weight = numbers(*shape), numbers(shape[-1], seed=1)
    for offset in (0.0, 1.0):
        close("norm", rms_norm(x, weight, EPS, offset=offset), norm_truth(x, weight, EPS, offset))
    assert each_set == ["rms_norm"] * 2


@native_only
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_in_fp64(shape, act, n_threads, each_set, threads):
    threads(n_threads)
    gate, up = 3 * numbers(*shape), numbers(*shape, seed=1)
    close("gated", gated(gate, up, act), gated_truth(gate, up, act))
    assert each_set == ["gated"]


@native_only
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_norms(shape, each_set):
    x, weight, pull = numbers(*shape), numbers(shape[-1], seed=1), numbers(*shape, seed=2)
    for offset in (0.0, 1.0):
        found = []
        for leaf, w, eps in ((x.clone(), weight, 0.1), (x.double(), weight.double(), 0.1)):
            leaf.requires_grad_()
            found += torch.autograd.grad(rms_norm(leaf, w, eps, offset=offset), leaf, pull.to(leaf.dtype))
        close("dx", *found)
    assert each_set == ["rms_norm", "rms_norm_backward"] * 2


@native_only
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_activations(shape, act, each_set):
    gate, up, pull = 3 * numbers(*shape), numbers(*shape, seed=1), numbers(*shape, seed=2)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (gate, up)]
        found.append(torch.autograd.grad(gated(*leaves, act), leaves, pull.to(dtype)))
    for name, got, want in zip(("d_gate", "d_up"), *found, strict=True):
        close(name, got, want)
    assert each_set == ["gated", "gated_backward"]


@native_only
@pytest.mark.parametrize("act", ACTS)
def test_extreme_gates(act, each_set):
    """To a few units in the last place of the formula; not a number where torch's is, with its gradient's limits."""
    gate = torch.tensor([*EXTREMES, *(-x for x in EXTREMES), float("nan")])
    gate.requires_grad_()
    got, one = gated(gate, torch.ones_like(gate), act), torch.ones(len(gate))
    assert torch.equal(got.isnan(), gated_ref(gate, one, act).isnan())
    finite = ~got.isnan()
    torch.testing.assert_close(got[finite].double(), gated_truth(gate, one, act)[finite], rtol=1e-6, atol=1e-36)
    (slope,) = torch.autograd.grad(got, gate, one)
    far = (gate.abs() > 100) & gate.isfinite()
    assert torch.equal(slope[far], (gate[far] > 0).float())
    assert slope[gate == 0].tolist() == [0.5, 0.5] and slope[~gate.isfinite()].isnan().all()


@native_only
def test_silu_is_off_by_few_units(each_set):
    gate = -torch.logspace(-3, 1.93, 100_001)
    want = gated_truth(gate, torch.ones_like(gate), "silu")
    error = (gated(gate, torch.ones_like(gate), "silu").double() - want).abs() / want.abs()
    assert error.max() < 4 * torch.finfo(torch.float32).eps


@native_only
@pytest.mark.parametrize("act", ACTS)
def test_what_is_not_finite_stays_where_it_is(act, each_set):
    for value in (float("nan"), float("inf"), -float("inf")):
        x, w = numbers(4, 40), numbers(40, seed=1)
        x[1, 3] = x[2, 37] = value  # in a whole vector, and in what is left of the row
        for got, want in (
            (rms_norm(x, w, EPS), rms_norm_ref(x, w, EPS)),
            (gated(x, numbers(4, 40, seed=1), act), gated_ref(x, numbers(4, 40, seed=1), act)),
            (gated(numbers(4, 40, seed=1), x, act), gated_ref(numbers(4, 40, seed=1), x, act)),
        ):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@native_only
def test_extreme_rows(each_set):
    w = torch.ones(50)
    for size in (0.0, 1e-25, 1e-15, 1e15, 1e25):  # squares of the first vanish beside eps, those of the last overflow
        x = size * numbers(3, 50)
        torch.testing.assert_close(rms_norm(x, w, EPS), rms_norm_ref(x, w, EPS), rtol=1e-5, atol=0)
    x = numbers(2, 16389).abs() + 1  # all squares positive: one chain of additions would lose digits
    assert ((rms_norm(x, torch.ones(16389), EPS) - norm_truth(x, torch.ones(16389), EPS)).abs() < 1e-6).all()


@native_only
@pytest.mark.parametrize("act", ACTS)
def test_strides(act, native):
    wide, weight = numbers(6, 5, 96), numbers(40, seed=1)
    views = [
        wide[..., 3:43], wide[::2, 1, :40], wide[:, :, ::2][..., :40], wide.transpose(0, 1)[..., :40],
        wide[:1, :1, :40].expand(6, 5, 40), numbers(40, 5).T, wide[0, 0, :40], numbers(40, 1).T,
        torch.arange(40.0).as_strided((1, 40), (1, 1)),
    ]  # fmt: skip
    for x in views:
        close("norm", rms_norm(x, weight, EPS), norm_truth(x, weight, EPS))
        close("gated", gated(x, x.flip(0), act), gated_truth(x, x.flip(0), act))
    halves = wide.chunk(2, -1)
    close("halves", gated(*halves, act), gated_truth(*halves, act))
    close("weight", rms_norm(views[0], weight[:1].expand(40), EPS), norm_truth(views[0], weight[:1].expand(40), EPS))
    assert rms_norm(numbers(5, 1), weight[:1], EPS).shape == (5, 1)


@native_only
@pytest.mark.parametrize("act", ACTS)
def test_gradients_of_strided_rows(act, native):
    both, weight, pull = numbers(4, 90), numbers(45, seed=1), numbers(1, 45, seed=2).expand(4, 45)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = both.to(dtype).clone().requires_grad_()
        gate, up = leaf.chunk(2, 1)
        out = gated(rms_norm(gate, weight.to(dtype), EPS), up, act)
        found += torch.autograd.grad(out, leaf, pull.to(dtype))
    close("gradient", *found)
    assert sorted(native) == sorted(OPS[:-1])


@native_only
@pytest.mark.parametrize("act", ACTS)
def test_bits_depend_on_no_thread_and_no_neighbor(act, native, threads):
    x, weight = numbers(300, 577), numbers(577, seed=1)
    found = []
    for n_threads in (1, 3):
        threads(n_threads)
        leaf = x.clone().requires_grad_()
        out = gated(rms_norm(leaf, weight, EPS), x, act)
        found.append((out, *torch.autograd.grad(out.sum(), leaf)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    one = rms_norm(x[7], weight, EPS)
    assert torch.equal(one, rms_norm(x, weight, EPS)[7])
    assert torch.equal(gated(one, x[7], act), found[0][0][7])


@native_only
def test_what_is_kept_for_the_gradient(native):
    x, weight, up = numbers(3, 8).requires_grad_(), numbers(8, seed=1), numbers(3, 8, seed=2)
    for out, inputs in ((rms_norm(x, weight, EPS), (x, weight)), (gated(x, up, "silu"), (x, up))):
        kept = out.grad_fn.saved_tensors
        assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in inputs]
    out = gated(x, up, "silu")
    (slope,) = torch.autograd.grad(out, x, torch.ones_like(out).requires_grad_(), create_graph=True)
    refused("once_differentiable", slope.sum().backward, error=RuntimeError)
    gated(up, x, "silu").sum().backward()
    close("only up", x.grad, F.silu(up))
    with torch.no_grad():
        assert gated(x, up, "silu").grad_fn is None and rms_norm(x, weight, EPS).grad_fn is None


class Own(torch.Tensor):
    """A tensor of another class."""


@native_only
def test_what_is_left_to_torch(native):
    x, weight = numbers(3, 8), numbers(8, seed=1)
    for a, w in (
        (x.double(), weight), (x.bfloat16(), weight), (x, weight.double()), (x, weight.bfloat16()),
        (x.as_subclass(Own), weight), (x, weight.as_subclass(Own)), (x[:0], weight), (x[:, :0], weight[:0]),
    ):  # fmt: skip
        assert torch.equal(rms_norm(a, w, EPS), rms_norm_ref(a, w, EPS))
        assert torch.equal(gated(a, a, "silu"), gated_ref(a, a, "silu")) or native
        native.clear()
    assert gated(x, x.double(), "silu").dtype == torch.float32 and not native
    w = weight.clone().requires_grad_()
    rms_norm(x, w, EPS).sum().backward()
    close("of weight", w.grad, norm_truth(x, torch.ones(8), EPS).sum(0), torch.float32)
    assert not native
    with torch.no_grad():
        rms_norm(x, torch.nn.Parameter(w), EPS)
    assert native == ["rms_norm"]


@pytest.mark.parametrize("n", [1, 5, 64, 129, 4999])
def test_log_sum_exps_in_fp64(n, each_set):
    x = torch.cat([numbers(3, n) * 20, numbers(1, n, seed=1) + 300, numbers(1, n, seed=2) - 1e4, torch.zeros(1, n)])
    x[5, 0] = 80.0
    wanted = x.double().logsumexp(-1)
    assert ((log_sum_exp(x).double() - wanted).abs() <= 2e-7 * wanted.abs() + 1e-6).all()
    assert torch.equal(log_sum_exp(x[:, :n]), log_sum_exp(torch.cat([x, x], 1)[:, :n])), "rows apart"
    assert each_set == ["log_sum_exp"] * 3


def test_log_sum_exps_of_what_is_not_finite(each_set):
    inf, nan = float("inf"), float("nan")
    rows = [[-inf] * 70, [inf, *[0.0] * 69], [nan, *[0.0] * 69], [nan, inf, *[0.0] * 68], [-inf, *[1.0] * 69]]
    x = torch.tensor(rows + [row[::-1] for row in rows])
    assert torch.allclose(log_sum_exp(x), x.logsumexp(-1), equal_nan=True) and each_set


def test_log_sum_exps_under_autograd_are_torchs(native):
    x = numbers(3, 7).requires_grad_()
    log_sum_exp(x).sum().backward()
    assert torch.allclose(x.grad, x.detach().softmax(-1)) and not native
    assert torch.equal(log_sum_exp(x.detach().double()), log_sum_exp_ref(x.detach().double())) and not native


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_references(dtype):
    x, weight, up = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(5, 3, 48), (48,), (5, 3, 48)]))
    for offset in (0, 1):
        for w in (weight, weight.float()):
            got = rms_norm_ref(x, w, EPS, offset=offset)
            assert got.dtype == dtype
            close("norm", got, norm_truth(x, w, EPS, offset))
    close("torch's", rms_norm_ref(x, weight, EPS), F.rms_norm(x, (48,), weight, EPS))
    for act in ACTS:
        close(act, gated_ref(x, up, act), gated_truth(x, up, act))


def test_wrong_arguments():
    x = numbers(3, 8)
    for op in (gated, gated_ref):
        refused("act is 'relu'; expected one of silu, gelu_tanh", op, x, x, "relu")
        refused(r"gate has shape \[3, 8\] and up \[8\]", op, x, x[0], "silu")
    refused(r"weight has shape \[3\]; x \[3, 8\] needs \[8\]", rms_norm, x, x[:, 0], EPS)


@native_only
def test_the_extension_checks_what_could_crash():
    x = numbers(4, 8)
    at, real = x.data_ptr(), dispatch.native()
    for rows, d, stride, threads in ((0, 8, 8, 1), (4, 0, 8, 1), (4, 8, 7, 1), (4, 8, 8, 0)):
        refused("rms_norm: sizes", real.rms_norm, at, at, at, rows, d, stride, EPS, 0.0, threads)
        refused("gated: sizes", real.gated, at, at, at, rows, d, 8, stride, "silu", threads)
        refused("gated_backward: sizes", real.gated_backward, at, at, at, at, at, rows, d, stride, 8, "silu", threads)
        refused("backward: sizes", real.rms_norm_backward, at, at, at, at, rows, d, stride, EPS, 0.0, threads)
    refused("null address", real.rms_norm, at, at, 0, 4, 8, 8, EPS, 0.0, 1)
    refused("no activation 'relu'", real.gated, at, at, at, 4, 8, 8, 8, "relu", 1)
    refused("no instruction set 'sse'", real.gated, at, at, at, 4, 8, 8, 8, "silu", 1, "sse")


def test_log_sum_exp_of_any_number_of_axes():
    """The extension wrote a number a row into room for one a slab."""
    for shape in ((7,), (3, 5), (2, 3, 5), (2, 0, 5)):
        x = torch.randn(shape)
        close("axes", log_sum_exp(x), x.double().logsumexp(-1))
