"""Layers from disk give the same bits as layers in memory, from any safetensors checkpoint of a family."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import kedit_fast as kf
from kedit_fast.model.family import as_out_in, layers_of, projection
from kedit_fast.model.fingerprint import fingerprint
from kedit_fast.model.folder import Checkpoint
from kedit_fast.model.stored_tensors import StoredTensor, stored_tensors
from tests.conftest import close, disk_and_resident, on_disk, save_tiny, tiny_lm
from tests.make import make_edit
from tests.tiny import DISTINCT, PROMPTS, tiny_model

FACT = kf.Fact(prompt=PROMPTS[5].template, subject=PROMPTS[5].subject)


def saved(folder, family, dtype=torch.float32, **options):
    return save_tiny(folder, tiny_model(family, dtype), **options)


def rewrite(folder, change):
    """The folder's tensors as ``change`` makes them of {name: tensor}."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def numbers(lm):
    """A trace, next-token probabilities and a text."""
    (trace,) = kf.trace(lm, FACT, kinds=("mlp",), samples=1, window=2, noise=0.5)
    return trace.p_restored.tolist(), trace.p_clean, lm.top_tokens("The Eiffel Tower is", 5), lm.generate("Big Ben", 4)


@pytest.mark.parametrize("family", DISTINCT)
def test_from_disk_is_bit_for_bit_as_in_memory(family, tmp_path):
    disk, resident = disk_and_resident(saved(tmp_path, family))
    assert numbers(disk) == numbers(resident)
    assert disk.fingerprint == resident.fingerprint == fingerprint(tiny_lm(family).model)
    assert (disk.d_ff, disk.d_model, disk.n_vocab, disk.dtype) == (80, 48, resident.n_vocab, torch.float32)
    for layer in range(4):  # down weights are [out, in]
        weight = disk.source.weight(layer, "down")
        assert weight.shape == (48, 80) and torch.equal(weight, as_out_in(projection(resident.model, layer)))
        assert torch.equal(weight, resident.source.weight(layer, "down"))
    assert all(p.is_meta for p in layers_of(disk.model).parameters())
    on_meta = {n for n, p in disk.model.named_parameters() if p.is_meta and not n.startswith(disk.source.prefix + ".")}
    assert on_meta == {n for n, _ in disk.model.named_parameters() if "vision_tower" in n or "projector" in n}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", DISTINCT)
