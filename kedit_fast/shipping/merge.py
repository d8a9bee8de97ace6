"""Edits written into a checkpoint folder, shard by shard.

    merge_checkpoint("llama", edit, "llama-edited")           # or a chain: [first, second]

The model is never in memory. W + Δ has the shape and dtype of W, so a shard of the merged checkpoint is the source's
shard with some byte ranges replaced: files are copied in pieces, and one edited tensor at a time is read, summed and
written over its place. The merged folder keeps the replaced bytes and their digests in ``kedit_fast_merge/``, for
unmerge.py; a subfolder, because some loaders take every safetensors file that lies beside the model's own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kedit_fast.basics import checks
from kedit_fast.basics.folders import check_new_folder, copy_file, copy_folder, new_folder, sha256_of, write_json
from kedit_fast.basics.progress import progress
from kedit_fast.basics.state import own_state
from kedit_fast.edits.chain import check_chain
from kedit_fast.edits.changes import only_weights
from kedit_fast.edits.deltas import check_fits, edited_weight
from kedit_fast.edits.edit import Edit, check_once, digest, edit_list
from kedit_fast.model.disk import Disk, open_on_disk
from kedit_fast.model.family import auto_class, family_of, is_conv1d, projection
from kedit_fast.model.fingerprint import fingerprint
from kedit_fast.model.folder import INDEX, Checkpoint, read_config
from kedit_fast.model.opening import named_folder
from kedit_fast.model.stored_tensors import DTYPES, StoredTensor, stored_tensors, write_parts
from kedit_fast.shipping.history import check_words, now

FORMAT, VERSION = "kedit_fast.merge", 1
KEPT, MANIFEST, ORIGINALS, BEFORE = "kedit_fast_merge", "manifest.json", "original.safetensors", "before"
# Weights in other files than those the checkpoint is read from: left as they are they would be the unedited model's.
OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".safetensors", ".gguf", ".onnx", ".onnx_data", ".index.json",
)  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """What ``merge_checkpoint`` wrote.

    folder: where; fingerprint: of the merged model, which a later edit of it is made for; tensors: names of the edited
    ones, in file order; left_out: files of the source that were not copied: weights in another format, hidden files
    """

    folder: Path
    fingerprint: str
    tensors: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where an edited weight lies: its layer, its bytes, whether it is stored [in, out]."""

    layer: int
    role: str
    stored: StoredTensor
    transposed: bool


@own_state()
def merge_checkpoint(
    source: checks.AnyPath,
    edits: Edit | Sequence[Edit],
    out: checks.AnyPath,
    *,
    who: str = "",
    message: str = "",
    force: bool = False,
) -> Merged:
    """Writes a copy of the checkpoint folder ``source`` with W + Δ in its edited layers; whole or not at all.

    The tensors are bit for bit those of ``edit.apply``, one edit after the other, on a model loaded in the
    checkpoint's dtype. Configuration and tokenizer files are copied.

    source: a folder with safetensors weights, one file or shards with their index; or the name of a model that the
    package index carries, as ``open_model`` takes it
    edits: one, or a chain in its order; out: a folder that is new or empty
    who, message: for the manifest; force: also for another base model than the edits', or edits out of their chain

    Cost: the folder read and written once; memory: one edited tensor, its sum, and 128 MB of fp64.
    Raises ValueError, with nothing written, for a wrong base, a quantized or pickled checkpoint, one with an adapter,
    independent edits, the same edit twice, an ``out`` that is not empty, and sums that are not finite;
    FileNotFoundError for no checkpoint.
    """
    edits, force = tuple(edit_list(edits)), checks.flag("force", force)
    check_words(message, who)
    source, out = checks.path("source", named_folder(source)), check_new_folder(out)
    _check_edits(edits, force)
    model, disk, checkpoint = open_checkpoint(source)
    base = fingerprint(model, disk)
    for edit in edits:
        if edit.fingerprint != base and not force:
            raise ValueError(
                f"the edit was made for model {edit.fingerprint or '(not said)'}, {source} is {base}; name the folder "
                "of its own base model, or, if that is meant (a fine-tuned copy), merge with force=True (--force)"
            )
    places = _places(model, checkpoint, edits)
    shards = checkpoint.files
    copied, left_out = files_of(source, shards)
    with new_folder(out) as unfinished, progress("merging", megabytes(source, copied)) as bar:
        files = {name: copy_file(source / name, unfinished / name, bar) for name in copied}
        kept = unfinished / KEPT
        kept.mkdir()
        if (source / KEPT).is_dir():
            copy_folder(source / KEPT, kept / BEFORE)
        original = _keep_originals(kept / ORIGINALS, places)
        written = {place.stored.name: _write_merged(place, edits, unfinished) for place in places}
        record: dict[str, Any] = {
            "format": FORMAT, "version": VERSION, "when": now(), "who": who, "message": message,
            "base": {"folder": source.absolute().name, "fingerprint": base},
            "fingerprint": checkpoint_fingerprint(unfinished),
            "files": {name: files[name] for name in shards},
            "tensors": {place.stored.name: _noted(place, original, written) for place in places},
            "edits": [_described(edit) for edit in edits],
        }  # fmt: skip
        write_json(kept / MANIFEST, record)
    return Merged(out, record["fingerprint"], tuple(written), tuple(left_out))


# ---- the checkpoint


def checkpoint_fingerprint(folder) -> str:
    """The fingerprint of the model in a checkpoint folder, of which little is read."""
    model, disk, _ = open_checkpoint(Path(folder))
    return fingerprint(model, disk)


