"""Where files may be written, writing them whole or not at all, and which names in a file name a file.

``check_place`` and ``check_folder`` are asked before any work, for whatever will be written; ``replace_file`` and
``append_records`` write. What is no regular file is written through (a pipe, a character device) or refused (a block
device, a socket), never replaced, and a link stays a link.
"""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from kedit_fast.basics import checks
from kedit_fast.basics.unfinished import discards, unfinished_file
from kedit_fast.basics.words import json_kind, reason


def check_place(path) -> Path:
    """The path, if a file can be written there; folders around it that are missing are made by whoever writes.

    Raises ValueError for an empty path, one that ends in a slash and what cannot be written to, NotADirectoryError
    where a file stands in a folder's place, IsADirectoryError where ``path`` itself is one, PermissionError where
    writing is not allowed, TypeError for what is no path.
    """
    path = checks.path("", path, "the name of a file to write", slash=False)
    target = written_file(path)
    if not target.exists():
        check_folder(target.parent, path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file to write")
    if path.exists() and not (path.is_file() or written_through(path)):
        raise ValueError(f"{path} is a block device or a socket; expected the name of a file to write")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} cannot be written: you may not write there")
    return path


def check_folder(folder, path=None) -> Path:
    """The folder, if files can be written to it, or if it can be made; nothing is made.

    path: what will be written there, for messages (default: the folder)
    Raises ValueError for an empty path, NotADirectoryError where a file is in the way, PermissionError where writing is
    not allowed.
    """
    folder = checks.path("", folder, "the name of a folder to write to")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise NotADirectoryError(f"{path or folder} cannot be written: {there} is no folder")
    with named_instead(there, Path(path or folder)):
        allowed = writable(there)
    if not allowed:
        raise PermissionError(f"{path or folder} cannot be written: you may not write to {there}")
    return folder


def existing_folder(path, what: str, way_out: str = "") -> Path:
    """The path, if a folder is there. what: "a folder of versions"; way_out: what makes one, for the message.

    Raises FileNotFoundError where nothing is there, NotADirectoryError for a file.
    """
    path = checks.path("", path, f"the name of {what}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder; expected {what}" + (f", {way_out}" if way_out else ""))
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; expected {what}")
    return path


def existing_file(path, what: str) -> Path:
    """The path, if a file is there. what: "a saved trace".

    Raises FileNotFoundError where nothing is there, IsADirectoryError for a folder.
    """
    path = checks.path("path", path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected {what}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    return path


def read_object(path, what: str) -> dict:
    """The object that a JSON file holds. what: of what it should be, "a saved report".

    Raises ValueError for what is no text, no JSON or no object; FileNotFoundError and IsADirectoryError.
    """
    path = existing_file(path, what)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise ValueError(f"{path} is not JSON ({place}); expected {what}") from error
    except (RecursionError, ValueError) as error:  # a number of thousands of digits is one
        raise ValueError(f"{path} is not {what}: {reason(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {json_kind(found)}; expected {what}, an object")
    return found


class Damaged(ValueError):
    """A file does not hold what it should."""


@contextmanager
def reading(path, way_out: str, what: str = "is damaged"):
    """Has a file whose contents this block cannot take refused: its name, what is wrong, the way out.

    what: "is not a saved trace". Raises Damaged for it; an OSError stays what it is.
    """
    try:
        yield
    except DAMAGE as error:
        raise Damaged(f"{path} {what} ({reason(error)}); {way_out}") from error


# What working with values raises that are of another kind, size or number than expected.
DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError)


def check_format(record: dict, *formats: str, version: int) -> None:
    """Raises ValueError for a record of another format than these, or of another version, which once was a text."""
    if record["format"] not in formats or str(record["version"]) != str(version):
        raise ValueError(f"it is {record['format']!r} of version {record['version']!r}")


def holds_something(path: Path) -> bool:
    """Whether a file is there that would be lost: an empty one, of a run that wrote nothing, would not."""
    return path.is_file() and path.stat().st_size > 0


