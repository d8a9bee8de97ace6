"""Independent edits: all computed together, each as if there were no other."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
import kedit_fast.jobs.values as values_module
from tests.conftest import refused, tiny_lm
from tests.editors.cases import FACTS, FAMILIES, GROUPS, apart, moments, relative

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
COMMON = dict(v_lr=1.0, v_num_grad_steps=6, clamp_norm_factor=0.4)
EDITORS = {
    "rome": kf.Rome(layers=(1,), **COMMON),
    "r-rome": kf.Rome(layers=(1,), key="averaged", **COMMON),
    "rome in two layers": kf.Rome(layers=(0, 2), **COMMON),
    "memit": kf.Memit(layers=(0, 1, 2), mom2_update_weight=5.0, **COMMON),
    "without statistics": kf.Memit(layers=(0, 1), mom2_update_weight=5.0, mom2_adjustment=False, **COMMON),
}


def edit(editor, lm, facts=FACTS, **options):
    given = moments() if editor.mom2_adjustment else None
    return editor.edit(lm, facts, **{"moments": given, "contexts": GROUPS} | options)


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_is_the_edit_of_its_fact_alone(family, name):
    lm, editor = tiny_lm(family, torch.float64), EDITORS[name]
    together = edit(editor, lm, independent=True)
    assert together.independent and len(together.facts) == len(FACTS)
    for i, fact in enumerate(FACTS):
        mine, alone = together.only(i), edit(editor, lm, [fact])
        assert mine.facts == alone.facts
        assert relative(mine.values, alone.values) < 1e-9
        assert apart(mine, alone) < 1e-8
        assert all(relative(mine.keys[layer], alone.keys[layer]) < 1e-9 for layer in alone.layers)


def test_each_is_on_top_of_a_shared_edit():
    lm, editor = tiny_lm("llama", torch.float64), EDITORS["memit"]
    below = edit(editor, lm, FACTS[:1])
    together = edit(editor, lm, FACTS[1:], previous=below, independent=True)
    for i, fact in enumerate(FACTS[1:]):
        alone = edit(editor, lm, [fact], previous=below)
        assert apart(together.only(i), alone) < 1e-8


def test_the_cut_into_groups_does_not_matter(monkeypatch):
    lm, editor = tiny_lm("gpt2", torch.float64), EDITORS["memit"]
    whole = edit(editor, lm, independent=True)
    monkeypatch.setattr(values_module, "groups", lambda lm, tasks, settings: [[task] for task in tasks])
    monkeypatch.setattr("kedit_fast.editors.located.together", lambda items, *size: [[i] for i in items])
    parts = edit(editor, lm, independent=True)
    assert apart(parts, whole) < 1e-8


def test_facts_that_contradict_each_other():
    """One prompt with two targets: an error together, two edits apart; equal facts are one."""
    lm, editor = tiny_lm("gpt2"), EDITORS["rome"]
    facts = [FACTS[0], replace(FACTS[0], target_new="Paris"), FACTS[0]]
    refused("contradict", edit, editor, lm, facts)
    with pytest.warns(UserWarning, match="1 fact: left out"):
        together = edit(editor, lm, facts, independent=True)
    assert [fact.target_new for fact in together.facts] == [FACTS[0].target_new, "Paris"]
    report = kf.evaluate(lm, together.facts, together)
    alone = [kf.evaluate(lm, [fact], edit(editor, lm, [fact])) for fact in together.facts]
    for i, one in enumerate(alone):
        assert report.edited["p_new"][i] == pytest.approx(float(one.edited["p_new"][0]), rel=1e-3)
    assert not torch.equal(report.edited["p_new"], report.base["p_new"])


def test_an_edit_on_top_of_independent_ones_is_refused():
    lm, editor = tiny_lm("gpt2"), EDITORS["rome"]
    refused(r"edit.only\(i\)", edit, editor, lm, previous=edit(editor, lm, independent=True))
