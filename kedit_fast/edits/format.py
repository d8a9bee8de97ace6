"""The file of an edit: one safetensors file without pickle, of tensors and a JSON record that says what they are."""

import hashlib

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kedit_fast.basics.words import brief
from kedit_fast.edits.changes import PromptChange, WeightChange
from kedit_fast.edits.erasures import BiasChange, ErasureChange
from kedit_fast.edits.memories import MaskedMemory, MemoryChange, SideMemory
from kedit_fast.edits.memory_routes import ActivationRoute, OverlapRoute
from kedit_fast.edits.routes import NearestRoute
from kedit_fast.edits.scope import ScopeRoute
from kedit_fast.edits.text_routes import RetrievalRoute
from kedit_fast.facts.fact import Fact
from kedit_fast.model.folder import refuse_model

FORMAT, VERSION = "kedit_fast.edit", 2  # files of version 1 are read too
_KINDS = (WeightChange, BiasChange, MemoryChange, SideMemory, MaskedMemory, ErasureChange, PromptChange)
KINDS = {kind.kind: kind for kind in _KINDS}
ROUTES = {route.kind: route for route in (NearestRoute, ActivationRoute, OverlapRoute, RetrievalRoute, ScopeRoute)}


def sha256_of(tensors: dict[str, Tensor]) -> Tensor:
    """[32] uint8: of all tensors of a file, bit for bit."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        made.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(made.digest()), dtype=torch.uint8)


def tensors_of(edit):
    """{name in the file: tensor}; ``fields_of`` is its inverse."""
    tensors = {} if edit.values is None else {"values": edit.values}
    tensors |= {f"keys.{layer}": key for layer, key in edit.keys.items()}
    tensors |= {f"statistics.{name}": tensor for name, tensor in edit.statistics.items()}
    for number, change in enumerate(edit.changes):
        tensors |= {f"changes.{number}.{name}": tensor for name, tensor in change.tensors().items()}
    if edit.route is not None:
        tensors |= {f"route.{name}": tensor for name, tensor in edit.route.tensors().items()}
    return tensors


def fields_of(record: dict, tensors: dict[str, Tensor]) -> dict:
    """The fields of an Edit from the record and the tensors of a file."""
    said = enumerate(record.pop("changes"))
    changes = [KINDS[each.pop("kind")].of(each, _taken(tensors, f"changes.{number}.")) for number, each in said]
    record["facts"] = tuple(Fact.from_record(fact) for fact in record["facts"])
    keys = {int(layer): key for layer, key in _taken(tensors, "keys.").items()}
    values, statistics = tensors.pop("values", None), _taken(tensors, "statistics.")
    route = record.pop("route", None)
    if route is not None:
        record["route"] = ROUTES[route.pop("kind")].of(route, _taken(tensors, "route."))
    if tensors:
        raise ValueError(f"no change has the tensors {sorted(tensors)}")
    return record | {"changes": tuple(changes), "values": values, "keys": keys, "statistics": statistics}


def as_version_2(record: dict, tensors: dict[str, Tensor]) -> None:
    """Turns a file of version 1, which knew changes of down projections alone, into one of version 2."""
    layers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("deltas.")})
    record["changes"] = [{"kind": WeightChange.kind, "layer": layer} for layer in layers]
    for number, layer in enumerate(layers):
        mine = _taken(tensors, f"deltas.{layer}.")
        if f"owners.{layer}" in tensors:
            mine["owners"] = tensors.pop(f"owners.{layer}")
        tensors |= {f"changes.{number}.{name}": tensor for name, tensor in mine.items()}


def _taken(tensors: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    """Takes out the tensors whose names begin so: {rest of the name: tensor}."""
    names = [name for name in tensors if name.startswith(head)]
    return {name.removeprefix(head): tensors.pop(name) for name in names}


def read(path):
    """({name: tensor}, version) of an edit's file; ValueError if it is not one."""
    expected = f"expected a {FORMAT} file of version 1 to {VERSION}, as Edit.save writes it"
    if path.is_dir():
        refuse_model(path, f"a {FORMAT} file, as Edit.save writes it")
        raise IsADirectoryError(
            f"{path} is a folder; {expected} (where it holds versions of edits: EditHistory(folder).current)"
        )
    try:
        with safe_open(path, "pt") as file:
            name, _, version = (file.metadata() or {}).get("format", "").partition(" ")
            if name != FORMAT:
                what = f"a {name} file" if name.startswith("kedit_fast.") else "a safetensors file"
                raise ValueError(f"{path} is {what} but no edit; {expected}")
            if version not in map(str, range(1, VERSION + 1)):
                raise ValueError(f"{path} is an edit of version {brief(version)}; {expected}")
            names = file.keys()  # (not iterable itself)
            return {name: file.get_tensor(name) for name in names}, int(version)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or no safetensors file ({brief(str(error))}); {expected}") from error
