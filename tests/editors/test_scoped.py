"""MEMIT behind a scope: its independent edits, of which a route takes the one that a prompt asks for, or none."""

from dataclasses import fields, replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.serac import Serac
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.evaluation.probes import probe, read_edited, read_probes
from tests.conftest import refused, relative_error, tiny_lm
from tests.editors.cases import GROUPS, moments
from tests.editors.test_ike import FACTS, fact_file
from tests.editors.test_serac import examples

pytestmark = pytest.mark.filterwarnings("ignore:facts not written")
OUTSIDE = ["Paris is in the city of", "Big Bend is in the city of", "You play the piano"]
GIVEN = {"moments": moments(), "contexts": GROUPS}


@pytest.fixture
def editor(tmp_path):
    given = fact_file(tmp_path / "examples.json", examples())
    return kf.ScopedMemit(layers=(1, 2), v_num_grad_steps=3, mom2_update_weight=80.0, examples=given)


def of_memit(editor) -> kf.Memit:
    return kf.Memit(**{f.name: getattr(editor, f.name) for f in fields(kf.Memit)})


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_in_scope_a_facts_own_update_acts_and_else_the_base_model(family, editor, tmp_path):
    lm = tiny_lm(family, torch.float64)
    edit, alone = editor.edit(lm, FACTS, **GIVEN), of_memit(editor).edit(lm, FACTS, independent=True, **GIVEN)
    edit.save(tmp_path / "edit.safetensors")
    view = lm.with_edit(Edit.load(tmp_path / "edit.safetensors"))
    texts = [fact.text for fact in FACTS]
    assert view.owners([*texts, *OUTSIDE]).tolist() == [*range(len(FACTS)), -1, -1, -1]
    for i, text in enumerate(texts):
        asked = [probe(lm, text, ["Rome", "cheese boat"], likeliest=True)]
        (got,), (expected,) = read_edited(view, asked), read_edited(lm.with_edit(alone.only(i)), asked)
        assert got.p == pytest.approx(expected.p, rel=1e-8) and got.top == expected.top
    misses = [probe(lm, text, ["Rome"], likeliest=True) for text in OUTSIDE]
    base, edited = read_probes(view, misses)
    assert base == edited, "to the bit"
    assert view.generate(OUTSIDE, 3) == lm.generate(OUTSIDE, 3)


def test_it_is_memits_values_and_keys_and_no_move_of_the_weights(editor):
    lm = tiny_lm("llama")
    edit, alone = editor.edit(lm, FACTS, **GIVEN), of_memit(editor).edit(lm, FACTS, independent=True, **GIVEN)
    assert relative_error(edit.values, alone.values) == 0
    assert digest(replace(edit, route=None)) == digest(alone)
    assert not edit.independent and "growth" not in edit.provenance and edit.provenance["scope"]["examples"] == 12


def test_a_fact_is_left_out_and_the_others_stay(editor):
    lm = tiny_lm("llama", torch.float64)
    edit = editor.edit(lm, FACTS, **GIVEN)
    rest = edit.without(0)
    assert lm.with_edit(rest).owners([FACTS[0].text, FACTS[1].text]).tolist() == [-1, 0]
    assert lm.with_edit(rest).top_tokens(FACTS[0].text) == lm.top_tokens(FACTS[0].text)
    of_second = [lm.with_edit(some).top_tokens(FACTS[1].text) for some in (edit, rest)]
    assert [p for _, p in of_second[0]] == pytest.approx([p for _, p in of_second[1]], rel=1e-8)
    refused(r"routed.*\(scope\).*lm\.with_edit", edit.apply, lm.model)


def test_a_phrasing_is_in_the_scope_of_its_fact(editor, tmp_path):
    """What the classifier holds of it stands beside the fact's own row, and goes with the fact."""
    lm, wording = tiny_lm("llama"), "You find Big Ben"
    strict = replace(Serac(examples=editor.examples).routed(lm, FACTS)[0].scope, threshold=0.999, slope=80.0)
    phrased = [replace(FACTS[0], phrasings=(wording,)), *FACTS[1:]]

    def routed(facts):
        route, _ = Serac(examples=editor.examples).routed(lm, facts)
        return replace(route, scope=replace(strict, weight=route.scope.weight))

    assert routed(FACTS).choose(lm, [wording]).tolist() == [-1]
    route = routed(phrased)
    assert route.whose.tolist() == [0, 0, *range(1, len(FACTS))] and route.choose(lm, [wording]).tolist() == [0]
    edit = replace(editor.edit(lm, phrased, **GIVEN), route=route)
    edit.save(tmp_path / "edit.safetensors")
    assert digest(Edit.load(tmp_path / "edit.safetensors")) == digest(edit)
    assert edit.without(1).route.choose(lm, [wording]).tolist() == [0]
    assert edit.without(0).route.choose(lm, [wording]).tolist() == [-1] and edit.without(0).route.n_entries == 1
    refused("some of each of", replace, route, whose=torch.zeros_like(route.whose))


def test_by_name_every_prompt_of_the_subject_is_in_scope(editor):
    lm = tiny_lm("llama")
    edit = replace(editor, route="names").edit(lm, FACTS, **GIVEN)
    assert lm.with_edit(edit).owners(["Big Ben was built by", *OUTSIDE]).tolist() == [0, -1, -1, -1]
    refused("route = 'likeness': expected", kf.ScopedMemit, route="likeness")
    refused("independent = True: each prompt is answered", editor.edit, lm, FACTS, independent=True)
