"""An edit as data: its parts fit, one fact can be taken out, and its file gives every bit back or is refused."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from kedit_fast.edits.deltas import Dense, LowRank
from kedit_fast.edits.edit import Edit, digest
from tests.conftest import refused
from tests.make import FACTS, lowrank, make_edit, owned_edit, watched
from tests.tiny import D_FF, D_MODEL, tiny_model


def test_fields_are_kept_in_order_and_as_json_has_them():
    edit = make_edit()
    assert edit.layers == (1, 2)
    assert list(edit.weights) == [(1, "down"), (2, "down")] and edit.deltas[2] is edit.weights[2, "down"]
    assert edit.hparams["layers"] == [1, 2]
    assert edit.provenance["fit"] == {"1": 0.25}
    refused("provenance has to be plain values", make_edit, provenance={"fit": torch.zeros(3)}, error=TypeError)


def test_repr_says_what_it_is():
    text = repr(make_edit(tiny_model("llama")))
    assert text.startswith("Edit(memit, 2 facts, layers 1, 2, rank 2-48,")
    assert "model llama-4-48" in text
    assert "independent" in repr(owned_edit())
    assert "model unknown" in repr(make_edit(deltas={}))


def test_only_takes_the_factors_of_one_fact():
    edit = owned_edit()
    first, second = edit.only(0), edit.only(1)
    assert first.facts == FACTS[:1]
    assert second.facts == FACTS[1:]
    assert not first.independent
    assert torch.equal(first.deltas[1].u, edit.deltas[1].u[:, 1:])
    assert torch.equal(first.deltas[2].v, edit.deltas[2].v)
    assert torch.equal(second.deltas[1].v, edit.deltas[1].v[:, :1])
    assert second.layers == (1,)  # fact 1 owns nothing in layer 2
    assert torch.equal(second.values, edit.values[1:])
    assert torch.equal(second.keys[1], edit.keys[1][1:])
    assert first.only(0) is first
    refused(r"i = .*: expected a whole number from 0 to 1", edit.only, 2)
    refused("solved together", make_edit().only, 0)


def test_an_independent_edit_of_one_fact_is_that_facts():
    """Whoever makes it, or reads it: it can be merged, applied and asked as any edit."""
    deltas, of_one = {1: lowrank()}, dict(facts=FACTS[:1], values=None, keys={})
    owned = make_edit(deltas=deltas, owners={1: torch.tensor([0, 0])}, **of_one)
    assert not owned.independent and owned.only(0) is owned
    assert digest(owned) == digest(make_edit(deltas=deltas, **of_one))
    with pytest.raises(ValueError, match="fact indices 0 to 0"):
        make_edit(deltas=deltas, owners={1: torch.tensor([0, 1])}, **of_one)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(values=torch.zeros(3, D_MODEL)), r"values: expected \[2, 48\]"),
        (dict(keys={1: torch.zeros(2, 7)}), r"keys of layer 1: expected \[2, 80\]"),
        (dict(deltas={-1: lowrank()}), "a whole number from 0"),
        (dict(deltas={1: torch.zeros(D_MODEL, D_FF)}), "LowRank | Dense"),
        (dict(owners={2: torch.zeros(2, dtype=torch.int64)}), "all of them, or none"),
        (dict(deltas={1: lowrank()}, owners={1: torch.tensor([0, 2])}), "fact indices 0 to 1"),
        (dict(deltas={1: lowrank()}, owners={1: torch.tensor([0])}), "one for each of 2 factors"),
        (dict(deltas={1: Dense(torch.zeros(2, 80))}, values=None, owners={1: torch.tensor([0, 0])}), "factors to own"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    refused(message, make_edit, **changes)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["u", "v", "delta"])
def test_deltas_that_are_not_finite_are_refused(part, value):
    delta = Dense(torch.zeros(D_MODEL, D_FF)) if part == "delta" else lowrank()
    getattr(delta, part)[3, 1] = value
    refused("deltas of layer 2 hold NaN or infinity", make_edit, deltas={1: lowrank(), 2: delta})


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [make_edit(), owned_edit(), make_edit(values=None, keys={}, deltas={})], ids=repr)
def test_round_trip_is_exact(edit, tmp_path):
    path = tmp_path / "an edit.safetensors"
    edit.save(path)
    loaded = Edit.load(str(path))
    for name in ("method", "hparams", "fingerprint", "facts", "contexts", "provenance", "layers"):
        assert getattr(loaded, name) == getattr(edit, name), name
    kept, found = (tensors_of(one) for one in (edit, loaded))
    assert kept.keys() == found.keys()
    for name, tensor in kept.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert loaded.independent == edit.independent
    assert [type(delta) for delta in loaded.deltas.values()] == [type(delta) for delta in edit.deltas.values()]


def tensors_of(edit):
    tensors = {f"changes {i} {part}": t for i, c in enumerate(edit.changes) for part, t in c.tensors().items()}
    tensors |= {f"keys {layer}": t for layer, t in edit.keys.items()}
    return tensors | ({} if edit.values is None else {"values": edit.values})


def test_views_and_shared_tensors_can_be_saved(tmp_path):
    keys = torch.randn(2, D_FF)
    edit = make_edit(deltas={1: LowRank(torch.randn(2, D_MODEL).T, keys.T)}, keys={1: keys, 3: keys})
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    assert torch.equal(loaded.deltas[1].v, keys.T)
    assert torch.equal(loaded.keys[3], keys)


def test_saving_over_a_file_replaces_it_whole(tmp_path, monkeypatch):
    path = tmp_path / "edit.safetensors"
    make_edit().save(path)
    loaded = Edit.load(path)  # its tensors may still lie in the file
    owned_edit().save(path)
    assert Edit.load(path).independent
    assert torch.equal(loaded.deltas[1].delta, make_edit().deltas[1].delta)
    watched(monkeypatch, os, "replace", break_at=(1,), error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        make_edit().save(path)
    assert Edit.load(path).independent
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_saved_edit_is_a_file_as_any_and_equal_edits_are_equal_files(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(6)]  # a header in any order would show in six
    for path in paths:
        make_edit().save(path)
    assert len({path.read_bytes() for path in paths}) == 1
    (tmp_path / "other").touch()
    assert paths[0].stat().st_mode == (tmp_path / "other").stat().st_mode  # read by whom any new file can be
    tensors = load_file(paths[0])
    record = json.loads(bytes(tensors["record"].numpy()))
    assert record["facts"][0] == FACTS[0].to_record()
    assert torch.equal(tensors["changes.1.u"], lowrank(seed=2).u)


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "edit.safetensors"
    make_edit().save(path)
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for size in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 9 + header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        says = refused("cut short or no safetensors file", Edit.load, path)
        assert str(path) in says
        assert "version 1" in says


def rewritten(path, tensors=None, version="1"):
    """The saved edit with other tensors or another header."""
    make_edit().save(path)
    kept = load_file(path) | (tensors or {})
    kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
    save_file(kept, path, metadata={"format": f"kedit_fast.edit {version}"})
    return path


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "edit.safetensors"
    for content in (b"PK\x03\x04" + bytes(100), b"not an edit at all, just some text\n", bytes(64)):
        path.write_bytes(content)
        refused("no safetensors file", Edit.load, path)
    save_file({"weight": torch.zeros(3)}, path)
    refused("but no edit", Edit.load, path)
    refused("version 99", Edit.load, rewritten(path, version="99"))
    with pytest.raises(FileNotFoundError):
        Edit.load(tmp_path / "missing")
    refused("is a folder; expected a kedit_fast.edit file", Edit.load, tmp_path, error=IsADirectoryError)


@pytest.mark.parametrize(
    "tensors",
    [
        {"deltas.2.v": None},
        {"values": None},
        {"keys.1": None},
        {"record": None},
        {"deltas.3.u": torch.zeros(2, 2)},
        {"record": torch.zeros(9, dtype=torch.uint8)},
        {"record": torch.tensor(list(b"[]"), dtype=torch.uint8)},
        {"record": torch.tensor(list(b"3"), dtype=torch.uint8)},
        {"deltas": torch.zeros(2, 2)},
        {"record": torch.tensor(list(b"\xff\xfe"), dtype=torch.uint8)},
        {"deltas.2.v": torch.zeros(5, 5)},
    ],
    ids=lambda tensors: next(iter(tensors)),
)
def test_a_damaged_edit_is_refused(tmp_path, tensors):
    path = rewritten(tmp_path / "edit.safetensors", tensors)
    assert str(path) in refused("is a damaged edit", Edit.load, path)