def written_through(path: Path) -> bool:
    """Whether something is there that takes what is written to it and keeps no file: a pipe, a character device."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def written_file(path: Path) -> Path:
    """The file that is written at a path: behind a link, the one that it leads to, whether it is there or not.

    Raises ValueError for links that lead to each other.
    """
    if not path.is_symlink() or written_through(path):
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise ValueError(f"{path} is a link that leads nowhere; expected the name of a file to write")
    return target


def writable(folder) -> bool:
    """Whether a file can be made in a folder; tried, for what its mode says is not true of every file system."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise type(error)(error.errno, error.strerror, str(folder)) from error
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
    """Has an OSError of this block name ``path``, or a file in it, where it names ``unfinished``, a name of our making,
    or no file.

    Its type and errno stay.
    """
    try:
        with named(path):
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
def saying(text: str):
    """Has an OSError of this block, of a disk that is full for instance, say what stays and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise type(error)(f"{error}; {text}") from error
        raise type(error)(error.errno, f"{error.strerror}; {text}", error.filename) from error


@contextmanager
def replace_file(path) -> Iterator[Path]:
    """Gives a path to write to; what it holds is at ``path`` when the block ends without an error.

    What is there is replaced, and folders around it that are missing are made: so is whatever this package saves. The
    file gets the mode of a plainly created one, whoever wrote it. A pipe or a device is written to, what a link leads
    to is replaced. Raises what ``check_place`` raises, and OSError where writing fails; both name ``path``.
    """
    path = check_place(path)
    if discards():
        with tempfile.TemporaryDirectory() as folder:
            (unfinished := Path(folder, "discarded")).touch()
            yield unfinished
        return
    if written_through(path):
        with tempfile.TemporaryDirectory() as folder, _told_as(path, unfinished := Path(folder, "written")):
            unfinished.touch()
            yield unfinished
            with open(unfinished, "rb") as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
        return
    target = written_file(path)
    with folders_around(target), unfinished_file(target) as unfinished, _told_as(path, unfinished):
        mode = unfinished.stat().st_mode  # as the umask has it; safetensors makes files only their owner can read
        yield unfinished
        sync(unfinished)
        unfinished.chmod(mode)
        put_in_place(unfinished, target)


@contextmanager
def folders_around(path: Path) -> Iterator[None]:
    """Makes the folders around a path that are missing; on an error in this block those that are empty go again."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty: it is in use
            for folder in missing:
                folder.rmdir()
        raise


def put_in_place(unfinished: Path, target: Path) -> None:
    """Gives a file or folder its final name, also after the machine has lost power."""
    os.replace(unfinished, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Has what a file or a folder holds on the disk, also after the machine has lost power.

    Raises OSError, naming it, for a file; of a folder, that not all systems know to do.
    """
    is_folder = path.is_dir()
    with suppress(OSError) if is_folder else named(path):
        opened = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_text(path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all; half characters, which UTF-8 has not, become question marks.

    Raises as ``replace_file``.
    """
    with replace_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="replace", newline="\n")


@contextmanager
def _told_as(path: Path, unfinished: Path):
    """Errors of writing ``unfinished`` are told of ``path``."""
    with named_instead(unfinished, path):
        try:
            yield
        except SafetensorError as error:  # says which file of its own it could not write
            raise OSError(f"{path} could not be written: {str(error).partition(' at path ')[0]}") from error


def append_records(log, records: Iterable[dict], *, allow_nan: bool = False) -> None:
    """Adds a line of JSON for each record to a log, all of them or none; does nothing where ``log`` is None.

    A log that is not there is made, and the folders around it.
    Raises ValueError, unless ``allow_nan``, for a record that holds NaN or infinity, which JSON has not; OSError,
    naming the log, where writing fails.
    """
    if log is None:
        return
    lines = "".join(json.dumps(record, allow_nan=allow_nan) + "\n" for record in records).encode()
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with saying("the lines before are kept"), named(log), open(log, "ab", buffering=0) as file:
        before = file.tell() if Path(log).is_file() else None
        try:
            while lines:
                lines = lines[file.write(lines) :]
        except OSError:
            if before is not None:
                file.truncate(before)
            raise


# ---- names in files


def file_in(folder, name, source) -> Path:
    """``folder / name`` for a name that stands in a file: it has to be the plain name of a file of that folder.

    A name that another wrote must not lead out of the folder: paths (of any system), "..", and links that do are
    refused. Files of the Hugging Face cache are links into it, and stay in it.
    source: the file that the name stands in. Raises ValueError, naming it.
    """
    folder = Path(folder)
    is_plain = isinstance(name, str) and name.strip(". ") and name.isprintable() and len(name.encode()) < 256
    if not is_plain or "/" in name or "\\" in name or re.match("[A-Za-z]:", name):
        raise ValueError(f"{source} names the file {checks.shown(name)}; expected a plain name of a file in {folder}")
    path = folder / name
    home, file = (Path(os.path.realpath(each)) for each in (folder, path))
    if file.is_relative_to(home) or (home.parent.name == "snapshots" and file.is_relative_to(home.parent.parent)):
        return path
    raise ValueError(f"{source} names the file {name!r}, which is a link out of {folder}; put the file itself there")
