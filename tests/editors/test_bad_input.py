"""Bad input to an edit: a clear error before any work, and nothing written."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Regex, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

import kedit_fast as kf
import kedit_fast.jobs.values as values_module
import kedit_fast.sweep.engine as engine
from kedit_fast.moments import SecondMoment
from tests.conftest import open_tiny, tiny_lm
from tests.editors.cases import FACTS, moments
from tests.edits import make_edit, owned_edit
from tests.tiny import D_FF, tiny_model, tiny_tokenizer

EDITORS = [kf.Rome(layers=(1,), v_num_grad_steps=2), kf.Memit(layers=(1, 2), v_num_grad_steps=2)]
both = pytest.mark.parametrize("editor", EDITORS, ids=["rome", "memit"])
FACT = FACTS[0]


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """An empty folder to work in, where no sweep may run and, in the end, nothing may stand."""

    def no_sweep(*args):
        raise AssertionError("a sweep ran before the input was checked")

    monkeypatch.setattr(engine, "prepared", no_sweep)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir())


def refused(says, editor, lm, facts=FACT, error=ValueError, **options):
    with pytest.raises(error, match=says):
        editor.edit(lm, facts, **{"moments": moments(), "contexts": None} | options)


@both
def test_the_guard_works(editor, workshop):
    """Good input gets as far as the first sweep."""
    for contexts in (["{}"], None):
        refused("a sweep ran", editor, tiny_lm("gpt2"), error=AssertionError, contexts=contexts)
    refused("a sweep ran", editor, tiny_lm("gpt2"), error=AssertionError, moments=None, corpus="self")


# --- facts -----------------------------------------------------------------------------------------------------------


def test_a_subject_that_is_not_in_its_prompt(workshop):
    with pytest.raises(ValueError, match=r"subject 'Big Ben' not in prompt 'It is in'; Fact.prompt needs one \{\}"):
        kf.Fact(prompt="It is in", subject="Big Ben", target_new="Rome")
    with pytest.raises(ValueError, match="Big Ben"):
        kf.Fact.from_record({"prompt": "The Eiffel Tower is in", "subject": "Big Ben", "target_new": "Rome"})


@both
@pytest.mark.parametrize("target", ["", "  ", None])
def test_an_empty_target(editor, target, workshop):
    if target is not None:
        with pytest.raises(ValueError, match="target_new is empty"):
            kf.Fact(prompt="{} is in", subject="Big Ben", target_new=target)
    else:
        fact = kf.Fact(prompt="{} is in", subject="Big Ben", id="7")
        refused(r"fact 7 \('Big Ben is in'\) has no target_new", editor, tiny_lm("gpt2"), [FACT, fact])


@both
def test_facts_that_contradict_each_other(editor, workshop):
    other = replace(FACT, target_new="Berlin")
    refused("contradict each other: target_new 'Rome' and 'Berlin'", editor, tiny_lm("gpt2"), [FACT, FACTS[1], other])


@both
@pytest.mark.parametrize(
    ("facts", "error", "says"),
    [
        ([], ValueError, "no facts"),
        (["Big Ben"], TypeError, "expected Facts, got str"),
        ([None], TypeError, "NoneType"),
    ],
)
def test_no_facts_or_something_else(editor, facts, error, says, workshop):
    refused(says, editor, tiny_lm("gpt2"), facts, error)


@both
def test_a_prompt_longer_than_the_model(editor, workshop):
    fact = kf.Fact(prompt="It is in the city. " * 40 + "{} is in", subject="Big Ben", target_new="Rome")
    refused("tokens; this model takes 128", editor, tiny_lm("gpt2"), fact)


@both
def test_words_that_the_tokenizer_drops(editor, workshop):
    dropping = Tokenizer.from_str(tiny_tokenizer()._tokenizer.to_str())
    dropping.normalizer = normalizers.Replace(Regex(" ?\u200b"), "")
    lm = replace(tiny_lm("gpt2"), tokenizer=PreTrainedTokenizerFast(tokenizer_object=dropping))
    refused("no tokens; the tokenizer drops", editor, lm, replace(FACT, target_new="\u200b"))
    refused("the tokenizer drops these characters", editor, lm, replace(FACT, subject="\u200b"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("facts.jsonl", '{"prompt": "{} is", "subject": "Big Ben", "target": "Rome"}\n{"prompt": \n', "line 2, column"),
        ("facts.json", '[\n{"subject": "Big Ben"},\n{"subject" "a"}]', "line 3, column"),
        ("facts.jsonl", '\n{"prompt": "no", "subject": "Big Ben"}\n', r"record 0 \(line 2\)"),
        ("facts.json", '[{"prompt": "{} is", "subject": "Rome", "target": "x"}, {"subject": "x"}]', "record 1: fields"),
    ],
)  # fmt: skip
def test_an_unreadable_record(name, text, says, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        kf.load_facts(path)
    assert str(path) in str(error.value)


# --- the model -------------------------------------------------------------------------------------------------------


def test_an_unknown_family(workshop):
    model = tiny_model("gpt2")
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match="unknown model family 'mamba'; known: gpt2") as error:
        kf.open_model(model, tokenizer=tiny_tokenizer())
    assert '"mamba": Family(' in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(value, workshop):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj.weight.*holds NaN or infinity"):
        open_tiny(model)


@both
def test_weights_that_break_after_the_model_was_opened(editor, monkeypatch):
    """Seen in the first sweep, before any step is taken."""
    lm = open_tiny(tiny_model("llama"))
    with torch.no_grad():
        lm.model.model.layers[2].mlp.up_proj.weight[3, 4] = torch.nan
    monkeypatch.setattr(values_module._Group, "optimize", None)
    refused("NaN or infinity", editor, lm, contexts=["{}"])


@both
@pytest.mark.parametrize("layer", [4, -1, 1.0, "1", True])
def test_a_layer_out_of_range(editor, layer, workshop):
    refused(
        f"layer {layer!r} is out of range: this model has layers 0 to 3",
        replace(editor, layers=(0, layer)),
        tiny_lm("gpt2"),
    )
    refused(f"layer {layer!r} is out of range", replace(editor, v_loss_layer=layer), tiny_lm("gpt2"))


# --- settings --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": ()}, r"needs layers; (Rome|Memit)\.for_model\(lm\) derives them"),
        ({"layers": (1, 1)}, r"layers \(1, 1\): expected each layer once"),
        ({"fact_token": "last"}, "fact_token 'last': only"),
        ({"v_num_grad_steps": 0}, "v_num_grad_steps 0: expected a number above 0"),
        ({"v_lr": -0.5}, "v_lr -0.5"),
        ({"v_lr": float("nan")}, "v_lr nan"),
        ({"clamp_norm_factor": 0}, "clamp_norm_factor 0"),
        ({"regularizer": -1e-6}, "regularizer -1e-06"),
    ],
)
def test_settings_that_make_no_sense(editor, changes, says, workshop):
    refused(says, replace(editor, **changes), tiny_lm("gpt2"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mom2_update_weight": 0}, "mom2_update_weight 0"),
        ({"layers": (2, 1)}, r"layers \(2, 1\): expected lowest first"),
    ],
)
def test_settings_that_make_no_sense_in_memit(changes, says, workshop):
    refused(says, replace(EDITORS[1], **changes), tiny_lm("gpt2"))


@both
@pytest.mark.parametrize("contexts", [[], [["{}"], []], ["So. {}"], ["{}", "no place"], ["{}", "{} {}"]])
def test_malformed_contexts(editor, contexts, workshop):
    refused("context", editor, tiny_lm("gpt2"), contexts=contexts)
    refused("context", editor, tiny_lm("gpt2"), contexts=contexts, moments=None, corpus="self")


# --- statistics ------------------------------------------------------------------------------------------------------


@both
def test_neither_statistics_nor_a_corpus(editor, workshop):
    refused("give moments=.*or corpus=.*or mom2_adjustment=False", editor, tiny_lm("gpt2"), moments=None)


@both
def test_statistics_of_another_model(editor, workshop):
    other, lm = tiny_lm("llama").fingerprint, tiny_lm("gpt2")
    foreign = {i: replace(m, fingerprint=other) for i, m in moments().items()}
    refused(f"second moment of layer 1 is of {other}, this model is {lm.fingerprint}", editor, lm, moments=foreign)


@both
def test_statistics_of_too_few_tokens(editor, workshop):
    few = moments(n_tokens=D_FF - 1)
    refused(
        "is of 79 tokens, fewer than d_ff = 80.*collect more tokens, or.*regularizer",
        editor,
        tiny_lm("gpt2"),
        moments=few,
    )


@both
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: {i: x for i, x in m.items() if i != 1}, r"no second moment for layer 1; given for \[0, 2, 3\]"),
        (lambda m: m | {1: m[2]}, "given for layer 1 is of layer 2"),
        (lambda m: m | {1: SecondMoment(torch.eye(64), 500, 1)}, r"is \[64, 64\]; this model's d_ff is 80"),
        (lambda m: m | {1: SecondMoment(torch.full((80, 80), torch.nan), 500, 1)}, "layer 1 holds NaN or infinity"),
    ],
)
def test_statistics_that_do_not_fit(editor, change, says, workshop):
    refused(says, editor, tiny_lm("gpt2"), moments=change(moments()))


@both
def test_a_corpus_that_is_missing_or_too_short(editor, workshop):
    lm = tiny_lm("gpt2")
    refused("no such file", editor, lm, error=FileNotFoundError, moments=None, corpus="absent.txt")
    refused("fewer than the 800 asked for", editor, lm, moments=None, corpus=["The Space Needle is in Seattle."])
    refused("non-empty list of texts", editor, lm, moments=None, corpus=[])


@pytest.mark.parametrize("options", [{"layers": (1, 4)}, {"layers": ()}, {"n_tokens": 0}, {"corpus": ["Too short."]}])
def test_statistics_are_refused_before_their_folder_is_made(options, workshop):
    with pytest.raises(ValueError):
        kf.second_moments(tiny_lm("gpt2"), **{"layers": (1,), "corpus": "self"} | options, cache_dir=workshop / "cache")


# --- earlier edits ---------------------------------------------------------------------------------------------------


@both
def test_an_earlier_edit_that_cannot_be_built_on(editor, workshop):
    model = tiny_model("gpt2")
    lm = open_tiny(model)
    refused("carries independent edits", editor, lm, previous=owned_edit(model))
    refused("carries independent edits", editor, lm.with_edit(owned_edit(model)))
    refused("this edit was made on", editor, lm, previous=make_edit(tiny_model("llama")))
    refused(r"expected an Edit, got str; Edit.load", editor, lm, error=TypeError, previous="edit.safetensors")


def test_a_truncated_edit_file(tmp_path):
    path = tmp_path / "edit.safetensors"
    make_edit(tiny_model("gpt2")).save(path)
    whole = path.read_bytes()
    for length in (0, 7, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short") as error:
            kf.Edit.load(path)
        assert str(path) in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_record_of_facts_round_trips_where_input_is_good(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(fact.to_record()) + "\n" for fact in FACTS))
    assert [fact.text for fact in kf.load_facts(path)] == [fact.text for fact in FACTS]
