"""EMMET against its oracle, as an equality, and as MEMIT at another weight."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from tests.conftest import refused, tiny_lm
from tests.editors import cases
from tests.editors.cases import FACTS, GROUPS, apart, matrices, moments, oracle_facts, relative
from tests.oracle.memit import memit_update
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
SETTINGS = {"v_lr": 1.0, "v_num_grad_steps": 4, "clamp_norm_factor": 0.4}
OPTIMIZATION = {"lr": 1.0, "steps": 4, "clamp": 0.4}
WEIGHT, EPSILON = 5.0, 0.1
EDITOR = kf.Emmet(layers=(1,), mom2_update_weight=WEIGHT, emmet_lambda=EPSILON, **SETTINGS)


def edit(lm, facts=FACTS, editor=EDITOR, **options):
    return editor.edit(lm, facts, **{"moments": moments(), "contexts": GROUPS} | options)


def inverse(C, K, epsilon=EPSILON):
    """A^-1 K^T (K A^-1 K^T + epsilon I)^-1, by explicit inverses."""
    left = torch.linalg.inv(WEIGHT * C) @ K.T
    return left @ torch.linalg.inv(K @ left + epsilon * torch.eye(len(K), dtype=K.dtype))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_emmet_equals_the_oracle(family, monkeypatch):
    cases.make_exact(monkeypatch)
    lm = tiny_lm(family, torch.float64)
    made = edit(lm)
    expected = memit_update(
        lm.model, tiny_tokenizer(), oracle_facts(), GROUPS, (1,), matrices(), WEIGHT, inverse=inverse,
        pull_back=family in cases.POST_NORM, **OPTIMIZATION,
    )  # fmt: skip
    assert relative(made.values, expected.z) < 1e-8 and relative(made.keys[1], expected.keys[1]) < 1e-8
    assert relative(made.deltas[1].dense(), expected.deltas[1]) < 1e-8
    assert relative(edit(tiny_lm(family)).deltas[1].dense(), expected.deltas[1]) < 1e-4


def test_a_ridge_stands_beside_the_weighted_moment():
    lm = tiny_lm("llama", torch.float64)
    made = edit(lm, editor=replace(EDITOR, update_norm_lambda=0.7))
    C, k = moments()[1].matrix.double(), made.keys[1]
    ridged = C + 0.7 / WEIGHT * torch.eye(len(C), dtype=C.dtype)
    residual = made.values - cases.values_at(lm, FACTS, 1)
    assert relative(made.deltas[1].dense(), residual.T @ inverse(ridged, k).T) < 1e-8


def test_without_epsilon_each_fact_has_its_value():
    lm = tiny_lm("llama", torch.float64)
    made = edit(lm, editor=replace(EDITOR, emmet_lambda=0.0))
    residual = made.values - cases.values_at(lm, FACTS, 1)
    assert relative(made.keys[1] @ made.deltas[1].dense().T, residual) < 1e-8


def test_one_fact_is_romes_update_whatever_epsilon_is():
    lm = tiny_lm("llama", torch.float64)
    made = edit(lm, FACTS[:1])
    k, residual = made.keys[1][0], (made.values - cases.values_at(lm, FACTS[:1], 1))[0]
    left = torch.linalg.solve(moments()[1].matrix.double(), k)
    assert relative(made.deltas[1].dense(), torch.outer(residual, left / (left @ k))) < 1e-8


def test_several_are_memit_at_epsilon_times_the_weight():
    lm = tiny_lm("llama", torch.float64)
    memit = kf.Memit(layers=(0, 1), mom2_update_weight=EPSILON * WEIGHT, **SETTINGS)
    assert apart(edit(lm, editor=replace(EDITOR, layers=(0, 1))), edit(lm, editor=memit)) < 1e-8


def test_independent_ones_are_those_of_each_fact_alone():
    lm = tiny_lm("gpt2", torch.float64)
    together = edit(lm, independent=True)
    for i, fact in enumerate(FACTS):
        assert apart(together.only(i), edit(lm, [fact])) < 1e-8


def test_facts_of_one_key_have_no_exact_update():
    one = kf.Fact(prompt="The {} is in the city of", subject="Space Needle", target_new="Rome")
    other = replace(one, prompt="The {} was built by", target_new="Paris")
    exact = replace(EDITOR, emmet_lambda=0.0)
    refused("not independent.*raise emmet_lambda", edit, tiny_lm("gpt2"), [one, other], exact, contexts=["{}"])


def test_settings_for_a_model():
    derived = kf.Emmet.for_model(tiny_lm("gpt2"))
    assert len(derived.layers) == 1 and "derived" in derived.source
    assert derived.emmet_lambda * derived.mom2_update_weight == pytest.approx(tiny_lm("gpt2").d_ff)
    assert kf.Emmet.for_model(cases.named("gpt2-xl", layers=48)).source == "published for gpt2-xl"


@pytest.mark.parametrize(("n", "exact"), [(1, True), (2, False)])
def test_the_fit_is_the_share_that_a_layer_gives(n, exact):
    notes = edit(tiny_lm("llama"), FACTS[:n]).provenance["layers"]["1"]
    assert notes["fit"] == pytest.approx(1.0 if exact else notes["g"] / (notes["g"] + EPSILON * WEIGHT))


def test_a_ridge_does_for_few_tokens():
    few = moments(n_tokens=50)
    refused("has no inverse", edit, tiny_lm("gpt2"), moments=few)
    edit(tiny_lm("gpt2"), editor=replace(EDITOR, update_norm_lambda=1.0), moments=few)
    edit(tiny_lm("gpt2"), editor=kf.Encore(layers=(1,), v_num_grad_steps=2, update_norm_lambda=1.0), moments=few)
