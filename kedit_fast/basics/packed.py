"""Reading what is packed: npz files and gzip files, which may say that they hold far more than they are long.

What is read takes no more memory than a fixed multiple of the file: an array's bytes have to be there, and what is
compressed may not unpack to more than ``RATIO`` times its length, where text and numbers do to 30 times at most.
"""

import gzip
import io
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

RATIO = 200
BESIDE = 1 << 20  # bytes that may come of a file, however short


def read_arrays(path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """{name: array} of an npz file; names: those to read (default: all).

    Raises ValueError for another file, and for one that is cut short, holds objects (which would be unpickled), lacks
    an array or would unpack to far more than it is long; OSError where it cannot be opened. Memory: that of the arrays.
    """
    with open(path, "rb") as opened:
        try:
            with zipfile.ZipFile(opened) as file:
                there = {each.filename.removesuffix(".npy"): each for each in file.infolist()}
                names = list(there) if names is None else list(names)
                if missing := [name for name in names if name not in there]:
                    raise ValueError(f"it lacks {missing}")
                return {name: _array(name, _member(file, there[name])) for name in names}
        # zipfile's own for what is damaged: of another compression, encrypted, with places before its beginning
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            raise ValueError("it is no npz file, or cut short") from error


def _member(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > BESIDE + RATIO * info.compress_size:
        raise ValueError(f"{info.filename} would unpack to {info.file_size:,} bytes from {info.compress_size:,}")
    with file.open(info) as member:
        return member.read(info.file_size)


def _array(name: str, data: bytes) -> np.ndarray:
    """The array of an npy file, as a view of its bytes."""
    head = io.BytesIO(data)
    try:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read[np.lib.format.read_magic(head)](head)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or min(shape, default=0) < 0 or not dtype.itemsize or size != len(data) - head.tell():
            raise ValueError(f"{shape} of {dtype} in {len(data)} bytes")
        if dtype.kind == "U":  # numpy makes texts of letters that there are not, and Python then stops in a SystemError
            letters = np.frombuffer(data, np.dtype("u4").newbyteorder(dtype.byteorder), offset=head.tell())
            if letters.size and letters.max() > sys.maxunicode:
                raise ValueError("letters that there are not")
        return np.frombuffer(data, dtype, offset=head.tell()).reshape(shape, order="F" if by_columns else "C")
    except Exception as error:  # numpy's parser of headers raises what Python's own raises, of many types
        raise ValueError(f"its {name} is no array of numbers or text") from error


@contextmanager
def unpacked(path) -> Iterator[io.BufferedReader]:
    """What a gzip file holds, to be read as far as it is wanted.

    Reading raises ValueError for one that is damaged, cut short, or unpacks to far more than it is long; OSError where
    it cannot be opened.
    """
    try:
        with gzip.open(path, "rb") as file:
            yield io.BufferedReader(_Bounded(path, file))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file") from error


class _Bounded(io.RawIOBase):
    """A stream that ends in an error where it gives more than a file of its length may."""

    def __init__(self, path, file):
        self._path, self._file, self._left = path, file, BESIDE + RATIO * os.stat(path).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, room) -> int:
        n = self._file.readinto(room)
        self._left -= n
        if self._left < 0:
            raise ValueError(f"{self._path} would unpack to over {RATIO} times its length, as no text does")
        return n
