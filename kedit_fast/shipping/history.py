"""A folder of edits that belong to one model, in versions: what was in force when, who changed it, and the way back.

    history = EditHistory("edits")
    history.add(edit, message="capital of Kazakhstan", who="Ana")      # version 1: (edit,)
    for edit in history.current:                                       # the chain in force, in order
        lm = lm.with_edit(edit)
    history.rollback(0)                                                # version 2, the same as version 0: no edit

Version 0 is the model as it is. A version is never changed nor removed: rolling back adds one. The folder holds
history.json (the list of versions) and edits/<sha256 of the file>.safetensors, each kept once; both are checked
against their digests whenever they are read.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from kedit_fast.basics import checks
from kedit_fast.basics.files import (
    check_format,
    existing_folder,
    file_in,
    named_instead,
    put_in_place,
    read_object,
    reading,
    replace_file,
)
from kedit_fast.basics.folders import sha256_of, write_json
from kedit_fast.edits.chain import check_follows
from kedit_fast.edits.changes import refuse_independent
from kedit_fast.edits.edit import Edit, check_alone, check_once
from kedit_fast.model.folder import refuse_model

FORMAT, VERSION = "kedit_fast.history", 1
MANIFEST, EDITS = "history.json", "edits"


@dataclass(frozen=True)
class Version:
    """What was in force from ``when`` on.

    number: 0 is the model without edits; edits: sha256 of the edit files in force, in order; message, who: as given;
    when: UTC, ISO 8601; rollback_of: the version that this one brought back, None where an edit was added
    """

    number: int
    edits: tuple[str, ...] = ()
    message: str = ""
    who: str = ""
    when: str = ""
    rollback_of: int | None = None

    def __post_init__(self):
        checks.whole("number", self.number)
        checks.listed("edits", self.edits, str, "digests", empty=True)
        for name in ("message", "who", "when"):
            checks.text(name, getattr(self, name), blank=True)
        checks.optional(checks.whole, "rollback_of", self.rollback_of)


class EditHistory:
    """The versions of a chain of edits in a folder, which the first ``add`` makes.

    Every reading method reads the folder anew, so several programs may work on one; additions wait for each other.
    Raises ValueError, naming the file, where something in the folder is damaged or missing.
    """

    def __init__(self, folder: checks.AnyPath) -> None:
        self.folder = checks.path("", folder, "the name of a folder of versions")
        if os.path.lexists(folder):
            existing_folder(folder, "a folder of versions")
            refuse_model(folder, "a folder of versions of edits")

    @property
    def versions(self) -> tuple[Version, ...]:
        """All versions, the oldest first; ``versions[n].number == n``."""
        return self._read()[1]

    @property
    def begun(self) -> bool:
        """Whether there are versions in the folder: one that nothing was added to has only the model as it is."""
        return (self.folder / MANIFEST).is_file()

    @property
    def fingerprint(self) -> str:
        """Of the model that the edits are for; empty before the first."""
        return self._read()[0]

    @property
    def current(self) -> tuple[Edit, ...]:
        """The edits in force, in the order in which they act."""
        return self.edits_of(self.versions[-1].number)

    def edits_of(self, number: int) -> tuple[Edit, ...]:
        """The edits that were in force in one version, each checked against its digest."""
        fingerprint, versions = self._read()
        return tuple(self._load(name, fingerprint) for name in _numbered(versions, number).edits)

    def add(self, edit: Edit, message: str = "", who: str = "", *, check_chain: bool = True) -> Version:
        """A new version: the current chain with ``edit`` at its end.

        check_chain: False to add an edit that was not made on top of the
            current chain. Their deltas add up, but neither was computed with the other in place.
        Raises ValueError, and adds nothing, for an edit of another model, an independent one, one that is in force
        already, a routed one beside another, and one that was made on top of other edits than those in force.
        """
        checks.instance("edit", edit, Edit, "an Edit; Edit.load reads a file")
        check_words(message, who)
        check_chain = checks.flag("check_chain", check_chain)
        refuse_independent(edit, "a version is in force for every text")
        if not edit.fingerprint:
            raise ValueError("this edit does not say for which model it was made, so nobody could tell where it fits")
        (self.folder / EDITS).mkdir(parents=True, exist_ok=True)
        with self._alone():
            fingerprint, versions = self._read()
            if fingerprint and edit.fingerprint != fingerprint:
                raise ValueError(
                    f"this edit was made for model {edit.fingerprint or '(not said)'}, {self.folder} holds edits of "
                    f"{fingerprint}; keep the edits of each model in a folder of their own"
                )
            below = self.edits_of(len(versions) - 1)
            check_once([*below, edit])
            check_alone([*below, edit])
            if check_chain:
                check_follows(edit, below)
            if not (self.folder / MANIFEST).exists():  # first: edits that nothing lists are of a manifest that is lost
                self._write(fingerprint, versions)
            new = Version(len(versions), (*versions[-1].edits, self._keep(edit)), message, who, now())
            self._write(fingerprint or edit.fingerprint, (*versions, new))
        return new

    def rollback(self, number: int, message: str = "", who: str = "") -> Version:
        """A new version that brings back the chain of version ``number``; the versions between stay in the history.

        Raises ValueError for a version that is not there or whose edits are damaged, FileNotFoundError where there is
        no folder.
        """
        check_words(message, who)
        existing_folder(self.folder, "a folder of versions")
        old = _numbered(self._read()[1], number)  # before a lock is left in the folder; versions are only ever added
        with self._alone():
            fingerprint, versions = self._read()
            self.edits_of(old.number)
            said = message or f"rollback to version {old.number}"
            new = Version(len(versions), old.edits, said, who, now(), rollback_of=old.number)
            self._write(fingerprint, (*versions, new))
        return new

    # ---- the folder

    @contextmanager
    def _alone(self):
        """No other program adds a version inside this context; the system frees the lock of a killed one."""
        try:
            import fcntl
        except ImportError:  # not a Unix: the last of two that write at the same moment wins
            yield
            return
        with open(self.folder / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> tuple[str, tuple[Version, ...]]:
        """(fingerprint, versions) of the manifest."""
        path = self.folder / MANIFEST
        if not path.exists():
            if (self.folder / EDITS).is_dir() and any((self.folder / EDITS).glob("*.safetensors")):
                raise ValueError(f"{path} is gone, but its edits are there; bring it back from a copy of the folder")
            return "", (Version(0, message="the model as it is"),)
        with reading(path, "expected what EditHistory writes"):
            record = read_object(path, "what EditHistory writes")
            check_format(record, FORMAT, version=VERSION)
            if record["sha256"] != _sha256_of_list(record["fingerprint"], record["versions"]):
                raise ValueError("its digest does not fit its contents; was it edited by hand?")
            versions = tuple(Version(**(each | {"edits": tuple(each["edits"])})) for each in record["versions"])
            if not versions or [version.number for version in versions] != list(range(len(versions))):
                raise ValueError("its versions are not numbered from 0 on")
            return record["fingerprint"], versions

    def _write(self, fingerprint: str, versions: Sequence[Version]) -> None:
        listed = [asdict(version) | {"edits": list(version.edits)} for version in versions]
        record = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint, "versions": listed}
        record["sha256"] = _sha256_of_list(fingerprint, listed)
        with replace_file(self.folder / MANIFEST) as unfinished:
            write_json(unfinished, record)

    def _keep(self, edit: Edit) -> str:
        """Saves an edit under the digest of its file, which it returns."""
        new = self.folder / EDITS / ".new"  # additions wait for each other; what a killed one left is written over
        try:
            with named_instead(new, self.folder / EDITS):
                edit.save(new)
                name = sha256_of(new)
                put_in_place(new, self.folder / EDITS / f"{name}.safetensors")
        finally:
            new.unlink(missing_ok=True)
        return name

    def _load(self, name: str, fingerprint: str) -> Edit:
        path = file_in(self.folder / EDITS, f"{name}.safetensors", self.folder / MANIFEST)
        if not path.exists():
            raise ValueError(f"{path} is missing; bring it back from a copy of the folder")
        if sha256_of(path) != name:
            raise ValueError(f"{path} is damaged: its digest is not its name; bring it back from a copy of the folder")
        edit = Edit.load(path)
        if edit.fingerprint != fingerprint:
            raise ValueError(f"{path} is an edit of model {edit.fingerprint}, {MANIFEST} says {fingerprint}")
        return edit


# ---- chains


def _numbered(versions: Sequence[Version], number: int) -> Version:
    return versions[checks.whole("number", number, most=len(versions) - 1)]


def check_words(message, who) -> None:
    """Raises BadArgument unless both are texts, for the record."""
    for name, words in (("message", message), ("who", who)):
        checks.text(name, words, blank=True)


def now() -> str:
    """UTC, ISO 8601, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sha256_of_list(fingerprint: str, versions: list) -> str:
    return hashlib.sha256(json.dumps([fingerprint, versions], sort_keys=True).encode()).hexdigest()
