"""The solves through cuBLAS and cuSOLVER: on a machine without a GPU by stand-ins for the libraries' routines.

The stand-ins are C functions (ctypes callbacks) over the memory of CPU tensors, written in numpy from the libraries'
documentation: matrices by columns, one triangle read and written. So what is called, with which pointers, leading
dimensions and flags, is computed and compared; how the real libraries take it only the tests marked ``gpu`` show.
"""

import ctypes
import math
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy
import pytest
import torch
from numpy.lib.stride_tricks import as_strided
from torch.utils._python_dispatch import TorchDispatchMode

from kedit_fast.kernels import cusolver, dispatch
from kedit_fast.kernels import solve as module
from kedit_fast.kernels.solve import condition, factor, factor_ref, memit_solve, memit_solve_ref
from tests.compare import close
from tests.kernels import normal, random_moment, solves

# The declarations of cublas_api.h (CUDA 13.0) and cusolverDn.h (12.x), as letters: p pointer or handle, i enum,
# l int64_t, z size_t.
PROTOTYPES = {
    "cublasDsyrk_v2_64": "piillpplppl",
    "cublasDtrsm_v2_64": "piiiillpplpl",
    "cusolverDnCreate": "p",
    "cusolverDnCreateParams": "p",
    "cusolverDnSetStream": "pp",
    "cusolverDnXpotrf_bufferSize": "ppilipli" + "pp",
    "cusolverDnXpotrf": "ppilipli" + "pzpzp",
}
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "z": ctypes.c_size_t}
LOWER, UPPER, OP_N, OP_T, LEFT, RIGHT, NON_UNIT, REAL_64F = 0, 1, 0, 1, 0, 1, 0, 1
BLAS_HANDLE, PARAMS, STREAM = 0xB1A5, 0x9A5A, 0x57
DEVICE_BYTES, HOST_BYTES = 48, 16
MAPS = "7f00-7f01 r-xp 00000000 fd:00 17 {}\n"


def by_columns(address, rows, columns, leading):
    """The matrix at an address, as a view; nothing outside it can be reached."""
    assert leading >= max(1, rows)
    memory = (ctypes.c_double * (leading * (columns - 1) + rows)).from_address(address)
    return as_strided(numpy.frombuffer(memory), (rows, columns), (8, 8 * leading))


def scalar(address):
    return ctypes.c_double.from_address(address).value


def triangle(uplo, matrix):
    return {LOWER: numpy.tril, UPPER: numpy.triu}[uplo](matrix)


class Libraries:
    """The routines of both libraries over CPU memory, and what was asked of them."""

    def __init__(self):
        self.calls, self.mistakes, self.status, self.wrong_argument = [], [], {}, 0
        self.handles, self.devices = {}, []
        for name, letters in PROTOTYPES.items():
            types = [TYPES[letter] for letter in letters]
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._watched(name)))

    def _watched(self, name):
        def run(*arguments):
            self.calls.append((name, arguments))
            try:
                getattr(self, f"_{name}")(*arguments)
            except Exception as mistake:  # must not leave a C function
                self.mistakes.append(mistake)
                return 99
            return self.status.get(name, 0)

        return run

    def named(self, name):
        return [arguments for called, arguments in self.calls if called == name]

    def _cublasDsyrk_v2_64(self, handle, uplo, trans, n, k, alpha, a, lda, beta, c, ldc):
        assert handle == BLAS_HANDLE and self.devices
        a = by_columns(a, n, k, lda) if trans == OP_N else by_columns(a, k, n, lda).T
        c = by_columns(c, n, n, ldc)
        c += triangle(uplo, scalar(alpha) * a @ a.T + (scalar(beta) - 1) * c)

    def _cublasDtrsm_v2_64(self, handle, side, uplo, trans, diag, m, n, alpha, a, lda, b, ldb):
        assert handle == BLAS_HANDLE and diag == NON_UNIT and self.devices
        size = m if side == LEFT else n
        a, b = triangle(uplo, by_columns(a, size, size, lda)), by_columns(b, m, n, ldb)
        inverse = numpy.linalg.inv({OP_N: a, OP_T: a.T}[trans])
        b[:] = scalar(alpha) * (inverse @ b if side == LEFT else b @ inverse)

    def _cusolverDnCreate(self, handle):
        assert self.devices
        made = 0x1000 + len(self.handles)
        self.handles[made] = threading.get_ident()
        ctypes.c_void_p.from_address(handle).value = made

    def _cusolverDnCreateParams(self, params):
        ctypes.c_void_p.from_address(params).value = PARAMS

    def _cusolverDnSetStream(self, handle, stream):
        assert self.handles[handle] == threading.get_ident() and stream == STREAM

    def _cusolverDnXpotrf_bufferSize(self, handle, params, uplo, n, type_a, a, lda, compute, on_device, on_host):
        self._check_problem(handle, params, type_a, compute)
        ctypes.c_size_t.from_address(on_device).value = DEVICE_BYTES
        ctypes.c_size_t.from_address(on_host).value = HOST_BYTES

    def _cusolverDnXpotrf(
        self, handle, params, uplo, n, type_a, a, lda, compute, buffer, n_buffer, host_buffer, n_host_buffer, info
    ):
        self._check_problem(handle, params, type_a, compute)
        assert self.calls[-3][0] == "cusolverDnSetStream" and (n_buffer, n_host_buffer) == (DEVICE_BYTES, HOST_BYTES)
        ctypes.memset(buffer, 255, n_buffer), ctypes.memset(host_buffer, 255, n_host_buffer)
        matrix = by_columns(a, n, n, lda)
        lower = triangle(uplo, matrix) if uplo == LOWER else triangle(uplo, matrix).T
        minor = factored(lower)
        matrix += triangle(uplo, (lower if uplo == LOWER else lower.T) - matrix)
        ctypes.c_int.from_address(info).value = -self.wrong_argument or minor

    def _check_problem(self, handle, params, type_a, compute):
        assert self.handles[handle] == threading.get_ident() and params == PARAMS and self.devices
        assert type_a == compute == REAL_64F


