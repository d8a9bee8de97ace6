"""Whether an edited tiny model says what its edit implies, against one prompt at a time by Hugging Face's forward."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.basics.intervals import wilson
from kedit_fast.experiments.consistency import EDITED, consistency
from kedit_fast.experiments.implied import implied
from kedit_fast.facts.tokens import answer_tokens, encode
from tests.conftest import open_tiny, refused, tiny_lm
from tests.experiments.test_implied import CAPITAL, TOWER
from tests.facts.test_knowledge import TABLE, changed
from tests.make import make_edit, owned_edit
from tests.tiny import tiny_model

HOP = kf.Fact("{} is in the country of", "The Eiffel Tower", "Italy", "France")
N_WRITTEN = 6
TUNED = kf.Ft(layers=(1,), lr=5e-3, num_steps=80)


@pytest.fixture(scope="module")
def taught():
    """(a tiny model, an edit that writes two facts, and by chance or its lesson some that follow)"""
    model = tiny_model("llama")
    lm = open_tiny(model)
    edit = TUNED.edit(lm, [TOWER, CAPITAL, HOP])
    return model, lm, replace(edit, facts=edit.facts[:2])  # what follows is no edited fact, though it was trained


@pytest.fixture(scope="module")
def found(taught):
    _, lm, edit = taught
    return consistency(lm, edit, TABLE, hops=2, generate=N_WRITTEN)


@torch.no_grad()
def asked_alone(model, tokenizer, prompt, answer):
    """(exp of the answer's mean log p, whether each of its tokens is the likeliest)"""
    ids, target = encode(tokenizer, prompt), answer_tokens(tokenizer, prompt, answer)
    logits = model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1].double()
    logprob = logits.log_softmax(-1)[range(len(target)), target]
    return float(logprob.mean().exp()), float((logits.argmax(-1) == torch.tensor(target)).all())


@torch.no_grad()
def written_alone(model, tokenizer, prompt):
    ids = encode(tokenizer, prompt)
    n = len(ids)
    for _ in range(N_WRITTEN):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    text = tokenizer.decode(ids[n:], skip_special_tokens=True)
    return min((text.partition(end)[0] for end in (".", "\n")), key=len)


def test_it_equals_one_prompt_at_a_time(taught, found):
    model, lm, edit = taught
    facts = [*found.facts, *(one.fact for one in found.implied)]
    assert found.implied == tuple(implied(edit.facts, TABLE, hops=2)) and len(facts) == 8

    def check(side, at):
        for i, fact in enumerate(facts):
            p, exact = asked_alone(model, lm.tokenizer, fact.text, fact.target_new)
            text = written_alone(model, lm.tokenizer, fact.text)
            assert side["p_new"][i] == pytest.approx(p, rel=1e-4) and side["exact"][i] == exact
            assert found.texts[i][at].strip() == text.strip()
            names = [fact.target_new, *({"Italy": ["Italia"], "France": ["La France"]}.get(fact.target_new, []))]
            words = " ".join(re.findall(r"\w+", text.lower()))
            assert side["written"][i] == any(re.search(rf"\b{name.lower()}\b", words) is not None for name in names)
            if fact.target_true is None:
                assert math.isnan(side["success"][i]) and math.isnan(side["p_old"][i])
                continue
            old, _ = asked_alone(model, lm.tokenizer, fact.text, fact.target_true)
            assert side["p_old"][i] == pytest.approx(old, rel=1e-4) and side["success"][i] == (p > old)

    check(found.base, 0)
    with edit.apply(model):
        check(found.edited, 1)


def test_the_table_the_rest_and_what_is_shown(found):
    assert [one.kind for one in found.implied] == ["alias", "alias", "inverse", "one hop", "two hops", "two hops"]
    assert found.edited["exact"][:2] == [1, 1] and found.followed[3]  # the hop was trained
    rest = [one.fact for one, followed in zip(found.implied, found.followed, strict=True) if not followed]
    assert found.rest == rest and 0 < len(rest) < 6
    summary = found.summary()
    assert list(summary) == [EDITED, "alias", "inverse", "one hop", "two hops", "implied"]
    said = sum(found.edited["exact"][2:])
    share = summary["implied"]["exact"]["edited"]
    assert (share.mean, share.n) == (said / 6, 6) and (share.low, share.high) == pytest.approx(wilson(said, 6))
    shown, page = str(found), found.to_html()
    assert "6 facts implied by 2 edited facts" in shown and f"{len(rest)} fact" in shown and "two hops" in shown
    assert all(f"{fact.text} {fact.target_new}" in shown for fact in rest)
    assert "to be edited" in page and "followed" in page and page == found._repr_html_()
    assert repr(found) == f"Consistency({shown.splitlines()[0]})"


