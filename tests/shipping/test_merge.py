"""Edits written into a checkpoint's files: the same bits as in memory, a bounded memory, and every refusal."""

import json
import threading
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kedit_fast as kf
from kedit_fast.basics import folders
from kedit_fast.edits.deltas import Dense, LowRank
from kedit_fast.model import stored_tensors
from kedit_fast.model.fingerprint import fingerprint
from kedit_fast.model.smollm2 import SMOLLM2
from kedit_fast.shipping import merge
from kedit_fast.shipping.merge import KEPT, MANIFEST, merge_checkpoint
from kedit_fast.shipping.unmerge import unmerge
from tests.conftest import on_disk, refused
from tests.make import bits, lowrank, make_edit, owned_edit, same_bits, watched
from tests.shipping.checkpoints import base_checkpoint, contents, save_checkpoint, two_edits
from tests.tiny import D_FF, D_MODEL, DISTINCT, tiny_model


def applied(model, edits):
    """The bits of a model with edits written into it, one after the other."""
    for edit in edits:
        edit.apply(model, check_fingerprint=False)
    return bits(model)


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_merged_checkpoint_is_the_edited_model_bit_for_bit(family, dtype, shard, tmp_path):
    model = save_checkpoint(tmp_path / "base", family, dtype, shard)
    edits, before = two_edits(model), contents(tmp_path / "base")
    merged = merge_checkpoint(tmp_path / "base", edits, tmp_path / "out")
    opened = kf.open_model(tmp_path / "out")
    assert same_bits(opened.model, applied(model, edits))
    assert merged.fingerprint == opened.fingerprint == fingerprint(model)
    assert contents(tmp_path / "base") == before
    after = contents(tmp_path / "out")
    others = {name: data for name, data in before.items() if not name.endswith(".safetensors")}
    assert others.items() <= after.items()
    assert len([n for n in before if n.endswith(".safetensors")]) > 2 or shard == "5GB"
    again = on_disk(tmp_path / "out")  # streamed from disk
    assert again.source.name == "disk"
    assert again.fingerprint == opened.fingerprint


@pytest.mark.parametrize("family", DISTINCT)
def test_each_family(family, tmp_path):
    model = save_checkpoint(tmp_path / "base", family, shard="40KB")
    edit = make_edit(model)  # one layer low rank, one dense
    merge_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    assert same_bits(kf.open_model(tmp_path / "out").model, applied(model, [edit]))
    unmerge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "base")


def test_a_checkpoint_without_the_heads_prefix_and_with_a_tied_head(tmp_path):
    model = base_checkpoint(tmp_path / "base")
    edit = make_edit(model)
    merged = merge_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    assert merged.tensors == ("h.1.mlp.c_proj.weight", "h.2.mlp.c_proj.weight")
    assert same_bits(kf.open_model(tmp_path / "out").model, applied(model, [edit]))


def test_the_demo_models_name_is_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    edit = make_edit(save_checkpoint(SMOLLM2.folder))
    named, folder = (
        merge_checkpoint(base, edit, tmp_path / str(i)) for i, base in enumerate(("smollm2", SMOLLM2.folder))
    )
    assert named.fingerprint == folder.fingerprint


def test_only_edited_tensors_differ_and_the_manifest_says_so(tmp_path):
    model = save_checkpoint(tmp_path / "base")
    edit = make_edit(model)
    merged = merge_checkpoint(tmp_path / "base", edit, tmp_path / "out", who="Ana", message="because")
    base, out = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert {name for name in base if not torch.equal(base[name], out[name])} == set(merged.tensors)
    kept = load_file(tmp_path / "out" / KEPT / "original.safetensors")
    assert kept.keys() == set(merged.tensors)
    assert all(torch.equal(kept[name], base[name]) for name in kept)
    record = json.loads((tmp_path / "out" / KEPT / MANIFEST).read_text())
    assert (record["who"], record["message"], record["base"]["fingerprint"]) == ("Ana", "because", edit.fingerprint)
    assert record["edits"][0]["provenance"] == edit.provenance
    assert len(record["edits"][0]["facts"]) == 2


