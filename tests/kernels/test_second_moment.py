"""second_moment_ against an independent product in fp64, in every instruction set this machine runs."""

import pytest
import torch

from kedit_fast.kernels import dispatch
from kedit_fast.kernels.second_moment import fill_upper_, second_moment_, second_moment_ref
from tests.compare import close
from tests.kernels import normal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [1, 17, 129, 600]  # 600: three blocks of 256 rows, the last one short
WIDTHS = [1, 7, 48, 80, 130]

native_only = pytest.mark.skipif(dispatch.native() is None, reason=f"no extension: {dispatch.why_not_native()}")


def random_keys(n, d, dtype=torch.float32, seed=0):
    return normal(n, d, seed=seed, dtype=dtype)


def truth(keys):
    """Lower triangle of keys^T keys in fp64, by a sum over rows."""
    keys = keys.double()
    return torch.einsum("ni,nj->ij", keys, keys).tril()


def instruction_sets():
    module = dispatch.native()
    return module.instruction_sets() if module else [pytest.param("none", marks=native_only)]


def run_native(c, keys, threads=1, instruction_set=""):
    module = dispatch.native()
    c_type, key_type = (str(x.dtype).removeprefix("torch.") for x in (c, keys))
    run = getattr(module, f"second_moment_{c_type}_{key_type}")
    n, d = keys.shape
    return run(c.data_ptr(), c.stride(0), keys.data_ptr(), n, d, keys.stride(0), threads, instruction_set)


