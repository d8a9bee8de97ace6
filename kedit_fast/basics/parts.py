"""Parts of a long piece of work on disk, so that a killed run goes on where it stood and ends with the same bits."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_fast.basics.bits import digest, json_of, json_tensor
from kedit_fast.basics.files import check_folder, check_format, reading, replace_file, saying, write_text
from kedit_fast.basics.unfinished import LOCKS, MANIFEST, is_unfinished, locked
from kedit_fast.basics.words import short

Make = Callable[[], dict[str, Tensor]]
Keep = Callable[[str, Make], dict[str, Tensor]]  # ``keep(name, make)``: the part of that name, made if need be
Run = Any  # a ``Keep`` of a whole piece of work: ``Held``, ``Parts``, ``Inside`` or, of several ranks, ``Together``
FORMAT, VERSION = "kedit_fast.run", 1
PART = ".safetensors"
_TAKEN = "{}: another run works there; wait for it, or name another folder"
AGAIN = "delete it, and it is made again"


def make_now(name: str, make: Make) -> dict[str, Tensor]:
    """The ``Keep`` of work that nobody keeps: makes each part."""
    return make()


class Held:
    """A ``Keep`` in memory: for work that is done again with less memory, and that nobody keeps on disk.

    memory: bytes that the work was last cut for, None as it was begun; begun: when, of work that another run began
    """

    begun = ""

    def __init__(self) -> None:
        self.memory: int | None = None
        self._parts: dict[str, dict[str, Tensor]] = {}

    def __call__(self, name: str, make: Make) -> dict[str, Tensor]:
        if name not in self._parts:
            self._parts[name] = make()
        return self._parts[name]

    @property
    def own(self) -> "Held":
        """What keeps parts that are no other rank's (``Together``)."""
        return self

    def names(self) -> list[str]:
        """Of all parts."""
        return list(self._parts)

    def look(self, name: str, key: str) -> Tensor | None:
        """One tensor of a part; None where it has none of that name."""
        return self._parts[name].get(key)

    def narrow(self, memory: int) -> None:
        """Notes that what is not done yet is cut for so many bytes."""
        self.memory = memory

    def release(self, name: str) -> None:
        """Lets go of a part that nobody asks for again."""
        del self._parts[name]

    def forget(self, begins: str) -> None:
        """Drops the parts whose names begin so."""
        self._parts = {name: part for name, part in self._parts.items() if not name.startswith(begins)}