def _check_edits(edits, force):
    for edit in edits:
        only_weights(edit, "a checkpoint answers for all")
    if not any(edit.layers for edit in edits):
        raise ValueError("nothing to merge: the edits have no deltas")
    (check_once if force else check_chain)(edits)


def open_checkpoint(folder: Path) -> tuple[nn.Module, Disk, Checkpoint]:
    """(the model without its layers' weights, their source, the tensors' places) of a checkpoint folder."""
    _check_folder(folder)
    config = read_config(folder)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{folder} is quantized, its packed weights cannot be written: merge into the checkpoint it was made from "
            "and quantize that again, or serve the edit beside it as an adapter: export_peft (kedit-fast merge --peft)"
        )
    family = family_of(config)
    model_class = auto_class(family)._model_mapping[type(config)]
    checkpoint = Checkpoint(folder, model_class.base_model_prefix, family.stored_as)
    first = next(iter(checkpoint.tensors(checkpoint.files[0]).values()))
    stored_as = DTYPES.get(first.dtype)  # no cast of the embedding
    model, disk = open_on_disk(checkpoint, config, model_class, torch.device("cpu"), stored_as)
    return model, disk, checkpoint


def _check_folder(folder: Path):
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; expected a checkpoint's folder, as save_pretrained makes it"
        )
    single, index = folder / "model.safetensors", folder / INDEX
    pickled = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth") for p in folder.glob(suffix))
    if not single.exists() and not index.exists() and pickled:
        raise ValueError(
            f"{folder} holds pickled weights ({pickled[0]}), which run code when they are read; save it as safetensors "
            "first: model.save_pretrained(folder)"
        )
    if single.exists() and index.exists():
        raise ValueError(f"{folder} holds both {single.name} and {index.name}; remove the one that is not the model's")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds a PEFT adapter, which would be added to the merged weights: merge_and_unload() it first"
        )


def _places(model: nn.Module, checkpoint: Checkpoint, edits) -> list[_Place]:
    """Where the edited weights lie, in file order; ValueError where a delta does not fit or a weight is packed."""
    family, places = family_of(model.config), []
    for layer, role in sorted({place for edit in edits for place in edit.weights}):
        transposed = is_conv1d(projection(model, layer, role))
        stored = checkpoint.stored(f"{family.layers}.{layer}.{family.roles[role]}.weight")
        if stored.dtype not in DTYPES:
            raise ValueError(
                f"{stored.name} is stored as {stored.dtype}: a quantized checkpoint, whose packed weights cannot be "
                "written. Merge into the one it was made from, or use export_peft (kedit-fast merge --peft)"
            )
        shape = stored.shape[::-1] if transposed else stored.shape
        for edit in edits:
            if (layer, role) in edit.weights:
                check_fits(edit.weights[layer, role], shape, f"layer {layer}", "the checkpoint's")
        places.append(_Place(layer, role, stored, transposed))
    return sorted(places, key=lambda place: (place.stored.file.name, place.stored.begin))


def files_of(folder: Path, shards: list[str]) -> tuple[list[str], list[str]]:
    """(names to copy, names to leave out) of a checkpoint's files, folders within it included."""
    copied: list[str] = []
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        parts = Path(name).parts
        if not path.is_file() or parts[0] == KEPT:
            continue
        stale = path.name.endswith(OTHER_WEIGHTS) and name not in (*shards, INDEX)
        hidden = any(part.startswith(".") for part in parts)
        (left_out if stale or hidden else copied).append(name)
    return copied, left_out


# ---- bytes


def _keep_originals(path: Path, places: list[_Place]) -> dict[str, str]:
    """Writes the tensors that will be replaced to one safetensors file; -> {name: sha256 of its bytes}."""
    write_parts(path, [place.stored for place in places])
    return {part.name: sha256_of(part.file, part.begin, part.size) for part in stored_tensors(path)}


@torch.no_grad()
def _write_merged(place: _Place, edits, folder: Path) -> str:
    """Writes W + Δ over its place in the copied shard; -> the sha256 of the bytes written."""
    target = place.stored.at(folder / place.stored.file.name)
    stored = target.read()
    weight = stored.T if place.transposed else stored
    for edit in edits:
        delta = edit.weights.get((place.layer, place.role))
        weight = weight if delta is None else edited_weight(weight, delta)
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"layer {place.layer}: the checkpoint's weight holds NaN or infinity, or W + Δ is beyond the range of "
            f"{weight.dtype}; nothing was written"
        )
    stored = weight.T if place.transposed else weight
    bits = stored.contiguous().reshape(-1).view(torch.uint8).numpy().data
    target.overwrite([bits])
    return hashlib.sha256(bits).hexdigest()


def _noted(place: _Place, original: dict[str, str], written: dict[str, str]) -> dict:
    name = place.stored.name
    digests = {"original": original[name], "merged": written[name]}
    return {"file": place.stored.file.name, "layer": place.layer, **digests}


def _described(edit: Edit) -> dict:
    return {
        "method": edit.method, "hparams": edit.hparams, "fingerprint": edit.fingerprint, "digest": digest(edit),
        "facts": [fact.to_record() for fact in edit.facts], "provenance": edit.provenance,
    }  # fmt: skip


def megabytes(folder: Path, names: list[str]) -> float:
    return round(sum((folder / name).stat().st_size for name in names) / 1e6, 1)
