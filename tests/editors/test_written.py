"""What an edit says of itself once it is made: against evaluation and generation of the model with it."""

import warnings
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors import written as written_module
from kedit_fast.editors.written import NAMED, NotWritten, Overgrown, _by_fact, not_written, with_written
from kedit_fast.edits.deltas import Dense
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation.probes import Answer, Probe
from kedit_fast.experiments.rounds import edit_in_rounds
from tests.conftest import tiny_lm
from tests.editors.cases import FACTS, GROUPS, moments
from tests.editors.test_checks import FACT
from tests.tiny import D_FF, D_MODEL

GOOD = {"v_num_grad_steps": 12, "mom2_adjustment": False}
EDITORS = {
    "rome": kf.Rome(layers=(1,), **GOOD),
    "memit": kf.Memit(layers=(1, 2), mom2_update_weight=80, **GOOD),
    "alphaedit": kf.AlphaEdit(layers=(1,), v_num_grad_steps=12, nullspace_threshold=0.0, nullspace_share=0.5, L2=1e-3),
    "ft": kf.EDITORS["ft"](layers=(1,), lr=5e-3, num_steps=8),
    "ft-l": kf.EDITORS["ft-l"](layers=(1,), lr=5e-3, num_steps=8, norm_constraint=0.02),
}


def edit_of(name, lm, facts=FACTS, **options):
    reads = {"contexts": GROUPS} if hasattr(EDITORS[name], "v_lr") else {}
    reads |= {"moments": moments()} if EDITORS[name].mom2_adjustment else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EDITORS[name].edit(lm, facts, **reads, **options)


def asked(lm, edit, facts=FACTS):
    """(P(new), whether all its tokens are the likeliest) as evaluation has them."""
    columns = kf.evaluate(lm, facts, edit).edited
    return columns["p_new"].tolist(), [bool(x) for x in columns["efficacy_exact"]]


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_each_editor_says_what_evaluation_finds(name, family):
    lm = tiny_lm(family)
    edit = edit_of(name, lm)
    found, (p_new, exact) = edit.provenance["written"], asked(lm, edit)
    assert found["p_new"] == pytest.approx(p_new, abs=2e-5)
    assert found["written"] == exact
    assert not_written(edit) == [fact for fact, right in zip(FACTS, exact, strict=True) if not right]


@pytest.mark.parametrize("name", ["rome", "memit"])
def test_independent_edits_are_asked_each_under_its_own(name, tmp_path):
    lm = tiny_lm("llama")
    below = edit_of("ft-l", lm, FACTS[3:])
    edit = edit_of(name, lm, independent=True, previous=below)
    found, (p_new, exact) = edit.provenance["written"], asked(lm.with_edit(below), edit)
    assert (found["p_new"], found["written"]) == (pytest.approx(p_new, abs=2e-5), exact)
    for i, fact in enumerate(FACTS):
        one = edit.only(i)
        assert one.provenance["written"] == {key: [values[i]] for key, values in found.items()}
        assert asked(lm.with_edit(below), one, [fact])[0] == pytest.approx(p_new[i : i + 1], abs=2e-5)
    edit.save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit").provenance == edit.provenance


def test_what_it_says_is_what_it_goes_on_with():
    """To the first token that is not the target's; the whole target where all are."""
    lm = tiny_lm("llama")
    edit = edit_of("ft", lm)
    assert len(set(edit.provenance["written"]["written"])) == 2, "one of each kind is needed here"
    for fact, written, says in zip(FACTS, *(edit.provenance["written"][k] for k in ("written", "says")), strict=True):
        continued = lm.with_edit(edit).generate(fact.text, 8, stop=False)
        assert continued.startswith(says) and says
        assert (says.strip() == fact.target_new) == written
    target, half = lm.encode("cheese boat"), lm.encode("cheese of the piano in New York")
    found = _by_fact(
        lm, [FACTS[1]], [Probe([1], "", (target,))], [Answer((1.0,), (0.0,), (tuple(half[: len(target)]),))]
    )
    assert found == {"written": [False], "p_new": [1.0], "says": ["cheese of"]}


