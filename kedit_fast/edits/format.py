"""The file of an edit: one safetensors file, no pickle; written as version 2, read as version 1 too."""

import hashlib
from collections.abc import Callable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_fast.basics.files import replace_file
from kedit_fast.basics.parts import json_of, json_tensor
from kedit_fast.basics.words import reason
from kedit_fast.edits.changes import KINDS, WeightChange
from kedit_fast.facts.fact import Fact

FORMAT, VERSION = "kedit_fast.edit", 2


def _sha256_of(tensors: dict[str, Tensor]) -> Tensor:
    """[32] uint8: of all tensors of a file, bit for bit."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        made.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return torch.frombuffer(bytearray(made.digest()), dtype=torch.uint8)


def _tensors_of(edit):
    """{name in the file: tensor}; ``_fields_of`` is its inverse."""
    tensors = {} if edit.values is None else {"values": edit.values}
    tensors |= {f"keys.{layer}": key for layer, key in edit.keys.items()}
    for number, change in enumerate(edit.changes):
        tensors |= {f"changes.{number}.{name}": tensor for name, tensor in change.tensors().items()}
    return tensors


def _fields_of(record: dict, tensors: dict[str, Tensor]) -> dict:
    """The fields of an Edit from the record and the tensors of a file."""
    parts = _parts_of(tensors)
    said = record.pop("changes")
    changes = [
        KINDS[each.pop("kind")].of(each, {name: parts.pop(("changes", str(number), name)) for name in names})
        for number, each in enumerate(said)
        for names in [[name for kind, at, name in parts if (kind, at) == ("changes", str(number))]]
    ]
    return record | {"changes": tuple(changes)} | _rows_of(parts)


def _fields_of_1(record: dict, tensors: dict[str, Tensor]) -> dict:
    """The same of a file of version 1, which knew changes of down projections alone."""
    parts = _parts_of(tensors)
    layers = sorted({int(at) for kind, at, _ in parts if kind == "deltas"})
    changes = []
    for layer in layers:
        names = [name for kind, at, name in parts if (kind, at) == ("deltas", str(layer))]
        of_layer = {name: parts.pop(("deltas", str(layer), name)) for name in names}
        owners = parts.pop(("owners", str(layer), ""), None)
        of_layer |= {} if owners is None else {"owners": owners}
        changes.append(WeightChange.of({"layer": layer}, of_layer))
    return record | {"changes": tuple(changes)} | _rows_of(parts)


def _parts_of(tensors: dict[str, Tensor]) -> dict[tuple[str, str, str], Tensor]:
    """{(kind, place, name): tensor} by the dots in a tensor's name."""
    split = {name: (*name.split("."), "", "") for name in tensors}
    return {split[name][:3]: tensor for name, tensor in tensors.items()}


def _rows_of(parts: dict[tuple[str, str, str], Tensor]) -> dict:
    """values and keys, which nothing else may stand beside."""
    values = parts.pop(("values", "", ""), None)
    keys = {int(at): parts.pop((kind, at, "")) for kind, at, _ in list(parts) if kind == "keys"}
    if parts:
        raise ValueError(f"no change has the tensors {sorted('.'.join(part) for part in parts)}")
    return {"values": values, "keys": keys}


def _read(path):
    """({name: tensor}, version) of an edit's file; ValueError if it is not one."""
    expected = f"expected a {FORMAT} file of version 1 to {VERSION}, as Edit.save writes it"
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder; {expected} (where it holds versions of edits: EditHistory(folder).current)"
        )
    try:
        with safe_open(path, "pt") as file:
            name, _, version = (file.metadata() or {}).get("format", "").partition(" ")
            if name != FORMAT:
                raise ValueError(f"{path} is a safetensors file but no edit; {expected}")
            if version not in map(str, range(1, VERSION + 1)):
                raise ValueError(f"{path} is an edit of version {version}; {expected}")
            names = file.keys()  # (not iterable itself)
            return {name: file.get_tensor(name) for name in names}, int(version)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or no safetensors file ({error}); {expected}") from error


def _storable(tensor):
    """A contiguous copy on the CPU: safetensors takes neither views with strides nor shared memory."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def write_edit(edit, path) -> None:
    """Writes one file, whole or not at all; equal edits make equal files, byte for byte."""
    tensors = {name: _storable(tensor) for name, tensor in _tensors_of(edit).items()}
    record = {name: getattr(edit, name) for name in ("method", "hparams", "fingerprint", "contexts", "provenance")}
    record |= {"facts": [fact.to_record() for fact in edit.facts], "tensors": sorted(tensors)}
    record["changes"] = [{"kind": change.kind} | change.record() for change in edit.changes]
    # A tensor, not the file's header: that ends at 100 MB, which 20,000 facts with 5 kB of probes each pass.
    tensors["record"] = json_tensor(record)
    tensors["sha256"] = _sha256_of(tensors)
    with replace_file(path) as unfinished:
        # One entry: of several, safetensors writes another order each time, and equal edits are to be equal files.
        save_file(tensors, unfinished, metadata={"format": f"{FORMAT} {VERSION}"})


def read_edit(path, make: Callable):
    """``make(**fields)`` of the edit in a file, on the CPU. Raises ValueError, naming the file, for anything else."""
    tensors, version = _read(path)
    try:
        given = tensors.pop("sha256", None)  # files of before have none
        if given is not None and not torch.equal(given, _sha256_of(tensors)):
            raise ValueError("its contents are not those that were saved: their digest is another")
        record = json_of(tensors.pop("record"))
        expected = record.pop("tensors")
        if sorted(tensors) != expected:
            raise ValueError(f"expected the tensors {expected}, found {sorted(tensors)}")
        record["facts"] = tuple(Fact.from_record(fact) for fact in record["facts"])
        return make(**(_fields_of_1 if version == 1 else _fields_of)(record, tensors))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is a damaged edit ({reason(error)}); expected what Edit.save wrote") from error
