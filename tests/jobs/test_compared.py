"""Families that no parity test covers: what opens gives the model's own logits, anything else is refused with why."""

from dataclasses import replace

import pytest
import torch
import transformers

from kedit_fast.jobs import compared
from kedit_fast.model.family import FAMILIES, TESTED, Family, family_of
from tests import tiny
from tests.conftest import close, on_disk, open_tiny, save_tiny, tiny_lm
from tests.tiny import ATTENTION, FAMILY_NAMES, sharpen, tiny_model, tiny_tokenizer

STRANGER = "hyperclovax"  # it has every factor, and norms behind attention and MLP
SCALED = {"embedding_multiplier": 12.0, "residual_multiplier": 0.5, "logits_scaling": 8.0}
SCALES = Family(
    embedding_scale="embedding_multiplier", residual_scale="residual_multiplier", logit_scale="logits_scaling"
)


def stranger(layers=2, **config):
    """A sharpened tiny model of a family outside the table."""
    vocabulary = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 1, "eos_token_id": 0}
    config = tiny._common(layers) | vocabulary | {"use_post_norm": False} | config
    model = transformers.HyperCLOVAXForCausalLM(transformers.HyperCLOVAXConfig(**config))
    model.set_attn_implementation(ATTENTION)
    sharpen(model, 0)
    return model.eval()


@pytest.fixture
def entry(monkeypatch):
    """Sets the user's entry for it, as the advice says."""
    return lambda family=Family(): monkeypatch.setitem(FAMILIES, STRANGER, family)  # noqa: B008


def test_the_tested_families_are_those_of_the_parity_tests():
    assert sorted(TESTED) == sorted(FAMILY_NAMES) and set(TESTED) == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("qwen3_5_text", "No entry makes it one of them: it has layers of linear attention, and a sweep knows"),
        ("llama4_text", "No entry .* it has layers of chunked attention.*scales queries by their place in the call"),
        ("qwen3_next", "No entry .* it has layers of linear attention"),
    ],
)
def test_no_entry_is_offered_that_could_not_be_right(family, says):
    with pytest.raises(ValueError, match=f"(?s)unknown model family '{family}'.*{says}"):
        family_of(transformers.AutoConfig.for_model(family))


@pytest.mark.parametrize(
    ("config", "hint"), [({}, r"covers it$"), (SCALED, r"; it multiplies.*12\.0.*0\.5.*in the entry")]
)
def test_the_entry_to_write_is_shown(config, hint):
    says = rf'(?s)is one entry in.*"{STRANGER}": Family\(.*compared with the model\'s own logits.*{hint}'
    with pytest.raises(ValueError, match=says):
        open_tiny(stranger(**config))


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({}, Family()),
        (SCALED, SCALES),
        (SCALED | {"use_post_norm": True}, replace(SCALES, post_norm="post_norm2")),
    ],
)
def test_an_entry_that_fits_opens(entry, config, family):
    entry(family)
    model = stranger(**config)
    lm = open_tiny(model)
    with torch.no_grad():
        p = model(torch.tensor([lm.encode("The Eiffel Tower is in")])).logits[0, -1].softmax(-1)
    close("p", torch.tensor([p for _, p in lm.top_tokens("The Eiffel Tower is in", 5)]), p.topk(5).values)


@pytest.mark.parametrize(
    ("config", "family", "says"),
    [
        ({"logits_scaling": 8.0}, Family(), r"own by 87\.5% of their size.*\(logits_scaling = 8\.0\)"),
        ({"logits_scaling": 8.0}, Family(logit_divisor="logits_scaling"), r"own by 98\.4% of their size"),
        ({"embedding_multiplier": 12.0}, Family(), r"differ from the model's own.*embedding_multiplier = 12\.0"),
        ({"residual_multiplier": 0.5}, Family(), r"is not what .* stream gets, by 50\.0%.*residual_multiplier = 0\.5"),
        ({"use_post_norm": True}, Family(), r"is not what .* stream gets, by .*post_norm"),
        ({"use_post_norm": True}, Family(post_norm="post_norm1"), r"is not what .* stream gets, by"),
    ],
)
def test_an_entry_that_leaves_something_out_is_refused(entry, config, family, says):
    entry(family)
    with pytest.raises(ValueError, match=f"'{STRANGER}' is covered by no test of kedit_fast, and .*{says}"):
        open_tiny(stranger(**config))


