"""A route around independent edits: of each prompt it takes the edit whose fact is asked for, or none."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors import written
from kedit_fast.editors.serac import Serac
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.evaluation.probes import probe, read_edited, read_probes
from tests.conftest import refused, tiny_lm
from tests.editors.cases import GROUPS, moments
from tests.editors.networks import network
from tests.editors.test_ike import FACTS, fact_file
from tests.editors.test_serac import examples
from tests.make import make_edit

pytestmark = pytest.mark.filterwarnings(
    "ignore:facts not written", "ignore:the edit moves", "ignore:the second moments of layers"
)
OUTSIDE = ["Paris is in the city of", "Big Bend is in the city of", "You play the piano"]
GIVEN = {"moments": moments(), "contexts": GROUPS}
MEMIT = kf.Memit(layers=(1, 2), v_num_grad_steps=3, mom2_update_weight=80.0)
EDITORS = {
    "memit": lambda lm: (MEMIT, GIVEN),
    "rome": lambda lm: (kf.Rome(layers=(1,), v_num_grad_steps=3), GIVEN),
    "mend": lambda lm: (kf.Mend(network=network(lm, "mend")), {}),
    "ice": lambda lm: (kf.Ice(), {}),
}


@pytest.fixture
def scope(tmp_path):
    return Serac(examples=fact_file(tmp_path / "examples.json", examples()))


def alone(lm, editor=MEMIT, facts=FACTS, given=GIVEN):
    return editor.edit(lm, facts, independent=True, **given)


@pytest.mark.parametrize(
    ("family", "name"), [*(("llama", name) for name in EDITORS), ("gpt2", "memit"), ("gemma2", "memit")]
)
def test_where_it_is_asked_for_a_facts_own_edit_acts_and_else_the_base_model(family, name, scope, tmp_path):
    lm = tiny_lm(family, torch.float64)
    singles = alone(lm, EDITORS[name](lm)[0], FACTS, EDITORS[name](lm)[1])
    kf.routed(lm, singles, scope).save(tmp_path / "edit.safetensors")
    view = lm.with_edit(Edit.load(tmp_path / "edit.safetensors"))
    texts = [fact.text for fact in FACTS]
    assert view.owners([*texts, *OUTSIDE]).tolist() == [*range(len(FACTS)), -1, -1, -1]
    for i, text in enumerate(texts):
        asked = [probe(lm, text, ["Rome", "cheese boat"], likeliest=True)]
        (got,), (expected,) = read_edited(view, asked), read_edited(lm.with_edit(singles.only(i)), asked)
        assert got.p == pytest.approx(expected.p, rel=1e-8) and got.top == expected.top
    misses = [probe(lm, text, ["Rome"], likeliest=True) for text in OUTSIDE]
    base, edited = read_probes(view, misses)
    assert base == edited, "to the bit"
    assert view.generate(OUTSIDE, 3) == lm.generate(OUTSIDE, 3)


def test_nothing_of_the_edits_changes_but_who_is_asked(scope):
    lm = tiny_lm("llama")
    singles = alone(lm)
    edit = kf.routed(lm, singles, scope)
    assert digest(replace(edit, route=None)) == digest(singles) and edit.method == "memit" and not edit.independent
    assert edit.provenance["scope"]["examples"] == 12
    assert edit.provenance["route"] == {"method": "serac"} | scope.record
    assert kf.routed(lm, singles, "names").provenance["route"] == {"method": "names"}
    assert edit.provenance["written"] == singles.provenance["written"], "each prompt finds its own"


def test_an_edit_of_one_fact_is_taken_as_it_is(scope):
    lm = tiny_lm("llama", torch.float64)
    one = MEMIT.edit(lm, FACTS[0], **GIVEN)
    assert "growth" in one.provenance
    edit = kf.routed(lm, one, "names")
    assert "growth" not in edit.provenance and edit.route.n_entries == 1
    assert lm.with_edit(edit).top_tokens(FACTS[0].text) == lm.with_edit(one).top_tokens(FACTS[0].text)
    assert lm.with_edit(edit).top_tokens(OUTSIDE[0]) == lm.top_tokens(OUTSIDE[0])


def test_a_fact_is_left_out_and_the_others_stay(scope):
    lm = tiny_lm("llama", torch.float64)
    edit = kf.routed(lm, alone(lm), scope)
    rest = edit.without(0)
    assert lm.with_edit(rest).owners([FACTS[0].text, FACTS[1].text]).tolist() == [-1, 0]
    assert lm.with_edit(rest).top_tokens(FACTS[0].text) == lm.top_tokens(FACTS[0].text)
    of_second = [lm.with_edit(some).top_tokens(FACTS[1].text) for some in (edit, rest)]
    assert [p for _, p in of_second[0]] == pytest.approx([p for _, p in of_second[1]], rel=1e-8)
    refused(r"routed.*\(scope\).*lm\.with_edit", edit.apply, lm.model)


def test_a_phrasing_is_in_the_scope_of_its_fact(scope, tmp_path):
    """What the classifier holds of it stands beside the fact's own row, and goes with the fact."""
    lm, wording = tiny_lm("llama"), "You find Big Ben"
    strict = replace(scope.routed(lm, FACTS)[0].scope, threshold=0.999, slope=80.0)
    phrased = [replace(FACTS[0], phrasings=(wording,)), *FACTS[1:]]

    def of(facts):
        route, _ = scope.routed(lm, facts)
        return replace(route, scope=replace(strict, weight=route.scope.weight))

    assert of(FACTS).choose(lm, [wording]).tolist() == [-1]
    route = of(phrased)
    assert route.whose.tolist() == [0, 0, *range(1, len(FACTS))] and route.choose(lm, [wording]).tolist() == [0]
    edit = replace(kf.routed(lm, alone(lm, facts=phrased), scope), route=route)
    edit.save(tmp_path / "edit.safetensors")
    assert digest(Edit.load(tmp_path / "edit.safetensors")) == digest(edit)
    assert edit.without(1).route.choose(lm, [wording]).tolist() == [0]
    assert edit.without(0).route.choose(lm, [wording]).tolist() == [-1] and edit.without(0).route.n_entries == 1
    refused("some of each of", replace, route, whose=torch.zeros_like(route.whose))


