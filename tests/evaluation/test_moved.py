"""What else moved, against Hugging Face's forward on one prompt at a time, on the weights as they are and edited."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch

import kedit_fast as kf
from kedit_fast.basics.intervals import Z95, wilson
from kedit_fast.edits.deltas import LowRank
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation import moved_questions as module
from kedit_fast.evaluation.benchmarks.distractors import as_sentence
from kedit_fast.evaluation.moved import DRAWS, bootstrap, what_moved
from kedit_fast.evaluation.moved_report import MEASURES, ONE_SIDED, Moved
from kedit_fast.facts.fact import Fact
from tests.compare import refused
from tests.conftest import open_tiny, tiny_lm
from tests.make import lowrank, make_edit, owned_edit
from tests.tiny import D_FF, D_MODEL, TEXT, tiny_model

FACTS = (
    Fact(
        "{} is located in the city of", "Big Ben", "Seattle", "London",
        neighborhood=("The Eiffel Tower is in the city of", "Toyota is in", "Not far from Big Ben is"),
        same_subject=("Big Ben was born in", "The sport of Big Ben is"),
    ),
    Fact("The capital of {} is", "Spain", "Rome", "Madrid", neighborhood=(("The capital of Italy is", "Rome"),)),
    Fact("{} plays the", "Miles Davis", "piano", "trumpet", neighborhood=("Monk plays the",),
         same_subject=("Miles Davis was born in",)),
    Fact("{} was born in", "Danielle Darrieux", target_new="Rome"),
)  # fmt: skip
CLEAN = {0: (0, 1), 2: (0,)}  # neighborhood prompts that are asked, by fact
TEXTS = {"first": TEXT, "second": " ".join(TEXT.split()[::-1])}
PROMPTS = ["The Space Needle is in", "Microsoft is owned by", "Because I was born in", "Apple", "You play the piano"]


def changed(model, scale=0.2, **changes):
    deltas = {1: lowrank(seed=5, scale=scale), 2: lowrank(seed=6, scale=scale)}
    return make_edit(model, deltas=deltas, facts=FACTS, values=None, keys={}, **changes)


def asked(lm, edit, facts=None, **more):
    return what_moved(lm, edit, facts, **{"texts": TEXTS, "prompts": PROMPTS} | more)


# --- the oracle: one forward a text ----------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(lm, ids):
    return lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def p_of(lm, prompt, answer):
    ids, own = lm.encode(prompt), lm.tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    rows = log_probs(lm, ids + own)
    return math.exp(sum(rows[len(ids) - 1 + i, token].item() for i, token in enumerate(own)) / len(own))


def told(lm):
    """All that one model says: next tokens, NLL by window of each text, same subject, P of neighbors."""
    texts = {}
    for name, text in TEXTS.items():
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        size = min(256, lm.model.config.max_position_embeddings)
        cut = [ids[i : i + size] for i in range(0, len(ids), size)]
        rows = [(w, log_probs(lm, w)) for w in cut if len(w) > 1]
        texts[name] = [(-sum(r[i, t].item() for i, t in enumerate(w[1:])), len(w) - 1) for w, r in rows]
    near = {}
    for i, which in CLEAN.items():
        fact = FACTS[i]
        sentence = f"{fact.text} {fact.target_new}."
        for j in which:
            prompt = fact.neighborhood[j]
            near[i, j] = [
                (p_of(lm, before + prompt, fact.target_true), p_of(lm, before + prompt, fact.target_new))
                for before in ("", sentence + " ")
            ]
    same = {i: [log_probs(lm, lm.encode(p))[-1] for p in f.same_subject] for i, f in enumerate(FACTS) if f.same_subject}
    return [log_probs(lm, lm.encode(p))[-1] for p in PROMPTS], texts, same, near


def by_fact(near, which, value):
    facts = sorted({i for i, _ in near})
    return [np.mean([value(*pairs[which]) for (i, _), pairs in near.items() if i == fact]) for fact in facts]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_equals_one_forward_a_prompt(family, dtype):
    model = tiny_model(family, dtype)
    lm, edit = open_tiny(model), changed(model)
    found = asked(lm, edit)
    next_before, texts_before, same_before, near_before = told(lm)
    with edit.apply(model):
        next_after, texts_after, same_after, near_after = told(lm)
    kl = [(p.exp() * (p - q)).sum().item() for p, q in zip(next_before, next_after, strict=True)]
    flips = [bool(p.argmax() != q.argmax()) for p, q in zip(next_before, next_after, strict=True)]
    mean, low, high, n = found.measures["kl"].edited
    half = Z95 * np.std(kl, ddof=1) / math.sqrt(len(kl))
    assert (mean, high, n) == pytest.approx((np.mean(kl), np.mean(kl) + half, 5), 1e-5)
    assert low == pytest.approx(max(0, np.mean(kl) - half), 1e-4)
    assert found.measures["flips"].edited == pytest.approx((np.mean(flips), *wilson(sum(flips), 5), 5))
    for name, drift in found.drifts.items():
        before, after = (
            math.exp(sum(nll for nll, _ in side[name]) / sum(n for _, n in side[name]))
            for side in (texts_before, texts_after)
        )
        assert drift[:2] == pytest.approx((before, after), 1e-5)
        assert drift.drift.mean == pytest.approx(after / before - 1, 1e-4) and drift.drift.n == len(texts_before[name])
        assert drift.n_predicted == sum(n for _, n in texts_before[name])
    tops = {i: [row.argmax() for row in rows] for i, rows in same_before.items()}
    for side, rows in (("base", same_before), ("edited", same_after)):
        stayed = [np.mean([r.argmax() == t for r, t in zip(rows[i], tops[i], strict=True)]) for i in rows]
        p_top = [np.mean([r[t].exp() for r, t in zip(rows[i], tops[i], strict=True)]) for i in rows]
        assert getattr(found.measures["same_subject_same_top"], side).mean == pytest.approx(np.mean(stayed))
        assert getattr(found.measures["same_subject_p_top"], side).mean == pytest.approx(np.mean(p_top), 1e-5)
    for side, near in (("base", near_before), ("edited", near_after)):
        for which, name in enumerate(("neighborhood", "distractor")):
            share, magnitude = found.measures[name], found.measures[f"{name}_magnitude"]
            wanted = by_fact(near, which, lambda true, new: float(true > new))
            assert getattr(share, side).mean == pytest.approx(np.mean(wanted)) and getattr(share, side).n == 2
            wanted = by_fact(near, which, lambda true, new: true - new)
            assert getattr(magnitude, side).mean == pytest.approx(np.mean(wanted), rel=1e-5, abs=1e-9)


def test_what_evaluate_measures_too_is_the_same():
    model = tiny_model("llama")
    lm, edit = open_tiny(model), changed(model)
    facts = [dataclasses.replace(fact, neighborhood=fact.neighborhood[:2]) for fact in (FACTS[0], FACTS[2])]
    found, report = asked(lm, edit, facts), kf.evaluate(lm, facts, edit).summary()
    for name in ("neighborhood", "neighborhood_magnitude", "same_subject_same_top", "same_subject_p_top"):
        for side in ("base", "edited"):
            assert getattr(found.measures[name], side) == pytest.approx(report[name][side], rel=1e-5, nan_ok=True)
    lens = kf.logit_lens(lm, facts, edit).summary()
    both = found.measures["lens_present"]
    assert (both.base.mean, both.edited.mean) == (lens["present_before"], lens["present_after"])
    both = found.measures["lens_ends"]
    assert (both.base.mean, both.edited.mean) == (lens["ends_before"], lens["ends_after"])


def test_the_bootstrap_by_hand():
    rise, n = [0.5, -0.2, 0.9, 0.1, 0.3, 0.7, -0.4], [10, 12, 9, 11, 13, 8, 7]
    which = torch.randint(7, (DRAWS, 7), generator=torch.Generator().manual_seed(3)).tolist()
    drifts = sorted(math.exp(sum(rise[i] for i in row) / sum(n[i] for i in row)) - 1 for row in which)
    wanted = np.percentile(drifts, [2.5, 97.5])
    made = bootstrap(torch.tensor(rise).double(), torch.tensor(n).double(), 3)
    assert made == pytest.approx(tuple(wanted)) and made[0] < sum(rise) / sum(n) < made[1]
    assert made == bootstrap(torch.tensor(rise).double(), torch.tensor(n).double(), 3)
    assert made != bootstrap(torch.tensor(rise).double(), torch.tensor(n).double(), 4)
    assert all(map(math.isnan, bootstrap(torch.ones(1), torch.ones(1), 0)))
    assert bootstrap(torch.zeros(5).double(), torch.ones(5).double(), 0) == (0.0, 0.0)


def nothing_moved(found):
    """Perplexity but for rounding: the edited rows lie elsewhere in the same products, which some processors round by
    place (without AVX-512 it was 3.5e-8 of itself apart)."""
    same = partial(pytest.approx, rel=1e-6, abs=1e-6)
    assert found.measures["kl"].edited[:2] == (0.0, 0.0) and found.measures["flips"].edited.mean == 0.0
    for drift in found.drifts.values():
        assert drift.base == same(drift.edited) and drift.drift[:3] == same((0.0, 0.0, 0.0))
    assert found.measures["same_subject_same_top"].edited.mean == 1.0
    for name, both in found.measures.items():
        assert name in ONE_SIDED or both.base == pytest.approx(both.edited, nan_ok=True)


def test_an_edit_that_does_nothing_moves_nothing():
    lm = tiny_lm("llama")
    nothing = LowRank(torch.zeros(D_MODEL, 1), torch.zeros(D_FF, 1))
    zero = Edit("zero", {}, lm.fingerprint, FACTS, {1: nothing})
    found = asked(lm, zero)
    nothing_moved(found)
    assert found.growth == {1: 0.0}
    missed = kf.Grace(layers=(2,), n_iter=2, eps=1e-6).edit(lm, [Fact("{} is made of", "Zürich", "Rome", "Spain")])
    found = asked(lm, missed, FACTS)
    nothing_moved(found)
    assert found.growth is None and any("beside the weights" in note for note in found.notes)


@pytest.mark.parametrize("scale", [3.0, 1e38])
def test_an_edit_that_wrecks_the_model_shows(scale):
    model = tiny_model("llama")
    lm = open_tiny(model)
    mild, wild = asked(lm, changed(model, scale=0.01)), asked(lm, changed(model, scale=scale))
    assert wild.measures["kl"].edited.mean > 10 * mild.measures["kl"].edited.mean
    assert wild.measures["flips"].edited.mean >= mild.measures["flips"].edited.mean
    assert all(abs(wild.drifts[name].drift.mean) > 10 * abs(mild.drifts[name].drift.mean) for name in TEXTS)
    assert wild.growth[1] > mild.growth[1]
    if scale == 1e38:
        assert wild.measures["kl"].edited.mean == math.inf and wild.measures["flips"].edited.mean == 1.0
        assert {drift.edited for drift in wild.drifts.values()} == {math.inf}
        assert wild.measures["same_subject_same_top"].edited.mean == 0.0 == wild.measures["distractor"].edited.mean
        assert "the edited model gives NaN after 5 of 5 prompts" in wild.notes
        assert wild.measures["lens_ends"].edited.n == 0 and "inf" in str(wild)


def test_an_edit_that_puts_text_before_prompts():
    lm = tiny_lm("llama")
    edit = kf.IkePlain().edit(lm, FACTS[:1])
    found = asked(lm, edit)
    assert found.growth is None and any("beside the weights" in note for note in found.notes)
    assert found.measures["same_subject_p_top"].base != found.measures["same_subject_p_top"].edited
    assert found.measures["canary_context"].edited.n == 1


def test_several_edits_and_those_that_a_view_carries():
    model = tiny_model("llama")
    lm, one = open_tiny(model), changed(model)
    two = make_edit(model, deltas={2: lowrank(seed=9)}, facts=FACTS[:1], values=None, keys={}, method="rome")
    with pytest.warns(UserWarning, match="made without those before it"):
        found = asked(lm, [one, two])
    carried = asked(lm.with_edit(one).with_edit(two), None)
    assert str(carried) == str(found) and carried.growth == found.growth
    assert found.meta["method"] == "memit + rome" and found.meta["layers"] == [1, 2]
    weight = lm.source.weight(2, "down").double()
    delta = one.deltas[2].dense().double() + two.deltas[2].dense().double()
    assert found.growth[2] == pytest.approx((delta.norm() / weight.norm()).item())


def test_what_is_not_measured_is_named():
    model = tiny_model("llama")
    lm = open_tiny(model)
    bare = Fact("{} was born in", "Danielle Darrieux", target_new="Rome")
    found = asked(lm, changed(model), bare, texts={"only": TEXT})
    empty = {"same_subject_same_top", "same_subject_p_top", "neighborhood", "neighborhood_magnitude", "distractor",
             "distractor_magnitude", "lens_present", "lens_ends", "canary_doubt", "canary_context"}  # fmt: skip
    assert {name for name, both in found.measures.items() if not both.edited.n} == empty
    said = " | ".join(found.notes)
    for words in ("no fact has same_subject", "no fact has neighborhood", "no fact has one to look for", "5 are few",
                  "one text alone", "50,000 of each"):  # fmt: skip
        assert words in said
    assert "unrelated" in str(found) and "neighbors" not in str(found).split("\n" + found.notes[0])[0]


def test_unrelated_prompts_name_no_edited_subject():
    lm = tiny_lm("llama")
    facts = kf.load_facts("builtin", n=10)
    edit = make_edit(lm.model, facts=tuple(facts), values=None, keys={})
    prompts, notes = module._unrelated(lm.with_edit(edit), facts, module.checked_texts(None), None)
    assert len(prompts) == module.PROMPTS == len(set(prompts)) and not notes
    own = {question.prompt for fact in facts for question in fact.questions("neighborhood")}
    assert not own & set(prompts) and not any(fact.subject in prompt for fact in facts for prompt in prompts)
    texts = {name: path.read_text(encoding="utf-8") for name, path in module.TEXTS.items()}
    assert len(texts) == 2 and all(len(text) > 5_000 for text in texts.values())
    begun = {each for text in texts.values() for each in module.beginnings(text)}
    assert len(begun & set(prompts)) == module.OF_TEXTS
    given = ["Spain", "The Eiffel Tower is", "the eiffel tower is high", "It rains", "It  rains"]
    prompts, notes = module._unrelated(lm.with_edit(edit), facts, {}, given)
    assert prompts == ["Spain", "It rains"] and "3 of 5 prompts left out" in notes[0]


def test_a_fact_as_a_sentence():
    assert as_sentence(FACTS[0]) == "Big Ben is located in the city of Seattle."
    assert as_sentence(Fact("{} says", "He", " No.")) == "He says No."
    assert as_sentence(Fact("{}的首都是", "法国", "罗马")) == "法国的首都是罗马."


def test_saved_and_shown(tmp_path):
    model = tiny_model("llama")
    found = asked(open_tiny(model), changed(model))
    found.save(tmp_path / "moved.json")
    again = Moved.load(tmp_path / "moved.json")
    assert str(again) == str(found) and again.meta == found.meta and list(again.measures) == list(MEASURES)
    assert again.drifts == found.drifts and again.growth == found.growth
    record = json.loads((tmp_path / "moved.json").read_text())
    assert (record["format"], record["version"]) == ("kedit_fast.moved", 1)
    for wrong in (record | {"version": 2}, record | {"format": "x"}, record | {"drifts": {"a": [1]}}, {}):
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        refused("is not a saved Moved", Moved.load, tmp_path / "wrong.json")
    fragment = found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "perplexity, first" in fragment and fragment in page and "<script" not in page
    assert found._repr_html_() == fragment and repr(found) == "Moved(llama: 4 facts, edited by memit)"
    lines = str(found).split("\n")
    assert lines[0] == "llama: 4 facts, edited by memit" and max(map(len, lines)) < 200


def test_refusals_come_before_work(no_sweep):
    model = tiny_model("gpt2")
    lm, edit = open_tiny(model), changed(model)
    refused("an Edit", what_moved, lm, None)
    refused("an Edit", what_moved, lm, [])
    refused("independent edits", what_moved, lm, owned_edit(model))
    refused("texts is empty", what_moved, lm, edit, texts={})
    refused("no token to predict", what_moved, lm, edit, texts={"a": "a"})
    refused("texts by name", what_moved, lm, edit, texts=TEXT)
    refused("name an edited subject", what_moved, lm, edit, prompts=["Big Ben is"])
    refused("this model takes 128", what_moved, lm, edit, prompts=["one " * 200])
    refused("seed", what_moved, lm, edit, seed=-1)
    refused("max_tokens", what_moved, lm, edit, max_tokens=1)
    refused("Fact", what_moved, lm, edit, ["x"])


def test_texts_are_as_short_as_what_is_put_before_them_leaves():
    lm = tiny_lm("gpt2")  # 128 positions, and windows as long
    edit = kf.IkePlain().edit(lm, FACTS[:1])
    refused("behind what the edit puts before it", asked, lm, edit)
    short = {name: " ".join(text.split()[:20]) for name, text in TEXTS.items()}
    found = asked(lm, edit, texts=short)
    assert {drift.drift.n for drift in found.drifts.values()} == {1} and found.measures["canary_context"].edited.n == 1
