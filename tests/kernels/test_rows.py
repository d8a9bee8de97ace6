"""Rows that begin: noise rounded once, and the rows of branching runs."""

import pytest
import torch

from kedit_fast.kernels.rows import add_noise, add_noise_ref, branch_rows, branch_rows_ref

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d"), [(1, 5), (17, 48), (129, 33)])
def test_noise_is_rounded_once(rows, d, dtype):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, d, generator=generator).to(dtype)
    index = torch.randperm(rows, generator=generator)[: (rows + 1) // 2]
    noise = torch.randn(len(index), d, generator=generator, dtype=torch.float64)
    before = x.clone()
    got = add_noise(x, noise, index)
    wanted = x.clone()
    for i, row in enumerate(index.tolist()):
        wanted[row] = (x[row].double() + noise[i]).to(dtype)
    assert got.dtype == dtype and torch.equal(got, wanted)
    assert torch.equal(x, before), "the input is not written to"
    assert torch.equal(add_noise_ref(x, noise, index), got)


def test_noise_rounded_twice_would_be_seen():
    """The published in-place add promotes to float64; noise that is rounded first gives another bf16."""
    x, noise = torch.full((1, 1000), 1.0, dtype=torch.bfloat16), torch.linspace(0, 0.1, 1000, dtype=torch.float64)[None]
    got = add_noise(x, noise, torch.tensor([0]))
    assert not torch.equal(got, x + noise.to(torch.bfloat16))


def test_no_places_change_nothing():
    x = torch.randn(3, 4)
    assert torch.equal(add_noise(x, torch.empty(0, 4, dtype=torch.float64), torch.empty(0, dtype=torch.int64)), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [[0], [3, 3, 0], list(range(129))])
@pytest.mark.parametrize("contiguous", [True, False])
def test_branching_rows_are_copies(source, dtype, contiguous):
    h = torch.randn(129, 7).to(dtype) if contiguous else torch.randn(7, 129).to(dtype).T
    got = branch_rows([h], torch.tensor(source))
    assert torch.equal(got[:129], h) and torch.equal(got[129:], h[source]) and got.dtype == dtype
    assert torch.equal(branch_rows_ref([h], torch.tensor(source)), got)
    assert torch.equal(branch_rows([h[:50], h[50:]], torch.tensor(source)), got), "in parts"
    got.zero_()
    assert h.any()


def test_gradients_of_branches_add_up():
    h = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    (branch_rows([h], torch.tensor([1, 1, 2])) * torch.arange(6.0, dtype=torch.float64)[:, None]).sum().backward()
    assert h.grad.tolist() == [[0.0, 0.0], [1.0 + 3 + 4] * 2, [2.0 + 5] * 2]
