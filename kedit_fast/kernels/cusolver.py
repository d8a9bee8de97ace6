"""cuBLAS and cuSOLVER, as torch has loaded them: the routines of ``solve`` on NVIDIA GPUs, in place, in fp64.

Called by ctypes with raw pointers, without a kernel of our own and so without nvcc: a solve is a handful of library
calls of at least d_ff² FLOP each, and what is left, λC in fp64, torch writes by blocks of rows (``solve._weighted``).
At d_ff = 28,672 with C in fp32 those blocks move 18 GB where a fused kernel would move 8, and the factor takes 7.9
TFLOP: at the peaks of an H100 (3.35 TB/s, 67 TFLOP/s) 5 ms, or 2, beside 117. cuBLAS runs under torch's own handle,
cuSOLVER under one of ours for each device and thread, on the current stream.

Bytes at d_ff = 28,672: λC + KᵀK and its factor share one buffer of 8 d_ff² = 6.13 GiB. C in fp32 is 3.06 GiB more and
a block of rows 56 MiB; n = 10,000 facts bring 2.14 GiB of keys in fp64, 0.61 of residuals (d = 8,192) and 0.75 of
I + G Gᵀ. That is 12.7 GiB, beside what the caller holds and cuSOLVER's workspace, which comes from torch's allocator
in the size that cuSOLVER asks for. The reference, whose factor is a copy, holds another 6.13 GiB while it factors.

A lower triangle by rows is an upper one by columns, as both libraries see it.
"""

import ctypes
import re
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# The libraries' enumerations.
_UPPER = 1  # of cublasFillMode_t
_N, _T = 0, 1  # of cublasOperation_t
_LEFT, _RIGHT = 0, 1  # of cublasSideMode_t
_NON_UNIT = 0  # of cublasDiagType_t
_FP64 = 1  # of cudaDataType

_enum, _int64, _pointer, _size = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t
_POTRF = (_pointer, _pointer, _enum, _int64, _enum, _pointer, _int64, _enum)  # handle, params, uplo, n, A, lda, compute

# {library: {routine: its arguments}}; each returns a status, 0 for success. The 64-bit cuBLAS came with CUDA 12.
LIBRARIES = {
    "libcublas": {
        # handle, uplo, op, n, k, alpha, A, lda, beta, C, ldc
        "cublasDsyrk_v2_64": (
            _pointer, _enum, _enum, _int64, _int64, _pointer, _pointer, _int64, _pointer, _pointer, _int64,
        ),
        # handle, side, uplo, op, diag, m, n, alpha, A, lda, B, ldb
        "cublasDtrsm_v2_64": (
            _pointer, _enum, _enum, _enum, _enum, _int64, _int64, _pointer, _pointer, _int64, _pointer, _int64,
        ),
    },
    "libcusolver": {
        "cusolverDnCreate": (_pointer,),
        "cusolverDnCreateParams": (_pointer,),
        "cusolverDnSetStream": (_pointer, _pointer),
        "cusolverDnXpotrf_bufferSize": (*_POTRF, _pointer, _pointer),  # bytes on the device, bytes on the host
        "cusolverDnXpotrf": (*_POTRF, _pointer, _size, _pointer, _size, _pointer),  # the two buffers, info
    },
}  # fmt: skip


def why_not() -> str:
    """Why the routines cannot be called in this process; empty if they can."""
    return _load()[1]


def cholesky_(matrix: Tensor) -> tuple[Tensor, int]:
    """As ``openblas.cholesky_``."""
    size = len(matrix)
    with torch.cuda.device(matrix.device):
        handle, params = _solver(matrix.device, threading.get_ident())
        _call("cusolverDnSetStream", handle, torch.cuda.current_stream().cuda_stream)
        problem = handle, params, _UPPER, size, _FP64, matrix, size, _FP64
        on_device, on_host = ctypes.c_size_t(), ctypes.c_size_t()
        _call("cusolverDnXpotrf_bufferSize", *problem, ctypes.byref(on_device), ctypes.byref(on_host))
        workspace = torch.empty(on_device.value, dtype=torch.uint8, device=matrix.device)
        host_workspace = ctypes.create_string_buffer(on_host.value)
        info = torch.zeros(1, dtype=torch.int32, device=matrix.device)
        _call("cusolverDnXpotrf", *problem, workspace, on_device.value, host_workspace, on_host.value, info)
        minor = int(info)  # waits for the GPU, which may use the host's workspace until then
    if minor < 0:
        raise RuntimeError(f"cusolverDnXpotrf finds its argument {-minor} wrong, for a matrix [{size}, {size}]")
    return matrix, minor


