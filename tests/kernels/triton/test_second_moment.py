"""The second moment on Triton against a sum in fp64: every tile of the triangle, and nothing beside it."""

import math

import pytest
import torch

from kedit_fast.kernels.second_moment import second_moment_
from tests.kernels.test_second_moment import test_any_strides, test_nothing_to_add, truth  # noqa: F401 (on Triton too)
from tests.kernels.triton import DEVICE, DTYPES, near, random

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language
second_moment = pytest.importorskip("kedit_fast.kernels.triton.second_moment")

pytestmark = pytest.mark.usefixtures("on_triton")
_triangle_place = second_moment.triangle_place


@triton.jit
def _places_kernel(out, first, COUNT: tl.constexpr):
    number = tl.arange(0, COUNT)
    i, j = _triangle_place(first + number)
    tl.store(out + number, i)
    tl.store(out + COUNT + number, j)


@pytest.mark.parametrize("c_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (17, 7), (129, 48), (70, 130), (33, 400)])
def test_adds_the_product(n, d, dtype, c_dtype):
    keys, start = random(n, d, dtype=dtype), random(d, d, seed=1).to(c_dtype)
    c = start.clone()
    assert second_moment_(c, keys) is c
    # Products of 16-bit keys are exact in fp32, so the tolerance is that of the sums, whatever the keys' dtype.
    near("c", c.tril().to(torch.float32), start.double().tril() + truth(keys))


def test_nothing_is_written_beside_the_matrix():
    room = torch.full((3, 70, 70), -3.0, device=DEVICE)
    keys = random(20, 70)
    second_moment_(room[1], keys)
    assert (room[0] == -3).all() and (room[2] == -3).all()
    near("c", room[1].tril(), truth(keys) - 3 * torch.ones(70, 70, device=DEVICE).double().tril())


def test_keys_beside_the_matrix_are_not_read():
    whole = torch.full((40, 100), math.nan, device=DEVICE)
    whole[:, 16:80] = random(40, 64)
    c = second_moment_(torch.zeros(64, 64, device=DEVICE), whole[:, 16:80])
    near("c", c.tril(), truth(whole[:, 16:80]))


def test_calls_and_chunks_add_up(monkeypatch):
    monkeypatch.setattr(second_moment, "_CHUNK", 30)
    keys, c = random(100, 48, dtype=torch.bfloat16), torch.zeros(48, 48, device=DEVICE)
    for part in keys.split([1, 64, 35]):
        second_moment_(c, part)
    near("c", c.tril(), truth(keys))


def test_long_sums_keep_their_accuracy():
    keys = random(9000, 16).abs() + 1  # all products positive: the digits of a long fp32 sum would go
    c = second_moment_(torch.zeros(16, 16, dtype=torch.float64, device=DEVICE), keys)
    assert (c.tril() - truth(keys)).abs().max() / truth(keys).max() < 1e-6


def test_what_the_kernel_takes_as_aligned_is_aligned():
    """A load of 16 bytes at another address is an error on a GPU; the interpreter would not see it."""
    wide = random(6, 400, dtype=torch.bfloat16)
    for keys in (wide, wide[:, 1:33], wide[:, :40], wide[:, ::2], wide.T[:, :3], wide[:, :399].contiguous()):
        aligned = second_moment._aligned(keys)
        assert aligned.shape[1] % 16 == aligned.stride(0) % 16 == aligned.data_ptr() % 16 == 0
        assert aligned.stride(1) == 1 and torch.equal(aligned[:, : keys.shape[1]], keys)
    assert second_moment._aligned(wide).data_ptr() == wide.data_ptr(), "keys that fit are not copied"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bad_key_is_named_and_nothing_is_added(dtype, value):
    keys = random(50, 20, dtype=dtype)
    keys[49, 3] = value
    c = torch.ones(20, 20, device=DEVICE)
    with pytest.raises(ValueError, match=rf"keys\[49, 3\] is {value} \(1 such"):
        second_moment_(c, keys)
    assert torch.equal(c, torch.ones(20, 20, device=DEVICE))


def test_a_missing_tile_would_be_seen(monkeypatch):
    """The check fails if one row of keys is left out, or the last tile is not launched."""
    keys = random(33, 130)
    kernel = second_moment.second_moment_kernel

    class Short:
        def __getitem__(self, grid):
            return kernel[grid[0] - 1,]

    aligned = second_moment._aligned
    for name, broken in (("second_moment_kernel", Short()), ("_aligned", lambda keys: aligned(keys)[:-1])):
        with monkeypatch.context() as patch:
            patch.setattr(second_moment, name, broken)
            c = second_moment_(torch.zeros(130, 130, device=DEVICE), keys)
        with pytest.raises(AssertionError):
            near("broken", c.tril(), truth(keys))


@pytest.mark.parametrize("last_row", [0, 3, 500, 8191])  # 8191: a key of a million elements
def test_every_program_has_its_own_tile(last_row):
    """(i, j) counts through the triangle: checked around the beginning of a row, where the root is rounded."""
    first = max(0, last_row * (last_row + 1) // 2 - 32)
    places = torch.full((2, 64), -1, dtype=torch.int32, device=DEVICE)
    _places_kernel[(1,)](places, first, COUNT=64, enable_fp_fusion=True)
    wanted = [divmod_triangle(t) for t in range(first, first + 64)]
    assert places.T.tolist() == [list(place) for place in wanted]


def divmod_triangle(t):
    """(i, j) with t = i (i + 1) / 2 + j, in whole numbers."""
    i = (math.isqrt(8 * t + 1) - 1) // 2
    return i, t - i * (i + 1) // 2
