"""Files of edits: what version 1 wrote is read, bit for bit, and answers to the same digest."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kedit_fast.edits.edit import Edit, digest
from tests.make import make_edit, owned_edit


def saved_as_version_1(edit, path):
    """The file that version 1 made of an edit: deltas by layer, of down projections alone."""
    tensors = {} if edit.values is None else {"values": edit.values}
    for change in edit.changes:
        tensors |= {f"deltas.{change.layer}.{name}": tensor for name, tensor in vars(change.delta).items()}
        tensors |= {} if change.owners is None else {f"owners.{change.layer}": change.owners}
    tensors |= {f"keys.{layer}": key for layer, key in edit.keys.items()}
    record = {name: getattr(edit, name) for name in ("method", "hparams", "fingerprint", "contexts", "provenance")}
    record |= {"facts": [fact.to_record() for fact in edit.facts], "tensors": sorted(tensors)}
    tensors["record"] = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    made = hashlib.sha256()
    for name in sorted(tensors):
        made.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        made.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())
    tensors["sha256"] = torch.frombuffer(bytearray(made.digest()), dtype=torch.uint8)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "kedit_fast.edit 1"})
    return record


@pytest.mark.parametrize("edit", [make_edit(), owned_edit(), make_edit(values=None, keys={}, deltas={})], ids=repr)
def test_files_of_version_1_are_read(edit, tmp_path):
    saved_as_version_1(edit, tmp_path / "old.safetensors")
    loaded = Edit.load(tmp_path / "old.safetensors")
    assert digest(loaded) == digest(edit) and repr(loaded) == repr(edit) and loaded.facts == edit.facts
    edit.save(tmp_path / "new.safetensors")
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "new.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_the_digest_of_a_down_projections_delta_is_that_of_version_1():
    """Edits made on top of others name them by it."""
    edit, made = make_edit(), hashlib.sha256()
    for layer, delta in edit.deltas.items():
        for name, tensor in vars(delta).items():
            made.update(json.dumps(layer).encode() + json.dumps(name).encode())
            made.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            made.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    assert digest(edit) == made.hexdigest()[:16]


def test_a_tensor_that_no_change_has_is_seen(tmp_path):
    make_edit().save(tmp_path / "edit.safetensors")
    tensors = load_file(tmp_path / "edit.safetensors") | {"owners.1": torch.zeros(2, dtype=torch.int64)}
    del tensors["sha256"]
    record = json.loads(bytes(tensors["record"].tolist()))
    record["tensors"] = sorted(set(tensors) - {"record"})
    tensors["record"] = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "odd.safetensors", {"format": "kedit_fast.edit 2"})
    with pytest.raises(ValueError, match=r"no change has the tensors \['owners\.1'\]"):
        Edit.load(tmp_path / "odd.safetensors")
