"""Where tensors lie in safetensors files, byte by byte: what it takes to replace one without reading the others.

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON: dtype, shape and byte range
of each tensor), and the tensors' bytes, row-major and little endian.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kedit_fast.basics.files import named, reading
from kedit_fast.basics.folders import pieces

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
INTEGERS = {"BOOL": torch.bool, "U8": torch.uint8} | {f"I{n}": getattr(torch, f"int{n}") for n in (8, 16, 32, 64)}
SIZES = {name: dtype.itemsize for name, dtype in (DTYPES | INTEGERS).items()}
MOST_DIMS = 64  # numpy has no more
LONGEST_HEADER = 100_000_000  # bytes, as the format has it


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``size`` bytes from ``begin`` on; dtype as the file names it ("BF16").

    stamp: of the file when its header was read, by which a later change of it is seen
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int
    stamp: tuple[int, int]

    def at(self, file: Path) -> "StoredTensor":
        """The same place in a copy of the file."""
        return replace(self, file=file, stamp=_stamp(os.stat(file)))

    def read(self) -> Tensor:
        """The tensor, in memory of its own. Only for dtypes in ``DTYPES``."""
        held = torch.empty(self.shape, dtype=self.kind)
        self.read_into(held)
        return held

    @property
    def kind(self) -> torch.dtype:
        """The dtype; ValueError for one that no weight here has."""
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.file}: tensor {self.name!r} is {self.dtype}; expected one of {', '.join(DTYPES)} (a quantized "
                "checkpoint is loaded by transformers: give open_model the loaded model)"
            )
        return DTYPES[self.dtype]

    @property
    def is_aligned(self) -> bool:
        """Whether it begins where its dtype may begin in memory."""
        return self.begin % SIZES.get(self.dtype, 1) == 0

    def read_into(self, held: Tensor) -> None:
        """Reads it into a contiguous tensor of its dtype and shape, on the CPU. Raises ValueError where the file has
        changed since its header was read, OSError where it cannot be read."""
        room = memoryview(held.view(-1).view(torch.uint8).numpy())
        with named(self.file), open(self.file, "rb", buffering=0) as file:
            if _stamp(os.fstat(file.fileno())) != self.stamp:
                raise ValueError(f"{self.file} has changed since the model was opened; open it again")
            file.seek(self.begin)
            while room:
                n = file.readinto(room)
                if not n:
                    raise OSError(f"{self.file} ends {len(room)} bytes early; it was cut short")
                room = room[n:]

    def mapped(self) -> Tensor:
        """The tensor as a view of the file, whose pages are read when they are looked at."""
        if not self.size or not self.is_aligned:
            return self.read()
        with named(self.file):
            mapped = np.memmap(self.file, np.uint8, "c", self.begin, (self.size,))  # "c": torch wants it writable
        return torch.frombuffer(mapped, dtype=INTEGERS.get(self.dtype) or self.kind).view(self.shape)

    def part(self, index: tuple) -> Tensor:
        """``read()[index]``, of which only these pages of the file are read."""
        return self.mapped()[index].clone()

    def overwrite(self, parts: Iterable) -> None:
        """Writes bytes, ``size`` of them in any number of parts, over this place of the file."""
        with named(self.file), open(self.file, "rb+") as file:
            file.seek(self.begin)
            for part in parts:
                file.write(part)


def stored_tensors(file) -> list[StoredTensor]:
    """All tensors of a safetensors file, in the order of their bytes; none is read.

    Raises ValueError, naming the file, for one that is cut short or something else: the tensors' bytes have to follow
    each other and to fill the file, each as many as its dtype and shape say.
    """
    file, way_out = Path(file), "fetch or save the checkpoint again"
    with reading(file, way_out, "is cut short or no safetensors file"):
        with named(file), open(file, "rb") as opened:
            stamp = _stamp(os.fstat(opened.fileno()))
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(stamp[0] - 8, LONGEST_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {stamp[0]:,}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found = [
            StoredTensor(name, file, at["dtype"], tuple(at["shape"]), 8 + length + begin, end - begin, stamp)
            for name, at in header.items()
            for begin, end in [at["data_offsets"]]
        ]
        found.sort(key=lambda tensor: (tensor.begin, tensor.size))
        _check_places(found, 8 + length, stamp[0])
    return found


def _check_places(tensors: list[StoredTensor], end: int, size: int) -> None:
    for tensor in tensors:
        if len(tensor.shape) > MOST_DIMS or not all(type(n) is int for n in (tensor.begin, tensor.size, *tensor.shape)):
            raise ValueError(f"tensor {tensor.name!r} is of no shape, or lies nowhere")
        wanted = math.prod(tensor.shape) * SIZES[tensor.dtype] if tensor.dtype in SIZES else tensor.size
        if tensor.begin != end or tensor.size != wanted or min((tensor.size, *tensor.shape)) < 0:
            raise ValueError(f"tensor {tensor.name!r}: {tensor.size} bytes at {tensor.begin} of {tensor.shape}")
        end += tensor.size
    if end != size:
        raise ValueError(f"tensors end at {end:,} in a file of {size:,} bytes")


def _stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def write_parts(path, tensors: Sequence[StoredTensor]) -> None:
    """Writes a safetensors file of tensors that lie in other files, copied in pieces; their names must differ."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        begin, end = end, end + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with named(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in pieces(tensor.file, tensor.begin, tensor.size):
                file.write(piece)
