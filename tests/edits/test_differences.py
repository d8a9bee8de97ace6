"""What differs between two edits, from their factors."""

import math
from dataclasses import replace

import pytest
import torch

from kedit_fast.edits.changes import PromptChange
from kedit_fast.edits.deltas import Dense, LowRank
from kedit_fast.edits.differences import compare
from tests.make import FACTS, lowrank, make_edit
from tests.tiny import D_FF, D_MODEL


def test_an_edit_and_itself():
    edit = make_edit()
    found = compare(edit, edit)
    assert (found.parts, found.hparams, found.only_a, found.only_b) == ({}, {}, (), ())
    for at in found.layers:
        assert at.norm_a == at.norm_b == edit.deltas[at.layer].norm()
        assert at.difference < 1e-12 * at.norm_a
        assert at.cosine == pytest.approx(1, abs=1e-12)


def test_changes_that_are_none_of_weights_are_compared_too():
    edits = [make_edit(changes=[PromptChange([text], [["Rome"]])]) for text in ("It is. ", "It was. ", "It is. ")]
    differ, same = compare(*edits[:2]).parts, compare(edits[0], edits[2]).parts
    assert [kind.split()[0] for sides in differ.pop("besides weights") for kind in sides] == ["prompt", "prompt"]
    assert differ == same == {}


@pytest.mark.parametrize("dense", ["neither", "a", "b", "both"])
def test_norms_and_cosines_are_those_of_the_dense_deltas(dense):
    deltas = [lowrank(seed=1, rank=3, dtype=torch.float64), lowrank(seed=2, rank=2)]
    wanted_a, wanted_b = (delta.dense().double() for delta in deltas)
    for i, name in enumerate("ab"):
        if dense in (name, "both"):
            deltas[i] = Dense(deltas[i].dense().double())
    a, b = (make_edit(deltas={1: delta}) for delta in deltas)
    [at] = compare(a, b).layers
    cosine = float((wanted_a * wanted_b).sum() / wanted_a.norm() / wanted_b.norm())
    assert at.norm_a == pytest.approx(float(wanted_a.norm()), rel=1e-6)
    assert at.norm_b == pytest.approx(float(wanted_b.norm()), rel=1e-6)
    assert at.difference == pytest.approx(float((wanted_a - wanted_b).norm()), rel=1e-6)
    assert at.cosine == pytest.approx(cosine, rel=1e-4)


def test_edits_that_nearly_agree_do_not_cancel():
    delta = lowrank(dtype=torch.float64)
    other = LowRank(delta.u * (1 + 1e-10), delta.v)
    [at] = compare(make_edit(deltas={1: delta}), make_edit(deltas={1: other})).layers
    assert at.difference == pytest.approx(1e-10 * delta.norm(), rel=1e-4)


def test_other_layers_facts_and_settings():
    zero = LowRank(torch.zeros(D_MODEL, 1), torch.zeros(D_FF, 1))
    a = make_edit(deltas={1: lowrank(), 3: zero}, hparams={"v_lr": 0.1, "layers": [1, 3]})
    changed = (replace(FACTS[0], target_new="Oslo"), FACTS[1])
    b = make_edit(deltas={2: lowrank(), 3: zero}, hparams={"v_lr": 0.5, "layers": [1, 3], "new": 1}, facts=changed,
                  method="rome", fingerprint="x")  # fmt: skip
    found = compare(a, b)
    assert found.parts == {"method": ("memit", "rome"), "fingerprint": ("", "x")}
    assert found.hparams == {"v_lr": (0.1, 0.5), "new": (None, 1)}
    assert (found.only_a, found.only_b) == ((FACTS[0],), (changed[0],))
    norm = lowrank().norm()
    assert [(at.layer, at.norm_a, at.norm_b, at.difference) for at in found.layers] == [
        (1, norm, 0.0, norm), (2, 0.0, norm, norm), (3, 0.0, 0.0, 0.0),
    ]  # fmt: skip
    assert all(math.isnan(at.cosine) for at in found.layers)


def test_edits_of_models_of_other_widths_are_refused():
    other = LowRank(torch.ones(3, 1), torch.ones(5, 1))
    with pytest.raises(ValueError, match="different widths"):
        compare(make_edit(), make_edit(deltas={1: other}, values=None, keys={}))


def test_a_question_in_a_chat_is_not_the_statement():
    edit = make_edit()
    asked = replace(edit, facts=tuple(replace(fact, chat=True) for fact in edit.facts))
    found = compare(edit, asked)
    assert (found.only_a, found.only_b) == (edit.facts, asked.facts)
    assert asked.facts[0].label != edit.facts[0].label and "in a chat" in asked.facts[0].label
