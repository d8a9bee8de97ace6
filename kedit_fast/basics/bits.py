"""What tensors hold, bit for bit: JSON values as bytes, and digests that tell things apart."""

import hashlib
import json

import torch
from torch import Tensor


def json_tensor(value) -> Tensor:
    """A JSON value as [bytes] uint8, for files that hold tensors alone; ``json_of`` gives it back."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def json_of(tensor: Tensor):
    """The value of ``json_tensor``."""
    return json.loads(bytes(tensor.numpy()))


def digest(*things) -> str:
    """16 hex digits that tell things apart: tensors by their bits, anything else by its JSON."""
    made = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Tensor):
            made.update(f"{thing.dtype} {tuple(thing.shape)}".encode())
            made.update(thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            made.update(json.dumps(thing).encode())
    return made.hexdigest()[:16]
