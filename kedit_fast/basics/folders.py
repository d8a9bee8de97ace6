"""Writing folders whole or not at all, and files of any size in pieces."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kedit_fast.basics import checks
from kedit_fast.basics.files import check_folder, folders_around, named, named_instead, put_in_place, sync
from kedit_fast.basics.unfinished import unfinished_folder

PIECE = 8 << 20  # bytes of a file held at a time


@contextmanager
def new_folder(path):
    """Gives an empty folder beside ``path``; it takes the name ``path`` when the block ends without an error.

    Folders around it that are missing are made. On an error nothing of it stays, and what a killed run left is deleted
    by the next one. Raises ValueError where ``path`` is a file or holds something, and where another run writes there,
    and OSError, naming ``path`` or a file in it, where writing fails.
    """
    path = check_new_folder(path)
    with folders_around(path), unfinished_folder(path) as unfinished, named_instead(unfinished, path):
        check_new_folder(path)  # another run may have ended since
        yield unfinished
        sync_folder(unfinished)
        check_new_folder(path)
        if path.exists():  # empty; some systems rename onto nothing only
            path.rmdir()
        put_in_place(unfinished, path)


def sync_folder(folder: Path) -> None:
    """Has a folder and all that lies in it on the disk, as it must be before it takes its final name."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def check_new_folder(path) -> Path:
    """The path, if ``new_folder`` can make a folder there; raises as it does."""
    path = checks.path("", path, "the name of a folder to make")
    if path.is_symlink():
        raise ValueError(f"{path} is a link; expected a folder that is new or empty")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "is not empty" if path.is_dir() else "is a file"
        raise ValueError(f"{path} {what}; expected a folder that is new or empty")
    return check_folder(path)


def pieces(path, begin: int = 0, size: int | None = None) -> Iterator[bytes]:
    """The bytes of a file from ``begin`` on, ``size`` of them (default: all), at most ``PIECE`` at a time.

    Raises OSError, naming the file, where it ends before or cannot be read.
    """
    with named(path), open(path, "rb") as file:
        file.seek(begin)
        left = os.fstat(file.fileno()).st_size - begin if size is None else size
        while left > 0:
            piece = file.read(min(PIECE, left))
            if not piece:
                raise OSError(f"{path} ends {left} bytes early; it was cut short")
            left -= len(piece)
            yield piece


def sha256_of(path, begin: int = 0, size: int | None = None) -> str:
    """The sha256 of a file, or of ``size`` bytes of it from ``begin`` on, in hex."""
    made = hashlib.sha256()
    for piece in pieces(path, begin, size):
        made.update(piece)
    return made.hexdigest()


def copy_file(source: Path, target: Path, bar=None) -> str:
    """Copies a file in pieces, folders around ``target`` included; -> the sha256 of its contents.

    bar: a ``progress`` bar, advanced by megabytes
    """
    made = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with named(target), open(target, "wb") as file:
        for piece in pieces(source):
            file.write(piece)
            made.update(piece)
            if bar is not None:
                bar.advance(len(piece) / 1e6, source.name)
    return made.hexdigest()


def copy_folder(source: Path, target: Path) -> None:
    """Copies the files of a folder and of the folders in it, in pieces."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            copy_file(file, target / file.relative_to(source))


def write_json(path: Path, record: dict) -> None:
    """A record for people to read as well: indented, letters of all languages as they are."""
    with named(path):
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
