"""lowrank_add against a loop over rows and factors in fp64, its owners, its gradients and its refusals."""

import pytest
import torch

from kedit_fast.kernels.lowrank import lowrank_add, lowrank_add_ref
from tests.compare import TOLERANCE, close
from tests.kernels import normal

D, D_FF = 67, 150  # more than a block of each on Triton, and no multiple of it


def problem(rows, rank, dtype=torch.float64, device="cpu"):
    sizes = ((rows, D), (rows, D_FF), (D, rank), (D_FF, rank))
    return [normal(*size, seed=seed, dtype=dtype).to(device) for seed, size in enumerate(sizes)]


def owners(rows, rank, n_facts, device="cpu"):
    """Owners out of order; -1 owns no factor, the last fact owns none either, fact 1 owns no row."""
    generator = torch.Generator().manual_seed(0)
    row_owner = torch.randint(-1, n_facts, (rows,), generator=generator)
    row_owner[row_owner == 1] = 0
    return row_owner.to(device), torch.randint(0, max(1, n_facts - 1), (rank,), generator=generator).to(device)


def by_loop(y, x, u, v, row_owner=None, factor_owner=None):
    """The formula read out, row by row and factor by factor, in fp64."""
    y, x, u, v = (tensor.double() for tensor in (y, x, u, v))
    out = y.clone()
    for row in range(len(y)):
        for j in range(u.shape[1]):
            if row_owner is None or row_owner[row] == factor_owner[j]:
                out[row] = out[row] + (x[row] @ v[:, j]) * u[:, j]
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 17, 129])
@pytest.mark.parametrize("owned", [False, True], ids=["all rows", "owned"])
def test_equals_the_formula(dtype, rows, owned):
    arguments = problem(rows, 7, dtype)
    if owned:
        arguments += owners(rows, 7, 4)
    out = lowrank_add(*arguments)
    assert out.dtype == dtype
    close("lowrank_add", out, by_loop(*arguments), dtype)
    assert torch.equal(out, lowrank_add_ref(*arguments))


def test_strided_inputs_and_mixed_dtypes():
    y, x, u, v = problem(17, 5, torch.float32)
    strided = lowrank_add(y, torch.stack([x, x], -1)[..., 0], u.T.contiguous().T, v.T.contiguous().T)
    close("strided", strided, lowrank_add(y, x, u, v), torch.float32)
    half = lowrank_add(y.bfloat16(), x.bfloat16(), u, v)
    assert half.dtype == torch.bfloat16
    # One rounding, at the end: the sum itself is made in fp32.
    assert torch.equal(half, lowrank_add(y.bfloat16().float(), x.bfloat16().float(), u, v).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inputs_stay_and_rows_of_nobody_keep_their_bits(dtype, device):
    y, x, u, v = problem(40, 6, dtype, device)
    y[:, 0] = -0.0
    before = [tensor.clone() for tensor in (y, x, u, v)]
    row_owner, factor_owner = owners(40, 6, 4, device)
    out = lowrank_add(y, x, u, v, row_owner, factor_owner)
    assert all(torch.equal(a, b) for a, b in zip((y, x, u, v), before, strict=True))
    nobody = ~torch.isin(row_owner, factor_owner)
    assert 0 < nobody.sum() < 40
    assert torch.equal(out[nobody], y[nobody]) and torch.equal(out[nobody].signbit(), y[nobody].signbit())
    assert (out[~nobody] != y[~nobody]).any(1).all()


@pytest.mark.parametrize("poisoned", [2, 3], ids="uv")
def test_a_broken_fact_does_not_reach_the_others(poisoned, device):
    y, x, u, v = given = problem(36, 6, torch.float32, device)
    row_owner, factor_owner = torch.arange(36, device=device) % 3, torch.arange(6, device=device).flip(0) % 3
    whole = lowrank_add(y, x, u, v, row_owner, factor_owner)
    given[poisoned][:, factor_owner == 1] = torch.nan
    broken = lowrank_add(y, x, u, v, row_owner, factor_owner)
    assert broken[row_owner == 1].isnan().all()
    assert torch.equal(broken[row_owner != 1], whole[row_owner != 1])


def test_one_owner_for_all_is_an_update_of_all_rows():
    y, x, u, v = problem(9, 4)
    owned = lowrank_add(y, x, u, v, torch.full((9,), 5), torch.full((4,), 5))
    close("owned by one", owned, lowrank_add(y, x, u, v), torch.float64)


@pytest.mark.parametrize("rows, rank", [(0, 3), (5, 0), (0, 0)])
def test_nothing_to_add(rows, rank, device):
    y, x, u, v = problem(rows, rank, torch.float32, device)
    none = (torch.zeros(n, dtype=torch.int64, device=device) for n in (rows, rank))
    for got in (lowrank_add(y, x, u, v), lowrank_add(y, x, u, v, *none)):
        assert torch.equal(got, y) and got is not y


def test_rows_and_factors_of_others_have_nothing_to_add(device):
    y, x, u, v = problem(5, 3, torch.float32, device)
    strangers = torch.full((5,), 9, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    assert torch.equal(lowrank_add(y, x, u, v, *strangers), y)


@pytest.mark.parametrize("owned", [False, True], ids=["all rows", "owned"])
def test_gradients(owned):
    arguments = [tensor.requires_grad_() for tensor in problem(6, 4)]
    extra = owners(6, 4, 3) if owned else ()
    assert torch.autograd.gradcheck(lambda *floats: lowrank_add(*floats, *extra), arguments)


def test_gradient_of_half_rows_comes_back_in_their_dtype():
    y, x, u, v = problem(6, 4, torch.bfloat16)
    row_owner, factor_owner = torch.tensor([0, 1, -1, 0, 2, 1]), torch.tensor([1, 0, 1, 3])
    lowrank_add(y.requires_grad_(), x.requires_grad_(), u, v, row_owner, factor_owner).float().sum().backward()
    assert y.grad.dtype == x.grad.dtype == torch.bfloat16
    assert torch.equal(y.grad, torch.ones_like(y))
    assert x.grad.any(1).tolist() == [True, True, False, True, False, True]


def test_rows_of_nobody_have_a_gradient_of_zero():
    floats = [tensor.requires_grad_() for tensor in problem(3, 2)]
    out = lowrank_add(*floats, torch.tensor([-1, -1, -1]), torch.tensor([0, 1]))
    gradients = torch.autograd.grad(out.sum(), floats)
    assert [gradient.any().item() for gradient in gradients] == [True, False, False, False]


def test_refusals():
    y, x, u, v = problem(6, 4)
    row_owner, factor_owner = owners(6, 4, 3)
    for arguments, says in (
        ((y, x, v, u), r"expected y \[rows, d\]"),
        ((y[0], x[0], u, v), r"expected y \[rows, d\]"),
        ((y, x, u, v, row_owner), "go together"),
        ((y, x, u, v, row_owner[:5], factor_owner), r"row_owner \[6\] int64"),
        ((y, x, u, v, row_owner, factor_owner.int()), r"factor_owner \[4\] int64"),
    ):
        with pytest.raises(ValueError, match=says):
            lowrank_add(*arguments)
