"""Bad input to an edit: a clear error before any work, and nothing written."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

import kedit_fast as kf
import kedit_fast.editors.rome as rome_module
import kedit_fast.editors.spread as spread_module
import kedit_fast.jobs.values as values_module
from kedit_fast.edits.edit import digest
from kedit_fast.facts.tokens import answer_tokens
from kedit_fast.moments.second_moment import SecondMoment
from tests import compare
from tests.conftest import open_tiny, tiny_lm
from tests.editors.cases import FACTS, moments
from tests.make import make_edit, owned_edit
from tests.tiny import D_FF, tiny_model, tiny_tokenizer

EDITORS = [kf.Rome(layers=(1,), v_num_grad_steps=2), kf.Memit(layers=(1, 2), v_num_grad_steps=2)]
pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
both = pytest.mark.parametrize("editor", EDITORS, ids=["rome", "memit"])
FACT = FACTS[0]


@pytest.fixture
def workshop(tmp_path, monkeypatch, no_sweep):
    """An empty folder to work in, where no sweep may run and, in the end, nothing may stand."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir())


def refused(says, editor, lm, facts=FACT, **options):
    return compare.refused(says, editor.edit, lm, facts, **{"moments": moments(), "contexts": None} | options)


@both
def test_the_guard_works(editor, workshop):
    """Good input gets as far as the first sweep."""
    for contexts in (["{}"], None):
        refused("a sweep ran", editor, tiny_lm("gpt2"), error=AssertionError, contexts=contexts)
    refused("a sweep ran", editor, tiny_lm("gpt2"), error=AssertionError, moments=None, corpus="self")


GIVEN, OTHER = moments(), {i: moment for i, moment in moments().items() if i != 1}
NO_CORPUS = 'corpus = .*: expected "self".* or a list of texts'
REFUSED = [
    # facts
    ({"facts": []}, "facts is empty"),
    ({"facts": [FACT, kf.Fact("{} is in", "Big Ben", id="7")]}, r"fact 7 \('Big Ben is in'\) has no target_new"),
    ({"facts": [FACT, FACTS[1], replace(FACT, target_new="Berlin")]}, "contradict .*: target_new 'Rome' and 'Berlin'"),
    # settings; their values: test_hyperparameters.py
    ({"layers": ()}, r"needs layers; (Rome|Memit)\.for_model\(lm\) derives them"),
    ({"layers": (0, 4)}, "layers = .*4: this model has layers 0 to 3"),
    ({"v_loss_layer": 4}, "v_loss_layer = 4: this model has layers 0 to 3"),
    *(
        ({"contexts": contexts} | statistics, "context")
        for contexts in ([], [["{}"], []], ["So. {}"], ["{}", "no place"], ["{}", "{} {}"])
        for statistics in ({}, {"moments": None, "corpus": "self"})
    ),
    # statistics
    ({"moments": None}, "give moments=.*or corpus=.*or mom2_adjustment=False"),
    ({"corpus": "self"}, "moments= and corpus= are both given; give one"),
    ({"moments": {}, "corpus": ["x"]}, "moments= and corpus= are both given; give one"),
    ({"moments": None, "corpus": ["The Space Needle is in Seattle."]}, "fewer than the 640 asked for"),
    ({"moments": None, "corpus": []}, "corpus is empty; expected .* a list of texts"),
    ({"moments": moments(n_tokens=D_FF - 1)}, "79 tokens, fewer than d_ff = 80.*collect more tokens, or.*regularizer"),
    ({"moments": OTHER}, r"no second moment for layer 1; given for \[0, 2, 3\]"),
    ({"moments": OTHER | {1: GIVEN[2]}}, "given for layer 1 is of layer 2"),
    ({"moments": OTHER | {1: SecondMoment(torch.eye(64), 500, 1)}}, r"is \[64, 64\]; this model's d_ff is 80"),
    ({"moments": OTHER | {1: SecondMoment(torch.full((80, 80), torch.nan), 500, 1)}}, "layer 1 holds NaN or infinity"),
]
OF_ANOTHER_KIND = [
    ({"facts": ["Big Ben"]}, "facts = 'Big Ben': expected Facts"),
    ({"facts": [None]}, "facts = None: expected Facts"),
    ({"moments": GIVEN[1]}, r"moments = <SecondMoment>: expected \{layer: SecondMoment\}; give \{1: moment\}"),
    ({"moments": list(GIVEN.values())}, r"moments = \[.*: expected \{layer"),
    ({"moments": "moments.npz"}, "moments = 'moments.npz': expected .*; SecondMoment.load reads a file"),
    ({"moments": Path("moments.npz")}, r"moments = PosixPath.*: expected .*; SecondMoment.load"),
    ({"moments": GIVEN[1].matrix}, "moments = <Tensor>: expected"),
    ({"moments": OTHER | {1: GIVEN[1].matrix}}, r"moments\[1\] = <Tensor>: expected a SecondMoment; .*\(matrix"),
    ({"moments": OTHER | {1: None}}, r"moments\[1\] = None: expected a SecondMoment"),
    *(({"moments": None, "corpus": x}, NO_CORPUS) for x in (3, 0.5, b"text", {"a": 1}, torch.ones(3))),
    ({"previous": "edit.safetensors"}, "previous = 'edit.safetensors': expected Edits; Edit.load"),
]


