"""RMS norms and gated activations on Triton against their formulas in fp64, in every dtype, gradients too."""

import pytest
import torch

from kedit_fast.kernels import pointwise as module
from kedit_fast.kernels.pointwise import ACTS, gated, gated_ref, rms_norm, rms_norm_ref
from tests.compare import close
from tests.kernels.test_pointwise import EPS, EXTREMES, gated_truth, norm_truth
from tests.kernels.triton import DEVICE, DTYPES, near, random

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory")

SHAPES = [(1, 1), (1, 5), (17, 48), (2, 3, 700), (129, 64), (1, 4100)]


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """The ops that Triton ran."""
    from kedit_fast.kernels.triton import pointwise

    ran = []
    for op in ("rms_norm", "rms_norm_backward", "gated", "gated_backward"):
        run = getattr(pointwise, op)
        monkeypatch.setattr(pointwise, op, lambda *given, op=op, run=run: (ran.append(op), run(*given)))
    return ran


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape, dtype, counted):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    for offset, w in ((0.0, weight), (1.0, weight.float())):
        got = rms_norm(x, w, EPS, offset=offset)
        assert got.dtype == dtype
        near("norm", got, norm_truth(x, w, EPS, offset))
    assert counted == ["rms_norm"] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations(shape, act, dtype, counted):
    gate, up = 3 * random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    near("gated", gated(gate, up, act), gated_truth(gate, up, act))
    assert counted == ["gated"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_norms(shape, dtype, counted):
    x, weight, pull = (random(*s, dtype=dtype, seed=i) for i, s in enumerate((shape, shape[-1:], shape)))
    found = []
    for leaf, w in ((x.clone(), weight), (x.double(), weight.double())):
        leaf.requires_grad_()
        found += torch.autograd.grad(rms_norm(leaf, w, 0.1, offset=1.0), leaf, pull.to(leaf.dtype))
    near("dx", *found)
    assert counted == ["rms_norm", "rms_norm_backward"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_activations(shape, act, dtype, counted):
    gate, up, pull = (random(*shape, dtype=dtype, seed=seed) for seed in range(3))
    found = []
    for wide in (dtype, torch.float64):
        leaves = [t.to(wide).clone().requires_grad_() for t in (gate, up)]
        found.append(torch.autograd.grad(gated(*leaves, act), leaves, pull.to(wide)))
    for name, got, want in zip(("d_gate", "d_up"), *found, strict=True):
        near(name, got, want)
    assert counted == ["gated", "gated_backward"]


@pytest.mark.parametrize("act", ACTS)
def test_strides(act, counted):
    both, weight = random(9, 1300), random(650, seed=1)
    halves, narrow = both.chunk(2, 1), both[:, 3:21]
    near("halves", gated(*halves, act), gated_truth(*halves, act))
    near("norm", rms_norm(halves[1], weight, EPS), norm_truth(halves[1], weight, EPS))
    near("columns", rms_norm(narrow.T, weight[:9], EPS), norm_truth(narrow.T, weight[:9], EPS))
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = both.to(dtype).clone().requires_grad_()
        gate, up = leaf.chunk(2, 1)
        out = gated(rms_norm(gate, weight.to(dtype), EPS), up, act)
        found += torch.autograd.grad(out, leaf, weight.to(dtype).expand(9, 650))
    close("gradient", *found)
    assert len(counted) == 7


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow):RuntimeWarning"
)  # of numpy, which the interpreter computes with
def test_extreme_gates(act):
    gate = torch.tensor([*EXTREMES, *(-x for x in EXTREMES), float("nan")], device=DEVICE).requires_grad_()
    one = torch.ones_like(gate)
    got = gated(gate, one, act)
    assert torch.equal(got.isnan(), gated_ref(gate, one, act).isnan())
    finite = ~got.isnan()
    torch.testing.assert_close(got[finite].double(), gated_truth(gate, one, act)[finite], rtol=3e-6, atol=1e-36)
    (slope,) = torch.autograd.grad(got, gate, one)
    far = (gate.abs() > 100) & gate.isfinite()
    assert torch.equal(slope[far], (gate[far] > 0).float())
    assert slope[~gate.isfinite()].isnan().all()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_rows_do_not_reach_each_other():
    x, weight = random(40, 65), random(65, seed=1)
    x[3, 7], x[4] = float("nan"), 1e25
    torch.testing.assert_close(
        rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS), rtol=1e-5, atol=1e-6, equal_nan=True
    )


def test_rows_too_wide_for_a_program(monkeypatch, counted):
    monkeypatch.setattr(module, "_WIDEST", 64)
    x, weight = random(3, 65), random(65, seed=1)
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS)) and not counted


def test_a_tile_too_few_would_be_seen(monkeypatch):
    """The checks above fail if the last tile of columns is not launched."""
    from kedit_fast.kernels.triton import pointwise

    gate, up = random(9, 1300), random(9, 1300, seed=1)
    grid = pointwise._grid
    monkeypatch.setattr(pointwise, "_grid", lambda rows, n: (grid(rows, n)[0], grid(rows, n)[1] - 1))
    assert gated(gate, up, "silu").isnan().any()
