"""Numbers in sentences."""

from kedit_fast.basics.words import counted, ranges


def test_one_is_singular():
    assert [counted(n, "fact") for n in (0, 1, 2, 1_000)] == ["0 facts", "1 fact", "2 facts", "1,000 facts"]


def test_numbers_in_a_row_are_folded():
    assert ranges([3, 4, 5, 8]) == "3-5, 8" and ranges([]) == "" and ranges([2]) == "2" and ranges([1, 2]) == "1-2"
