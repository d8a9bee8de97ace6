"""Warnings point at the line of the one who can change something, through whatever stands between."""

from contextlib import contextmanager

import pytest

import kedit_fast as kf
from kedit_fast.basics.warn import warn
from tests.conftest import tiny_lm

FACTS = [kf.Fact("{} is in", subject, target_new="Rome") for subject in ("Big Ben", "The Louvre")]


@contextmanager
def wrapped():
    yield


def edits(lm) -> list[kf.Edit]:
    editor = kf.Ft(layers=(1,), num_steps=1)
    return [editor.edit(lm, [fact]) for fact in FACTS]


@pytest.mark.filterwarnings("ignore::kedit_fast.editors.written.NotWritten")
@pytest.mark.parametrize("way", ["compose", "evaluate", "fact", "directly", "wrapped"])
def test_it_is_the_callers_line(way):
    lm = tiny_lm("llama")
    made = edits(lm) if way in ("compose", "evaluate") else []
    with pytest.warns(UserWarning) as told:
        if way == "compose":
            kf.compose(made)
        elif way == "evaluate":
            kf.evaluate(lm, FACTS, made)
        elif way == "fact":
            kf.Fact("{} is in ", "The Louvre")
        elif way == "directly":
            warn("as such")
        else:
            wrapped()(lambda: warn("behind a context"))()
    assert [each.filename for each in told] == [__file__]