def test_a_mixture_of_experts_is_compared_by_its_routed_keys_too(monkeypatch):
    """olmoe stacks its experts as those of the table do; one whose gate is another's is seen."""
    vocabulary = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 1, "eos_token_id": 0}
    config = tiny._common(2) | vocabulary | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 20}
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**config))
    model.set_attn_implementation(ATTENTION)
    model.set_experts_implementation("eager")
    sharpen(model, 0)
    model.eval()
    with pytest.raises(
        ValueError, match=r'one entry in(?s:.)*mixtures of experts.*mlp_down="mlp.experts".*experts=True'
    ):
        open_tiny(model)
    monkeypatch.setitem(FAMILIES, "olmoe", Family())
    with pytest.raises(ValueError, match="its entry does not fit this model: its layers are mixtures of experts"):
        open_tiny(model)
    entry = Family(mlp_down="mlp.experts", mlp_up=None, mlp_gate=None, experts=True)
    monkeypatch.setitem(FAMILIES, "olmoe", entry)
    assert open_tiny(model).d_ff == 80
    gate = type(model.model.layers[0].mlp.experts)._apply_gate
    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "_apply_gate", lambda self, both: 2 * gate(self, both))
    with pytest.raises(ValueError, match=r"routed keys of its experts do not give .* by 100\.0%"):
        open_tiny(model)


def test_a_window_that_attention_is_not_told_of_is_refused(entry):
    """It begins behind the text that is compared."""
    entry()
    model = stranger()
    model.config.sliding_window = 4096
    with pytest.raises(ValueError, match=r"longer texts .* layer 0 says sliding attention, a window of 4096, .* None"):
        open_tiny(model)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="the config of layer 1 says sliding"):
        open_tiny(model)
    model.config.use_sliding_window = False
    open_tiny(model)


def test_blocks_that_mix_rows_elsewhere_than_in_attention_are_refused(entry, monkeypatch):
    """One text by itself is right; of two in a pack the second one's rows stand behind the first one's."""
    entry()

    def mixed(module, args, out):
        return out + 0.5 * out.roll(1, 1) * (torch.arange(out.shape[1]) > 0)[None, :, None]

    model = stranger()
    model.model.layers[0].mlp.register_forward_hook(mixed)
    with pytest.warns(UserWarning, match="hooks of others"), pytest.raises(ValueError, match="differ from the model's"):
        open_tiny(model)
    both = compared._texts
    monkeypatch.setattr(compared, "_texts", lambda lm: both(lm)[:1])
    with pytest.warns(UserWarning, match="hooks of others"), pytest.raises(ValueError, match="is not what its entry"):
        open_tiny(model)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_entry_says_what_the_stream_gets(family, monkeypatch):
    """The families of the table pass the comparison that others have to pass, and fail it without a word of theirs."""
    monkeypatch.setattr(compared, "TESTED", ())
    lm = tiny_lm(family)
    compared.check_own_logits(lm)
    for word in ("post_norm", "residual_scale", "embedding_scale", "logit_scale", "logit_divisor"):
        if getattr(lm.family, word):
            with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"differ from|is not what its entry"):
                patch.setitem(FAMILIES, family, replace(lm.family, **{word: None}))
                compared.check_own_logits(lm)


def test_an_entry_with_a_wrong_path_is_refused(entry):
    entry(Family(norm="model.layers.0.input_layernorm"))
    with pytest.raises(ValueError, match="differ from the model's own"):
        open_tiny(stranger())
    entry(Family(norm="model.final_norm"))
    with pytest.raises(ValueError, match=r"its entry does not fit this model: .*final_norm"):
        open_tiny(stranger())


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
def test_a_model_on_disk_is_compared_layer_by_layer(entry, scaling, tmp_path):
    entry()
    model = stranger(logits_scaling=scaling, layers=6)
    model.set_attn_implementation("sdpa")
    save_tiny(tmp_path, model)
    if scaling != 1:
        with pytest.raises(ValueError, match=r"87\.5% of their size"):
            on_disk(tmp_path)
        return
    lm = on_disk(tmp_path)
    assert all(p.is_meta for p in lm.model.model.layers.parameters()), "no layer stays"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
