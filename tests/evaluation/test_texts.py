"""Finding answers in what a model writes, by hand."""

import math

import pytest

from kedit_fast.evaluation.texts import contains, leaks, matches, ngram_entropy, normalized
from kedit_fast.evaluation.written import before_any


@pytest.mark.parametrize(
    ("text", "same"),
    [(" The  Eiffel Tower!", "eiffel tower"), ("an apple a day", "apple day"), ("U.S.A.", "usa"),
     ("The The", "the the"), ("Theatre", "theatre"), ("", ""), ("...", "...")],
)  # fmt: skip
def test_normalized(text, same):
    assert normalized(text) == same


def test_matches_and_contains():
    assert matches(" the Rome.", ["Paris", "Rome"]) and not matches("Rome, Italy", ["Rome"])
    assert contains("It is in Rome, Italy", ["Paris", "rome"]) and not contains("Romeo", ["Rome"])
    assert not contains("", ["Rome"]) and not matches("anything", [])
    assert contains("他住在巴黎市", ["巴黎"]) and contains("New   York", ["new york"])
    assert not contains("Rome", ["", " "]) and not matches("", ["", " "]) and not leaks("Rome", "", "Paris")
    assert contains("Rome", ["", "Rome"]) and leaks("Rome", "Rome", " ")


@pytest.mark.parametrize(
    ("text", "ends", "kept"),
    [("a. b", (".",), "a"), ("\n\nRome\nnext", ("\n",), "\n\nRome"), ("a", (".",), "a"), (" . a", (".",), " "),
     ("x\ny.z", (".", "\n"), "x"), ("", (".",), "")],
)  # fmt: skip
def test_a_text_before_its_ends(text, ends, kept):
    assert before_any(text, ends) == kept


def test_nothing_ends_inside_an_accepted_answer():
    kept = ("St. Louis", "U.S.")
    assert before_any("in st. louis. Then", (".",), kept) == "in st. louis"
    assert before_any(" the U.S. and more. Then", (".",), kept) == " the U.S. and more"
    assert before_any("the United States. She is of the U.S.", (".",), kept) == "the United States"


def test_entropy_by_hand():
    # pairs: "a b" three times, "b a" twice; triples: "a b a" twice, "b a b" twice
    pairs = 3 / 5 * math.log2(5 / 3) + 2 / 5 * math.log2(5 / 2)
    assert ngram_entropy("a b a b a b") == pytest.approx((2 / 3 * pairs + 4 / 3 * 1) / 2)
    assert ngram_entropy("it's") == pytest.approx((2 / 3 * 1 + 0) / 2)  # it ' s: two pairs, one triple
    assert [ngram_entropy(text) for text in ("", "one", "one two", "no no no no no")] == [0, 0, 0, 0]