def add_gram_(matrix: Tensor, rows: Tensor, *, by_rows: bool = False) -> None:
    """``matrix += rowsᵀ rows`` (``rows rowsᵀ`` if ``by_rows``), on and below the diagonal only."""
    size, width = len(matrix), rows.shape[1]
    op, inner = (_T, width) if by_rows else (_N, len(rows))
    one = ctypes.byref(ctypes.c_double(1))
    _call_blas("cublasDsyrk_v2_64", matrix.device, _UPPER, op, size, inner, one, rows, width, one, matrix, size)


def solve_triangular_(lower: Tensor, b: Tensor, *, left: bool, transposed: bool) -> Tensor:
    """``b`` overwritten by op(L)⁻¹ b if ``left``, else by b op(L)⁻¹; op(L) is Lᵀ if ``transposed``, else L."""
    size, (rows, columns) = len(lower), b.shape
    lower = lower.contiguous()  # a copy only of a factor that torch made
    flags = _RIGHT if left else _LEFT, _UPPER, _T if transposed else _N, _NON_UNIT
    one = ctypes.byref(ctypes.c_double(1))
    _call_blas("cublasDtrsm_v2_64", b.device, *flags, columns, rows, one, lower, size, b, columns)
    return b


def _call_blas(name: str, device: torch.device, *arguments) -> None:
    with torch.cuda.device(device):
        _call(name, torch.cuda.current_blas_handle(), *arguments)  # torch has set the current stream


def _call(name: str, *arguments) -> None:
    """Calls a routine, a tensor by its address. RuntimeError: it could not be launched; says its status."""
    passed = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    status = _load()[0][name](*passed)
    if status:
        raise RuntimeError(f"{name} returned status {status} (cublasStatus_t or cusolverStatus_t; 0 is success)")


@cache
def _solver(device: torch.device, thread: int) -> tuple[int, int]:
    """cuSOLVER's handle and parameters for the current device; two threads may not share one."""
    handle, params = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cusolverDnCreate", ctypes.byref(handle))
    _call("cusolverDnCreateParams", ctypes.byref(params))
    return handle.value, params.value


@cache
def _load() -> tuple[dict, str]:
    """({name: routine}, "") or ({}, why not)."""
    if not torch.cuda.is_available():
        return {}, "torch finds no CUDA device"
    _have_torch_load_cusolver()
    routines = {}
    for stem, prototypes in LIBRARIES.items():
        paths = _mapped(stem, _maps())
        if len(paths) != 1:  # a handle of torch's cuBLAS must not reach another copy of it
            found = ", ".join(paths) if paths else "none: this torch was linked otherwise"
            return {}, f"one {stem}.so is needed in this process, found: {found}"
        library = ctypes.CDLL(paths[0])
        for name, arguments in prototypes.items():
            routine = getattr(library, name, None)
            if routine is None:
                return {}, f"{paths[0]} has no {name}; CUDA 12 and later have"
            routine.argtypes, routine.restype = arguments, ctypes.c_int
            routines[name] = routine
    return routines, ""


def _have_torch_load_cusolver() -> None:
    """torch loads cuSOLVER with its first factorization on a GPU."""
    torch.linalg.cholesky_ex(torch.eye(2, device=torch.cuda.current_device()))


def _maps() -> str:
    """What is mapped into this process; empty where the system does not tell (all but Linux)."""
    try:
        return Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _mapped(stem: str, maps: str) -> list[str]:
    """Paths of the shared libraries of this name in the text of /proc/self/maps."""
    return sorted(set(re.findall(rf"(/.*/{re.escape(stem)}\.so(?:\.\d+)*)$", maps, re.MULTILINE)))