def test_it_is_saved_and_the_rest_is_a_fact_file(found, tmp_path):
    found.save(tmp_path / "found.json")
    again = kf.Consistency.load(tmp_path / "found.json")
    assert str(again) == str(found) and again.implied == found.implied and again.texts == found.texts
    assert again.meta == json.loads(json.dumps(found.meta)) and repr(again.base) == repr(found.base)
    found.save_rest(tmp_path / "rest.json")
    rest = kf.load_facts(tmp_path / "rest.json")
    assert [replace(fact, id="") for fact in rest] == found.rest
    found.to_html(tmp_path / "page.html")
    assert "What the edit implies" in (tmp_path / "page.html").read_text()
    for change in ({"format": "x"}, {"by": "luck"}, {"base": {}}, {"implied": [{}]}, {"texts": [3]}):
        (tmp_path / "bad.json").write_text(json.dumps(json.loads((tmp_path / "found.json").read_text()) | change))
        refused("is not a saved consistency report", kf.Consistency.load, tmp_path / "bad.json")


def test_the_rest_is_made_on_top_of_the_edit(taught, found):
    _, lm, edit = taught
    more = TUNED.edit(lm, found.rest, previous=edit)
    after = consistency(lm, [edit, more], TABLE)
    assert after.facts == (*edit.facts, *found.rest) and after.edited["exact"][2 : len(after.facts)] == [1] * len(
        found.rest
    )


def test_what_is_in_conflict_is_never_in_the_rest(taught):
    _, lm, edit = taught
    spain = kf.Fact("{} is in the country of", "The Eiffel Tower", "Spain")
    found = consistency(lm, replace(edit, facts=(TOWER, spain)), TABLE, generate=0)
    assert len(found.conflicts) == 1 and "which answer holds" in str(found) and found.texts == ()
    assert not {"Italy", "Spain"} & {fact.target_new for fact in found.rest}
    assert "conflict" in found.to_html() and "Spain, because" in str(found)


def test_what_counts_as_followed(taught):
    _, lm, edit = taught
    by = {how: consistency(lm, edit, TABLE, hops=2, by=how) for how in ("exact", "success", "written")}
    for how, found in by.items():
        values = found.edited[how][2:]
        exact = found.edited["exact"][2:]
        assert found.followed == [bool(e if math.isnan(v) else v) for v, e in zip(values, exact, strict=True)]
    assert "P(new) > P(old)" in str(by["success"]).splitlines()[0]


def test_independent_edits_are_asked_one_by_one():
    model = tiny_model("gpt2")
    lm = open_tiny(model)
    edit = owned_edit(model)
    facts = (replace(TOWER, id="a"), kf.Fact("{} is in the country of", "Rome", "Norway", "Italy"))
    edit = replace(edit, facts=facts)
    found = consistency(lm, edit, TABLE)
    assert [one.fact.target_new for one in found.implied if one.kind == "one hop"] == ["Italy"]  # not Norway
    for i in (0, 1):
        alone = consistency(lm, edit.only(i), TABLE)
        mine = [j for j, one in enumerate(found.implied) if one.follows_from == (facts[i],)]
        expected = [alone.edited["p_new"][0], *alone.edited["p_new"][1:]]
        assert [found.edited["p_new"][j] for j in (i, *(2 + j for j in mine))] == pytest.approx(expected, rel=1e-4)


def test_notes_and_an_edit_from_which_nothing_follows():
    lm = tiny_lm("gpt2")
    found = consistency(lm, make_edit(lm.model), TABLE | {"aliases": {}, "known": []}, generate=0)
    assert found.implied == () and found.rest == [] and "1 fact of no relation of the table" in str(found)
    assert list(found.summary()) == [EDITED]


def test_the_model_is_asked_on_demand_and_without_its_edits(taught):
    _, lm, edit = taught
    unknown = changed("known", to=[])
    assert consistency(lm, edit, unknown, ask=True).implied == tuple(implied(edit.facts, unknown, lm=lm))
    assert consistency(lm, edit, unknown).implied == tuple(implied(edit.facts, unknown))


def test_bad_input_is_refused(no_sweep):
    lm = tiny_lm("gpt2")
    edit = kf.Edit("x", {}, "", (TOWER,), [])
    refused("edit: no fact in it has a new answer", consistency, lm, replace(edit, facts=()), TABLE)
    refused("edit = 'edit.safetensors'", consistency, lm, "edit.safetensors", TABLE)
    refused("table = 3", consistency, lm, edit, 3)
    refused("by = 'p': expected one of exact, success, written", consistency, lm, edit, TABLE, by="p")
    refused(
        "generate = 0: expected a whole number of at least 1", consistency, lm, edit, TABLE, by="written", generate=0
    )
    refused("hops = 0", consistency, lm, edit, TABLE, hops=0)
    refused("ask = 1: expected True or False", consistency, lm, edit, TABLE, ask=1)
    refused("independent edits.*edit.only", consistency, lm, [owned_edit(lm.model), edit], TABLE)
