"""Fact files: .json and .jsonl, as records with their places, and what must be said once they are read."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import islice
from typing import Any

from kedit_fast.basics import checks
from kedit_fast.basics.packed import unpacked
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import counted, first_few, json_kind, not_text

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
NEARLY = 0.9  # of difflib's ratio: "paraphrase_prompt" and "neighbourhood" are, "attribute_prompts" is not
SHOWN = 3  # records named one by one in a warning


class Notes:
    """What must be said of records once they are read: each kind is one sentence with names and counts."""

    def __init__(self, known: Iterable[str] = ()):
        """known: names of fields that are read; a field that is nearly one of them is said to be"""
        self._known = sorted(known)
        self.unused: Counter[str] = Counter()  # {field or kind of input: times}
        self.repeated: Counter[str] = Counter()  # {JSON key given twice in one object: times}
        self.spelled: list[str] = []  # records whose subject was found spelled otherwise
        self.skipped: list[str] = []  # what is wrong with each record that was passed over

    def sentences(self) -> list[str]:
        """A sentence for each kind of thing there is to say."""
        said = []
        if self.unused:
            said.append(f"read and not used: {_counted(self.unused, self._near)}")
        if self.repeated:
            said.append(f"given twice in one object, and the last is taken: {_counted(self.repeated)}")
        if self.spelled:
            said.append(
                "the subject is spelled otherwise than in its prompt (case, quotes, Unicode form, spaces) and taken as "
                + f"it stands there, {_some(self.spelled)}"
            )
        if self.skipped:
            said.append(f"passed over, {_some(self.skipped)}")
        return said

    def tell(self, path, made: Sequence) -> None:
        """Warns of what there is to say of a file. Raises ValueError where nothing was ``made`` of its records."""
        if not made:
            raise ValueError(f"{path}: no record makes a fact; the first: {self.skipped[0]}")
        for sentence in self.sentences():
            warn(f"{path}: {sentence}")

    def misspelled(self, record) -> str:
        """For the message on a record that makes no fact, its fields that are nearly one that is read."""
        near = [(name, self._near(name)) for name in islice(record, 100)] if isinstance(record, dict) else []
        return "".join(f"; is {name!r} meant to be {known!r}?" for name, known in near if known)

    def _near(self, name: str) -> str | None:
        return None if name in self._known else next(iter(get_close_matches(name, self._known, 1, NEARLY)), None)


def _counted(counts: Counter, near: Callable[[str], str | None] = lambda name: None) -> str:
    shown = []
    for name, n in counts.items():
        times = f"{n:,} times" if n > 1 else "once"
        shown.append(f"{name} ({times}{f'; is it {near(name)!r}?' if near(name) else ''})")
    return ", ".join(shown)


def _some(records: list[str]) -> str:
    return f"{counted(len(records), 'record')}: {first_few(records, SHOWN)}"


# ---- files


def read_records(path, notes: Notes | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a fact file; place is "<file>: record <i>", with the line number for JSON lines.

    path: .json or .json.gz (one array), .jsonl or .jsonl.gz (one record a line, read as far as it is asked for; a line
    that is no JSON is yielded as the ValueError that says so). notes: told of keys that an object has twice.
    Raises ValueError for another suffix, unreadable JSON (with its line), a broken gzip file, text that is not UTF-8,
    or a file without records; OSError where the file cannot be opened.
    """
    path, notes = checks.path("path", path), notes or Notes()
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: a fact file ends in one of {', '.join(SUFFIXES)}")
    read = _read_lines if ".jsonl" in path.suffixes[-2:] else _read_array
    found = False
    try:
        with (
            unpacked(path) if path.suffix == ".gz" else open(path, "rb") as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig") as file,
        ):
            for item in read(path, file, notes):
                found = True
                yield item
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {not_text(error)}") from error
    if not found:
        raise ValueError(f"{path}: holds no records")


def _read_array(path, file, notes):
    records = read_json(file.read(), path, notes)
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a JSON array of records, found {json_kind(records)}")
    for index, record in enumerate(records):
        yield f"{path}: record {index}", record


def _read_lines(path, file, notes):
    index = 0
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = read_json(line, path, notes, number)
        except ValueError as error:
            record = error
        yield f"{path}: record {index} (line {number})", record
        index += 1


def read_json(text: str, path, notes: Notes, line: int | None = None):
    """The value of a JSON text; ValueError, with the file and the line, where it has none. line: a line's own number.

    notes: told of keys that an object has twice
    """
    try:
        return json.loads(text, object_pairs_hook=partial(_object, notes))
    except json.JSONDecodeError as error:
        hint = "; for one record a line, name the file .jsonl" if line is None and error.msg == "Extra data" else ""
        place = f"{path}: line {line or error.lineno}, column {error.colno}"
        raise ValueError(f"{place}: not JSON ({error.msg}){hint}") from error
    except (RecursionError, ValueError) as error:  # brackets by the thousand; a number of thousands of digits
        raise ValueError(f"{path}{f': line {line}' if line else ''}: JSON that cannot be read ({error})") from error


def _object(notes: Notes, pairs: list[tuple[str, Any]]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        notes.repeated.update({key: n - 1 for key, n in Counter(key for key, _ in pairs).items() if n > 1})
    return made
