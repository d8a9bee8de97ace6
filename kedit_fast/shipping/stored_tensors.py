"""Where tensors lie in safetensors files, byte by byte: what it takes to replace one without reading the others.

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON: dtype, shape and byte range
of each tensor), and the tensors' bytes, row-major and little endian.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kedit_fast.basics.files import named
from kedit_fast.basics.folders import pieces
from kedit_fast.model.folder import open_tensors

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``size`` bytes from ``begin`` on; dtype as the file names it ("BF16")."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    def at(self, file: Path) -> "StoredTensor":
        """The same place in a copy of the file."""
        return replace(self, file=file)

    def read(self) -> Tensor:
        """The tensor, in memory of its own. Only for dtypes in ``DTYPES``."""
        held = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        room = memoryview(held.view(-1).view(torch.uint8).numpy())
        for piece in pieces(self.file, self.begin, self.size):
            room[: len(piece)] = piece
            room = room[len(piece) :]
        return held

    def overwrite(self, parts: Iterable) -> None:
        """Writes bytes, ``size`` of them in any number of parts, over this place of the file."""
        with named(self.file), open(self.file, "rb+") as file:
            file.seek(self.begin)
            for part in parts:
                file.write(part)


def stored_tensors(file) -> list[StoredTensor]:
    """All tensors of a safetensors file, in the order of their bytes; none is read.

    Raises ValueError for a file that is cut short or something else.
    """
    file = Path(file)
    with open_tensors(file):  # checks the header, and that the file is as long as it says
        pass
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = [
        StoredTensor(name, file, at["dtype"], tuple(at["shape"]), 8 + length + begin, end - begin)
        for name, at in header.items()
        for begin, end in [at["data_offsets"]]
    ]
    return sorted(found, key=lambda tensor: tensor.begin)


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