class Parts:
    """A ``Keep`` over a folder: a part that is there is read, one that is not is made and written, whole or not at all.

    folder: made if need be; its parent must exist
    asked: JSON values, all that the parts depend on; they are written down first, and compared when a run goes on
    anew: whether other work that is there is removed, and not refused
    beside: whether the run is that of another process, which this one works with

    A part comes back bit for bit, so work that is cut into the same parts ends with the same bits, interrupted or not,
    on the same machine with the same number of threads. The folder is this run's until ``close``, or until its process
    ends, however it ends; a folder without any part goes then.
    Raises ValueError where the folder is of other work, naming what differs, another run works in it, or a part is
    damaged; OSError where the folder cannot be made or written.
    """

    def __init__(self, folder, asked: dict, anew: bool = False, beside: bool = False):
        self.folder = check_checkpoint(folder)
        self.begun, self.memory, self._lock, self._beside = "", None, None, beside
        self.folder.mkdir(exist_ok=True)
        if not beside:
            self._claim()
        try:
            self._begin(json.loads(json.dumps(asked)), anew)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the folder to others."""
        if not self._beside and not any(self.folder.glob(f"*{PART}")):
            with suppress(OSError):  # other things lie there
                (self.folder / MANIFEST).unlink(missing_ok=True)
                self.folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def own(self) -> "Parts":
        return self

    def names(self) -> list[str]:
        return [path.stem for path in self.folder.glob(f"*{PART}") if not is_unfinished(path)]

    def look(self, name: str, key: str) -> Tensor | None:
        path = self._path(name)
        with reading(path, AGAIN), safe_open(path, "pt") as file:
            return file.get_tensor(key) if key in file.keys() else None  # noqa: SIM118 (no dict)

    def narrow(self, memory: int) -> None:
        """Writes down that what is not done yet is cut for so many bytes: a run that goes on begins with them."""
        self.memory = self._manifest["memory"] = memory
        self._write()

    def release(self, name: str) -> None:
        """Nothing: parts on disk are for the run that may come."""

    def forget(self, begins: str) -> None:
        """Removes the parts whose names begin so."""
        for path in self.folder.iterdir():
            if path.name.startswith(begins) and path.suffix == PART:
                path.unlink(missing_ok=True)

    def _claim(self) -> None:
        if not LOCKS:
            return
        self._lock = os.open(self.folder, os.O_RDONLY)
        held = locked(self._lock)
        there = self.folder.exists() and os.path.samestat(os.fstat(self._lock), os.stat(self.folder))
        if held is False or not there:  # not there: a run that ended has just removed it
            os.close(self._lock)
            raise ValueError(_TAKEN.format(self.folder))

    def _begin(self, asked: dict, anew: bool) -> None:
        path = self.folder / MANIFEST
        if path.exists():
            try:
                return self._compare(path, asked)
            except ValueError:
                if not anew:
                    raise
                self.forget("")
        self._manifest = {"format": FORMAT, "version": VERSION, "begun": _now(), "memory": None, "asked": asked}
        self.begun, self.memory = "", None
        self._write()

    def _write(self) -> None:
        write_text(self.folder / MANIFEST, json.dumps(self._manifest, indent=1))

    def _compare(self, path: Path, asked: dict) -> None:
        with reading(path, "delete the folder and begin again"):
            self._manifest = found = json.loads(path.read_text(encoding="utf-8"))
            check_format(found, FORMAT, version=VERSION)
            before = dict(found["asked"])
            self.begun, self.memory = datetime.fromisoformat(found["begun"]).strftime("%-d %b, %H:%M"), found["memory"]
            if self.memory is not None and not (type(self.memory) is int and self.memory > 0):
                raise ValueError(f"its memory is {self.memory!r}")
        differing = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
        if differing:
            name = differing[0]
            raise OtherWork(
                self.folder,
                f"its {name} is {short(before.get(name))}, this one's {short(asked.get(name))}"
                + (f" (and {', '.join(differing[1:])} differ)" if differing[1:] else ""),
            )

    def __call__(self, name: str, make: Make) -> dict[str, Tensor]:
        found = self.find(name)
        if found is not None:
            return found
        self.write(name, make())
        return self.read(name)  # what goes on must not depend on whether the part was made in this run

    def find(self, name: str) -> dict[str, Tensor] | None:
        """The part of that name; None where it is not there."""
        return self.read(name) if self._path(name).exists() else None

    def read(self, name: str) -> dict[str, Tensor]:
        """The part of that name. Raises ValueError where it is damaged or has changed."""
        path = self._path(name)
        with reading(path, AGAIN), safe_open(path, "pt") as file:
            part = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
            if (file.metadata() or {}).get("digest") != _digest_of(part):
                raise ValueError("its contents are not those that were kept: their digest is another")
            return part

    def write(self, name: str, part: dict[str, Tensor]) -> None:
        """Writes a part, in place of one that is there."""
        with (
            saying("the parts before it are kept, and the same call goes on from there"),
            replace_file(self._path(name)) as unfinished,
        ):
            held = {key: _whole(tensor.detach().cpu()) for key, tensor in part.items()}
            save_file(held, unfinished, {"digest": _digest_of(held)})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{PART}"


class Inside:
    """A ``Keep`` of work that is a part itself: its own parts are named after it."""

    def __init__(self, keep: Run, name: str):
        self._keep, self._name = keep, name

    def __call__(self, name: str, make: Make) -> dict[str, Tensor]:
        return self._keep(f"{self._name}+{name}", make)

    @property
    def own(self) -> "Inside":
        return Inside(self._keep.own, self._name)

    def names(self) -> list[str]:
        begins = f"{self._name}+"
        return [name.removeprefix(begins) for name in self._keep.names() if name.startswith(begins)]

    def look(self, name: str, key: str) -> Tensor | None:
        return self._keep.look(f"{self._name}+{name}", key)

    @property
    def begun(self) -> str:
        return self._keep.begun

    @property
    def memory(self) -> int | None:
        return self._keep.memory

    def narrow(self, memory: int) -> None:
        self._keep.narrow(memory)

    def release(self, name: str) -> None:
        self._keep.release(f"{self._name}+{name}")

    def forget(self, begins: str) -> None:
        self._keep.forget(f"{self._name}+{begins}")


def keep_whole(keep: Run, name: str, make: Callable[[Inside], dict[str, Tensor]]) -> tuple[dict[str, Tensor], bool]:
    """(a part that is made in parts of its own, which are kept until it is whole; whether it was found)."""
    new: list[str] = []

    def made() -> dict[str, Tensor]:
        new.append(name)
        return make(Inside(keep, name))

    part = keep(name, made)
    keep.forget(f"{name}+")
    return part, not new


class OtherWork(ValueError):
    """A run folder is of other work than is asked for. differs: in words, what"""

    def __init__(self, folder: Path, differs: str):
        self.differs = differs
        super().__init__(
            f"{folder} holds other work: {differs}; go on with what it was begun with, or name another folder"
        )


def check_checkpoint(folder) -> Path:
    """The folder, if it is a checkpoint or can become one; raises as ``Parts``, which also knows of what work."""
    folder = check_folder(folder)
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{folder} cannot be made: there is no folder {folder.parent}; make it first")
    held = [path for path in folder.iterdir() if not is_unfinished(path)] if folder.exists() else []
    if held and folder / MANIFEST not in held:
        raise ValueError(f"{folder} is not empty and no checkpoint; name another folder")
    return folder


def remove_parts(folder) -> None:
    """Removes a run folder: the manifest after the parts, so that a run killed meanwhile leaves what can go on.

    Does nothing where there is none, or where a run works in it; what else lies there stays.
    """
    folder = Path(folder)
    with _free(folder) as is_free:
        if is_free:
            _removed(folder)


def check_free(folder: Path) -> None:
    """Raises ValueError where a run works in a folder."""
    with _free(folder) as is_free:
        if not is_free:
            raise ValueError(_TAKEN.format(folder))


@contextmanager
def _free(folder: Path) -> Iterator[bool]:
    """Whether no run works in a folder, nor begins to in this context; where there are no locks nobody knows."""
    lock = os.open(folder, os.O_RDONLY) if LOCKS and folder.is_dir() else None
    try:
        yield lock is None or locked(lock) is not False
    finally:
        if lock is not None:
            os.close(lock)


def _removed(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        for path in folder.iterdir():
            if path.suffix == PART or is_unfinished(path):
                path.unlink(missing_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
    with suppress(OSError):  # not there, or not ours alone
        folder.rmdir()


def keep_json(keep: Keep, name: str, make: Callable[[], object]):
    """A part that is plain JSON values."""
    return json_of(keep(name, lambda: {"json": json_tensor(make())})["json"])


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, a copy unless it is contiguous and has its memory to itself, as safetensors needs it."""
    return tensor if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _digest_of(part: dict[str, Tensor]) -> str:
    return digest(*(x for key in sorted(part) for x in (key, part[key])))


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
