"""Taking a merge out of a checkpoint folder: the base's bits, or a refusal that changes nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import kedit_fast as kf
from kedit_fast.shipping import unmerge as module
from kedit_fast.shipping.merge import KEPT, MANIFEST, merge_checkpoint
from kedit_fast.shipping.unmerge import read_manifest, unmerge
from tests.conftest import refused
from tests.make import make_edit, watched
from tests.shipping.checkpoints import contents, save_checkpoint, two_edits


@pytest.fixture(params=[("llama", "5GB"), ("gpt2", "20KB")], ids=["one file", "shards"])
def merged(request, tmp_path):
    """(base folder, merged folder) of a bfloat16 model with two edits."""
    family, shard = request.param
    model = save_checkpoint(tmp_path / "base", family, torch.bfloat16, shard)
    merge_checkpoint(tmp_path / "base", two_edits(model), tmp_path / "out")
    return tmp_path / "base", tmp_path / "out"


def test_undo_restores_every_file_bit_for_bit(merged, tmp_path):
    base, out = merged
    before = contents(out)
    assert unmerge(out, tmp_path / "back") == tmp_path / "back"
    assert contents(tmp_path / "back") == contents(base)
    assert contents(out) == before
    assert unmerge(out) == out
    assert contents(out) == contents(base)
    refused(r"expected a folder that merge_checkpoint \(kedit-fast merge\) wrote", unmerge, out)


def merged_twice(folder):
    """Merges an edit into folder/base, to folder/one, and another on top, to folder/two; gives what "one" holds."""
    first = make_edit(save_checkpoint(folder / "base"))
    merge_checkpoint(folder / "base", first, folder / "one")
    merge_checkpoint(folder / "one", make_edit(kf.open_model(folder / "one").model), folder / "two")
    return contents(folder / "one")


def test_a_merge_on_a_merge_is_undone_one_by_one(tmp_path):
    one = merged_twice(tmp_path)
    unmerge(tmp_path / "two", tmp_path / "back")
    assert contents(tmp_path / "back") == one
    unmerge(tmp_path / "two")
    assert contents(tmp_path / "two") == one
    unmerge(tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "base")


def test_an_interrupted_undo_in_place_can_be_run_again(tmp_path, monkeypatch):
    model = save_checkpoint(tmp_path / "base", shard="20KB")
    merge_checkpoint(tmp_path / "base", two_edits(model), tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls = watched(patch, module, "_restore", break_at=(2,), error=KeyboardInterrupt)
        unmerge(tmp_path / "out")
    assert len(calls) == 2
    unmerge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "base")


def test_a_model_that_is_open_keeps_its_weights(tmp_path):
    """Loaded models read files through memory maps; an undo in place must not change them under their feet."""
    model = save_checkpoint(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", make_edit(model), tmp_path / "out")
    lm = kf.open_model(tmp_path / "out")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    unmerge(tmp_path / "out")
    assert all(torch.equal(lm.model.state_dict()[name], before[name]) for name in before)


# ---- refusals


def rewrite(folder, change):
    """Changes the tensors of a folder's first shard that has one of the edited layers."""
    record = read_manifest(folder)
    name, notes = next(iter(record["tensors"].items()))
    tensors = load_file(folder / notes["file"])
    change(tensors, name)
    save_file(tensors, folder / notes["file"], metadata={"format": "pt"})


def untouched(folder, says):
    before = contents(folder)
    for out in (None, folder.parent / "back"):
        refused(says, unmerge, folder, out)
        assert contents(folder) == before
    assert not (folder.parent / "back").exists()


@pytest.mark.parametrize(
    "edited, says",
    [
        (True, "is not what the merge wrote.*nothing was undone"),
        (False, "another tensor of it was changed after the merge"),
    ],
)
def test_a_tensor_that_was_changed_since_is_refused(edited, says, merged):
    def train(tensors, name):
        changed = name if edited else next(n for n in tensors if n != name and "mlp" not in n)
        tensors[changed] = tensors[changed] + 1

    rewrite(merged[1], train)
    untouched(merged[1], says)


def test_a_missing_or_damaged_original_is_refused(merged):
    kept = merged[1] / KEPT / "original.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    untouched(merged[1], "is missing or damaged; nothing was undone")
    kept.write_bytes(whole[:-1])
    untouched(merged[1], "cut short")


def test_a_damaged_manifest_is_refused(merged):
    path = merged[1] / KEPT / MANIFEST
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"version": "9"}))
    untouched(merged[1], "it is 'kedit_fast.merge' of version '9'")
    del record["files"]
    path.write_text(json.dumps(record))
    untouched(merged[1], "it lacks files")
    path.write_text("{")
    untouched(merged[1], "is damaged")


# ---- a manifest that another wrote


def manifest_with(folder, change):
    path = folder / KEPT / MANIFEST
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def renamed(victim):
    """Has the manifest speak of another file, as if it were the first shard."""

    def change(record):
        name, digest = next(iter(record["files"].items()))
        record["files"] = {victim: digest, **record["files"]}
        for notes in record["tensors"].values():
            notes["file"] = victim if notes["file"] == name else notes["file"]

    return change


@pytest.mark.parametrize("victim", ["../victim.safetensors", "..\\victim.safetensors", "C:victim", "link.safetensors"])
def test_names_that_lead_out_of_the_folder_are_refused(victim, merged):
    """The victim holds the very tensors that the manifest says, so only its name is wrong."""
    out = merged[1]
    shard = next(iter(read_manifest(out)["files"]))
    bits = (out / shard).read_bytes()
    (out.parent / "victim.safetensors").write_bytes(bits)
    (out / "link.safetensors").symlink_to("../victim.safetensors")
    manifest_with(out, renamed(victim))
    untouched(out, f"{MANIFEST} is damaged .it names the file")
    manifest_with(out, renamed(str(out.parent / "victim.safetensors")))
    untouched(out, f"{MANIFEST} is damaged .it names the file")
    assert (out.parent / "victim.safetensors").read_bytes() == bits


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda record: record.update(files=[]), "has no file of the checkpoint"),
        (lambda record: record.update(tensors=3), "is damaged"),
        (lambda record: record.update(base={}), "fingerprint"),
        (lambda record: record.update(edits=[{"facts": 3}]), "is none"),
        (lambda record: next(iter(record["tensors"].values())).pop("merged"), "has no merged"),
        (lambda record: next(iter(record["tensors"].values())).update(file="other"), "has no file of the checkpoint"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(change, says, merged):
    manifest_with(merged[1], change)
    untouched(merged[1], says)


def test_the_restored_model_is_the_base_or_it_is_said(merged):
    out = merged[1]
    manifest_with(out, lambda record: record["base"].update(fingerprint="llama-4-48-0000000000000000"))
    before = contents(out)
    refused(r"not llama-4-48-0000000000000000, which the manifest names", unmerge, out, out.parent / "back")
    assert contents(out) == before and not (out.parent / "back").exists()
    refused(r"the edited tensors are as they were", unmerge, out)
    assert (out / KEPT / MANIFEST).exists()


@pytest.mark.parametrize("killed_at", [1, 2])
def test_an_undo_that_was_killed_at_its_end_can_be_run_again(killed_at, tmp_path, monkeypatch):
    """After the record's first renaming, and before the earlier record takes its place."""
    one = merged_twice(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watched(patch, module, "put_in_place", break_at=(killed_at,), error=KeyboardInterrupt)
        unmerge(tmp_path / "two")
    unmerge(tmp_path / "two")
    assert contents(tmp_path / "two") == one