@both
@pytest.mark.parametrize(
    ("given", "says", "error"),
    [
        *((*row, ValueError) for row in REFUSED),
        *((*row, TypeError) for row in OF_ANOTHER_KIND),
        ({"moments": None, "corpus": "absent.txt"}, "no such file", FileNotFoundError),
    ],
)
def test_what_is_refused_before_any_work(editor, given, says, error, workshop):
    settings = {name: value for name, value in given.items() if hasattr(editor, name)}
    given = {name: value for name, value in given.items() if name not in settings}
    refused(says, replace(editor, **settings), tiny_lm("gpt2"), **given, error=error)


# --- facts -----------------------------------------------------------------------------------------------------------


def words(n):
    """A text of n tokens."""
    text = " the" * n
    assert len(tiny_tokenizer()(text)["input_ids"]) == n
    return text


@both
def test_the_target_counts_to_the_length(editor, workshop):
    """The last of 128 positions is for the last token that is read: the target's last but one."""
    lm = tiny_lm("gpt2")
    n_target = len(answer_tokens(tiny_tokenizer(), "a", "cheese boat"))
    assert n_target >= 3
    subject = kf.Fact(prompt="{}", subject="Big Ben", target_new="cheese boat")
    n_subject = len(tiny_tokenizer()("Big Ben")["input_ids"])
    fits = replace(subject, prompt="{}" + words(128 - n_target + 1 - n_subject))
    refused("a sweep ran", editor, lm, fits, error=AssertionError, contexts=["{}"])
    long = replace(fits, prompt=fits.prompt + " the")
    for contexts in (None, ["{}"]):
        given = {"moments": None, "corpus": "self", "contexts": contexts}
        says = refused("a text of 129 tokens; this model takes 128", editor, lm, [FACT, long], **given)
        assert f"fact {long.label} in context '{{}}'" in says


@both
def test_a_context_that_makes_a_prompt_too_long(editor, workshop):
    """Seen before statistics are measured."""
    context = words(120) + ". {}"
    given = {"moments": None, "corpus": "self", "contexts": ["{}", context]}
    says = refused(r"tokens; this model takes 128.*Shorten the text", editor, tiny_lm("gpt2"), **given)
    assert FACT.label in says and repr(context) in says


@both
def test_words_that_the_tokenizer_drops(editor, workshop):
    dropping = Tokenizer.from_str(tiny_tokenizer()._tokenizer.to_str())
    dropping.normalizer = normalizers.Replace(Regex(" ?\u200b"), "")
    lm = replace(tiny_lm("gpt2"), tokenizer=PreTrainedTokenizerFast(tokenizer_object=dropping))
    refused("no tokens; the tokenizer drops", editor, lm, replace(FACT, target_new="\u200b"))
    refused("the tokenizer drops these characters", editor, lm, replace(FACT, subject="\u200b"))


# --- the model -------------------------------------------------------------------------------------------------------


@both
def test_weights_that_break_after_the_model_was_opened(editor, monkeypatch):
    """Seen in the first sweep, before any step is taken."""
    lm = open_tiny(tiny_model("llama"))
    with torch.no_grad():
        lm.model.model.layers[2].mlp.up_proj.weight[3, 4] = torch.nan
    monkeypatch.setattr(values_module._Pack, "_losses", None)
    refused("NaN or infinity", editor, lm, contexts=["{}"])


@both
def test_a_head_that_turned_nan(editor):
    """Every hidden state is a number, no loss is."""
    lm = open_tiny(tiny_model("llama"))
    with torch.no_grad():
        lm.model.lm_head.weight[7, 7] = torch.nan
    refused("llama gives NaN after 'Space Needle': damaged weights", editor, lm, contexts=["{}"])


@both
def test_a_loss_that_overflows(editor):
    """float16 ends at 65,504: a step that leaves it, and from there a NaN."""
    lm = open_tiny(tiny_model("llama", torch.float16))
    wild = replace(editor, v_lr=1e5, clamp_norm_factor=1e9, v_num_grad_steps=3)
    says = r"became (NaN|infinite) at step [23] of 3.*learning rate that is too high.*or float16, too narrow a dtype"
    refused(f"the loss of fact {re.escape(FACTS[1].label)} {says}", wild, lm, FACTS[1], contexts=["{}"])


@both
def test_an_update_that_is_no_number(editor, monkeypatch):
    """Whatever the reason: it goes into no edit, and the fact is named."""

    def broken(lm, tasks, settings, *kept):
        values = values_module.optimize_values(lm, tasks, settings)
        values.values[[task.name == FACTS[1].label for task in tasks]] = torch.inf
        return values

    monkeypatch.setattr(rome_module, "optimize_values", broken)
    monkeypatch.setattr(spread_module, "optimize_values", broken)
    says = rf"the (residual at|change of the output of) layer 1 of fact {re.escape(FACTS[1].label)} holds NaN"
    refused(says, editor, tiny_lm("gpt2"), list(FACTS[:3]), contexts=["{}"])


