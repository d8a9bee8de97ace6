"""Probes: read many at once as one at a time, and written as generation alone."""

import dataclasses
import math

import pytest
import torch

from kedit_fast.evaluation import evaluate, probes, written
from kedit_fast.evaluation.probes import Answer, probe, read_edited, read_probes
from kedit_fast.evaluation.written import before_any, write_probes
from kedit_fast.facts.fact import Fact
from kedit_fast.jobs import generate as generate_module
from kedit_fast.jobs.score import logprobs
from tests.conftest import tiny_lm
from tests.evaluation.test_evaluate import make_edit as edit_of
from tests.evaluation.test_evaluate import make_owned
from tests.make import make_edit
from tests.tiny import PROMPTS


@pytest.fixture(scope="module")
def lm():
    return tiny_lm("llama")


def asked_of(lm):
    """One with two answers, one whose likeliest token is read too, one of which nothing is asked, and one to go on."""
    return [
        probe(lm, "Big Ben is in", ("Rome", "Zürich Paris"), kind="a"),
        probe(lm, "The capital of Spain is", (None, "Madrid"), likeliest=True, owner=1),
        probe(lm, "Monk plays the", ()),
        probe(lm, "Toyota is in", (), likeliest=True, n_written=3),
        probe(lm, "Big Ben is in", ("Rome",)),
    ]


def same(a: Answer, b: Answer):
    for x, y in ((a.p, b.p), (a.exact, b.exact), ([a.p_top], [b.p_top])):
        assert x == pytest.approx(y, rel=1e-5, nan_ok=True)
    assert (a.said, a.top, a.text) == (b.said, b.top, b.text)


def test_answers_stand_in_order_and_equal_those_alone(lm):
    view, asked = lm.with_edit(edit_of(lm)), asked_of(lm)
    base, edited = read_probes(view, asked)
    for i, one in enumerate(asked):
        for side, alone in zip((base, edited), read_probes(view, [one]), strict=True):
            same(side[i], alone[0])
            assert len(side[i].p) == len(side[i].exact) == len(side[i].said) == len(one.answers)
    assert base[0].p[0] == base[4].p[0] != edited[0].p[0]
    assert [math.isnan(p) for p in base[1].p] == [True, False] and base[2] == Answer()
    assert base[1].p_top >= base[1].p[1] and (base[0].top, base[1].top) == (None, read_probes(lm, asked)[0][1].top)
    assert read_probes(lm, asked)[1] is None and read_probes(view, []) == ([], [])


def test_said_are_the_likeliest_tokens_behind_the_answers_own(lm):
    """What makes an answer exact; with it a benchmark counts the right tokens of one."""
    asked = asked_of(lm)
    answer = read_probes(lm, asked)[0][0]
    ids = asked[0].prompt + asked[0].answers[1]
    tops = lm.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert list(answer.said[1]) == tops[len(asked[0].prompt) - 1 : -1]
    told = probe(lm, "Big Ben is in", (lm.tokenizer.decode(answer.said[0]),), attached=True)
    assert read_probes(lm, [told])[0][0].exact == (1.0,)


@pytest.mark.parametrize("make", [edit_of, make_owned])
def test_the_edited_model_alone_answers_as_beside_the_base_model(lm, make):
    facts = (Fact("{} is in", "Big Ben", "Rome"), Fact("{} is", "Spain", "Rome"))
    view, asked = lm.with_edit(make(lm, facts)), asked_of(lm)
    base, edited = read_probes(view, asked)
    for together, alone, before in zip(edited, read_edited(view, asked), base, strict=True):
        same(together._replace(p_top=0.0), alone._replace(p_top=0.0))
        assert alone.top != before.top or together.p_top == pytest.approx(alone.p_top, rel=1e-5, nan_ok=True)


def test_each_owner_writes_under_its_own_edit(lm):
    facts = (Fact("{} is in", "Big Ben", "Rome"), Fact("{} is", "Spain", "Rome"))
    edit = make_owned(lm, facts)
    asked = [probe(lm, "Big Ben is in", n_written=4, owner=owner) for owner in (1, 0, 1)]
    want = [lm.with_edit(edit.only(one.owner)).generate("Big Ben is in", 4) for one in asked]
    assert write_probes(lm.with_edit(edit), asked) == want


def test_a_prompt_with_one_nan_answer_is_no_success_for_the_other(lm, monkeypatch):
    """NaN in the second token of target_new, of the edited model: target_true must not win against it."""
    fact = Fact("{} is in", "Big Ben", "Rome Zürich", "London", neighborhood=("Toyota is in",))
    second, read = lm.tokenizer(" Zürich", add_special_tokens=False)["input_ids"][-1], []

    def torn(lm, h, targets):
        read.append(h)
        bad = (targets == second) & (len(read) > 2)  # two of the base model come first
        return logprobs(lm, h, targets).masked_fill(bad, math.nan)

    monkeypatch.setattr(probes, "logprobs", torn)
    report = evaluate(lm, fact, edit_of(lm))
    for name in ("efficacy", "p_new", "p_true", "neighborhood", "neighborhood_p_true", "neighborhood_magnitude"):
        assert report.edited[name].tolist() == [0], name
    assert report.base["neighborhood_p_true"][0] > 0


@pytest.mark.parametrize("memory", [None, 4_000_000])
def test_what_is_written_equals_generation_alone_however_they_are_batched(memory, monkeypatch):
    lm = tiny_lm("llama").with_edit(make_edit())
    lm = lm if memory is None else dataclasses.replace(lm, memory=memory)
    prompts = [p.template.replace("{}", p.subject) for p in PROMPTS]
    prompts += [prompts[0], " ".join(prompts[:7])]
    sizes, written = [], generate_module._written
    monkeypatch.setattr(generate_module, "_written", lambda lm, ids, *a: sizes.append(len(ids)) or written(lm, ids, *a))
    made = write_probes(lm, [probe(lm, prompt, n_written=4) for prompt in prompts])
    assert sum(sizes) == len(set(prompts)) and len(sizes) >= (2 if memory is None else 3)
    assert made == [lm.generate(prompt, 4) for prompt in prompts]


def test_a_prompt_with_and_without_a_stop_rule_is_written_on_once(monkeypatch):
    lm = tiny_lm("llama").with_edit(make_edit())
    prompts = [p.template.replace("{}", p.subject) for p in PROMPTS[:4]]
    texts = [lm.generate(prompt, 6) for prompt in prompts]
    until = (texts[0][len(texts[0]) // 2], "\n")
    asked = [probe(lm, prompt, n_written=6, until=stop) for stop in (until, ()) for prompt in prompts]
    asked.append(probe(lm, "Therefore", n_written=6, until=until))  # with a rule alone
    sizes, real = [], written.generate
    monkeypatch.setattr(written, "generate", lambda lm, ids, *a, **k: sizes.append(len(ids)) or real(lm, ids, *a, **k))
    made = write_probes(lm, asked)
    assert sizes == [4, 1]
    assert made[4:8] == texts and made[:4] == [before_any(text, until) for text in texts] != texts
    assert made == [write_probes(lm, [one])[0] for one in asked]  # each by its own rule