def factored(lower):
    """Cholesky in place, column by column; the order of the first minor that is not positive, or 0."""
    for j in range(len(lower)):
        rest = lower[j:, j] - lower[j:, :j] @ lower[j, :j]
        if not rest[0] > 0:
            lower[j:, j:] = math.nan
            return j + 1
        lower[j:, j] = rest / math.sqrt(rest[0])
    return 0


@pytest.fixture
def libraries(monkeypatch):
    """The package's loader on the stand-ins, and the solves of CPU tensors through them."""
    stand_in = Libraries()

    @contextmanager
    def on_device(device):
        stand_in.devices.append(device)
        try:
            yield
        finally:
            stand_in.devices.pop()

    for name, value in {
        "is_available": lambda: True, "device": on_device, "current_blas_handle": lambda: BLAS_HANDLE,
        "current_stream": lambda: SimpleNamespace(cuda_stream=STREAM),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cusolver, "_have_torch_load_cusolver", lambda: None)
    maps = MAPS.format("/lib/libcublas.so.13.1") + MAPS.format("/lib/libcusolver.so.12")
    monkeypatch.setattr(cusolver, "_maps", lambda: maps)
    open_library = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: stand_in if path in cusolver._maps() else open_library(path))
    monkeypatch.setattr(module, "_algebra", lambda device: module._CUSOLVER)
    for cached in (cusolver._load, cusolver._solver):
        cached.cache_clear()
    assert cusolver.why_not() == ""
    yield stand_in
    assert not stand_in.mistakes and not stand_in.devices
    for cached in (cusolver._load, cusolver._solver):
        cached.cache_clear()


# ---- what is called


def test_prototypes():
    ours = {name: types for routines in cusolver.LIBRARIES.values() for name, types in routines.items()}
    assert ours == {name: tuple(TYPES[letter] for letter in letters) for name, letters in PROTOTYPES.items()}


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("d, n", [(1, 1), (7, 4), (4, 7), (33, 33)])
def test_products_reach_the_lower_triangle_only(libraries, by_rows, d, n):
    solves.check_gram(cusolver, d, n, by_rows)
    ((_, uplo, trans, order, inner, _, _, lda, _, _, ldc),) = libraries.named("cublasDsyrk_v2_64")
    assert (uplo, trans, order, inner) == (UPPER, OP_T if by_rows else OP_N, d, n)
    assert (lda, ldc) == (n if by_rows else d, d)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("left, shape", solves.SIDES)
def test_triangular_solves(libraries, left, shape, transposed):
    solves.check_triangular(cusolver, left, shape, transposed)
    ((_, side, uplo, trans, _, m, n, _, _, lda, _, ldb),) = libraries.named("cublasDtrsm_v2_64")
    # By columns everything is transposed: the sides are exchanged, b [rows, columns] is columns x rows.
    assert (side, uplo, trans) == (RIGHT if left else LEFT, UPPER, OP_T if transposed else OP_N)
    assert (m, n, lda, ldb) == (shape[1], shape[0], 9, shape[1])


