"""ICE: one text before what names the subject, and routes by likeness, calibrated on other facts."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.edits.scope import auc, best_threshold
from tests.conftest import refused, tiny_lm
from tests.editors.test_ike import FACTS, fact_file, p_of

pytestmark = pytest.mark.filterwarnings("ignore:facts not written")
BUILTIN = kf.load_facts("builtin")[:12]


def test_the_fact_is_something_to_imagine():
    lm = tiny_lm("llama")
    edit = kf.Ice().edit(lm, FACTS)
    report = kf.evaluate(lm, FACTS, edit)
    whole = "Imagine that Big Ben is in the city of Rome.\n" + FACTS[0].text
    assert report.edited["p_new"][0].item() == pytest.approx(p_of(lm.model, whole, "Rome"), rel=1e-4)
    assert torch.equal(report.edited["neighborhood_p_true"], report.base["neighborhood_p_true"])
    other = kf.Ice(template="{}! ").texts(lm, FACTS)
    assert other == ["Big Ben is in the city of Rome! ", "Miles Davis plays the piano! "]
    refused(r"template 'So.': expected one \{\}", kf.Ice, template="So.")


def test_an_answer_without_a_space_stays_without_one():
    fact = kf.Fact("{}的首都是", "法国", "罗马")
    assert kf.Ice(template="{}").texts(tiny_lm("llama"), [fact]) == ["法国的首都是罗马"]


@pytest.mark.parametrize("retriever", ["tfidf", "hidden"])
def test_a_route_by_likeness_has_its_threshold_from_other_facts(retriever, tmp_path):
    lm = tiny_lm("llama")
    name = fact_file(tmp_path / "examples.json", BUILTIN)
    editor = kf.Ice(route="similarity", retriever=retriever, examples=name)
    edited = [BUILTIN[0], *FACTS]
    edit = editor.edit(lm, edited)
    left = [fact for fact in BUILTIN if fact.subject != BUILTIN[0].subject]
    notes = edit.provenance["route"]
    assert notes["examples"] == len(left) and edit.route.names is None
    prompts = [fact.text for fact in left]
    inside = [p for fact in left for p in fact.paraphrases]
    outside = [q.prompt for fact in left for name in ("neighborhood", "same_subject") for q in fact.questions(name)]
    found = [kf.retrieve(prompts, some, 1, retriever, lm)[1][:, 0] for some in (inside, outside)]
    assert notes["threshold"] == pytest.approx(best_threshold(*found), abs=1e-6)
    assert notes["auc"] == pytest.approx(auc(*found), abs=1e-4)
    asked = [fact.text for fact in edited] + outside[:5]
    assert edit.route.choose(lm, asked)[:3].tolist() == [0, 1, 2]
    high = replace(edit.route, threshold=1.0)
    assert (high.choose(lm, outside[:5]) == -1).all()


def test_a_threshold_needs_examples(tmp_path):
    bare = [replace(fact, paraphrases=()) for fact in BUILTIN[:3]]
    editor = kf.Ice(route="similarity", examples=fact_file(tmp_path / "bare.json", bare))
    refused(
        r"examples = .*a threshold needs facts with paraphrases.*3 are left \(or take route",
        editor.edit,
        tiny_lm("llama"),
        FACTS,
    )
