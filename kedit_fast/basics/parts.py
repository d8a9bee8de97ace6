"""Parts of a long piece of work on disk, so that a killed run goes on where it stood and ends with the same bits."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kedit_fast.basics.files import check_folder, reading, replace_file, saying, write_text
from kedit_fast.basics.unfinished import is_unfinished

Make = Callable[[], dict[str, Tensor]]
Keep = Callable[[str, Make], dict[str, Tensor]]  # ``keep(name, make)``: the part of that name, made if need be
IDENTITY = "identity.json"


def make_now(name: str, make: Make) -> dict[str, Tensor]:
    """The ``Keep`` of work that nobody keeps: makes each part."""
    return make()


def check_checkpoint(folder) -> Path:
    """The folder, if it is a checkpoint or can become one; raises as ``Parts``, which also knows of what work."""
    folder = check_folder(folder)
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{folder} cannot be made: there is no folder {folder.parent}; make it first")
    held = [path for path in folder.iterdir() if not is_unfinished(path)] if folder.exists() else []
    if held and folder / IDENTITY not in held:
        raise ValueError(f"{folder} is not empty and no checkpoint; name another folder")
    return folder


class Parts:
    """A ``Keep`` over a folder: a part that is there is read, one that is not is made and written, whole or not at all.

    folder: made if need be; its parent must exist
    identity: JSON values, all that the parts depend on; they are written down first, and compared when a run goes on

    A part comes back bit for bit, so work that is cut into the same parts ends with the same bits, interrupted or not,
    on the same machine with the same number of threads.
    Raises ValueError where the folder is of other work, naming what differs, or a part is damaged; OSError where the
    folder cannot be made or written.
    """

    def __init__(self, folder, identity: dict):
        self.folder = check_checkpoint(folder)
        path = self.folder / IDENTITY
        identity = json.loads(json.dumps(identity))
        if path.exists():
            self._compare(path, identity)
        else:
            self.folder.mkdir(exist_ok=True)
            write_text(path, json.dumps(identity, indent=1))

    def _compare(self, path: Path, identity: dict) -> None:
        with reading(path, "delete the folder and begin again"):
            found = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in {**found, **identity} if found.get(name) != identity.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{self.folder} holds other work: its {name} is {_short(found.get(name))}, this one's "
                f"{_short(identity.get(name))}"
                + (f" (and {', '.join(differing[1:])} differ)" if differing[1:] else "")
                + "; go on with what it was begun with, or name another folder"
            )

    def __call__(self, name: str, make: Make) -> dict[str, Tensor]:
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            with reading(path, "delete it, and it is made again"):
                return load_file(path)
        part = make()
        with (
            saying("the parts before it are kept, and the same call goes on from there"),
            replace_file(path) as unfinished,
        ):
            save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in part.items()}, unfinished)
        # Read again: what goes on must not depend on whether the part was made in this run.
        return load_file(path)


def keep_json(keep: Keep, name: str, make: Callable[[], object]):
    """A part that is plain JSON values."""
    return json_of(keep(name, lambda: {"json": json_tensor(make())})["json"])


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


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