def test_a_factor_by_columns_is_taken_too(libraries):
    lower = torch.linalg.cholesky(random_moment(9)).T.contiguous().T
    got = cusolver.solve_triangular_(lower, normal(2, 9), left=False, transposed=True)
    close("b", got, normal(2, 9) @ torch.linalg.inv(lower.T), torch.float64)


@pytest.mark.parametrize("d", [1, 2, 17, 70])
def test_cholesky_in_place(libraries, d):
    matrix = solves.check_cholesky(cusolver, d)
    (problem,) = (arguments[2:8] for arguments in libraries.named("cusolverDnXpotrf"))
    assert problem == (UPPER, d, REAL_64F, matrix.data_ptr(), d, REAL_64F)
    assert [arguments[2:8] for arguments in libraries.named("cusolverDnXpotrf_bufferSize")] == [problem]


def test_a_handle_for_each_thread_and_no_more(libraries):
    def work():
        cusolver.cholesky_(random_moment(3))
        cusolver.cholesky_(random_moment(3))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    work()
    idents = list(libraries.handles.values())
    assert len(idents) == len(set(idents)) and 2 <= len(idents) <= 3
    assert len(libraries.named("cusolverDnSetStream")) == 6


# ---- the solves


@pytest.mark.parametrize("way", ["dense", "woodbury"])
@pytest.mark.parametrize("n, d_ff", [(1, 1), (5, 64), (17, 7), (60, 61), (40, 301)])
def test_equals_the_reference(libraries, n, d_ff, way):
    solves.check_solve(n, d_ff, way)
    assert libraries.named("cusolverDnXpotrf")


def test_inputs_are_not_worked_on_in_place(libraries):
    solves.check_inputs_stay()


