"""ROME against its oracle, and what must hold for its edits."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
import kedit_fast.editors.rome as rome_module
from kedit_fast.edits.deltas import LowRank
from tests.conftest import disk_and_resident, open_tiny, save_tiny, tiny_lm
from tests.editors import cases
from tests.editors.cases import FACTS, FAMILIES, FLAT, GROUPS, matrices, moments, oracle_facts, relative
from tests.make import Broken, watched
from tests.oracle.access import add_delta, lookup, read_value, site_module
from tests.oracle.rome import rome_update
from tests.oracle.values import keys
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
LAYER = 1
OPTIMIZATION = dict(lr=1.0, steps=5, weight_decay=0.5, kl_factor=0.0625, clamp=0.8)
EDITOR = kf.Rome(
    layers=(LAYER,), v_lr=1.0, v_num_grad_steps=5, v_weight_decay=0.5, kl_factor=0.0625, clamp_norm_factor=0.8
)
KEYS = {"published": "bare", "averaged": "averaged"}


def edit(lm, facts=FACTS[1], editor=EDITOR, **options):
    return editor.edit(lm, facts, **{"moments": moments(), "contexts": FLAT} | options)


def oracle(model, fact, key="published", layer=LAYER, moment=True):
    moment = matrices()[layer].double() if moment else None
    return rome_update(model, tiny_tokenizer(), fact, FLAT, layer, moment, key=KEYS[key], **OPTIMIZATION)


def compare(made, expected, tolerance):
    assert relative(made.values[0], expected.value.value) < tolerance
    assert relative(made.deltas[LAYER].dense(), expected.delta) < tolerance
    found = made.provenance["found"]
    assert abs(found["steps"][0] - expected.value.n_iterations) <= 1
    assert found["loss"][0] == pytest.approx(expected.value.losses[-1], rel=1e-4)


# --- the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", KEYS)
def test_rome_equals_the_oracle(family, key):
    lm = tiny_lm(family)
    made = edit(lm, editor=replace(EDITOR, key=key))
    compare(made, oracle(lm.model, oracle_facts()[1], key), 1e-4)
    k_star = keys(lm.model, tiny_tokenizer(), oracle_facts()[1], [FLAT], LAYER)
    assert relative(made.keys[LAYER][0], k_star) < 1e-5
    assert made.method == "rome" and made.layers == (LAYER,) and made.facts == FACTS[1:2]


@pytest.mark.parametrize("family", FAMILIES)
def test_rome_equals_the_oracle_in_float64(family, monkeypatch):
    cases.make_exact(monkeypatch)
    lm = tiny_lm(family, torch.float64)
    for i in range(len(FACTS)):
        compare(edit(lm, FACTS[i]), oracle(lm.model, oracle_facts()[i]), 1e-8)


def test_groups_of_contexts_weigh_the_same_in_rome():
    """MEMIT's mean of group means is not ROME's: its contexts are flat."""
    lm = tiny_lm("gpt2")
    flat, grouped = edit(lm, contexts=FLAT), edit(lm, contexts=GROUPS)
    assert torch.equal(flat.deltas[LAYER].dense(), grouped.deltas[LAYER].dense())
    assert flat.contexts == grouped.contexts == [FLAT]


@pytest.mark.parametrize("key", KEYS)
def test_several_facts_are_written_one_after_the_other(key, monkeypatch):
    cases.make_exact(monkeypatch)
    model = tiny_model("llama", torch.float64)
    lm = open_tiny(model)
    made = edit(lm, FACTS, replace(EDITOR, key=key))
    sequential, total, values = copy.deepcopy(model), 0, []
    for fact in oracle_facts():
        update = oracle(sequential, fact, key)
        add_delta(site_module(sequential, LAYER, "mlp_out"), update.delta)
        total = total + update.delta
        values.append(update.value.value)
    assert relative(made.deltas[LAYER].dense(), total) < 1e-8
    assert relative(made.values, torch.stack(values)) < 1e-8
    assert made.deltas[LAYER].rank == len(FACTS)
    alone = edit(lm, FACTS[-1], replace(EDITOR, key=key))
    assert relative(made.values[-1], alone.values[0]) > 1e-3, "the last edit does not see those before it"


def test_several_layers_are_edited_one_after_the_other(monkeypatch):
    cases.make_exact(monkeypatch)
    model = tiny_model("gpt2", torch.float64)
    made = edit(open_tiny(model), FACTS[:2], replace(EDITOR, layers=(2, 0)))
    sequential = copy.deepcopy(model)
    total = dict.fromkeys((0, 2), 0)
    for fact in oracle_facts()[:2]:
        for layer in (2, 0):
            delta = oracle(sequential, fact, layer=layer).delta
            add_delta(site_module(sequential, layer, "mlp_out"), delta)
            total[layer] = total[layer] + delta
    assert made.layers == (0, 2)
    for layer in (0, 2):
        assert relative(made.deltas[layer].dense(), total[layer]) < 1e-8


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bare_key_s_value_is_the_new_one(family):
    """As published: W'k_0 + b = v*."""
    model = tiny_model(family)
    made = edit(open_tiny(model))
    place = lookup(tiny_tokenizer(), FACTS[1].prompt, FACTS[1].subject)
    assert relative(read_value(model, *place, LAYER, "mlp_out"), made.values[0]) > 1e-2
    with made.apply(model):
        assert relative(read_value(model, *place, LAYER, "mlp_out"), made.values[0]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_averaged_key_s_value_is_the_new_one(family):
    """R-ROME: W'k* + b = v*, which the published form misses."""
    model = tiny_model(family)
    lm = open_tiny(model)
    made, published = edit(lm, editor=replace(EDITOR, key="averaged")), edit(lm)
    down, k_star = site_module(model, LAYER, "mlp_out"), made.keys[LAYER]
    with torch.no_grad():
        with made.apply(model):
            assert relative(down(k_star)[0], made.values[0]) < 1e-5
        with published.apply(model):
            assert relative(down(k_star)[0], made.values[0]) > 1e-2


@pytest.mark.parametrize("key", KEYS)
def test_the_update_is_rank_one_and_least_in_the_metric_of_c(key):
    """Δ = (v* - m) uᵀ / uᵀk with C u along k*, which makes tr(Δ C Δᵀ) least for k = k*."""
    lm = tiny_lm("gpt2", torch.float64)
    made = edit(lm, editor=replace(EDITOR, key=key))
    delta = made.deltas[LAYER]
    assert isinstance(delta, LowRank) and delta.rank == 1
    assert torch.linalg.matrix_rank(delta.dense()) == 1
    along = matrices()[LAYER].double() @ delta.v[:, 0]
    assert torch.cosine_similarity(along, made.keys[LAYER][0], dim=0).abs() > 1 - 1e-9


def test_without_statistics_the_key_takes_their_place():
    lm = tiny_lm("gpt2", torch.float64)
    made = edit(lm, editor=replace(EDITOR, mom2_adjustment=False), moments=None)
    compare(made, oracle(lm.model, oracle_facts()[1], moment=False), 1e-8)
    assert torch.cosine_similarity(made.deltas[LAYER].v[:, 0], made.keys[LAYER][0], dim=0).abs() > 1 - 1e-12


def test_a_regularizer_bears_statistics_of_few_tokens():
    lm = tiny_lm("gpt2")
    few = moments(n_tokens=40)
    made = edit(lm, editor=replace(EDITOR, regularizer=1e-3), moments=few)
    C = few[LAYER].matrix.double()
    C += 1e-3 * C.diagonal().mean() * torch.eye(len(C))
    expected = rome_update(lm.model, tiny_tokenizer(), oracle_facts()[1], FLAT, LAYER, C, **OPTIMIZATION)
    assert relative(made.deltas[LAYER].dense(), expected.delta) < 1e-4


def test_the_notes_say_what_the_update_was_made_of():
    lm = tiny_lm("gpt2", torch.float64)
    known = {LAYER: replace(moments()[LAYER], fingerprint=lm.fingerprint, corpus="some text")}
    made = edit(lm, FACTS[:2], moments=known)
    value = oracle(lm.model, oracle_facts()[0]).value
    k, notes, found = made.keys[LAYER], made.provenance["layers"][str(LAYER)], made.provenance["found"]
    g = (k * torch.linalg.solve(matrices()[LAYER].double(), k.T).T).sum(1).mean().item()
    assert notes["g"] == pytest.approx(g, rel=1e-6) and abs(g - 1) > 0.1
    assert notes["corpus"] == "some text" and notes["fingerprint"] == lm.fingerprint
    assert notes["n_tokens"] == known[LAYER].n_tokens
    assert all(p > math.exp(-loss) * 1.01 for p, loss in zip(found["p_new"], found["loss"], strict=True))
    assert found["loss"][0] == pytest.approx(value.losses[-1], rel=1e-4)
    plain = edit(lm, editor=replace(EDITOR, mom2_adjustment=False), moments=None)
    assert plain.provenance["layers"] == {str(LAYER): {}}


def test_the_loss_reads_the_last_layer_whatever_v_loss_layer_says():
    lm = tiny_lm("gpt2")
    made, lower = edit(lm), edit(lm, editor=replace(EDITOR, v_loss_layer=2))
    assert torch.equal(made.values, lower.values)


def test_layers_from_disk_give_the_same_bits(tmp_path):
    pair = disk_and_resident(save_tiny(tmp_path, tiny_model("llama")))
    made, expected = (edit(lm, FACTS[:2]) for lm in pair)
    assert torch.equal(made.values, expected.values)
    assert torch.equal(made.deltas[LAYER].dense(), expected.deltas[LAYER].dense())


def test_an_edit_on_top_of_an_edit():
    lm = tiny_lm("gpt2", torch.float64)
    both = edit(lm, FACTS[:2])
    first = edit(lm, FACTS[0])
    second = edit(lm, FACTS[1], previous=first)
    total = first.deltas[LAYER].dense() + second.deltas[LAYER].dense()
    assert relative(total, both.deltas[LAYER].dense()) < 1e-9
    assert relative(second.deltas[LAYER].dense(), edit(lm, FACTS[1]).deltas[LAYER].dense()) > 1e-3


def test_generated_contexts_come_from_the_seed():
    lm = tiny_lm("llama")
    editor = replace(EDITOR, v_num_grad_steps=1, context_template_length_params=((3, 2), (5, 2)))
    made = edit(lm, editor=editor, contexts=None, seed=1)
    assert len(made.contexts) == 1 and len(made.contexts[0]) == 5 and made.contexts[0][0] == "{}"
    assert edit(lm, editor=editor, contexts=None, seed=1).contexts == made.contexts
    assert edit(lm, editor=editor, contexts=None, seed=2).contexts != made.contexts


# --- the model is left alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails, monkeypatch):
    calls = watched(monkeypatch, rome_module, "optimize_values", break_at=(2,) if fails else ())
    with cases.left_as_it_was("gpt2") as lm, pytest.raises(Broken) if fails else nullcontext():
        edit(lm, FACTS[:2])
    assert len(calls) == 2
