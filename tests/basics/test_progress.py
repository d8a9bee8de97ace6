"""Plain lines off a terminal, bars on one; which stage of how many, and time left by what this run has done."""

import io
import logging
import re
import sys
from dataclasses import replace

import pytest

import kedit_fast as kf
from kedit_fast.basics import progress as module
from kedit_fast.basics.progress import Bar, duration, logger, progress, scaled, show_progress, stages
from kedit_fast.editors import Memit, Rome
from kedit_fast.experiments.by_layer import edit_by_layer
from kedit_fast.gating.ask import names_of
from tests.conftest import tiny_lm
from tests.make import TOWER

FACTS = [TOWER, replace(TOWER, subject="Big Ben", id="b")]
EDIT = {"v_num_grad_steps": 3, "context_template_length_params": ((4, 2),), "mom2_adjustment": False}


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.fixture
def at_once(monkeypatch):
    """Every move of a bar is a line."""
    monkeypatch.setattr(module, "DELAY", -1.0)
    monkeypatch.setattr(module, "EVERY", 0.0)


def lines(capsys) -> list[str]:
    out, err = capsys.readouterr()
    assert out == "" and not re.search(r"[\r\x1b\x08]", err)
    return err.splitlines()


def test_lines_off_a_terminal(clock, capsys):
    """At the beginning, every some seconds, at the end; nothing of what is over at once."""
    with show_progress(), stages("sampling contexts", "optimizing values", "solving layers"):
        with progress("sampling contexts", 3) as bar:
            clock(1), bar.advance(3)
        with progress("optimizing values (steps)", 2400) as bar:
            clock(10), bar.advance(100, "loss 4.100")
            clock(5), bar.advance(100)
            clock(10), bar.advance(100, "loss 2.500")
            clock(35), bar.advance(2100)
    assert lines(capsys) == [
        "stage 2 of 3: optimizing values (steps): 4 %, 100 of 2,400; 3 min 50 s left; loss 4.100",
        "stage 2 of 3: optimizing values (steps): 12 %, 300 of 2,400; 2 min 55 s left; loss 2.500",
        "stage 2 of 3: optimizing values (steps): 100 %, 2,400 of 2,400; 0 s left; loss 2.500",
        "stage 2 of 3: optimizing values (steps): done in 1 min 0 s",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
def test_only_a_stage_that_ended_well_is_done(error, clock, capsys):
    with pytest.raises(error), show_progress(), progress("tracing", 2) as bar:
        clock(60), bar.advance()
        raise error
    assert lines(capsys) == ["tracing: 50 %, 1 of 2; 1 min 0 s left"]


def test_what_an_earlier_run_did_is_no_speed_of_this_one(clock, capsys):
    with show_progress(), progress("collecting", 1000) as bar:
        bar.resume(900)
        clock(10), bar.advance(10)
    assert lines(capsys)[0] == "collecting: 91 %, 910 of 1,000; 1 min 30 s left"


def test_units_around_a_stage_are_said(clock, capsys):
    """Stages inside have names of their own; the bar around stands back, and says how far it is."""
    with show_progress(), stages("editing", "tracing"), progress("editing", 4) as outer:
        for layer in (5, 6):
            with outer.inside(f"layer {layer}"), stages("asking", "writing"), progress("writing", 10) as bar:
                clock(20), bar.advance(5)
            outer.done += 1
    said = lines(capsys)
    assert said[0] == "layer 5 (0 of 4 done), stage 2 of 2: writing: 50 %, 5 of 10; 20 s left"
    assert said[2].startswith("layer 6 (1 of 4 done, 1 min 0 s left), stage 2 of 2: writing")


def test_names_of_the_flow_around_hold(clock, capsys):
    with show_progress(), stages("one", "two", "three"), stages("two"), progress("two", 1) as bar:
        clock(3), bar.advance()
    assert lines(capsys)[0].startswith("stage 2 of 3: two: 100 %")


def test_silent_without_being_asked(clock, capsys):
    with progress("tracing", 2) as bar:
        clock(60), bar.advance()
    with show_progress(False), progress("tracing", 2) as bar:
        clock(60), bar.advance()
    logger.info("a line")
    assert lines(capsys) == []


def test_the_caller_s_handler_gets_the_lines(clock, caplog, capsys):
    """And the package adds none of its own; everything is put back."""
    before = list(logger.handlers), logger.level
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "kedit_fast"), show_progress(), progress("tracing", 2) as bar:
            clock(60), bar.advance()
    finally:
        logger.removeHandler(caplog.handler)
    assert any("tracing: 50 %" in message for message in caplog.messages)
    assert lines(capsys) == [] and (list(logger.handlers), logger.level) == before


