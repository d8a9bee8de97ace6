"""Reads GGUF version 3 files (metadata and tensors) with numpy alone.

The layout is little-endian throughout: magic, version, counts, the metadata pairs, a directory of the tensors,
padding, then the tensors themselves (format specification: github.com/ggml-org/ggml, docs/gguf.md). What tensors are
made of is in ``gguf_blocks``; a block format that is not there is refused by its name.
"""

import math
import struct
from dataclasses import dataclass

import numpy as np

from kedit_fast.basics.words import not_text
from kedit_fast.model.gguf_blocks import FORMATS, OTHERS, dequantize

MAGIC, VERSION = b"GGUF", 3
MOST_DIMS = 4  # of the format
DEFAULT_ALIGNMENT = 32  # where the metadata has no "general.alignment"

# One entry a scalar metadata type, by its number in the file; 8 is a string and 9 an array.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its numpy shape (rows first), its type's number, its bytes [begin, end) in the file."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    end: int


@dataclass(frozen=True)
class Gguf:
    """A parsed file: the metadata, and tensors that are read from ``data`` when asked for."""

    data: memoryview
    metadata: dict
    entries: dict[str, TensorEntry]

    def tensor(self, name: str) -> np.ndarray:
        """The tensor ``name`` as a fresh fp32 array. Raises ValueError where the file has none of that name."""
        if name not in self.entries:
            raise ValueError(f"no tensor {name!r} in this GGUF file; it holds {len(self.entries)}, see .entries")
        entry = self.entries[name]
        return dequantize(self.data[entry.begin : entry.end], FORMATS[entry.kind]).reshape(entry.shape)


def read_gguf(buffer) -> Gguf:
    """Parse a GGUF file held in ``buffer`` (bytes, mmap, or any contiguous buffer, which is not copied).

    Raises ValueError for another magic or version, a tensor type that is not read, and a file shorter than its
    own directory says. All of the file is checked here, so ``Gguf.tensor`` cannot run past the end.
    """
    data = memoryview(buffer).cast("B")
    if data[:4] != MAGIC:
        raise ValueError(f"not a GGUF file: it begins with {bytes(data[:4])!r}, expected {MAGIC!r}")
    cursor = _Cursor(data, begin=4)
    version = cursor.scalar("<u4")
    if version != VERSION:
        raise ValueError(f"GGUF version {version} is not read, only version {VERSION}; convert the file anew")
    n_tensors, n_pairs = cursor.scalar("<u8"), cursor.scalar("<u8")
    metadata = {}
    for _ in range(n_pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<u4"))
    directory = [cursor.tensor_info() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}, expected a positive whole number; the file is damaged")
    base = -(-cursor.at // alignment) * alignment
    entries = {name: _entry(name, shape, kind, base + offset, len(data)) for name, shape, kind, offset in directory}
    return Gguf(data, metadata, entries)


def _entry(name: str, shape: tuple[int, ...], kind: int, begin: int, n_bytes: int) -> TensorEntry:
    """The checked entry of one tensor; ValueError where its type is not read, or it ends behind the file."""
    if kind not in FORMATS:
        label, known = OTHERS.get(kind, f"number {kind}"), ", ".join(form.name for form in FORMATS.values())
        raise ValueError(f"tensor {name!r} has type {label}; this reader knows {known}")
    form = FORMATS[kind]
    if (shape[-1] if shape else 1) % form.weights:
        raise ValueError(
            f"tensor {name!r} {shape} of type {form.name}: its rows are no multiple of {form.weights} weights"
        )
    end = begin + math.prod(shape) // form.weights * form.block.itemsize
    if end > n_bytes:
        raise ValueError(f"GGUF file is truncated: tensor {name!r} ends at byte {end}, the file has {n_bytes}")
    return TensorEntry(shape, kind, begin, end)


class _Cursor:
    """Reads the header front to back; ``at`` is the next byte. Raises ValueError at the end of the data."""

    def __init__(self, data: memoryview, begin: int):
        self.data, self.at = data, begin

    def take(self, n_bytes: int) -> memoryview:
        begin, self.at = self.at, self.at + n_bytes
        if self.at > len(self.data):
            raise ValueError(
                f"GGUF file is truncated: byte {self.at} of its header is asked for, it has {len(self.data)}"
            )
        return self.data[begin : self.at]

    def scalar(self, code: str):
        dtype = np.dtype(code)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        try:
            return bytes(self.take(length)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"a name or text in this GGUF file is none: {not_text(error)}") from error

    def value(self, kind: int):
        """A metadata value: number, bool, str, or a list of them (arrays of arrays included)."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, n = self.scalar("<u4"), self.scalar("<u8")
            if inner in _SCALARS:
                dtype = np.dtype(_SCALARS[inner])
                return np.frombuffer(self.take(n * dtype.itemsize), dtype).tolist()
            return [self.value(inner) for _ in range(n)]
        if kind not in _SCALARS:
            raise ValueError(f"metadata type {kind} is not one of GGUF version {VERSION}; the file is damaged")
        return self.scalar(_SCALARS[kind])

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape with rows first, type, offset from the start of the tensor data)."""
        name = self.string()
        n_dims = self.scalar("<u4")
        if n_dims > MOST_DIMS:
            raise ValueError(f"tensor {name!r} has {n_dims} dimensions; the file is damaged")
        dims = struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims))
        return name, tuple(reversed(dims)), self.scalar("<u4"), self.scalar("<u8")
