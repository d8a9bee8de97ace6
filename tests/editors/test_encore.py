"""ENCORE: MEMIT with a ridge, whose values stop early."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
import kedit_fast.jobs.values as values_module
from tests.conftest import tiny_lm
from tests.editors import cases
from tests.editors.cases import FACTS, GROUPS, apart, matrices, moments, oracle_facts, relative
from tests.oracle.memit import memit_update
from tests.tiny import D_FF, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
STEPS = 16
SETTINGS = {"v_lr": 1.0, "v_num_grad_steps": STEPS, "clamp_norm_factor": 20.0}
OPTIMIZATION = {"lr": 1.0, "steps": STEPS, "clamp": 20.0}
WEIGHT, RIDGE = 5.0, 0.7
EDITOR = kf.Encore(layers=(0, 1), mom2_update_weight=WEIGHT, update_norm_lambda=RIDGE, hits=2, **SETTINGS)


def edit(lm, facts=FACTS, editor=EDITOR, **options):
    return editor.edit(lm, facts, **{"moments": moments(), "contexts": GROUPS} | options)


def inverse(C, K):
    """(lambda C + lambda_n I + K^T K)^-1 K^T."""
    return torch.linalg.solve(WEIGHT * C + RIDGE * torch.eye(D_FF, dtype=C.dtype) + K.T @ K, K.T)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_encore_equals_the_oracle(family, monkeypatch):
    cases.make_exact(monkeypatch)
    lm = tiny_lm(family, torch.float64)
    made = edit(lm)
    expected = memit_update(
        lm.model, tiny_tokenizer(), oracle_facts(), GROUPS, (0, 1), matrices(), WEIGHT, inverse=inverse, hits=2,
        pull_back=family in cases.POST_NORM, **OPTIMIZATION,
    )  # fmt: skip
    steps = made.provenance["found"]["steps"]
    assert steps == [value.n_iterations for value in expected.values] and min(steps) < STEPS, "some stopped early"
    assert relative(made.values, expected.z) < 1e-8
    for layer in EDITOR.layers:
        assert relative(made.deltas[layer].dense(), expected.deltas[layer]) < 1e-8


def test_without_both_it_is_memit():
    lm = tiny_lm("gpt2", torch.float64)
    plain = replace(EDITOR, update_norm_lambda=0.0, hits=0)
    memit = kf.Memit(layers=(0, 1), mom2_update_weight=WEIGHT, **SETTINGS)
    assert apart(edit(lm, editor=plain), edit(lm, editor=memit)) == 0


def test_contexts_in_parts_stop_where_all_together_do(monkeypatch):
    """As where the memory does not hold all contexts of a fact at once."""
    lm = tiny_lm("gpt2", torch.float64)
    whole = edit(lm)
    n = len(FACTS) * (len(GROUPS[0] + GROUPS[1]) + 1)
    monkeypatch.setattr(values_module, "parts", lambda *_: ([range(1), range(1, n)], False))
    parts = edit(lm)
    steps = parts.provenance["found"]["steps"]
    assert steps == whole.provenance["found"]["steps"] and min(steps) < STEPS
    assert relative(parts.values, whole.values) < 1e-8


def test_settings_for_a_model():
    lm = tiny_lm("gpt2")
    derived = kf.Encore.for_model(lm)
    assert derived.layers == kf.Memit.for_model(lm).layers
    assert derived.update_norm_lambda / derived.mom2_update_weight == pytest.approx(10 / 20_000)
    assert kf.Encore.for_model(cases.named("gpt2-xl", layers=48)).source == "published for gpt2-xl"