def test_a_bar_on_a_terminal(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with show_progress(), stages("tracing", "writing"), progress("tracing [bold] facts", 4) as bar:
        clock(10), bar.advance(1, "loss [1]")
        clock(10), bar.advance(1)
    drawn = sys.stderr.getvalue()
    assert "stage 1 of 2: tracing [bold] facts" in drawn and "50%" in drawn and "\x1b" in drawn


@pytest.mark.parametrize(
    "seconds, said", [(0, "0 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_a_share_of_nothing_is_nothing():
    told = []
    scaled(told.append, 0.5)(0.5)
    assert told == [0.25] and scaled(None, 0.5) is None


def said_by(flow, capsys) -> list[str]:
    """What stages a flow goes through: the heads of its lines, once each."""
    with show_progress():
        flow()
    heads = [re.sub(r": (\d+ %.*|done in .*)$", "", line) for line in lines(capsys)]
    return [re.sub(r"(, \d.*| min.*) left\)", ")", head) for head in dict.fromkeys(heads)]


def test_every_flow_says_its_stages(at_once, capsys):
    lm = tiny_lm("gpt2")
    memit = Memit(layers=(1, 2), v_loss_layer=3, **EDIT)
    rome = Rome(layers=(1,), v_loss_layer=3, **EDIT)
    assert said_by(lambda: memit.edit(lm, FACTS), capsys) == [
        "stage 1 of 4: sampling contexts (tokens)",
        "stage 2 of 4: optimizing values (steps)",
        "stage 3 of 4: solving layers",
        "stage 4 of 4: asking the edited model",
    ]
    heads = said_by(lambda: rome.edit(lm, FACTS, contexts=["{}"]), capsys)
    assert any(head.startswith("optimizing values, fact by fact (1 of 2 done") for head in heads)
    assert said_by(lambda: kf.second_moments(lm, [1], n_tokens=300), capsys) == [
        "stage 1 of 2: sampling text for statistics (tokens)",
        "stage 2 of 2: collecting second moments (tokens)",
    ]
    asked = said_by(lambda: kf.evaluate(lm, FACTS, generate=2, text="The night train left. " * 9), capsys)
    assert asked == [
        "stage 1 of 3: generating (tokens)",
        "stage 2 of 3: evaluating facts",
        "stage 3 of 3: measuring perplexity (tokens)",
    ]
    assert said_by(lambda: kf.trace(lm, FACTS, samples=1), capsys) == ["tracing facts"]
    heads = said_by(lambda: edit_by_layer(lm, FACTS[:1], rome, [1, 2], contexts=["{}"], samples=1), capsys)
    assert heads[-1] == "stage 2 of 2: tracing facts" and any(h.startswith("layer 2 (1 of 2 done") for h in heads)
    rounds = kf.edit_in_rounds(lm, FACTS, memit, per_round=1, contexts=["{}"])
    heads = said_by(lambda: list(rounds), capsys)
    assert "round 1 (0 of 2 done), stage 1 of 3: optimizing values (steps)" in heads
    assert any(head.startswith("round 2 (1 of 2 done") for head in heads)


def test_the_gate_names_the_stages_that_it_goes_through():
    """Every label of ``ask`` begins with the name of a stage."""
    assert names_of("adapter")[1] == "adapter: writing" and "adapter: base model, writing" in names_of("adapter")


def test_values_count_steps_of_facts(monkeypatch):
    """A fact that is done early leaves none over."""
    bars = []
    monkeypatch.setattr(Bar, "close", lambda self: bars.append(self))
    Memit(layers=(1,), v_loss_layer=3, **EDIT).edit(tiny_lm("gpt2"), FACTS, contexts=["{}"])
    (values,) = [bar for bar in bars if bar.label.startswith("optimizing values")]
    assert values.total == values.done == 3 * len(FACTS)
