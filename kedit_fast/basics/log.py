"""The .jsonl log of a run that may be killed and gone on with: whole, and each line once."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from kedit_fast.basics.files import append_records, named


class Log:
    """A .jsonl log of work that may go on after it was killed: whole, and each line once.

    path: None for no log; options: of ``append_records``
    """

    def __init__(self, path, **options):
        self._path, self._options = path, options
        self._there: Counter[bytes] | None = None

    def add(self, records: Iterable[dict], again: bool = False) -> None:
        """Adds a line for each record; raises as ``append_records``.

        again: of a part that was found, whose lines an earlier run may have added: those that are there are passed
        over, and one that was cut short is written anew
        """
        if again and self._path is not None:
            records = [record for record in records if not self._has(record)]
        append_records(self._path, records, **self._options)

    def _has(self, record: dict) -> bool:
        if self._there is None:
            self._there = Counter(_line_digest(line) for line in _whole_lines(Path(self._path)))
        line = _line_digest(json.dumps(record).encode())
        self._there[line] -= 1
        return self._there[line] >= 0


def _line_digest(line: bytes) -> bytes:
    return hashlib.sha256(line).digest()


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a log, without their ends; what stands behind the last end was cut short, and goes."""
    if not path.is_file():
        return
    with named(path), open(path, "rb+") as file:
        whole = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            yield line[:-1]
        file.truncate(whole)
