"""Our forwards of norms, activations and gated MLPs against transformers' own, in every family; put back after it."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import kedit_fast as kf
from kedit_fast.jobs.score import next_token_probs
from kedit_fast.kernels import pointwise
from kedit_fast.model import fused
from kedit_fast.model.family import TESTED, family_of, layers_of, text_config
from kedit_fast.model.fused import ACTS, own_forwards
from kedit_fast.model.opening import open_model
from tests.conftest import relative_error
from tests.tiny import tiny_model, tiny_tokenizer

BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def changed(model) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


def distances(model, dtype) -> dict[str, float]:
    """{type: how far what ours gives is from what theirs does} over the modules of blocks that have another forward."""
    generator, found = torch.Generator().manual_seed(0), {}
    with own_forwards(model, family_of(model.config)):
        ours = {module: module.forward for module in changed(model)}
    for module, forward in ours.items():
        width = text_config(model.config).hidden_size
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            continue
        if weight is not None:
            width = len(weight)
            with torch.no_grad():
                weight.add_(torch.randn(weight.shape, generator=generator).to(dtype) / 4)
        x = torch.randn(3, 7, width, generator=generator).to(dtype)
        with torch.no_grad():
            far = relative_error(forward(x), module(x))
        name = type(module).__name__
        found[name] = max(found.get(name, 0.0), far)
    return found


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("family", TESTED)
def test_ours_compute_what_theirs_do(family, dtype):
    model = tiny_model(family, dtype)
    found = distances(model, dtype)
    entry = family_of(model.config)
    kinds = {type(module).__name__ for module in model.modules()}
    assert {kind for kind in kinds if kind.endswith("RMSNorm")} <= set(found) if entry.fused else True
    mlp = layers_of(model)[0].get_submodule(entry.mlp)
    if entry.fused and (entry.mlp_gate or entry.mlp_gate_up):
        assert type(mlp).__name__ in found
    assert max(found.values(), default=0.0) < BOUND[dtype], found
    assert not changed(model)


def test_a_wrong_offset_or_activation_is_seen(monkeypatch):
    model = tiny_model("gemma2")
    right = fused.rms_norm
    monkeypatch.setattr(fused, "rms_norm", lambda x, w, eps, offset: right(x, w, eps))
    assert distances(model, torch.float32)["Gemma2RMSNorm"] > 0.1
    monkeypatch.setattr(fused, "gated", lambda gate, up, act: pointwise.gated(gate, up, "silu"))
    assert distances(model, torch.float32)["Gemma2MLP"] > 1e-2


def test_every_activation_is_named():
    """Those of the families that have gated MLPs: one that is not would run as it is, unseen."""
    for family in TESTED:
        model = tiny_model(family)
        entry = family_of(model.config)
        if entry.fused and (entry.mlp_gate or entry.mlp_gate_up):
            mlp = layers_of(model)[0].get_submodule(entry.mlp)
            act = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
            assert type(act).__name__ in ACTS, family


def test_in_fp64_blocks_are_as_they_are():
    model = tiny_model("llama", torch.float64)
    with own_forwards(model, family_of(model.config)):
        assert not changed(model)


def test_what_is_not_transformers_goes_on_as_it_is():
    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-5

        def forward(self, x):
            return x + 1

    model = tiny_model("llama")
    layers = layers_of(model)
    layers[0].input_layernorm = LlamaRMSNorm()
    layers[1].mlp.forward = lambda x: x
    layers[2].mlp.act_fn = nn.Mish()
    with own_forwards(model, family_of(model.config)):
        assert "forward" not in vars(layers[0].input_layernorm) and "forward" in vars(layers[0].mlp)
        assert layers[1].mlp.forward(3) == 3 and "forward" not in vars(layers[2].mlp)
    assert layers[1].mlp.forward(3) == 3 and changed(model) == [layers[1].mlp]


def test_put_back_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(KeyError), own_forwards(model, family_of(model.config)):
        assert changed(model)
        raise KeyError
    assert not changed(model)


@pytest.mark.parametrize("what", ["hook", "own forward", "class of MLPs", "class of norms"])
def test_what_others_changed_is_what_a_sweep_runs(what, monkeypatch):
    """Hooks on an activation did not fire, and a forward given to a class was replaced."""
    model = tiny_model("llama")
    lm = open_model(model, tokenizer=tiny_tokenizer(bos=True))
    ids = torch.tensor([lm.encode("The Eiffel Tower is in the city of")])
    layer = layers_of(model)[0]
    if what == "hook":
        layer.mlp.act_fn.register_forward_hook(lambda module, given, out: out * 0)
    elif what == "own forward":
        layer.mlp.act_fn.forward = lambda x: x * 0
    else:
        one = layer.mlp if what == "class of MLPs" else layer.input_layernorm
        monkeypatch.setattr(type(one), "forward", lambda self, x: x * 0.5)
    with torch.no_grad():
        theirs = model(ids).logits[0, -1].softmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = next_token_probs(lm, ids.tolist(), torch.tensor([-1]))[0]
    assert (ours - theirs).abs().max() < 1e-5


def test_an_activation_of_the_same_name_is_another():
    class NewGELUActivation(nn.Module):
        def forward(self, x):
            return x + 1

    model = tiny_model("gpt2")
    layers_of(model)[0].mlp.act = NewGELUActivation()
    with own_forwards(model, family_of(model.config)):
        assert "forward" not in vars(layers_of(model)[0].mlp.act) and "forward" in vars(layers_of(model)[1].mlp.act)


def test_a_norm_of_another_dtype_computes_as_it_does():
    model = tiny_model("llama", torch.bfloat16)
    model.model.norm.float()
    model.lm_head.float()
    lm = open_model(model, tokenizer=tiny_tokenizer(bos=True))
    fact = kf.Fact("{} is in", "Big Ben", "Rome", "London")
    (found,) = kf.trace(lm, fact, kinds=("state",), samples=2)
    assert np.isfinite(found.p_restored).all()


def test_all_is_put_back_where_an_interrupt_comes_while_it_is():
    undone = []

    def undo():
        undone.append(1)
        if len(undone) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fused.put_back(undo)
    assert len(undone) == 2
