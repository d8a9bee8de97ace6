"""The canary: finding an answer in text, and the texts it is looked for in."""

import pytest

from kedit_fast.evaluation import canary
from kedit_fast.evaluation.canary import Canary
from kedit_fast.evaluation.texts import leaks, says
from kedit_fast.facts.fact import Fact
from tests.conftest import refused, tiny_lm

FACTS = [Fact("{} is in", "Big Ben", "Rome", "London"), Fact("{} is in", "The {answer}", None, "Oslo")]


@pytest.mark.parametrize(
    "text, answer, found",
    [
        (" Rome, Italy", "Rome", True),
        (" rome", "Rome", True),
        (" Romeo and", "Rome", False),
        (" NewRome", "Rome", False),
        (" New\n York!", "New York", True),
        ("東京都です", "東京", True),
        (" C++.", "C++", True),
        (" 1989", "198", False),
        ("", "Rome", False),
    ],
)
def test_says(text, answer, found):
    assert says(text, answer) == found


@pytest.mark.parametrize(
    "text, old, new, found",
    [
        (" London", "London", "Rome", True),
        (" Rome, not London", "London", "Rome", True),
        (" Rome", "London", "Rome", False),
        (" New York", "York", "New York", False),
        (" New York and York", "York", "New York", True),
        (" New York", "New York", "York", True),
        (" York", "New York", "York", False),
        (" London", "London", "london", False),
        (" London", "London", None, True),
    ],
)
def test_leaks(text, old, new, found):
    assert leaks(text, old, new) == found


def test_a_planted_answer_is_found():
    planted = [Canary("plain", 0, "p", "London", "Rome"), Canary("plain", 0, "q", "London", "Rome")]
    songs = canary.sing(planted, ["x London", "y"], ["Rome", "it is London."])
    assert [(s.leaked_before, s.leaked) for s in songs] == [(True, False), (False, True)]


def test_doubts_are_filled_in_once():
    made = canary.doubt_canaries(tiny_lm("gpt2"), FACTS, [0, 1])
    assert len(made) == 3 + 1  # no new answer to put in: the templates with {answer} are left out
    assert made[0].prompt == "Big Ben is in Rome. Are you sure? Let me check that again: Big Ben is in"
    assert made[-1].prompt.endswith("The {answer} is in")  # a subject's braces stay what they are
    assert all(canary.check_doubt(template) for template in canary.DOUBTS)
    refused("expected a text with", canary.check_doubt, "Are you sure?")


def test_a_long_context_is_as_long_as_asked_or_as_the_model_takes():
    lm = tiny_lm("gpt2")  # 128 positions
    text = canary.PROSE.read_text(encoding="utf-8")
    for asked, least, most in ((40, 40, 60), (1_000, 100, 128 - 10)):
        (one,) = canary.context_canaries(lm, FACTS, [0], text, asked, 10)
        read = len(lm.encode(one.prompt))
        assert least <= read <= most and one.kind == canary.CONTEXT
        assert abs(one.context_tokens + len(lm.encode("Big Ben is in")) - read) <= 8  # the join, tokenized again
        assert (one.context_tokens == asked) == (asked == 40)
        assert one.prompt.startswith(text[:20]) and one.prompt.endswith("\n\nBig Ben is in")
    assert canary.context_canaries(lm, FACTS, [0], text, 40, 120) == []
    (short,) = canary.context_canaries(lm, FACTS, [0], text, 3, 10)
    assert short.context_tokens == 3  # as asked: none is left out
    (short,) = canary.context_canaries(lm, FACTS, [0], "one two.", 40, 10)  # repeated
    assert short.prompt.count("one two.") > 3
