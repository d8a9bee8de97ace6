"""Edits of a model whose down projections are packed: views and adapters work, writing is refused with the way out."""

import pytest
import torch
from torch import nn

from kedit_fast.jobs.collect import Collect
from kedit_fast.kernels.lowrank import lowrank_add
from kedit_fast.model.family import layers_of, projection
from kedit_fast.shipping.adapter import export_peft, load_peft
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.runs import RunList, add_sequences
from kedit_fast.sweep.sites import Site
from tests.conftest import close, open_tiny, refused, relative_error
from tests.make import bits, logits, lowrank, make_edit, same_bits
from tests.tiny import D_FF, tiny_model

EDITED = (1, 2)


class PackedLinear(nn.Module):
    """A quantized linear layer as such packages build them: int8 weights, a scale for each output, dequantized in
    every call. ``weight`` is packed into one column, so that nothing can take its shape for [out, in]."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (linear.weight.detach() / scale).round().to(torch.int8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantized(self):
        return self.weight.reshape(self.out_features, self.in_features).to(self.scale.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantized(), self.bias)


def quantized_model():
    model = tiny_model("llama")
    for layer in layers_of(model):
        layer.mlp.down_proj = PackedLinear(layer.mlp.down_proj)
    return model


def dequantized_model():
    """The model that the quantized one computes: ordinary weights of the values that are packed."""
    model = tiny_model("llama")
    for layer, packed in zip(layers_of(model), layers_of(quantized_model()), strict=True):
        layer.mlp.down_proj.weight.data = packed.mlp.down_proj.dequantized()
    return model


@pytest.fixture
def model():
    return quantized_model()


def edit_of(model):
    return make_edit(model, deltas={layer: lowrank(seed=layer) for layer in EDITED})


PROMPTS = ["The Eiffel Tower is in the city of", "Miles Davis plays the"]


def probs(lm):
    return torch.stack([torch.tensor([p for _, p in sorted(lm.top_tokens(text, k=20))]) for text in PROMPTS])


def test_sweeps_and_edited_views_compute_what_the_packed_weights_say(model):
    plain = dequantized_model()
    edit, before = edit_of(model), bits(model)
    lm, same = open_tiny(model), open_tiny(plain)
    same_edited = same.with_edit(make_edit(plain, deltas=edit.deltas))
    edited = lm.with_edit(edit)
    assert lm.d_ff == D_FF  # not the packed shape
    close("as it is", probs(lm), probs(same))
    close("edited", probs(edited), probs(same_edited))
    assert relative_error(probs(edited), probs(lm)) > 0.01
    assert edited.generate(PROMPTS, 5) == same_edited.generate(PROMPTS, 5)
    assert same_bits(model, before)


def test_the_edit_is_added_to_the_packed_projection_exactly(model):
    """Bit for bit y + (x v) uᵀ, in the projection's own output: nothing is quantized again."""
    edit, layer = edit_of(model), EDITED[0]
    seen, lm = {}, open_tiny(model).with_edit(edit)
    # placed before the sweep's own hooks, so it sees what the packed layer gives
    watch = projection(model, layer).register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    runs = RunList()
    job = Collect(Site.mlp_out, [layer], add_sequences(runs, [[5, 17, 23]], owner=lm.run_owner), torch.tensor([2]))
    sweep(lm, runs.runs(), [job])
    watch.remove()
    u, v = edit.deltas[layer].u, edit.deltas[layer].v
    wanted = lowrank_add(seen["y"][0], seen["x"][0], u, v)
    assert torch.equal(job.values[layer][0], wanted[-1])
    assert not torch.equal(wanted, seen["y"][0])


def test_writing_is_refused_with_the_way_out(model):
    edit, before = edit_of(model), bits(model)
    refused(r"is quantized.*without quantization, use lm\.with_edit.*export_peft", edit.apply, model)
    assert same_bits(model, before)


def test_the_adapter_beside_the_packed_weights_is_the_same_edit(model, tmp_path):
    """PEFT wraps quantized layers of packages that it knows; what it adds to them is the adapter's own product, here
    read through ordinary weights of the same values, whose bits (and fingerprint) are not the packed ones."""
    edit = edit_of(model)
    export_peft(edit, tmp_path / "adapter", model=model)
    with pytest.raises(ValueError, match="for a quantized or fine-tuned copy of it, pass check_fingerprint=False"):
        load_peft(dequantized_model(), tmp_path / "adapter")
    wrapped = load_peft(dequantized_model(), tmp_path / "adapter", check_fingerprint=False).eval()
    for layer in EDITED:
        factors = edit.deltas[layer]
        projection(model, layer).register_forward_hook(
            lambda module, args, out, factors=factors: factors.add_to(out[0], args[0][0])[None]
        )
    close("logits", logits(wrapped), logits(model))
