"""Loaded models that are not opened: wrapped, or not all here; and those that are made ordinary."""

import pytest
import torch
import transformers
from torch import nn

import kedit_fast as kf
from tests.conftest import open_tiny
from tests.make import TOWER
from tests.tiny import tiny_model


class Compiled(nn.Module):
    """Stands for what torch.compile gives, which takes seconds to import."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


Compiled.__name__, Compiled.__module__ = "OptimizedModule", "torch._dynamo.eval_frame"


def test_wrappers_are_refused_with_what_to_give_instead():
    model = tiny_model("llama", layers=1)
    with pytest.raises(ValueError, match=r"wrapped by DataParallel: give the model in it, wrapped\.module"):
        open_tiny(nn.DataParallel(model))
    with pytest.raises(ValueError, match=r"wrapped by OptimizedModule: give the model from before torch\.compile"):
        open_tiny(Compiled(model))


def test_offloaded_and_meta_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama", layers=1)
    accelerate.cpu_offload(model)
    with pytest.raises(ValueError, match=r"the model is offloaded.*kf\.open_model\(folder, memory='24GB'\)"):
        open_tiny(model)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is on the meta device.*memory="):
        open_tiny(tiny_model("llama", layers=1).to("meta"))
    part = tiny_model("llama", layers=1)
    part.model.layers[0].self_attn.q_proj.to("meta")
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj\.weight' is on the meta device"):
        open_tiny(part)


def test_a_device_map_over_several_devices_is_refused():
    model = tiny_model("llama", layers=1)
    model.hf_device_map = {"": 0}
    open_tiny(model)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match=r"spread over devices 0, 1 \(device_map\); open its folder"):
        open_tiny(model)


def test_peft_is_refused_outside_and_inside():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", layers=1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], r=2))
    for given in (wrapped, model):  # the base has the adapter's layers in it
        with pytest.raises(ValueError, match=r"wrapped by PEFT.*merge_and_unload\(\) or unload\(\) the adapter first"):
            open_tiny(given)
    open_tiny(wrapped.unload())


def test_shards_are_refused():
    dist = pytest.importorskip("torch.distributed")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = tiny_model("llama", layers=1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fsdp.fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"is a DTensor, a shard of which lies here; open its folder"):
            open_tiny(model)
    finally:
        dist.destroy_process_group()


def test_what_is_no_causal_language_model_is_refused():
    with pytest.raises(ValueError, match="Linear is no Hugging Face model"):
        open_tiny(nn.Linear(2, 2))
    model = tiny_model("llama", layers=1)
    for headless in (model.model, transformers.LlamaForSequenceClassification(model.config)):
        with pytest.raises(ValueError, match=r"has no head over the vocabulary; load .* AutoModelForCausalLM"):
            open_tiny(headless)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_made_under_inference_mode_is_made_ordinary(family):
    with torch.inference_mode():
        model = tiny_model(family)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    editor = kf.Rome(layers=(1,), v_num_grad_steps=2, mom2_adjustment=False)
    opened = open_tiny(model), open_tiny(tiny_model(family))
    assert torch.equal(*(editor.edit(lm, [TOWER], contexts=[["{}"]]).values for lm in opened))
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before, "the same memory, tied ones too"