@pytest.mark.parametrize("op", [second_moment_, second_moment_ref])
@pytest.mark.parametrize("c_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("n", ROWS)
def test_adds_the_product(n, d, dtype, c_dtype, op):
    keys, start = random_keys(n, d, dtype), random_keys(d, d, seed=1).to(c_dtype)
    c = start.clone()
    assert op(c, keys) is c
    # Keys of 16 bits are exact in fp32, so the tolerance is that of the sums, whatever the keys' dtype.
    close("c", c.tril(), start.double().tril() + truth(keys), torch.float32)


@pytest.mark.parametrize("op", [second_moment_, second_moment_ref])
def test_fp64_keys_are_not_rounded(op):
    keys = normal(40, 30)
    c = op(torch.zeros(30, 30, dtype=torch.float64), keys)
    close("c", c.tril(), truth(keys), torch.float64)


@native_only
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("c_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [*WIDTHS, 200, 391])  # 391: several groups of panels a side
@pytest.mark.parametrize("n", ROWS)
def test_every_instruction_set(n, d, dtype, c_dtype, instruction_set):
    keys = random_keys(n, d, dtype)
    c = torch.full((d, d), -3.0, dtype=c_dtype)
    assert run_native(c, keys, threads=2, instruction_set=instruction_set)
    close("c", c.tril() + 3 * torch.ones(d, d).tril(), truth(keys), torch.float32)
    assert torch.equal(c.triu(1), torch.full((d, d), -3.0, dtype=c_dtype).triu(1)), "wrote above the diagonal"


@native_only
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_is_taken_as_it_is(dtype, instruction_set):
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    if dtype == torch.bfloat16 and instruction_set == "avx512_bf16":  # which takes subnormals for zeros
        numbers = numbers[numbers.abs().float() >= torch.finfo(torch.bfloat16).tiny]
    for part in numbers.split(999):
        # Two rows: both halves of a pair. The first column is one, so that c's first column holds the sums of a column.
        keys = torch.ones(2, 1 + len(part), dtype=dtype)
        keys[0, 1:], keys[1, 1:] = part, 0
        c = torch.zeros(1 + len(part), 1 + len(part), dtype=torch.float64)
        for rows in (keys, keys.flip(0), keys[:1]):
            assert run_native(c.zero_(), rows, instruction_set=instruction_set)
            assert torch.equal(c[1:, 0], part.double())


@native_only
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_every_instruction_set_refuses_bad_keys(value, dtype, instruction_set):
    for row, column in ((0, 0), (256, 36), (299, 12)):
        keys, c = random_keys(300, 37, dtype), torch.ones(37, 37, dtype=torch.float64)
        keys[row, column] = value
        assert not run_native(c, keys, instruction_set=instruction_set)
        assert torch.equal(c, torch.ones(37, 37, dtype=torch.float64))


@native_only
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_keep_their_accuracy_in_every_instruction_set(dtype, instruction_set):
    # All products positive: an fp32 sum over the rows would lose digits with the number of rows.
    keys = (random_keys(20_000, 8).abs() + 1).to(dtype)
    c = torch.zeros(8, 8, dtype=torch.float64)
    assert run_native(c, keys, instruction_set=instruction_set)
    error = (c.tril() - truth(keys)).abs().max() / truth(keys).max()
    assert error < 1e-6


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_a_stride_and_a_strided_accumulator(dtype):
    whole = torch.full((41, 100), float("nan"), dtype=dtype)
    whole[:, 3:80] = random_keys(41, 77, dtype)
    accumulators = torch.zeros(77, 90, dtype=torch.float64)
    assert run_native(accumulators[:, :77], whole[:, 3:80])
    close("c", accumulators[:, :77].tril(), truth(whole[:, 3:80]), torch.float32)
    assert not accumulators[:, 77:].any(), "wrote beside the accumulator"


@pytest.mark.parametrize("op", [second_moment_, second_moment_ref])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype, op, device):
    wide = random_keys(60, 90, dtype).to(device)
    views = [wide[::3, 5:53], wide[:, :48].T[:, :40], wide[:, ::2], wide[:1].expand(20, 90), wide[0, :48].expand(5, 48)]
    for keys in [*views, wide.flatten()[1:1281].view(20, 64)]:  # the last one: rows in order, at an odd address
        d = keys.shape[1]
        c = op(torch.zeros(d, d, dtype=torch.float64, device=device), keys)
        close("c", c.tril(), truth(keys), torch.float32)


@pytest.mark.parametrize("op", [second_moment_, second_moment_ref])
@pytest.mark.parametrize("n, d", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_add(n, d, op, device):
    c = torch.ones(d, d, dtype=torch.float64, device=device)
    op(c, torch.zeros(n, d, device=device))
    assert torch.equal(c.tril(), torch.ones_like(c).tril())


def test_long_sums_keep_their_accuracy():
    # All products positive: an fp32 sum over the rows would lose digits with the number of rows.
    keys = random_keys(20_000, 8).abs() + 1
    c = second_moment_(torch.zeros(8, 8, dtype=torch.float64), keys)
    error = (c.tril() - truth(keys)).abs().max() / truth(keys).max()
    assert error < 2e-7


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype, threads):
    keys, results = random_keys(700, 300, dtype), []
    for n_threads in (1, 2, 3):
        threads(n_threads)
        results.append(second_moment_(torch.zeros(300, 300, dtype=torch.float64), keys))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("op", [second_moment_, second_moment_ref])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row, column", [(0, 0), (300, 36), (4999, 12)])
def test_a_bad_key_is_named_and_nothing_is_added(row, column, value, dtype, op):
    keys = torch.zeros(5000, 37, dtype=dtype)
    keys[:100] = random_keys(100, 37, dtype)
    keys[row, column] = value
    c = torch.ones(37, 37, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"keys\[{row}, {column}\] is {value} \(1 such"):
        op(c, keys)
    assert torch.equal(c, torch.ones(37, 37, dtype=torch.float64))


@pytest.mark.parametrize("op", [second_moment_, second_moment_ref])
@pytest.mark.parametrize(
    "c, keys, error, message",
    [
        (torch.zeros(3, 3), torch.zeros(2, 4), ValueError, r"need \[4\] \* 2"),
        (torch.zeros(4), torch.zeros(2, 4), ValueError, "c has shape"),
        (torch.zeros(4, 4), torch.zeros(4), ValueError, "one row a token"),
        (torch.zeros(4, 4, dtype=torch.float16), torch.zeros(2, 4), TypeError, "c is torch.float16"),
        (torch.zeros(4, 4), torch.zeros(2, 4, dtype=torch.int32), TypeError, "keys are torch.int32"),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(2, 4), ValueError, "not contiguous"),
        (torch.zeros(4, 4, requires_grad=True), torch.zeros(2, 4), ValueError, "requires grad"),
        (torch.zeros(4, 4), torch.zeros(2, 4, device="meta"), ValueError, "move one of them"),
    ],
)
def test_wrong_arguments(c, keys, error, message, op):
    with pytest.raises(error, match=message):
        op(c, keys)


def test_keys_that_require_grad_leave_no_graph():
    keys = random_keys(5, 4).requires_grad_()
    for op in (second_moment_, second_moment_ref):
        assert not op(torch.zeros(4, 4), keys).requires_grad


@native_only
def test_extension_refuses_what_would_crash():
    run = dispatch.native().second_moment_float64_float32
    with pytest.raises(ValueError, match="null address"):
        run(0, 4, 0, 2, 4, 4, 1)
    for sizes in [(4, 8, -1, 4, 4, 1), (3, 8, 2, 4, 4, 1), (4, 8, 2, 4, 3, 1), (4, 8, 2, 4, 4, 0)]:
        with pytest.raises(ValueError, match="must be positive"):
            run(8, *sizes)
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        run_native(torch.zeros(4, 4), torch.zeros(2, 4), instruction_set="mmx")


@pytest.mark.parametrize("d", [0, 1, 5, 1024, 1100])
def test_fill_upper(d):
    lower = random_keys(d, d).tril()
    c = lower + torch.full((d, d), float("nan")).triu(1)
    assert fill_upper_(c) is c
    assert torch.equal(c, lower + lower.tril(-1).T)


def test_fill_upper_wants_a_square():
    with pytest.raises(ValueError, match="square"):
        fill_upper_(torch.zeros(3, 4))
