"""What an edit is not written into: each refusal comes before the first write and names the way out."""

import copy
import math

import pytest
import torch
from torch import nn

from kedit_fast.edits.deltas import LowRank
from kedit_fast.model.family import projection
from kedit_fast.model.fingerprint import fingerprint
from tests.make import bits, logits, lowrank, make_edit, owned_edit, same_bits
from tests.tiny import D_FF, D_MODEL, tiny_model


@pytest.fixture
def model():
    return tiny_model("llama")


def refused(model, message, edit=None, error=ValueError, **options):
    before = None if any(p.is_meta for p in model.parameters()) else bits(model)
    edit = edit or make_edit()
    with pytest.raises(error, match=message):
        edit.apply(model, **options)
    assert before is None or same_bits(model, before)


def test_another_model_is_refused(model):
    other = tiny_model("llama", seed=1)
    edit = make_edit(other)
    refused(model, f"made for model {fingerprint(other)}, this is {fingerprint(model)}", edit)
    refused(model, r"made for model \(not said\)")
    with edit.apply(model, check_fingerprint=False) as handle:
        assert not handle.undone


def test_an_owned_edit_is_refused(model):
    refused(model, r"2 independent edits.*edit\.only\(i\)", owned_edit(model))
    before = bits(model)
    with owned_edit(model).only(1).apply(model):
        assert not same_bits(model, before)
    assert same_bits(model, before)


def test_layers_shapes_and_sums_that_do_not_fit_are_refused(model):
    refused(model, "layer 4 is out of range", make_edit(model, deltas={1: lowrank(), 4: lowrank()}))
    edit = make_edit(model, deltas={1: lowrank(), 2: lowrank(d_ff=7)}, keys={})
    of_layer = "layer 2.s down projection: "
    refused(model, rf"{of_layer}the edit changes a weight of \[48, 7\], this model's is \[48, 80\]", edit)
    edit = make_edit(model)
    with torch.no_grad():
        projection(model, 2).weight[5, 5] = math.inf
    refused(model, f"{of_layer}the model's weight holds NaN or infinity", edit)
    model = tiny_model("llama", torch.float16)
    huge = LowRank(torch.full((D_MODEL, 1), 1e3), torch.full((D_FF, 1), 1e3))
    edit = make_edit(model, {1: lowrank(), 2: huge})
    refused(model, r"layer 2.*: W \+ Δ is beyond the range of torch.float16", edit)


def test_no_torch_module_is_refused():
    with pytest.raises(TypeError, match=r"got str; lm\.with_edit"):
        make_edit().apply("gpt2")


def test_meta_and_offloaded_weights_are_refused(model):
    accelerate = pytest.importorskip("accelerate")
    edit, base = make_edit(model), logits(model)
    refused(copy.deepcopy(model).to("meta"), "layer 1's down projection is offloaded or on the meta device", edit)
    accelerate.cpu_offload(model)
    refused(model, "offloaded", edit)
    assert torch.equal(logits(model), base)


def test_a_weight_that_is_here_only_for_this_call_is_refused(model):
    from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook

    edit, module = make_edit(model), projection(model, 2)
    module._hf_hook = SequentialHook(ModelHook(), AlignDevicesHook("cpu", offload=True))
    refused(model, "layer 2's down projection is offloaded", edit)
    module._hf_hook = AlignDevicesHook("cpu", offload=False)
    edit.apply(model).undo()


def test_peft_is_refused(model):
    peft = pytest.importorskip("peft")
    edit, before = make_edit(model), bits(model)
    config = peft.LoraConfig(target_modules=["down_proj"], r=2)
    wrapped = peft.get_peft_model(model, config)
    refused(wrapped, r"the model is wrapped by PEFT.*unload\(\)", edit)
    refused(model, "layer 1's down projection is wrapped by PEFT", edit)
    model = wrapped.unload()
    edit.apply(model).undo()
    assert same_bits(model, before)


class FakeLinear8bit(nn.Linear):
    """Stands for a quantizer's linear: its module names the package."""


def test_quantized_weights_are_refused(model):
    edit, module = make_edit(model), projection(model, 2)
    weight = module.weight
    module.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    refused(model, r"layer 2's down projection is quantized \(.*Linear, torch.int8\)", edit)
    module.weight = nn.Parameter(weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    refused(model, "quantized", edit)
    module.weight = weight
    FakeLinear8bit.__module__ = "bitsandbytes.nn.modules"
    module.__class__ = FakeLinear8bit
    refused(model, r"quantized \(bitsandbytes.nn.modules.FakeLinear8bit", edit)
    FakeLinear8bit.__module__ = __name__
    refused(model, "only nn.Linear and Conv1D", edit)


def test_computed_weights_are_refused(model):
    edit, module = make_edit(model), projection(model, 2)
    nn.utils.parametrizations.weight_norm(module)
    refused(model, "ParametrizedLinear.*parametrizations too", edit)
    nn.utils.parametrize.remove_parametrizations(module, "weight")
    del module.weight
    module.weight = torch.zeros(D_MODEL, D_FF)
    refused(model, "has no weight parameter", edit)


def test_tensor_subclasses_are_refused(model):
    edit, module = make_edit(model), projection(model, 2)
    kind = type("DTensor", (torch.Tensor,), {})
    module.weight = nn.Parameter(module.weight.detach().as_subclass(kind))
    assert type(module.weight) is kind
    refused(model, "has a DTensor for weight, a shard of which lies here", edit)


def test_shared_weights_are_refused(model):
    edit = make_edit(model)
    own = projection(model, 2).weight
    projection(model, 2).weight = projection(model, 3).weight
    refused(model, r"layer 2's.*shares its memory: .*layers\.2\..*layers\.3\.", edit)
    projection(model, 2).weight = own
    # Two weights in one storage, side by side as a loader may leave them, are no obstacle.
    buffer = torch.stack([own.detach(), own.detach()])
    projection(model, 2).weight, projection(model, 3).weight = map(nn.Parameter, buffer)
    make_edit(model).apply(model).undo()
    projection(model, 3).weight = nn.Parameter(buffer.flatten()[5 : 5 + own.numel()].view_as(own))
    refused(model, "shares its memory", edit)