def test_facts_that_are_not_written_are_named(recwarn):
    lm, editor = tiny_lm("llama"), replace(EDITORS["rome"], v_num_grad_steps=1)
    with pytest.warns(
        NotWritten, match=r"facts not written: 1 of 1: 'The Space Needle is in.*' -> 'Rome' \(P 0\."
    ) as one:
        edit = editor.edit(lm, FACTS[:1], contexts=GROUPS)
    assert one[0].filename == __file__ and "the model says" in str(one[0].message)
    assert not_written(edit) == [FACTS[0]] and "the model's last" not in str(one[0].message)
    reached = edit.provenance["found"]["p_new"][0]
    assert f"values themselves end at P {reached:.2f} (the median): take more v_num_grad_steps" in str(one[0].message)
    with pytest.warns(NotWritten, match="Layer 3 is the model's last: .* reaches no token behind it; take lower"):
        replace(editor, layers=(lm.n_layers - 1,)).edit(lm, FACTS[:1], contexts=GROUPS)
    many = tuple(replace(FACTS[0], subject=f"Needle {i}", id="") for i in range(NAMED + 2))
    nothing = Edit("by hand", {}, lm.fingerprint, many, {1: Dense(torch.zeros(D_MODEL, D_FF))})
    with pytest.warns(NotWritten, match=rf"not written: {NAMED + 2} of {NAMED + 2}: .*; and 2 more$"):
        with_written(lm, nothing)
    recwarn.clear()
    (done,) = list(edit_in_rounds(lm, FACTS[:1], editor, per_round=1, contexts=GROUPS))
    assert not done.new["efficacy_exact"].mean and not [w for w in recwarn if w.category is NotWritten]


def test_where_the_values_came_as_far_as_they_are_to_the_rate_is_not_named(monkeypatch):
    """Then it is the layers that fail: λ leaves nothing in the weights."""
    lm, editor = tiny_lm("llama"), replace(EDITORS["memit"], mom2_update_weight=1e12)
    with pytest.warns(NotWritten, match="values themselves end at P"):
        edit = editor.edit(lm, FACTS[:1], contexts=GROUPS)
    monkeypatch.setattr(written_module, "REACHED", edit.provenance["found"]["p_new"][0])
    with pytest.warns(NotWritten) as one:
        editor.edit(lm, FACTS[:1], contexts=GROUPS)
    assert "values themselves" not in str(one[0].message)


def test_an_edit_that_overflows_is_not_written():
    lm = tiny_lm("llama")
    edit = Edit("by hand", {}, lm.fingerprint, (FACT,), {1: Dense(torch.full((D_MODEL, D_FF), 3e38))})
    with pytest.warns(NotWritten, match=r"\(P 0.000, the model says ''\)"):
        found = with_written(lm, edit).provenance["written"]
    assert found == {"written": [False], "p_new": [0.0], "says": [""], "attached": [False]}


# ---- how far the weights move


def test_how_far_each_layer_moves_is_noted():
    lm = tiny_lm("llama")
    edit = edit_of("memit", lm)
    for layer, delta in edit.deltas.items():
        weight = lm.source.weight(layer, "down").double()
        share = (delta.dense().double().norm() / weight.norm()).item()
        assert edit.provenance["growth"][str(layer)] == pytest.approx(share, abs=1e-6)
    assert "growth" not in edit_of("memit", lm, independent=True).provenance, "no one change of the weights"


@pytest.mark.parametrize(("most", "warned"), [(0.001, True), (1e6, False)])
def test_an_edit_that_moves_a_weight_too_far_is_warned_of(most, warned, monkeypatch):
    monkeypatch.setattr(written_module, "MOST_GROWTH", most)
    lm = tiny_lm("llama")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        EDITORS["memit"].edit(lm, FACTS, contexts=GROUPS)
    told = [each for each in caught if each.category is Overgrown]
    assert len(told) == warned and all(each.filename == __file__ for each in told)
    assert not warned or "moves the weights of layer" in str(told[0].message)
    assert not warned or "or with a larger mom2_update_weight" in str(told[0].message)


def test_packed_weights_have_no_norm_to_be_read(monkeypatch):
    """A quantized model's: the edit is served beside them all the same."""
    lm = tiny_lm("llama")
    monkeypatch.setattr(type(lm.source), "weight", lambda *_: torch.zeros(2, 2, dtype=torch.int8))
    assert "growth" not in edit_of("memit", lm).provenance
