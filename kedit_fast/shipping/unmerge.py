"""A merge taken out of a checkpoint folder again, bit for bit.

    unmerge("llama-edited", "llama-again")                    # a new folder; or in place: unmerge("llama-edited")

A shard is restored as a new file and compared with the digest of the base's shard before it takes its name: whoever
has the old one open (loaded models read it through memory maps) keeps the weights that were loaded.
"""

import json
import shutil
from pathlib import Path

from kedit_fast.files import replace_file
from kedit_fast.progress import progress
from kedit_fast.shipping.folders import copy_file, copy_folder, new_folder, pieces, sha256_of
from kedit_fast.shipping.merge import BEFORE, FORMAT, KEPT, MANIFEST, ORIGINALS, VERSION, files_of, megabytes
from kedit_fast.shipping.stored_tensors import StoredTensor, stored_tensors
from kedit_fast.state import own_state

Patch = tuple[StoredTensor, StoredTensor]  # a place in the merged shard, and where the bytes lie that belong there


@own_state()
def unmerge(folder, out=None) -> Path:
    """Takes the last merge out of a folder that ``merge_checkpoint`` wrote; -> the folder restored.

    out: a folder, new or empty, for the restored checkpoint; None: in place. An undo in place that was interrupted may
        be run again.
    Raises ValueError, naming what differs, where the merged tensors or the kept ones are not what was written, and
    where a restored shard is not the base's; nothing is changed then.
    """
    folder = Path(folder)
    record = read_manifest(folder)
    patches = _checked_patches(folder, record)
    if out is not None:
        _restore_into(folder, Path(out), record, patches)
        return Path(out)
    with progress("restoring", megabytes(folder, list(patches))) as bar:
        for name, places in patches.items():
            with replace_file(folder / name) as unfinished:
                _restore(folder / name, unfinished, places, record["files"][name], bar)
    _drop_record(folder)
    return folder


def read_manifest(folder) -> dict:
    """What a merged folder says of its last merge: edits, who, when, base, digests. ValueError where there is none."""
    path = Path(folder) / KEPT / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {KEPT}/{MANIFEST}; expected a folder that merge_checkpoint (kedit-fast merge) wrote"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if (record["format"], record["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {record['format']!r}, version {record['version']!r}")
        missing = {"files", "tensors", "base", "edits"} - record.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return record
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); bring it back from a copy of the folder") from error


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
        if found not in (notes["merged"], notes["original"]):
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
        if (folder / KEPT / BEFORE).is_dir():
            copy_folder(folder / KEPT / BEFORE, unfinished / KEPT)


def _drop_record(folder: Path) -> None:
    """Removes the record of a merge that is undone; the one of the merge before it, if any, takes its place."""
    done = folder / f".{KEPT}.undone"
    shutil.rmtree(done, ignore_errors=True)
    (folder / KEPT).rename(done)
    if (done / BEFORE).is_dir():
        (done / BEFORE).rename(folder / KEPT)
    shutil.rmtree(done)