def test_memit_goes_up(workshop):
    refused(r"layers \(2, 1\): expected lowest first", replace(EDITORS[1], layers=(2, 1)), tiny_lm("gpt2"))


# --- statistics ------------------------------------------------------------------------------------------------------


@both
def test_statistics_of_another_model(editor, workshop):
    other, lm = tiny_lm("llama").fingerprint, tiny_lm("gpt2")
    foreign = {i: replace(m, fingerprint=other) for i, m in moments().items()}
    refused(f"second moment of layer 1 is of {other}, this model is {lm.fingerprint}", editor, lm, moments=foreign)


@both
def test_statistics_that_do_not_say_whose_they_are(editor, recwarn):
    """As the published npz files: taken, with one warning, and told by the edit."""
    lm = tiny_lm("gpt2")
    known = {i: replace(m, fingerprint=lm.fingerprint, corpus="mine") for i, m in moments().items()}
    made = editor.edit(lm, FACT, moments=known, contexts=["{}"])
    assert not [w for w in recwarn if "second moments" in str(w.message)]
    assert told_of(made) == {(lm.fingerprint, "mine", 500)}
    with pytest.warns(UserWarning) as warned:
        made = editor.edit(lm, FACT, moments=known | {1: moments()[1]}, contexts=["{}"])
    (warning,) = (w for w in warned if "second moments" in str(w.message))
    assert re.search(r"of layers \[1\] do not say which model they are of.*unchecked", str(warning.message))
    assert warning.filename == __file__, "the warning points at the line that called edit"
    assert (None, None, 500) in told_of(made)


def told_of(edit) -> set[tuple]:
    """(fingerprint, corpus, tokens) of the statistics, as the edit's notes say."""
    return {(n["fingerprint"], n["corpus"], n["n_tokens"]) for n in edit.provenance["layers"].values()}


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


@both
def test_an_earlier_edit_that_says_otherwise(editor):
    """A warning, not an error: a later edit may correct an earlier one."""
    lm = tiny_lm("gpt2")
    first = editor.edit(lm, [FACT, FACTS[1]], moments=moments(), contexts=["{}"])
    other = replace(FACT, target_new="Berlin", subject=FACT.subject.upper(), id="9")
    for options in ({"lm": lm, "previous": first}, {"lm": lm.with_edit(first)}):
        with pytest.warns(UserWarning, match="1 fact of an earlier edit overwritten") as warned:
            editor.edit(facts=[FACTS[2], other], moments=moments(), contexts=["{}"], **options)
        (warning,) = (w for w in warned if "overwritten" in str(w.message))
        assert f"{FACT.label} -> 'Rome' by {other.label} -> 'Berlin'" in str(warning.message)
        assert warning.filename == __file__


@both
def test_an_earlier_edit_of_the_same_relation(editor):
    """Under other words, where both facts name their relation."""
    lm, about = tiny_lm("gpt2"), {"relation_id": "P131"}
    first = editor.edit(lm, replace(FACT, provenance=about), moments=moments(), contexts=["{}"])
    other = replace(FACT, prompt="{} stands in", target_new="Berlin", provenance=about)
    with pytest.warns(UserWarning, match="overwritten.*'Rome' by .*'Berlin'"):
        editor.edit(lm, other, moments=moments(), contexts=["{}"], previous=first)


@both
def test_an_earlier_edit_that_agrees_or_is_of_others(editor, recwarn):
    lm = tiny_lm("gpt2")
    first = editor.edit(lm, FACT, moments=moments(), contexts=["{}"])
    others = [FACTS[1], replace(FACT, target_new=" Rome"), replace(FACT, prompt="{} stands in", target_new="Berlin")]
    editor.edit(lm, others, moments=moments(), contexts=["{}"], previous=first)
    assert not [w for w in recwarn if "overwritten" in str(w.message)]


@both
def test_an_edit_says_what_it_stands_on(editor, tmp_path):
    lm = tiny_lm("gpt2")

    def edit(facts, **options):
        return editor.edit(lm, facts, moments=moments(), contexts=["{}"], **options)

    first = edit(list(FACTS[:2]))
    assert "on_top_of" not in first.provenance
    second = edit(FACTS[2], previous=first)
    (below,) = second.provenance["on_top_of"]
    assert below == {"method": first.method, "n_facts": 2, "layers": list(first.layers), "digest": digest(first)}
    third = editor.edit(lm.with_edit(first), FACTS[3], moments=moments(), contexts=["{}"], previous=second)
    assert [each["digest"] for each in third.provenance["on_top_of"]] == [digest(first), digest(second)]
    with pytest.raises(ValueError, match=r"made on top of edit .* here stands before it: no edit"):
        edit(FACTS[3], previous=second)
    first.save(tmp_path / "edit.safetensors")
    assert digest(kf.Edit.load(tmp_path / "edit.safetensors")) == digest(first) != digest(second)