def test_no_loader_finds_a_second_weight_file_beside_the_model(tmp_path):
    """Loaders that take every *.safetensors of a folder must not find the originals, nor stale weights."""
    model = save_checkpoint(tmp_path / "base")
    stale = ("consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "m.gguf", ".secret")
    for name in stale:
        (tmp_path / "base" / name).write_text("stale")
    merged = merge_checkpoint(tmp_path / "base", make_edit(model), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert set(merged.left_out) == set(stale)
    assert not any((tmp_path / "out" / name).exists() for name in merged.left_out)


# ---- memory


class Held:
    """Counts tensors that merge.py has read or made and that are still alive, by their bytes."""

    def __init__(self):
        self.alive, self.most, self.read = 0, 0, []

    def add(self, tensor):
        size = tensor.untyped_storage().nbytes()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor.untyped_storage(), self._drop, size)

    def _drop(self, size):
        self.alive -= size


def test_no_more_than_one_tensor_is_held(tmp_path, monkeypatch):
    """Many edited layers, one shard: what is read and summed is one tensor at a time, files go in small pieces."""
    model = save_checkpoint(tmp_path / "base")
    edit = make_edit(model, deltas={layer: lowrank(seed=layer) for layer in range(4)})
    held, read, edited = Held(), stored_tensors.StoredTensor.read, merge.edited_weight

    def counted_read(self):
        tensor = read(self)
        held.read.append(self.name)
        held.add(tensor)
        return tensor

    def counted_sum(weight, delta):
        tensor = edited(weight, delta)
        held.add(tensor)
        return tensor

    def no_whole_file(*args, **kwargs):
        raise AssertionError("a whole file is loaded")

    monkeypatch.setattr(stored_tensors.StoredTensor, "read", counted_read)
    monkeypatch.setattr(merge, "edited_weight", counted_sum)
    monkeypatch.setattr(folders, "PIECE", 4096)
    for loader in ("safetensors.torch.load_file", "safetensors.torch.save_file", "pathlib.Path.read_bytes"):
        monkeypatch.setattr(loader, no_whole_file)
    merged = merge_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    assert sorted(held.read) == sorted(merged.tensors)
    assert held.most == 2 * D_MODEL * D_FF * 4  # W and W + Δ


def anonymous_memory():
    """Bytes of this process that are no file's: what mapped checkpoint files take does not count."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_far_below_a_shard(tmp_path, monkeypatch):
    """Nearly all of a shard are embeddings, which no edit touches: neither merging nor undoing may hold it."""
    model = tiny_model("llama", layers=2)
    model.config.vocab_size = 200_000
    model.resize_token_embeddings(200_000, mean_resizing=False)
    model.save_pretrained(tmp_path / "base")
    shard = (tmp_path / "base" / "model.safetensors").stat().st_size
    edit = make_edit(model, deltas={0: lowrank(), 1: lowrank()})
    del model
    assert shard > 40e6

    def peak_of(work):
        most, done = [anonymous_memory()], threading.Event()
        before = most[0]

        def watch():
            while not done.wait(0.0005):
                most.append(anonymous_memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        tracemalloc.start()  # bytes that Python itself holds, also where the watcher looked away
        try:
            work()
        finally:
            _, python = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            done.set()
            watcher.join()
        return max(max(most) - before, python)

    monkeypatch.setattr(folders, "PIECE", 1 << 20)
    assert peak_of(lambda: (tmp_path / "base" / "model.safetensors").read_bytes()) > 0.9 * shard  # it would be seen
    assert peak_of(lambda: merge_checkpoint(tmp_path / "base", edit, tmp_path / "out")) < 0.4 * shard
    assert peak_of(lambda: unmerge(tmp_path / "out", tmp_path / "back")) < 0.4 * shard


# ---- refusals


def refuse(tmp_path, edit, says, **options):
    refused(says, merge_checkpoint, tmp_path / "base", edit, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".unfinished")] == []


def test_the_wrong_base_is_refused_and_can_be_forced(tmp_path):
    save_checkpoint(tmp_path / "base")
    edit = make_edit(tiny_model("llama", seed=1))
    refuse(tmp_path, edit, r"was made for model llama-4-.* is llama-4-.*force=True \(--force\)")
    merge_checkpoint(tmp_path / "base", edit, tmp_path / "out", force=True)
    assert same_bits(kf.open_model(tmp_path / "out").model, applied(tiny_model("llama"), [edit]))


def test_edits_that_cannot_be_merged(tmp_path):
    model = save_checkpoint(tmp_path / "base")
    refuse(tmp_path, owned_edit(model), r"edit\.only\(i\).*, or make the edit without .*--independent")
    refuse(tmp_path, make_edit(model, deltas={}), "nothing to merge")
    wide = LowRank(torch.ones(D_MODEL, 1), torch.ones(D_FF + 1, 1))
    refuse(tmp_path, make_edit(model, deltas={1: wide}, keys={}), "made for another model")
    refuse(tmp_path, make_edit(model, deltas={9: lowrank()}), "layer 9 is out of range")
    later = make_edit(model, provenance={"on_top_of": [{"digest": "0123"}]})
    refuse(tmp_path, later, "made on top of edit 0123, here stands before it: no edit")
    refused("expected Edits", merge_checkpoint, tmp_path / "base", [], tmp_path / "out", error=TypeError)
    (tmp_path / "half").mkdir()
    model = save_checkpoint(tmp_path / "half" / "base", dtype=torch.float16)
    large = make_edit(model, deltas={1: lowrank(), 2: Dense(torch.full((D_MODEL, D_FF), 1e6))})
    refuse(tmp_path / "half", large, "layer 2: .*beyond the range of torch.float16; nothing was written")


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    model = save_checkpoint(tmp_path / "base")
    before = contents(tmp_path)
    watched(monkeypatch, merge, "edited_weight", break_at=(1,), error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(tmp_path / "base", make_edit(model), tmp_path / "new" / "out")
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()


def test_folders_that_cannot_be_written(tmp_path):
    model = save_checkpoint(tmp_path / "base")
    edit, before = make_edit(model), contents(tmp_path / "base")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out, says in (("full", "is not empty"), ("full/file", "is a file"), ("base", "is not empty")):
        refused(says, merge_checkpoint, tmp_path / "base", edit, tmp_path / out)
    refused("is no folder", merge_checkpoint, tmp_path / "base", edit, tmp_path / "full/file/out", error=OSError)
    assert contents(tmp_path / "base") == before


def test_checkpoints_that_cannot_be_merged_into(tmp_path):
    base = tmp_path / "base"
    model = save_checkpoint(base)
    edit = make_edit(model)
    refused("no such folder", merge_checkpoint, tmp_path / "nowhere", edit, tmp_path / "out", error=FileNotFoundError)
    config = (base / "config.json").read_text()
    quantized = json.loads(config) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (base / "config.json").write_text(json.dumps(quantized))
    refuse(tmp_path, edit, "is quantized.*export_peft.*merge --peft")
    (base / "config.json").write_text(config)
    (base / "adapter_config.json").write_text("{}")
    refuse(tmp_path, edit, "PEFT adapter.*merge_and_unload")
    (base / "adapter_config.json").unlink()
    (base / "model.safetensors.index.json").write_text("{}")
    refuse(tmp_path, edit, "holds both")
    (base / "model.safetensors.index.json").unlink()
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-8])
    refuse(tmp_path, edit, "cut short")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    refuse(tmp_path, edit, "pickled weights.*save it as safetensors")


def test_packed_weights_without_a_config_that_says_so_are_refused(tmp_path):
    model = save_checkpoint(tmp_path / "base")
    edit = make_edit(model)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = (tensors[name] * 10).to(torch.int8)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    refuse(tmp_path, edit, "stored as I8: a quantized checkpoint", force=True)
