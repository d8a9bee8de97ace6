"""What is asked of a model that was to forget, on tiny models that were taught what they forget."""

import json
import math
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.experiments import forgotten as module
from kedit_fast.experiments.forgotten import quantized, verify_forgotten
from tests.conftest import refused, tiny_lm
from tests.editors.cases import FACTS
from tests.make import owned_edit

pytestmark = pytest.mark.filterwarnings("ignore")

OLD = [replace(FACTS[0], paraphrases=("Space Needle is in",)), FACTS[2], FACTS[3]]
OLD[1] = replace(OLD[1], provenance={"reversed": "The clock of London is"})


@pytest.fixture(scope="module")
def taught():
    """A model that says the facts, and an edit that makes it forget the first two and keep the last."""
    lm = tiny_lm("llama")
    lm = lm.with_edit(kf.Ft(layers=(1,), lr=5e-3, num_steps=40).edit(lm, OLD))
    facts = [*kf.forgetting(OLD[:2]), *kf.keeping(OLD[2:])]
    return lm, kf.Unlearn(layers=(1,), lr=5e-3, num_steps=20, loss="bounded").edit(lm, facts)


def test_every_way_is_asked_without_and_with_the_edit(taught, tmp_path):
    lm, edit = taught
    report = verify_forgotten(lm, edit, relearning_steps=30, relearn=kf.Ft(layers=(1,), lr=5e-3))
    bare = replace(lm, edits=())
    assert [[f.target_new for f in side] for side in (report.facts, report.kept)] == [["Rome", "London"], ["Berlin"]]
    base, edited = report.base, report.edited
    for side, view in ((base, bare), (edited, lm.with_edit(edit))):
        for i, fact in enumerate(OLD[:2]):
            p = dict(view.top_tokens(fact.text, k=view.n_vocab))[f" {fact.target_new}"]
            assert side["p_old"][i] == pytest.approx(p, rel=1e-3)
        paraphrase = dict(view.top_tokens(OLD[0].paraphrases[0], k=view.n_vocab))[" Rome"]
        assert side["p_paraphrase"][0] == pytest.approx(paraphrase, rel=1e-3) and math.isnan(side["p_paraphrase"][1])
        assert math.isnan(side["p_reversed"][0]) and 0 < side["p_reversed"][1] < 1
        ranks = kf.logit_lens(view if view.edits else bare, OLD[:2])
        lens = ranks.after or ranks.before
        assert side["lens"] == [float((lens.rank_new[i, [2, 3]] <= 10).any()) for i in range(2)]
    assert edited["said"] == [0, 0] and edited["said_kept"] == [1] and edited["p_kept"][0] > 0.8
    assert set(base["choice"]) <= {0.0, 1.0} and report.chance == {"yes": 0.5, "choice": 0.5}
    assert report.relearning["most"] == 30 and 0 < report.relearning["old"] <= 30 and report.relearning["new"] > 0
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["summary"]["p_old"]["edited"] == pytest.approx(sum(edited["p_old"]) / 2, abs=1e-5)
    assert saved["edited"]["p_paraphrase"][1] is None and len(saved["facts"]) == 2
    shown = str(report)
    assert "P(old), paraphrases" in shown and "steps until it is said again" in shown and "quantized to 4 bits" in shown


def test_rounded_weights_are_on_their_grid(taught):
    lm, edit = taught
    view = quantized(lm, [edit], 4)
    delta = sum(e.weights[1, "down"].dense() for e in view.edits)
    weight = lm.source.weight(1, "down") + delta
    scale = weight.abs().amax(1, keepdim=True) / 7
    steps = weight / scale
    assert (steps - steps.round()).abs().max() < 1e-4 and len(steps.round().unique()) == 15
    fine = quantized(lm, [edit], 16)
    whole = sum(e.weights[1, "down"].dense() for e in lm.with_edit(edit).edits)
    assert (sum(e.weights[1, "down"].dense() for e in fine.edits) - whole).abs().max() < 1e-3
    memory = kf.Edit("leace", {}, "", (), [])
    assert quantized(lm, [memory], 8) is None


