"""The low-rank update on Triton against its formula in fp64: owners in any order, no fact reaches another's rows."""

import pytest
import torch

from kedit_fast.kernels.lowrank import lowrank_add, lowrank_add_ref
from tests.kernels import test_lowrank
from tests.kernels.test_lowrank import (  # noqa: F401 (the same on Triton)
    D_FF,
    test_a_broken_fact_does_not_reach_the_others,
    test_inputs_stay_and_rows_of_nobody_keep_their_bits,
    test_nothing_to_add,
    test_rows_and_factors_of_others_have_nothing_to_add,
)
from tests.kernels.triton import DEVICE, DTYPES, near

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory")


def problem(rows, rank, dtype=torch.float32):
    return test_lowrank.problem(rows, rank, dtype, DEVICE)


def owners(rows, rank, n_facts):
    return test_lowrank.owners(rows, rank, n_facts, DEVICE)


def truth(y, x, u, v, *owned):
    """The formula in fp64: with owners as a masked product, so for finite factors only."""
    y, x, u, v = (each.double() for each in (y, x, u, v))
    weight = x @ v
    if owned:
        weight = weight * (owned[0][:, None] == owned[1][None, :])
    return y + weight @ u.T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 17, 129])
@pytest.mark.parametrize("rank", [1, 19])
@pytest.mark.parametrize("owned", [False, True], ids=["all rows", "owned"])
def test_equals_the_formula(dtype, rows, rank, owned):
    arguments = problem(rows, rank, dtype)
    if owned:
        arguments += owners(rows, rank, 4)
    got = lowrank_add(*arguments)
    assert got.dtype == dtype
    near("lowrank_add", got, truth(*arguments))


def test_more_factors_than_a_block_for_one_owner():
    arguments = [*problem(20, 50), *owners(20, 50, 3)]
    near("owned", lowrank_add(*arguments), truth(*arguments))


def test_fp32_factors_are_not_rounded_to_the_rows_dtype():
    y, x, u, v = problem(17, 3)
    y, x = y.half(), x.half()
    got = lowrank_add(y, x, u, v)
    assert torch.equal(got, truth(y, x, u, v).half()) or (got != truth(y, x, u, v).half()).float().mean() < 0.01
    assert not torch.equal(got, lowrank_add(y, x, u.half(), v.half()))


def test_any_strides():
    y, x, u, v = problem(17, 5)
    wanted = lowrank_add(y, x, u, v)
    row_owner, factor_owner = owners(17, 5, 3)
    owned = lowrank_add(y, x, u, v, row_owner, factor_owner)
    y, x = (torch.stack([each, each], -1)[..., 0] for each in (y, x))
    u, v = (each.T.contiguous().T for each in (u, v))
    assert torch.equal(lowrank_add(y, x, u, v), wanted)
    assert torch.equal(lowrank_add(y, x, u, v, row_owner, factor_owner), owned)
    wide = torch.randn(D_FF, 12, device=DEVICE)
    wide[:, ::2][:, :5] = v
    assert torch.equal(lowrank_add(y, x, u, wide[:, ::2][:, :5]), wanted)


@pytest.mark.parametrize("owned", [False, True], ids=["all rows", "owned"])
@pytest.mark.parametrize("needed", [(0, 1, 2, 3), (1,)], ids=["all", "x"])
def test_gradients_are_those_of_the_reference(owned, needed):
    extra, found = owners(9, 5, 3) if owned else (), []
    for run in (lowrank_add, lowrank_add_ref):
        floats = problem(9, 5)
        for i in needed:
            floats[i].requires_grad_()
        out = run(*floats, *extra)
        found.append(torch.autograd.grad(out.square().sum(), [floats[i] for i in needed]))
    for name, got, wanted in zip("yxuv", *found, strict=False):
        near(f"gradient of {name}", got, wanted.double())


def test_a_wrong_row_or_factor_would_be_seen(monkeypatch):
    """The check against the formula fails if a tile's last row, or its last factor, is left out."""
    from kedit_fast.kernels.triton import lowrank

    arguments = [*problem(40, 6), *owners(40, 6, 4)]
    owned_tiles = lowrank.owned_tiles
    for column in (1, 3):

        def short(*owners, column=column):
            tiles = owned_tiles(*owners)
            tiles.bounds[(tiles.bounds[:, 3] - tiles.bounds[:, 2]).argmax(), column] -= 1
            return tiles

        monkeypatch.setattr(lowrank, "owned_tiles", short)
        with pytest.raises(AssertionError):
            near("broken", lowrank_add(*arguments), truth(*arguments))
