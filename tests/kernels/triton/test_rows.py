"""Noise and branching rows on Triton: to the bit of the reference, and every row of the output is written."""

import pytest
import torch

from kedit_fast.kernels.rows import add_noise, add_noise_ref, branch_rows, branch_rows_ref
from tests.conftest import close
from tests.kernels.triton import DEVICE, DTYPES, near, random

DTYPES = (torch.float64, *DTYPES)
SHAPES = [(1, 5), (17, 48), (129, 33), (3, 700)]

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory")


def some_rows(rows, k, seed=0):
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:k].to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "d"), SHAPES)
def test_noise(rows, d, dtype):
    x, index = random(rows, d, dtype=dtype), some_rows(rows, (rows + 1) // 2)
    noise, before = random(len(index), d, dtype=torch.float64, seed=1), x.clone()
    got, wanted = add_noise(x, noise, index), add_noise_ref(x, noise, index)
    assert got.dtype == dtype and torch.equal(x, before)
    if dtype == torch.bfloat16:
        near("noised", got, x.double().index_add(0, index, noise))
    else:
        assert torch.equal(got, wanted)
    clean = torch.ones(rows, dtype=torch.bool, device=DEVICE).index_fill(0, index, False)
    assert torch.equal(got[clean], x[clean]), "a row without noise keeps its bits"


def test_noise_from_another_dtype_and_strides():
    x, index = random(48, 17).T, some_rows(17, 9)
    noise = random(40, 9).T[:, :40].contiguous()
    wide = torch.stack([noise, noise], -1)[..., 0]
    assert torch.equal(add_noise(x[:, :40], wide, index), add_noise_ref(x[:, :40], wide, index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "d"), SHAPES)
def test_branches(rows, d, dtype):
    h = random(rows, d, dtype=dtype)
    for source in (torch.zeros(1, dtype=torch.int64), some_rows(rows, rows).cpu(), torch.full((20,), rows - 1)):
        got = branch_rows([h], source.to(DEVICE))
        assert torch.equal(got, branch_rows_ref([h], source.to(DEVICE)))
    got.zero_()
    assert h.any(), "the output is another tensor"


def test_branches_of_strided_rows():
    h, source = random(33, 20).T, some_rows(20, 7)
    assert torch.equal(branch_rows([h], source), branch_rows_ref([h], source))
    h = random(20, 90)[:, 3:36]
    assert torch.equal(branch_rows([h], source), branch_rows_ref([h], source))


def test_a_source_outside_is_not_read():
    got = branch_rows([random(5, 9)], torch.tensor([2, 5, -1, 1 << 40], device=DEVICE))
    assert got[:6].isfinite().all() and got[6:].isnan().all()


@pytest.mark.parametrize(("rows", "d"), [(0, 4), (3, 0), (3, 4)])
def test_nothing_to_do(rows, d):
    x, none = random(rows, d), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert torch.equal(add_noise(x, torch.zeros(0, d, dtype=torch.float64), none), x)
    assert torch.equal(branch_rows([x], none), x)


def test_gradients():
    source = torch.tensor([1, 1, 4], device=DEVICE)
    gradient = random(8, 6, dtype=torch.float64, seed=3)
    found = []
    for run in (add_noise, add_noise_ref):
        h, noise = (random(n, 6, dtype=torch.float64, seed=n).requires_grad_() for n in (5, 2))
        found.append(torch.autograd.grad(run(h, noise, source[1:]), [h, noise], gradient[:5]))
    for got, wanted in zip(*found, strict=True):
        close("gradient", got, wanted)


def test_a_row_too_few_would_be_seen(monkeypatch):
    """The checks above fail if the last tile is not launched, or one row's noise is taken from its neighbor."""
    from kedit_fast.kernels.triton import rows

    h, source = random(129, 33), some_rows(129, 40)
    wanted = branch_rows_ref([h], source)
    grid = rows._grid
    monkeypatch.setattr(rows, "_grid", lambda n, d: (grid(n, d)[0] - 1, grid(n, d)[1]))
    assert not torch.equal(branch_rows([h], source), wanted)
    monkeypatch.setattr(rows, "_grid", grid)
    assert torch.equal(branch_rows([h], source), wanted)

    noise = random(40, 33, dtype=torch.float64, seed=1)
    neighbor = torch.cat([source[1:2], source[:1], source[2:]])
    assert not torch.equal(add_noise(h, noise, neighbor), add_noise_ref(h, noise, source))
