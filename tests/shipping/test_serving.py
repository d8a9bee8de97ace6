"""What docs/tutorials/serving.md says of the forms in which an edit is served: they answer alike, also as a GGUF file.

The GGUF file is written by the gguf package, the writer of llama.cpp's converter, and read by this package's reader.
"""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kedit_fast as kf
from kedit_fast.model.gguf import read_gguf
from kedit_fast.shipping.adapter import load_peft
from tests.conftest import relative_error
from tests.make import logits, lowrank, make_edit
from tests.shipping.checkpoints import save_checkpoint
from tests.tiny import D_FF, D_MODEL, HEADS, KV_HEADS

EDITED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def served(tmp_path):
    """(the folder of a base checkpoint, an edit of it, the folder of the merged one)."""
    model = save_checkpoint(tmp_path / "base")
    edit = make_edit(model, deltas={1: lowrank(seed=1)})
    kf.merge_checkpoint(tmp_path / "base", edit, tmp_path / "merged")
    return tmp_path / "base", edit, tmp_path / "merged"


def test_adapter_checkpoint_and_view_answer_alike(served, tmp_path):
    base, edit, merged = served
    kf.export_peft(edit, tmp_path / "adapter", model=base, server="vllm")
    with_adapter = load_peft(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    from_folder = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert relative_error(logits(with_adapter), logits(from_folder)) < 1e-5
    with with_adapter.disable_adapter():
        assert relative_error(logits(with_adapter), logits(from_folder)) > 0.05
    lm = kf.open_model(base)
    prompt = "The Eiffel Tower is in the city of"
    written = kf.open_model(merged).generate(prompt, max_new_tokens=4)
    assert lm.with_edit(edit).generate(prompt, max_new_tokens=4) == written


def write_gguf(path, tensors, kind):
    """A llama's tensors under llama.cpp's names, as its converter writes them but for the order of a head's rows."""
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    for name, tensor in tensors.items():
        rows = tensor.float().numpy()
        of_blocks = kind if rows.ndim == 2 and rows.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(rows, of_blocks), raw_dtype=of_blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names.get_name(EDITED, (".weight",))


def test_the_edited_weight_survives_in_a_gguf_file(served, tmp_path):
    base, edit, merged = served
    tensors = load_file(merged / "model.safetensors")
    name = write_gguf(tmp_path / "edited.gguf", tensors, gguf.GGMLQuantizationType.F32)
    found = read_gguf((tmp_path / "edited.gguf").read_bytes())
    assert name == "blk.1.ffn_down.weight" and len(found.entries) == len(tensors)
    assert np.array_equal(found.tensor(name), tensors[EDITED].numpy())
    delta = torch.from_numpy(found.tensor(name)) - load_file(base / "model.safetensors")[EDITED]
    assert relative_error(delta, edit.deltas[1].dense()) < 1e-5


def test_a_rounded_gguf_file_keeps_most_of_an_edit(tmp_path):
    """Q8_0, on rows of 32 weights' multiple, as every real model has them (a tiny model's are 80 wide)."""
    generator = torch.Generator().manual_seed(0)
    before, delta = torch.randn(48, 96, generator=generator), lowrank(48, 96, seed=1).dense()
    name = write_gguf(tmp_path / "q8.gguf", {EDITED: before + delta}, gguf.GGMLQuantizationType.Q8_0)
    found = torch.from_numpy(read_gguf((tmp_path / "q8.gguf").read_bytes()).tensor(name))
    assert 1e-4 < relative_error(found, before + delta) < 1e-2
    assert relative_error(found - before, delta) < 0.05
