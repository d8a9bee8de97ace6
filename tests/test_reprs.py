"""What a notebook or a debugger shows of an object: a line that says what it is."""

import pytest
import torch

import kedit_fast as kf
from kedit_fast.basics.intervals import Interval
from kedit_fast.experiments.rounds import Round
from kedit_fast.moments.second_moment import SecondMoment
from kedit_fast.tracing.results import average
from tests.conftest import tiny_lm
from tests.experiments.test_by_layer import made_up
from tests.make import make_edit
from tests.pictures.test_traces import make

ONE = {"efficacy": Interval(0.75, 0.5, 1.0, 4)}
SHOWN = {
    "LM(tiny, llama, 4 layers, float32)": lambda: kf.LM(*_parts(tiny_lm("llama")), opened_as="tiny"),
    "LM(tiny, llama, 4 layers, float32, 1 edit)": lambda: _edited(tiny_lm("llama")),
    "TraceResult('The Eiffel Tower is in' -> ' Paris', mlp, prob 0.7, corrupted 0.2, 5 tokens x 12 layers)": (
        lambda: make("mlp")
    ),
    "AverageTrace(state, 2 facts, 12 layers, total effect 0.5 in prob)": lambda: average([make(), make()])["state"],
    "SecondMoment(layer 3, d_ff 8, 12,000 tokens, self-seed0, model llama-012345)": (
        lambda: SecondMoment(torch.eye(8), 12_000, 3, "llama-0123456789", "self-seed0")
    ),
    "SecondMoment(layer 3, d_ff 8, 9 tokens, model unknown)": lambda: SecondMoment(torch.eye(8), 9, 3),
    "LayerStudy(rome, 4 facts, 3 layers, model tiny)": lambda: made_up([0.1, 0.2, 0.3]),
    "Round(2, memit, 1,000 facts, efficacy of the new 0.750, perplexity 41)": (
        lambda: Round(2, "memit", 1_000, ONE, ONE, ONE, (40.0, 41.0), {}, 1.0, 1.0)
    ),
    "Suite(mine, 1 facts, 2 text)": lambda: kf.Suite((kf.Fact("{} is", "It"),), text=("a", "b"), name="mine"),
    "Suite(empty)": kf.Suite,
    "Edit(memit, 2 facts, layers 1, 2, rank 2-80, 0.0179 MB, model unknown)": make_edit,
}


def _parts(lm):
    return lm.model, lm.tokenizer, lm.source


def _edited(lm):
    lm = kf.LM(*_parts(lm), opened_as="tiny")
    return lm.with_edit(make_edit(lm.model))


@pytest.mark.parametrize("shown", SHOWN)
def test_a_line_says_what_it_is(shown):
    made = SHOWN[shown]()
    if not isinstance(made, kf.Edit):  # its size is of no interest here
        assert repr(made) == shown
    assert len(repr(made)) < 120 and "\n" not in repr(made)
