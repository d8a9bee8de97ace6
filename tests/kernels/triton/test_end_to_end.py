"""Whole flows on Triton equal the same flows on the references, and every op that has a kernel ran it."""

import importlib
from collections import Counter

import numpy as np
import pytest
import torch

import kedit_fast as kf
from kedit_fast.moments.second_moment import second_moments
from tests.conftest import close, open_tiny
from tests.kernels.triton import DEVICE
from tests.make import lowrank, make_edit
from tests.tiny import TEXT, tiny_model

FACT = kf.Fact(prompt="The capital of {} is", subject="France")
# What must have run, (op's file, function); ops without a kernel stay on the reference.
TRACED = {("rows", "add_noise"), ("rows", "branch_rows_"), ("lowrank", "lowrank_add")}


def tiny_lm(family: str, layers: int = 4) -> kf.LM:
    """The tiny model where the kernels run."""
    return open_tiny(tiny_model(family, layers=layers).to(DEVICE))


@pytest.fixture
def launched(on_triton, monkeypatch):
    """{(op's file, function): calls} of the ops on Triton, counted from here on."""
    calls = Counter()

    def count(op, function):
        module = importlib.import_module(f"kedit_fast.kernels.triton.{op}")
        run = getattr(module, function)

        def counted(*args, **kwargs):
            calls[op, function] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(module, function, counted)

    for op, function in (*TRACED, ("second_moment", "second_moment_")):
        count(op, function)
    return calls


def test_a_trace_of_an_edited_model(launched, monkeypatch):
    lm = tiny_lm("gpt2", layers=2)
    lm = lm.with_edit(make_edit(lm.model, {1: lowrank()}))
    options = {"kinds": ["state", "mlp"], "samples": 1, "noise": 0.5, "window": 2}
    found = kf.trace(lm, FACT, **options)
    assert set(launched) == TRACED, launched
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "reference")
    launched.clear()
    for got, wanted in zip(found, kf.trace(lm, FACT, **options), strict=True):
        assert (got.kind, got.answer_id) == (wanted.kind, wanted.answer_id)
        assert abs(got.p_clean - wanted.p_clean) < 1e-5 and abs(got.p_corrupted - wanted.p_corrupted) < 1e-5
        assert np.abs(got.p_restored - wanted.p_restored).max() < 1e-5
        assert np.ptp(wanted.p_restored) > 1e-4, "a trace in which nothing happens would pass"
    assert not launched


def test_second_moments(launched, monkeypatch):
    lines = [line for line in TEXT.splitlines() if line]
    found = second_moments(tiny_lm("llama"), [0, 2], lines, n_tokens=150)
    assert set(launched) - TRACED == {("second_moment", "second_moment_")}
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "reference")
    for layer, wanted in second_moments(tiny_lm("llama"), [0, 2], lines, n_tokens=150).items():
        close(f"C of layer {layer}", found[layer].matrix, wanted.matrix, torch.float32)
