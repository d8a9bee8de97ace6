"""A merge taken out of a checkpoint folder again, bit for bit.

    unmerge("llama-edited", "llama-again")                    # a new folder; or in place: unmerge("llama-edited")

A shard is restored as a new file and compared with the digest of the base's shard before it takes its name: whoever
has the old one open (loaded models read it through memory maps) keeps the weights that were loaded.
"""

import shutil
from pathlib import Path

from kedit_fast.basics import checks
from kedit_fast.basics.files import check_format, file_in, put_in_place, read_object, reading, replace_file
from kedit_fast.basics.folders import check_new_folder, copy_file, copy_folder, new_folder, pieces, sha256_of
from kedit_fast.basics.progress import progress
from kedit_fast.basics.state import own_state
from kedit_fast.model.stored_tensors import StoredTensor, stored_tensors
from kedit_fast.shipping.merge import (
    BEFORE,
    FORMAT,
    KEPT,
    MANIFEST,
    ORIGINALS,
    VERSION,
    checkpoint_fingerprint,
    files_of,
    megabytes,
)

UNDONE = f".{KEPT}.undone"
Patch = tuple[StoredTensor, StoredTensor]  # a place in the merged shard, and where the bytes lie that belong there


@own_state()
def unmerge(folder: checks.AnyPath, out: checks.AnyPath | None = None) -> Path:
    """Takes the last merge out of a folder that ``merge_checkpoint`` wrote; -> the folder restored.

    out: a folder, new or empty, for the restored checkpoint; None: in place. An undo in place that was interrupted may
        be run again.
    Raises ValueError, naming what differs, where the merged tensors or the kept ones are not what was written, and
    where a restored shard is not the base's; nothing is changed then. Last, where the restored model is not the base
    that the manifest names, for its configuration was changed: in place, the shards are restored then, and the manifest
    stays.
    """
    folder, out = checks.path("folder", folder), checks.optional(checks.path, "out", out)
    if out is not None:
        check_new_folder(out)
    record = read_manifest(folder)
    if out is None and (folder / UNDONE).exists():  # killed when all was restored
        _drop_record(folder)
        return folder
    patches = _checked_patches(folder, record)
    if out is not None:
        _restore_into(folder, out, record, patches)
        return out
    with progress("restoring", megabytes(folder, list(patches))) as bar:
        for name, places in patches.items():
            with replace_file(folder / name) as unfinished:
                _restore(folder / name, unfinished, places, record["files"][name], bar)
    _check_base(folder, folder, record)
    put_in_place(folder / KEPT, folder / UNDONE)
    _drop_record(folder)
    return folder


def read_manifest(folder) -> dict:
    """What a merged folder says of its last merge: edits, who, when, base, digests. ValueError where there is none."""
    folder = checks.path("folder", folder)
    path = folder / UNDONE / MANIFEST
    path = path if path.is_file() else folder / KEPT / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {KEPT}/{MANIFEST}; expected a folder that merge_checkpoint (kedit-fast merge) wrote"
        )
    with reading(path, "bring it back from a copy of the folder"):
        record = read_object(path, "what merge_checkpoint writes")
        check_format(record, FORMAT, version=VERSION)
        _check_record(record, Path(folder))
        return record


def _check_record(record: dict, folder: Path) -> None:
    """Raises ValueError for parts that are missing or of another kind, and for names that lead out of the folder."""
    missing = {"files", "tensors", "base", "edits"} - record.keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    for name in record["files"]:
        file_in(folder, name, "it")
    for name, notes in record["tensors"].items():
        absent = {"file", "original", "merged"} - notes.keys()
        if absent or notes["file"] not in record["files"]:
            raise ValueError(f"tensor {name!r} has no {', '.join(sorted(absent)) or 'file of the checkpoint'}")
    texts = (record["base"]["fingerprint"], *record["files"].values())
    lists = (edit["facts"] for edit in record["edits"])
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(facts, list) for facts in lists):
        raise ValueError("a digest, a fingerprint or a list of facts is none")


def _check_base(folder: Path, restored: Path, record: dict) -> None:
    """Raises ValueError unless the restored files are the model that was merged into."""
    found, expected = checkpoint_fingerprint(restored), record["base"]["fingerprint"]
    if found != expected:
        raise ValueError(
            f"{folder}: the edited tensors are as they were, and with them it is model {found}, not {expected}, which "
            f"the manifest names; its config.json was changed since, or {KEPT}/{MANIFEST}"
        )


def _checked_patches(folder: Path, record: dict) -> dict[str, list[Patch]]:
    """{shard: what to write where in it}, after the digests of every byte that is replaced and of what replaces it."""
    path = folder / KEPT / ORIGINALS
    kept = {tensor.name: tensor for tensor in stored_tensors(path)}
    patches: dict[str, list[Patch]] = {}
    for name, notes in record["tensors"].items():
        shard = folder / notes["file"]
        original = kept.get(name)
        if original is None or sha256_of(path, original.begin, original.size) != notes["original"]:
            raise ValueError(f"{path}: tensor {name!r} is missing or damaged; nothing was undone")
        target = next((tensor for tensor in stored_tensors(shard) if tensor.name == name), None)
        found = target and sha256_of(shard, target.begin, target.size)
        # An undo in place that was interrupted has restored some of them already.
        if target is None or found not in (notes["merged"], notes["original"]):
            raise ValueError(
                f"{shard}: tensor {name!r} is not what the merge wrote (trained on, quantized, or merged by another "
                "tool since), so nothing was undone"
            )
        patches.setdefault(notes["file"], []).append((target, original))
    return patches


def _restore(shard: Path, target: Path, places: list[Patch], expected: str, bar) -> None:
    """Writes the base's shard to ``target``; ValueError where its digest is another."""
    copy_file(shard, target, bar)
    for place, original in places:
        place.at(target).overwrite(pieces(original.file, original.begin, original.size))
    if sha256_of(target) != expected:
        raise ValueError(
            f"{shard}: with the merged tensors taken out it is not the base's file; another tensor of it was changed "
            "after the merge, so nothing was undone"
        )


def _restore_into(folder: Path, out: Path, record: dict, patches: dict[str, list[Patch]]) -> None:
    shards = sorted(record["files"])
    copied, _ = files_of(folder, shards)
    with new_folder(out) as unfinished, progress("restoring", megabytes(folder, copied)) as bar:
        for name in copied:
            if name in shards:
                _restore(folder / name, unfinished / name, patches.get(name, []), record["files"][name], bar)
            else:
                copy_file(folder / name, unfinished / name, bar)
        _check_base(folder, unfinished, record)
        if (folder / KEPT / BEFORE).is_dir():
            copy_folder(folder / KEPT / BEFORE, unfinished / KEPT)


def _drop_record(folder: Path) -> None:
    """Removes the record of a merge that is undone, once it has its other name; the one of the merge before it, if any,
    takes its place."""
    done = folder / UNDONE
    if (done / BEFORE).is_dir() and not (folder / KEPT).exists():
        put_in_place(done / BEFORE, folder / KEPT)
    shutil.rmtree(done, ignore_errors=True)
