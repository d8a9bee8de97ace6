"""Opening models, what lies around the blocks, and what is refused at the door."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import kedit_fast as kf
from kedit_fast.model import opening
from kedit_fast.model.family import FAMILIES, as_out_in, family_of, layers_of, projection, text_config
from kedit_fast.model.fingerprint import fingerprint
from kedit_fast.model.source import DEFAULT_MEMORY
from tests.conftest import close, open_tiny, tiny_lm
from tests.make import lowrank, make_edit
from tests.oracle.access import paths
from tests.tiny import D_FF, D_MODEL, DISTINCT, tiny_model, tiny_tokenizer

TEXT = "The Eiffel Tower is located in the city of"


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family):
    lm = tiny_lm(family)
    assert (lm.n_layers, lm.d_model, lm.d_ff) == (4, D_MODEL, D_FF)
    attention = layers_of(lm.model)[0].get_submodule(FAMILIES[family].attn)
    assert attention.config is lm.config is text_config(lm.model.config)
    out = as_out_in(layers_of(lm.model)[0].get_submodule(FAMILIES[family].attn_proj))
    assert out.shape == (D_MODEL, lm.config.num_attention_heads * lm.head_dim)
    assert lm.config.num_attention_heads % lm.n_key_heads == 0
    assert lm.n_vocab == lm.model.get_output_embeddings().weight.shape[0]
    assert (lm.dtype, lm.device.type) == (torch.float32, "cpu")
    for role in lm.family.roles:
        assert as_out_in(projection(lm.model, 1, role)).shape == lm.shape_of(role)
    names = paths(lm.model)
    down = lm.model.get_submodule(names.layers)[1].get_submodule(names.down)
    assert projection(lm.model, 1) is (down.experts if lm.family.experts else down)


@pytest.mark.parametrize("family", DISTINCT)
def test_the_likeliest_tokens_are_hugging_faces(family):
    lm = tiny_lm(family)
    with torch.no_grad():
        p = lm.model(torch.tensor([lm.encode(TEXT)])).logits[0, -1].softmax(-1)
    got = lm.top_tokens(TEXT, k=4)
    assert [token for token, _ in got] == [tiny_tokenizer().decode([i]) for i in p.topk(4).indices.tolist()]
    close("p", torch.tensor([x for _, x in got]), p.topk(4).values)


def test_an_opened_model_is_the_one_given():
    model = tiny_model("llama")
    lm = open_tiny(model)
    assert lm.model is model and lm.source.in_memory and lm.memory == DEFAULT_MEMORY
    assert open_tiny(model, memory="3 MB").memory == 3_000_000
    assert open_tiny(model, device="cpu", dtype="fp32").dtype == torch.float32


def test_a_view_with_an_edit_leaves_the_model_without_it():
    model = tiny_model("gpt2")
    lm = open_tiny(model)
    plain = lm.top_tokens(TEXT)
    edit = make_edit(model)
    edited = lm.with_edit(edit)
    assert edited.top_tokens(TEXT) != plain and lm.top_tokens(TEXT) == plain
    assert edited.fingerprint == lm.fingerprint and lm.edits == () and len(edited.edits) == 1
    assert len(edited.with_edit(make_edit(model, {1: lowrank(seed=5)})).edits) == 2


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_edit_acts_as_weights_of_that_dtype(family, dtype):
    """``written``: what the model would say once the edit is in weights of that dtype."""
    model = tiny_model(family, dtype).float()  # fp32 arithmetic over weights that ``dtype`` can hold
    edit = make_edit(model)
    got = open_tiny(model).with_edit(edit, written=dtype).top_tokens(TEXT, 8)
    for layer, delta in edit.deltas.items():
        weight = as_out_in(projection(model, layer)).data
        weight.copy_((weight.double() + delta.dense().double()).to(dtype))
    want = open_tiny(model).top_tokens(TEXT, 8)
    assert [t for t, _ in got] == [t for t, _ in want]
    close("written", torch.tensor([p for _, p in got]), torch.tensor([p for _, p in want]))


def test_an_edit_of_another_model_is_refused():
    edit = make_edit(tiny_model("llama", seed=1))
    with pytest.raises(ValueError, match=r"was made on llama-4-48-\w+ and the model is llama-4-48-"):
        tiny_lm("llama").with_edit(edit)
    with pytest.raises(ValueError, match="layer 9 is out of range: this model has layers 0 to 3"):
        tiny_lm("llama").with_edit(make_edit(deltas={9: lowrank()}, keys={}))


# ---- the door


def test_an_unknown_family_is_shown_the_entry_to_write():
    config = GPTNeoConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]])
    with pytest.raises(ValueError) as error:
        open_tiny(GPTNeoForCausalLM(config))
    text = str(error.value)
    assert "unknown model family 'gpt_neo'" in text and "kedit_fast/model/family.py" in text
    assert '"gpt_neo": Family(layers="model.layers"' in text and all(family in text for family in FAMILIES)
    entry = eval(text[text.index("Family(") : text.index("),\n") + 1], {"Family": type(FAMILIES["llama"])})
    assert replace(entry, fused=True) == FAMILIES["llama"]  # the entry it shows is one that works


def test_a_config_without_a_type_is_refused():
    with pytest.raises(ValueError, match="unknown model family None"):
        family_of(SimpleNamespace())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_are_refused(bad):
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = bad
    with pytest.raises(ValueError, match=r"'model\.layers\.2\.mlp\.up_proj\.weight' of .* holds NaN or infinity"):
        open_tiny(model)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        kf.open_model(tiny_model("llama"), tokenizer=SimpleNamespace(is_fast=False))


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"device": torch.device("meta")}])
def test_a_loaded_model_is_not_converted(options, monkeypatch):
    monkeypatch.setattr(opening, "checked_device", lambda device: device)  # every machine has another device: meta
    with pytest.raises(ValueError, match=r"used as it is: convert it first with model\.to"):
        open_tiny(tiny_model("llama"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp4"}, "dtype = 'fp4': expected one of float32, bfloat16"),
        ({"dtype": "nn"}, "dtype = 'nn': expected one of float32, bfloat16"),
        ({"device": "meta"}, "device = 'meta': expected a device of this machine"),
        ({"memory": "lots"}, "memory = 'lots': expected a size above 0: bytes, or a text with KB, MB, GB"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        open_tiny(tiny_lm("llama").model, **options)


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("1.5 GiB", 3 << 29), ("64kb", 64e3), ("77", 77), (5, 5)])
def test_sizes(text, size):
    assert open_tiny(tiny_lm("llama").model, memory=text).memory == size


@pytest.mark.parametrize("layer", [-1, 4, True, 1.0, "1"])
def test_layers_out_of_range_are_refused(layer):
    with pytest.raises(ValueError, match=r"is out of range: this model has layers 0 to 3"):
        projection(tiny_lm("gpt2").model, layer)


def test_layers_without_a_down_projection_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"layer 1 of this llama model has no module 'mlp\.down_proj'"):
        projection(model, 1)


# ---- fingerprints


def test_fingerprints_tell_models_apart_and_copies_together():
    lm = tiny_lm("gpt2")
    assert lm.fingerprint.startswith("gpt2-4-48-")
    assert lm.fingerprint == tiny_lm("gpt2", torch.bfloat16).fingerprint == open_tiny(tiny_model("gpt2")).fingerprint
    others = [open_tiny(tiny_model("gpt2", seed=1)), tiny_lm("gptj"), tiny_lm("gpt2", layers=2)]
    assert len({lm.fingerprint, *(other.fingerprint for other in others)}) == 4
    model = tiny_model("gpt2")
    with make_edit(model).apply(model):
        assert open_tiny(model).fingerprint != lm.fingerprint


@pytest.mark.parametrize("family", DISTINCT)
def test_a_fingerprint_sees_every_parameter_that_a_text_passes(family):
    """An attention-only fine-tune is another model, and so is one of a bias, a norm or the head."""
    model = tiny_model(family)
    base, prefix = fingerprint(model), FAMILIES[family].layers
    for name, parameter in model.named_parameters():
        if "vision" in name or "projector" in name or (name.startswith(prefix + ".") and f"{prefix}.2." not in name):
            continue
        kept = parameter.data.clone()
        parameter.data += 0.1 * parameter.data.std() + 0.1 * parameter.data.abs()
        assert fingerprint(model) != base, name
        parameter.data = kept
    assert fingerprint(model) == base


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_fingerprint_reads_rows_of_outputs(family):
    """An update u vᵀ changes every row [out, in], however few keys v has; GPT-2 stores them as columns."""
    model = tiny_model(family)
    base, weight = fingerprint(model), as_out_in(projection(model, 1)).data
    weight[5] += 0.5  # a row that is not read
    assert fingerprint(model) == base
    weight[:, 5] += 0.5
    assert fingerprint(model) != base


def test_layers_and_matrices_that_change_places_change_the_fingerprint():
    model = tiny_model("llama")
    base, attention = fingerprint(model), model.model.layers[1].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    assert fingerprint(model) != base


def test_a_model_without_weights_has_no_fingerprint():
    model = tiny_model("llama")
    model.model.layers[3].self_attn.q_proj.to("meta")
    with pytest.raises(ValueError, match="weights are not loaded"):
        fingerprint(model)