def test_by_name_every_prompt_of_the_subject_is_taken(tmp_path):
    """Of two facts of a subject that one which, in one of its phrasings, is most alike; a longer name holds another."""
    lm = tiny_lm("llama")
    facts = [
        replace(FACTS[0], phrasings=("You find {} in Rome",)), replace(FACTS[0], prompt="{} was built by", id="2"),
        replace(FACTS[1], subject="Ben", id="3"),
    ]  # fmt: skip
    edit = kf.routed(lm, alone(lm, facts=facts), "names")
    edit.save(tmp_path / "edit.safetensors")
    asked = ["Big Ben was built by", "You find Big Ben in", "Ben plays the", *OUTSIDE]
    for some in (edit, Edit.load(tmp_path / "edit.safetensors")):
        assert lm.with_edit(some).owners(asked).tolist() == [1, 0, 2, -1, -1, -1]
    assert lm.with_edit(edit.without(1)).owners(asked[:3]).tolist() == [0, 0, 1]
    assert lm.with_edit(edit.without(0)).owners(asked[:3]).tolist() == [0, 0, 1]
    refused("whose: expected int64, an entry for each of 4 rows", replace, edit.route, whose=torch.zeros(4))


def test_what_is_written_is_what_the_route_lets_through():
    """Two prompts of the same words: of equal ones the first fact is asked for."""
    lm = tiny_lm("llama")
    facts = [FACTS[0], replace(FACTS[0], prompt="in is {} the city of", target_new="Paris", id="2")]
    singles = alone(lm, facts=facts)
    edit = kf.routed(lm, singles, "names")
    assert lm.with_edit(edit).owners([fact.text for fact in facts]).tolist() == [0, 0]
    routed, own = (each.provenance["written"]["p_new"] for each in (edit, singles))
    assert routed[0] == own[0] and routed[1] != own[1]


def test_out_of_memory_is_survived(monkeypatch, scope):
    lm = tiny_lm("llama")
    singles, right, raised = alone(lm), written.read_edited, []

    def once(*args):
        if not raised:
            raised.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(*args)

    monkeypatch.setattr(written, "read_edited", once)
    with pytest.warns(UserWarning, match="out of memory"):
        edit = kf.routed(lm, singles, "names")
    assert raised and edit.provenance["written"]["p_new"] == pytest.approx(singles.provenance["written"]["p_new"])


def test_what_cannot_be_routed_is_refused_before_any_work(no_sweep, scope):
    lm = tiny_lm("gpt2")
    refused("2 facts were solved together.*independent=True", kf.routed, lm, make_edit(lm.model), "names")
    dense = make_edit(lm.model, facts=make_edit().facts[:1], values=None, keys={})
    refused("no part of which belongs to a fact", kf.routed, lm, dense, "names")
    refused("this edit was made on", kf.routed, lm, replace(dense, fingerprint="another"), "names")
    refused("route = 'likeness': expected", kf.routed, lm, replace(dense, changes=make_edit().changes[1:]), "likeness")
    bare = replace(FACTS[1], prompt="Miles Davis plays the", subject=None)
    owned = dict(owners={1: torch.tensor([0, 1])}, deltas={1: make_edit().deltas[2]}, values=None, keys={})
    refused("subject", kf.routed, lm, make_edit(lm.model, facts=[FACTS[0], bare], **owned), "names")
    clash = [FACTS[0], replace(FACTS[0], target_new="Paris")]
    refused("contradict", kf.routed, lm, make_edit(lm.model, facts=clash, **owned), "names")
    twin = [FACTS[0], replace(FACTS[0], chat=True, id="again")]
    refused("1 of 2 facts ask what another one does", kf.routed, lm, make_edit(lm.model, facts=twin, **owned), "names")
    below, good = make_edit(lm.model), make_edit(lm.model, facts=list(FACTS), **owned)
    refused("made on top of no edit and would stand on edit", kf.routed, lm.with_edit(below), good, "names")
    refused("carries independent edits", kf.routed, lm.with_edit(good), good, "names")


def test_one_that_is_routed_already_is_refused():
    lm = tiny_lm("llama")
    edit = kf.routed(lm, alone(lm), "names")
    refused(r"routed already \(retrieval\)", kf.routed, lm, edit, "names")
    refused("carries a routed edit", kf.routed, lm.with_edit(edit), alone(lm), "names")
