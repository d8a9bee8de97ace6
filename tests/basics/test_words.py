"""Numbers in sentences, and what errors say."""

import json

import numpy as np
import pytest
import torch

from kedit_fast.basics.words import brief, counted, did_you_mean, first_few, is_out_of_memory, ranges, reason


def test_one_is_singular():
    assert [counted(n, "fact") for n in (0, 1, 2, 1_000)] == ["0 facts", "1 fact", "2 facts", "1,000 facts"]


@pytest.mark.parametrize(
    ("n", "said"), [(0, ""), (1, "0"), (2, "0; 1"), (3, "0; 1; and 1 more"), (1_002, "0; 1; and 1,000 more")]
)
def test_the_first_few_are_named_and_the_others_counted(n, said):
    assert first_few(map(str, range(n)), 2) == said
    assert first_few(map(str, range(n)), 2, ", ") == said.replace(";", ",")


def test_numbers_in_a_row_are_folded():
    assert ranges([3, 4, 5, 8]) == "3-5, 8" and ranges([]) == "" and ranges([2]) == "2" and ranges([1, 2]) == "1-2"


def test_suggestions_are_of_words_too():
    known = ("merge", "merge undo", "history log", "edit")
    assert did_you_mean("merg", known) == "; did you mean merge?"
    assert did_you_mean("log", known) == "; did you mean history log?"
    assert did_you_mean("arc_chalenge", ["ARC_Challenge"]) == did_you_mean("ARC_chalenge", ["ARC_Challenge"]) != ""
    assert did_you_mean("quux", known) == ""


def test_memory_that_runs_out_is_told_from_other_errors():
    real = []
    for ask in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            ask()
        real.append(error.value)
    said = ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
    assert all(map(is_out_of_memory, [*real, torch.OutOfMemoryError("x"), *map(RuntimeError, said)]))
    assert not any(map(is_out_of_memory, [RuntimeError("shapes differ"), ValueError(said[0])]))


@pytest.mark.parametrize(
    "text, says",
    [("9" * 5_000, "a number in it has thousands of digits"), ("[" * 100_000, "it is nested too deeply")],
)
def test_what_json_cannot_hold_is_said_plainly(text, says):
    with pytest.raises((ValueError, RecursionError)) as caught:
        json.loads(text)
    assert reason(caught.value) == says


def test_a_value_of_any_length_makes_a_sentence():
    made = brief(f"found {'x' * 10**6}; expected a text")
    assert len(made) < 600 and made.startswith("found xxx") and made.endswith("xxx; expected a text")
    assert brief("short") == "short" and len(reason(ValueError("y" * 10**6))) < 600
