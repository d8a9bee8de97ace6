"""Names of files and folders that are being written: locked while they are, and found again after a killed run.

A writer holds a lock on what it writes, which the system frees when it ends, however it ends. So whoever comes next
knows which leftovers nobody writes any more. Where a system or a file system has no such locks, nothing is taken for a
leftover.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from kedit_fast.basics.warn import warn

try:
    import fcntl
except ImportError:  # not a Unix
    LOCKS = False
else:
    LOCKS = True

ENDING = ".unfinished"
RUN, MANIFEST = (
    ".run",
    "run.json",
)  # of a folder that keeps an unfinished run's parts (parts.py): its ending, its manifest
_NAME = 40  # characters of the final name that a name of ours begins with: a name may have 255 bytes


_discards: ContextVar[bool] = ContextVar("kedit_fast_discards", default=False)


@contextmanager
def discarding(on: bool = True) -> Iterator[None]:
    """Inside, ``replace_file`` keeps nothing: for processes that run a command beside the one that writes for all."""
    token = _discards.set(on)
    try:
        yield
    finally:
        _discards.reset(token)


def discards() -> bool:
    """Whether files are being discarded."""
    return _discards.get()


def unfinished_file(path: Path) -> AbstractContextManager[Path]:
    """A new empty file beside ``path`` to write to, gone when the block ends unless it was given another name.

    Several may write one ``path`` at a time. What killed writers of it left is deleted.
    """
    return _name_of_its_own(path, lambda name: os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o666))


def temporary_folder(path: Path) -> AbstractContextManager[Path]:
    """A new empty folder beside ``path`` to work in, gone when the block ends; as ``unfinished_file`` else."""
    return _name_of_its_own(path, _made_folder)


def _made_folder(path: Path) -> int | None:
    path.mkdir()
    return os.open(path, os.O_RDONLY) if LOCKS else None


@contextmanager
def _name_of_its_own(path: Path, make: Callable[[Path], int | None]) -> Iterator[Path]:
    """A name beside ``path``, made and locked; ``make`` gives the open file or folder."""
    _delete_leftovers(path)
    while True:
        unfinished = path.with_name(f".{path.name[:_NAME]}.{uuid.uuid4().hex[:8]}{ENDING}")
        lock = make(unfinished)
        if lock is None or (locked(lock) is not False and os.path.exists(unfinished)):
            break  # else another writer took it for a leftover, in the moment before it was locked
        os.close(lock)
    try:
        yield unfinished
    finally:
        if lock is not None:
            os.close(lock)
        _delete(unfinished)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether a name is of those that are given here: it is being written, or was left by a killed run."""
    return path.name.startswith(".") and path.name.endswith(ENDING)


def _delete_leftovers(path: Path) -> None:
    begins = f".{path.name[:_NAME]}."
    for name in os.listdir(path.parent):
        if name.startswith(begins) and name.endswith(ENDING) and len(name) == len(begins) + 8 + len(ENDING):
            with suppress(OSError), _is_left(path.with_name(name)) as left:
                if left:
                    _delete(path.with_name(name))


@contextmanager
def _is_left(unfinished: Path) -> Iterator[bool]:
    """Whether nobody writes a file or a folder any more, nor begins to in this context; without locks nobody knows."""
    descriptor = os.open(unfinished, os.O_RDONLY)
    try:
        yield locked(descriptor) is True
    finally:
        os.close(descriptor)


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to fill, gone when the block ends unless it was given another name.

    One writer for each ``path``: raises ValueError where another run fills it. What a killed run left of it is deleted,
    and what one left of another folder beside it is warned of: it may be as large as a model.
    """
    _warn_of_others(path)
    unfinished = path.with_name(f".{path.name}{ENDING}")
    new = True
    try:
        unfinished.mkdir()
    except FileExistsError:
        new = False
    lock = _claimed(unfinished, path, new)
    try:
        for left in unfinished.iterdir():
            _delete(left)
        yield unfinished
    finally:
        with suppress(FileNotFoundError):  # it has its final name
            if lock is None or os.path.samestat(os.fstat(lock), os.stat(unfinished)):
                shutil.rmtree(unfinished, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _warn_of_others(path: Path) -> None:
    for name in os.listdir(path.parent):
        other = path.with_name(name)
        if name != f".{path.name}{ENDING}" and is_unfinished(other) and other.is_dir():
            with suppress(OSError), _is_left(other) as left:
                if left:
                    warn(f"{other} is what a killed run left; delete it")


def _claimed(unfinished: Path, path: Path, new: bool) -> int | None:
    """The open and locked folder, None where there are no locks; ValueError where another run writes there."""
    if LOCKS:
        with suppress(FileNotFoundError):  # the run that made it has just given it its final name
            lock = os.open(unfinished, os.O_RDONLY)
            held = locked(lock)
            if (held or (held is None and new)) and os.path.samestat(os.fstat(lock), os.stat(unfinished)):
                return lock
            os.close(lock)
            if held is not None:
                raise ValueError(f"{path}: another run writes there; wait for it, or name another folder")
    elif new:
        return None
    raise ValueError(f"{path}: another run writes there, or one that was killed left {unfinished}; delete that then")


def locked(descriptor: int) -> bool | None:
    """Takes the lock of an open file or folder until it is closed; False: another has it, None: there are no locks."""
    if not LOCKS:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def run_folder(path: Path) -> Path:
    """Where a command keeps the parts of its run until ``path``, its result, is written."""
    return path.with_name((path.name if len(os.fsencode(path.name)) < 200 else path.name[:_NAME]) + RUN)


def has_run(folder: Path) -> bool:
    """Whether a folder keeps an unfinished run."""
    return (folder / MANIFEST).is_file()
