"""Writing files whole or not at all."""

import errno
import json
import os
import tempfile
import uuid
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def check_place(path) -> Path:
    """The path, if a file can be written there.

    Raises FileNotFoundError where its folder does not exist, NotADirectoryError where that is no folder,
    IsADirectoryError where ``path`` itself is one, PermissionError where writing is not allowed.
    """
    path = Path(path)
    if not path.parent.exists():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    if not path.parent.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {path.parent} is no folder")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file to write")
    if not (os.access(path, os.W_OK) if path.exists() else writable(path.parent)):
        raise PermissionError(f"{path} cannot be written: you may not write there")
    return path


def writable(folder) -> bool:
    """Whether a file can be made in a folder; tried, for what its mode says is not true of every file system."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return False


@contextmanager
def named(path):
    """Has an OSError of this block name ``path`` where it names no file: opening names one, reading and writing do not.

    Its type and errno stay.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


@contextmanager
def named_instead(unfinished: Path, path: Path):
    """Has an OSError of this block name ``path``, or a file in it, where it names ``unfinished``, a name of our making.

    Its type and errno stay.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        if isinstance(name, str | Path) and Path(name).is_relative_to(unfinished):
            name = path / Path(name).relative_to(unfinished)
            raise type(error)(error.errno, error.strerror, str(name)) from error
        if error.errno is None and str(unfinished) in str(error):
            raise type(error)(str(error).replace(str(unfinished), str(path))) from error
        raise


@contextmanager
def replace_file(path):
    """Gives a path beside ``path`` to write to; it takes the name ``path`` when the block ends without an error.

    The file gets the mode of a plainly created one, whoever wrote it. Raises what ``check_place`` raises, and OSError
    where writing fails; both name ``path``.
    """
    path = check_place(path)
    unfinished = path.with_name(f".{uuid.uuid4().hex}.unfinished")
    with named_instead(unfinished, path):
        try:
            unfinished.touch()
            mode = unfinished.stat().st_mode  # as the umask has it; safetensors makes files only their owner can read
            yield unfinished
            with open(unfinished, "rb+") as file:
                os.fsync(file.fileno())
            unfinished.chmod(mode)
            os.replace(unfinished, path)
        except SafetensorError as error:  # says which file of its own it could not write
            raise OSError(f"{path} could not be written: {str(error).partition(' at path ')[0]}") from error
        finally:
            unfinished.unlink(missing_ok=True)


def append_records(log, records: Iterable[dict]) -> None:
    """Adds a line of JSON for each record to a log, or does nothing where ``log`` is None. Records hold no NaN."""
    if log is not None:
        with open(log, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