def test_what_was_only_hidden_is_learned_again_sooner(taught):
    """Of a model that says the answers still, which needs no step, while new ones do."""
    lm, _ = taught
    how = kf.Ft(layers=(1,), lr=1e-2)
    steps = module._relearning(lm, kf.keeping(OLD[:2]), 25, how)
    assert steps["old"] == 0 and steps["new"] > 0
    assert module._relearning(lm, kf.keeping(OLD[:2]), 0, how) == {"most": 0}
    assert module._relearning(lm, kf.keeping(OLD[:2]), 1, replace(how, lr=1e-9))["new"] is None


def test_new_answers_are_new_to_each_prompt():
    assert module._moved(["Rome", "Rome", "Paris"]) == ["Paris", "Paris", "Rome"]
    assert module._moved(["a", "b", "c"]) == ["b", "c", "a"] and module._moved(["a", "a"]) is None


def test_a_fact_whose_answer_stays_is_one_to_keep():
    """Where both its answers are the same; as the editor has it."""
    lm = tiny_lm("llama")
    same = replace(OLD[2], target_true=OLD[2].target_new)
    edit = kf.Unlearn(layers=(1,), num_steps=1).edit(lm, [*kf.forgetting(OLD[:1]), same])
    report = verify_forgotten(lm, edit, relearning_steps=0, bits=())
    assert [[f.subject for f in side] for side in (report.facts, report.kept)] == [[OLD[0].subject], [same.subject]]


def test_what_a_later_edit_wrote_anew_is_not_asked_for(taught):
    lm, edit = taught
    again = kf.Ft(layers=(1,), num_steps=1).edit(lm.with_edit(edit), kf.keeping(OLD[:1]))
    report = verify_forgotten(lm, [edit, again], relearning_steps=0, bits=())
    subjects = [[fact.subject for fact in side] for side in (report.facts, report.kept)]
    assert subjects == [[OLD[1].subject], [OLD[2].subject, OLD[0].subject]]


def test_a_single_fact_and_edits_of_other_kinds():
    lm = tiny_lm("gpt2")
    texts = [f"{word} is" for word in ("Paris", "Rome", "London", "Berlin", "Spain", "France")]
    edit = kf.leace(lm, texts, [0, 1, 0, 1, 0, 1], 2)
    report = verify_forgotten(lm, edit, FACTS[0], relearning_steps=2)
    assert math.isnan(report.edited["choice"][0]) and "quantized_to_8_bits" not in report.edited
    assert report.relearning.keys() == {"old", "most"} and "choice" not in report.summary()
    assert "a new answer" not in str(report) and "steps until it is said again: over 2" in str(report)
    assert torch.isfinite(torch.tensor(report.edited["p_old"])).all()


def test_bad_input_is_refused(no_sweep):
    lm = tiny_lm("gpt2")
    edit = kf.Edit("x", {}, "", (), [])
    refused("nothing to verify: the edit has no fact with a target_true", verify_forgotten, lm, edit)
    refused("neither target_true nor target_new", verify_forgotten, lm, edit, kf.Fact("{} is", "Rome"))
    refused("budget = 2", verify_forgotten, lm, edit, FACTS[0], budget=2)
    refused("carries independent edits", verify_forgotten, lm, owned_edit(lm.model), FACTS[0])
    refused("bits = 8: expected", verify_forgotten, lm, edit, FACTS[0], bits=8)
    refused("edit = 'edit.safetensors'", verify_forgotten, lm, "edit.safetensors", FACTS[0])
    refused("relearn = 'ft'.*kf.Ft.for_model", verify_forgotten, lm, edit, FACTS[0], relearn="ft")
    refused("layers 0 to 3", verify_forgotten, lm, edit, FACTS[0], relearn=kf.Ft(layers=(9,)))
