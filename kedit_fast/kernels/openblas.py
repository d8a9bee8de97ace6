"""The OpenBLAS that numpy's wheels bring: where its routines lie, how many threads it may use, and those of ``solve``.

On a core of a Zen 4 its Cholesky is 1.5 times torch's (MKL), its symmetric products do half the work of torch's, and
its fp32 products of many rows lose less where the other cores are busy (see ``linear``). numpy is a dependency and maps
the library anyway; where numpy was built otherwise, torch does the work.

The routines over tensors read and write fp64 matrices whose rows lie one after the other, in place, on
``torch.get_num_threads()`` threads where that helps. A lower triangle by rows is an upper one by columns, as Fortran
sees it.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy
import torch
from torch import Tensor

# Bound by memory, with a barrier every few columns: on a busy machine OpenBLAS's spinning threads took over 200 s for a
# condition estimate at d_ff 4096 that one thread makes in half a second.
ON_ONE_THREAD = {"dtrsv_", "dlansy_"}
PREFIX, SUFFIX = "scipy_", "64_"  # of every symbol: 64-bit integers, renamed so that no other BLAS is in the way


@cache
def _library() -> ctypes.CDLL | None:
    folder = Path(numpy.__file__).parent.parent / "numpy.libs"
    found = sorted(folder.glob("libscipy_openblas64_*"))
    try:
        library = ctypes.CDLL(str(found[0])) if found else None
        if library is not None:
            _ = library.scipy_sgemm_64_, library.scipy_dpotrf_64_, library.scipy_openblas_set_num_threads64_
            library.scipy_dlansy_64_.restype = ctypes.c_double
        return library
    except (OSError, AttributeError):
        return None


def why_not() -> str:
    """Why there is no such library in this process; empty if there is."""
    return "" if _library() is not None else "numpy brings no OpenBLAS with 64-bit integers here"


@cache
def address(name: str) -> int:
    """Address of a routine such as "sgemm_" (Fortran calling convention, 64-bit integers)."""
    routine = getattr(_library(), f"{PREFIX}{name}{SUFFIX}")
    return ctypes.cast(routine, ctypes.c_void_p).value


@contextmanager
def threads(count: int) -> Iterator[None]:
    """OpenBLAS on so many threads, for the whole process, until the block ends."""
    library = _library()
    before = library.scipy_openblas_get_num_threads64_()
    library.scipy_openblas_set_num_threads64_(count)
    try:
        yield
    finally:
        library.scipy_openblas_set_num_threads64_(before)


def cholesky_(matrix: Tensor) -> tuple[Tensor, int]:
    """(L, 0) with L Lᵀ = ``matrix`` [d, d], read and overwritten on and below its diagonal; what stands above it stays.

    Where the matrix is not positive definite: (no factor, order of the first minor that is not positive).
    """
    info = ctypes.c_int64()
    _call("dpotrf_", "U", len(matrix), matrix, len(matrix), info)
    return matrix, info.value


def add_gram_(matrix: Tensor, rows: Tensor, *, by_rows: bool = False) -> None:
    """``matrix += rowsᵀ rows`` (``rows rowsᵀ`` if ``by_rows``), on and below the diagonal only."""
    size, width = len(matrix), rows.shape[1]
    op, inner = ("T", width) if by_rows else ("N", len(rows))
    _call("dsyrk_", "U", op, size, inner, 1.0, rows, width, 1.0, matrix, size)


def solve_triangular_(lower: Tensor, b: Tensor, *, left: bool, transposed: bool) -> Tensor:
    """``b`` overwritten by op(L)⁻¹ b if ``left``, else by b op(L)⁻¹; op(L) is Lᵀ if ``transposed``, else L."""
    size, op = len(lower), "T" if transposed else "N"
    lower = lower.contiguous()  # a copy only of a factor that torch made
    rows, columns = b.shape
    if rows == 1 and not left:
        _call("dtrsv_", "U", op, "N", size, lower, size, b, 1)  # dtrsm takes 2.3 times as long for one row
    else:
        _call("dtrsm_", "R" if left else "L", "U", op, "N", columns, rows, 1.0, lower, size, b, columns)
    return b


def one_norm(matrix: Tensor) -> float:
    """Largest column sum of |A| of a symmetric matrix [d, d], from its lower triangle."""
    return _call("dlansy_", "1", "U", len(matrix), matrix, len(matrix), matrix.new_empty(len(matrix)))


def _call(name: str, *arguments: str | int | float | Tensor | ctypes.c_int64):
    """Calls a routine as Fortran does: everything by address, the lengths of the strings at the end."""
    boxes = {str: lambda text: ctypes.c_char(text.encode()), int: ctypes.c_int64, float: ctypes.c_double}
    passed = [
        ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.byref(boxes.get(type(x), lambda y: y)(x))
        for x in arguments
    ]
    lengths = [ctypes.c_size_t(1) for x in arguments if isinstance(x, str)]
    with threads(1 if name in ON_ONE_THREAD else torch.get_num_threads()):
        return getattr(_library(), f"{PREFIX}{name}{SUFFIX}")(*passed, *lengths)
