"""Families that no parity test covers: what opens gives the model's own logits, anything else is refused with why."""

import pytest
import torch
import transformers

from kedit_fast.model.family import FAMILIES, TESTED, Family
from tests import tiny
from tests.conftest import close, on_disk, open_tiny, save_tiny
from tests.tiny import ATTENTION, FAMILY_NAMES, sharpen, tiny_model, tiny_tokenizer

MODELS = {"granite": "GraniteForCausalLM", "cohere": "CohereForCausalLM", "mixtral": "MixtralForCausalLM"}


def stranger(family, **config):
    """A sharpened tiny model of a family outside the table."""
    model_class = getattr(transformers, MODELS[family])
    vocabulary = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 1, "eos_token_id": 0}
    config = tiny._common(config.pop("layers", 2)) | vocabulary | config
    model = model_class(model_class.config_class(**config))
    model.set_attn_implementation(ATTENTION)
    sharpen(model, 0)
    return model.eval()


@pytest.fixture
def entries(monkeypatch):
    """A user's entries for them, as the advice says."""
    for name in MODELS:
        monkeypatch.setitem(FAMILIES, name, Family())


def test_the_tested_families_are_those_of_the_parity_tests():
    assert sorted(TESTED) == sorted(FAMILY_NAMES) and set(TESTED) == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        ("granite", {"logits_scaling": 8.0}, r"No entry .*multiplies embeddings or logits \(logits_scaling = 8\.0\)"),
        ("cohere", {}, r"No entry makes it one of them: .*logit_scale = 0\.0625"),
        ("mixtral", {"num_local_experts": 4}, r"No entry .*mixtures of experts \(num_local_experts = 4\)"),
        ("granite", {}, r'is one entry in.*"granite": Family\((?s:.)*compared with the model\'s own logits'),
    ],
)
def test_no_entry_is_offered_that_could_not_be_right(family, config, says):
    with pytest.raises(ValueError, match=f"(?s)unknown model family '{family}'.*{says}"):
        open_tiny(stranger(family, **config))


@pytest.mark.parametrize(("family", "config"), [("granite", {}), ("cohere", {"logit_scale": 1.0})])
def test_an_entry_that_fits_opens(entries, family, config):
    model = stranger(family, **config)
    lm = open_tiny(model)
    with torch.no_grad():
        p = model(torch.tensor([lm.encode("The Eiffel Tower is in")])).logits[0, -1].softmax(-1)
    close("p", torch.tensor([p for _, p in lm.top_tokens("The Eiffel Tower is in", 5)]), p.topk(5).values)


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        ("granite", {"logits_scaling": 8.0}, r"own by 700\.0% of their size.*\(logits_scaling = 8\.0\)"),
        ("granite", {"embedding_multiplier": 12.0}, r"differ from the model's own.*embedding_multiplier = 12\.0"),
        ("granite", {"residual_multiplier": 0.5}, r"is changed before the residual stream gets it, by 50\.0%"),
        ("cohere", {"logit_scale": 0.25}, r"own by 300\.0% of their size.*logit_scale = 0\.25"),
        ("mixtral", {"num_local_experts": 4}, r"does not fit this model: its layers are mixtures of experts"),
    ],
)
def test_an_entry_that_leaves_something_out_is_refused(entries, family, config, says):
    with pytest.raises(ValueError, match=f"'{family}' is covered by no test of kedit_fast, and .*{says}"):
        open_tiny(stranger(family, **config))


def test_an_entry_with_a_wrong_path_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "granite", Family(norm="model.layers.0.input_layernorm"))
    with pytest.raises(ValueError, match="differ from the model's own"):
        open_tiny(stranger("granite"))
    monkeypatch.setitem(FAMILIES, "granite", Family(norm="model.final_norm"))
    with pytest.raises(ValueError, match=r"its entry does not fit this model: .*final_norm"):
        open_tiny(stranger("granite"))


def test_a_class_of_somebody_s_own_is_compared_too():
    """Its config says llama; what its forward does nobody knows."""

    class Louder(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    model = tiny_model("llama")
    model.__class__ = Louder
    with pytest.raises(ValueError, match=r"'llama' is covered by no test.*by 50\.0% of their size"):
        open_tiny(model)


@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_a_model_on_disk_is_compared_layer_by_layer(entries, scaling, tmp_path):
    model = stranger("granite", logits_scaling=scaling, layers=6)
    model.set_attn_implementation("sdpa")
    save_tiny(tmp_path, model)
    if scaling != 1:
        with pytest.raises(ValueError, match=r"700\.0% of their size"):
            on_disk(tmp_path)
        return
    lm = on_disk(tmp_path)
    assert all(p.is_meta for p in lm.model.model.layers.parameters()), "no layer stays"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
