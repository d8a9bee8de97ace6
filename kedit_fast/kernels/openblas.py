"""The OpenBLAS that numpy's wheels bring: where its routines lie, and how many threads it may use.

Its fp32 products run at 97-103 GFLOP/s on one core of a Zen 4 where torch's (MKL) reach 80-90, and its Cholesky is 1.5
times torch's. numpy is a dependency and maps the library anyway; where numpy was built otherwise, torch does the work.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy

PREFIX, SUFFIX = "scipy_", "64_"  # of every symbol: 64-bit integers, renamed so that no other BLAS is in the way


@cache
def _library() -> ctypes.CDLL | None:
    folder = Path(numpy.__file__).parent.parent / "numpy.libs"
    found = sorted(folder.glob("libscipy_openblas64_*"))
    try:
        library = ctypes.CDLL(str(found[0])) if found else None
        if library is not None:
            _ = library.scipy_sgemm_64_, library.scipy_openblas_set_num_threads64_
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
def one_thread() -> Iterator[None]:
    """OpenBLAS on one thread: whoever calls it from several threads has its own pool."""
    library = _library()
    before = library.scipy_openblas_get_num_threads64_()
    library.scipy_openblas_set_num_threads64_(1)
    try:
        yield
    finally:
        library.scipy_openblas_set_num_threads64_(before)
