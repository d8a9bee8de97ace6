"""Finding answers in what a model writes, by hand."""

import pytest

from kedit_fast.evaluation.probes import before_any
from kedit_fast.evaluation.texts import contains, leaks, matches, normalized


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