class Allocations(TorchDispatchMode):
    """Addresses of the memory blocks of at least so many bytes that torch's operators return."""

    def __init__(self, least):
        super().__init__()
        self.least, self.kept, self.found = least, [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.least:
                self.kept.append(x)  # so that no address comes twice
                self.found.add(x.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("op, others", [(factor, 0), (factor_ref, 1)])
def test_one_buffer_for_the_matrix_and_its_factor(libraries, op, others, monkeypatch):
    monkeypatch.setattr(module, "_zeros", lambda size, device: torch.zeros(size, size, dtype=torch.float64))
    monkeypatch.setattr(module, "_BLOCK", 32)
    moment = random_moment(200).float()
    with Allocations(200 * 200 * 4) as seen:  # a copy of C in fp32 would show as well
        lower = op(moment).lower
    assert len(seen.found - {lower.data_ptr(), moment.data_ptr()}) == others
    assert lower.data_ptr() in seen.found
    addresses = {arguments[5] for arguments in libraries.named("cusolverDnXpotrf")}
    assert addresses == ({lower.data_ptr()} if op is factor else set())


# ---- errors


def test_bad_moments(libraries):
    solves.check_bad_moments()
    moment = random_moment(10)
    moment[3, 3] = math.nan
    with pytest.raises(ValueError, match=r"moment\[3, 3\] is nan"):
        factor(moment)
    assert condition(random_moment(40)) == pytest.approx(factor_ref(random_moment(40)).condition, rel=1e-10)


@pytest.mark.parametrize("name", ["cusolverDnCreate", "cusolverDnXpotrf_bufferSize", "cusolverDnXpotrf"])
def test_a_status_is_an_error(libraries, name):
    libraries.status[name] = 7
    with pytest.raises(RuntimeError, match=f"{name} returned status 7"):
        cusolver.cholesky_(random_moment(3))


def test_a_wrong_argument_is_no_minor(libraries):
    libraries.wrong_argument = 4
    with pytest.raises(RuntimeError, match=r"finds its argument 4 wrong, for a matrix \[3, 3\]"):
        cusolver.cholesky_(random_moment(3))


# ---- which libraries, and which backend


def test_without_a_gpu_there_is_nothing_to_load(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cusolver._load.__wrapped__() == ({}, "torch finds no CUDA device")


def test_libraries_are_found_by_their_whole_names():
    folder = "/a b/nvidia/cu13/lib"
    names = ["cublasLt.so.13", "cublas.so.13.1.0.3", "cusolverMg.so.12", "cusolver.so.12", "nvblas.so.13"]
    text = "".join(2 * MAPS.format(f"{folder}/lib{name}") for name in names) + "7f02-7f03 rw-p 00000000 00:00 0\n"
    assert cusolver._mapped("libcublas", text) == [f"{folder}/libcublas.so.13.1.0.3"]
    assert cusolver._mapped("libcusolver", text) == [f"{folder}/libcusolver.so.12"]
    assert cusolver._mapped("libcublas", "") == []


@pytest.mark.parametrize(
    "maps, reason",
    [
        (["/a/libcublas.so.13"], r"one libcusolver.so is needed in this process, found: none"),
        (["/a/libcublas.so.13", "/b/libcublas.so.12"], r"found: /a/libcublas.so.13, /b/libcublas.so.12"),
        (["/a/libcublas.so.11", "/a/libcusolver.so.11"], r"/a/libcublas.so.11 has no cublasDtrsm_v2_64; CUDA 12"),
    ],
)
def test_what_is_missing_is_said_and_the_reference_runs(libraries, maps, reason, monkeypatch):
    monkeypatch.delenv("KEDIT_FAST_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_load_native", lambda: (SimpleNamespace(), ""))
    assert dispatch.backend_for("solve", "cuda:1", torch.float64) == "native"
    assert dispatch.backend_for("solve", "cuda", torch.float32) == "reference"
    monkeypatch.setattr(cusolver, "_maps", lambda: "".join(map(MAPS.format, maps)))
    if "libcublas.so.11" in maps[0]:
        monkeypatch.delattr(libraries, "cublasDtrsm_v2_64")
    cusolver._load.cache_clear()
    assert dispatch.backend_for("solve", "cuda", torch.float64) == "reference"
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "native")
    with pytest.raises(ValueError, match=f"KEDIT_FAST_BACKEND=native: solve cannot run here: .*{reason}"):
        dispatch.backend_for("solve", "cuda", torch.float64)


def test_the_algebra_of_a_device(monkeypatch):
    monkeypatch.setattr(dispatch, "backend_for", lambda op, device, dtype: "native")
    assert module._algebra(torch.device("cpu")) is module._OPENBLAS
    assert module._algebra(torch.device("cuda", 1)) is module._CUSOLVER
    monkeypatch.setattr(dispatch, "backend_for", lambda op, device, dtype: "reference")
    assert module._algebra(torch.device("cuda")) is module._TORCH


# ---- on a GPU


def gpu(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(skip(test))


@pytest.fixture
def native_on_gpu(monkeypatch):
    """The tests run the libraries or fail: they must not pass on the reference."""
    monkeypatch.setattr(module, "_algebra", lambda device: module._CUSOLVER)
    assert cusolver.why_not() == ""


@gpu
@pytest.mark.parametrize("way", ["dense", "woodbury"])
@pytest.mark.parametrize("n, d_ff", [(1, 1), (5, 64), (17, 7), (129, 130), (40, 301)])
def test_gpu_equals_the_reference(native_on_gpu, n, d_ff, way):
    solves.check_solve(n, d_ff, way, "cuda", rel=1e-8)


@gpu
def test_gpu_errors(native_on_gpu):
    moment = random_moment(300).cuda()
    assert condition(moment) == pytest.approx(factor_ref(moment.cpu()).condition, rel=1e-8)
    moment[200, 200] = 0
    with pytest.raises(ValueError, match="minor of order 201, 1 of its diagonal"):
        factor(moment)


@gpu
def test_gpu_solves_on_the_current_stream(native_on_gpu):
    moment, keys = random_moment(500).cuda(), normal(20, 500).cuda()
    want = memit_solve_ref(keys.cpu(), keys.cpu(), moment.cpu(), 2.0)[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # whatever ran on another stream would be done before its input is
        v = memit_solve(keys, keys, moment * 1.0, 2.0)[1].cpu()
    close("v", v, want, torch.float64)


@gpu
def test_gpu_factor_of_4096_is_made_in_place(native_on_gpu):
    d = 4096
    keys = normal(2 * d, d).float().cuda()
    moment = keys.T @ keys / len(keys)
    factor(moment[:64, :64])  # handles and workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = factor(moment, 3.0)
    # A copy of the matrix would make it 2; blocks of rows are 1/16 each, cuSOLVER's workspace is not documented.
    assert torch.cuda.max_memory_allocated() - before < 1.75 * 8 * d * d
    right = normal(d, 3).cuda()
    whole = 3 * moment.double().tril()
    whole += whole.tril(-1).T
    assert (whole @ kept.solve(right) - right).norm() <= 1e-11 * right.norm()