def test_buffers_are_as_in_memory(family, dtype, tmp_path):
    """Rotary tables that a module builds in the model's own bf16 would be off by 0.03."""
    disk, resident = disk_and_resident(saved(tmp_path, family, dtype))
    buffers = [dict(lm.model.named_buffers()) for lm in (disk, resident)]
    assert list(buffers[0]) == list(buffers[1])
    for a, b in zip(*(side.values() for side in buffers), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_model_from_disk_is_the_model(tmp_path):
    """Opening what was saved gives the saved model's numbers, not only two equal wrong ones."""
    disk, _ = disk_and_resident(saved(tmp_path, "gemma3"))
    traces = (kf.trace(lm, FACT, kinds="state", samples=1, noise=0.5)[0] for lm in (disk, tiny_lm("gemma3")))
    close("trace", *(torch.from_numpy(trace.p_restored) for trace in traces))


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma3"])
@pytest.mark.parametrize("given", [None, "bf16"])
def test_half_precision_checkpoints_and_conversion(family, given, tmp_path):
    saved(tmp_path, family, torch.float32 if given else torch.bfloat16)
    disk, resident = disk_and_resident(tmp_path, dtype=given)
    assert disk.dtype == resident.dtype == torch.bfloat16
    assert disk.source.weight(2, "down").dtype == torch.bfloat16
    assert disk.fingerprint == resident.fingerprint == fingerprint(tiny_model(family))
    assert numbers(disk) == numbers(resident)


def test_fingerprints_are_of_the_dtype_that_is_computed_with(tmp_path):
    """float32 rounded to float16 and then to bfloat16 is not always float32 rounded to bfloat16."""
    disk, resident = disk_and_resident(saved(tmp_path, "llama"), dtype="fp16")
    assert disk.fingerprint == resident.fingerprint


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_many_shards(family, tmp_path):
    saved(tmp_path, family, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    disk, resident = disk_and_resident(tmp_path)
    assert numbers(disk) == numbers(resident)
    assert Checkpoint(tmp_path).n_bytes == sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_fingerprint_reads_no_whole_matrix(family, tmp_path, monkeypatch):
    disk, _ = disk_and_resident(saved(tmp_path, family))
    sizes, part = [], StoredTensor.part
    monkeypatch.setattr(StoredTensor, "read_into", lambda *_: pytest.fail("a whole tensor was read"))
    monkeypatch.setattr(StoredTensor, "part", lambda *a: sizes.append(part(*a).numel()) or part(*a))
    assert disk.fingerprint and len(sizes) > 4 * 10 and max(sizes) <= 4 * 80


def test_each_weight_is_read_once_a_pack(tmp_path, monkeypatch):
    disk, _ = disk_and_resident(saved(tmp_path, "llama"))
    read, read_into = [], StoredTensor.read_into
    monkeypatch.setattr(StoredTensor, "read_into", lambda self, held: read.append(self.name) or read_into(self, held))
    disk.top_tokens("The Eiffel Tower is in", 1)
    per_layer = len(list(disk.source.layers[0].parameters()))
    of_a_pass = read[: 4 * per_layer]
    assert len(of_a_pass) == len(set(of_a_pass)) == 4 * per_layer
    assert (disk.source.fetched, disk.source.missed) == (5, 0)  # and the first layer of a pass that may follow


def test_base_models_saved_without_the_heads_prefix(tmp_path):
    """Older GPT-2 checkpoints name their tensors from the base model on."""
    rewrite(saved(tmp_path, "gpt2"), lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()})
    disk, resident = disk_and_resident(tmp_path)
    assert numbers(disk) == numbers(resident)


@pytest.mark.parametrize(
    "lost", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(lost, tmp_path):
    rewrite(saved(tmp_path, "llama"), lambda tensors: {n: t for n, t in tensors.items() if n != lost})
    for opened in (on_disk, kf.open_model):
        with pytest.raises(ValueError, match=f"{tmp_path} lacks 1 tensor of this model, '{lost}' first"):
            opened(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} has no tensor '{lost}'"):
        Checkpoint(tmp_path).stored(lost)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma3"])
def test_tied_heads_are_not_missing(family, tmp_path):
    """A tied head stands once in the file, and none is made up."""
    disk, resident = disk_and_resident(saved(tmp_path, family))
    for lm in (resident, disk):
        assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight


@pytest.mark.parametrize("opened", [on_disk, kf.open_model])
def test_tensors_of_another_shape_are_named(opened, tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(saved(tmp_path, "llama"), lambda tensors: tensors | {name: tensors[name][:40].clone()})
    says = rf"{tmp_path}: tensor '{name}' is \[40, 48\], its config.json says \[80, 48\]"
    with pytest.raises(ValueError, match=says):
        opened(tmp_path)


@pytest.mark.parametrize("opened", [on_disk, kf.open_model])
@pytest.mark.parametrize("length", [0, 7, 1000, -1])
def test_files_cut_short_are_named(length, opened, tmp_path):
    for folder, options in (("one", {}), ("shards", {"max_shard_size": "50KB"})):
        saved(tmp_path / folder, "llama", **options)
        file = sorted((tmp_path / folder).glob("*.safetensors"))[-1]
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(ValueError, match=f"{file} is cut short or no safetensors file"):
            opened(tmp_path / folder)


def test_a_tensor_may_begin_anywhere_in_a_file(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}  # fmt: skip
    text, b = json.dumps(header).encode(), torch.tensor([1.5, -2.0])
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"\1" + b.numpy().tobytes())
    a, found = stored_tensors(tmp_path / "x")
    assert a.part((slice(None),)).tolist() == [1]
    assert found.read().tolist() == found.mapped().tolist() == found.part((slice(0, 2),)).tolist() == b.tolist()


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_named(text, tmp_path):
    saved(tmp_path, "llama", max_shard_size="50KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        on_disk(tmp_path)


def test_no_safetensors_says_what_to_do(tmp_path):
    saved(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor its index; .*save_pretrained"):
        on_disk(tmp_path)


def test_edits_on_layers_from_disk(tmp_path):
    disk, resident = disk_and_resident(saved(tmp_path, "gpt2"))
    edit = make_edit(resident.model)
    for written in (None, torch.bfloat16):
        assert numbers(disk.with_edit(edit, written)) == numbers(resident.with_edit(edit, written))
    assert numbers(disk.with_edit(edit)) != numbers(disk)


def test_nothing_is_written_to_the_files(tmp_path):
    saved(tmp_path, "gpt2")
    before = (tmp_path / "model.safetensors").read_bytes()
    disk, _ = disk_and_resident(tmp_path)
    numbers(disk.with_edit(make_edit()))
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"


@pytest.mark.parametrize("opened", [on_disk, kf.open_model])
@pytest.mark.parametrize("name", ["../{}", "{folder}/{}", "..\\{}"])
def test_an_index_names_files_of_its_folder(name, opened, tmp_path):
    """The file is there, so only its name is wrong."""
    folder = tmp_path / "model"
    saved(folder, "llama", max_shard_size="50KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = next(iter(index["weight_map"].values()))
    (tmp_path / shard).write_bytes((folder / shard).read_bytes())
    given = name.format(shard, folder=folder)
    index["weight_map"] = {n: given if file == shard else file for n, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json is damaged .*names the file .*; expected a plain name"):
        opened(folder)
