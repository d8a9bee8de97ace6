"""Unlearning losses against Adam on a plain Hugging Face model, and what they must leave alone."""

import math
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
import kedit_fast.jobs.finetune as job_module
from kedit_fast.editors.finetune import Ft
from kedit_fast.editors.unlearn import LOSSES, Unlearn
from kedit_fast.editors.written import NotWritten
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.evaluation.benchmarks.counterfact import sentences
from kedit_fast.jobs.losses import Bounded, Read
from tests.conftest import disk_and_resident, open_tiny, refused, save_tiny, tiny_lm
from tests.editors.cases import FACTS, left_as_it_was, make_exact, relative
from tests.oracle.unlearning import unlearn as oracle_unlearn
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::kedit_fast.editors.written.NotWritten")

FORGET, KEEP = kf.forgetting(FACTS[:2]), kf.keeping(FACTS[2:])
EDITOR = Unlearn(layers=(1, 2), lr=5e-3, num_steps=4, retain_weight=0.7)
OWN = {"rmu": {"layer_id": 3, "alpha": 20.0}, "entropy": {"lens_layers": (2, 3)}}


def with_loss(loss, **changes):
    return replace(EDITOR, loss=loss, **(OWN.get(loss, {}) | changes))


def oracle(lm, editor, facts=(*FORGET, *KEEP)):
    triples = lambda some, name: [(f.prompt, f.subject, getattr(f, name)) for f in some if getattr(f, name)]  # noqa: E731
    return oracle_unlearn(
        lm.model, tiny_tokenizer(), triples(facts, "target_true"), triples(facts, "target_new"), editor.layers,
        editor.loss, lr=editor.lr, steps=editor.num_steps, retain_weight=editor.retain_weight, beta=editor.beta,
        c=editor.steering_coeff, alpha=editor.alpha, read_layer=editor.layer_id, lens=editor.lens_layers,
    )  # fmt: skip


def compare(edit, expected, tolerance):
    assert edit.provenance["losses"] == pytest.approx(expected.losses, abs=1e-3)
    for layer, delta in expected.deltas.items():
        assert relative(edit.deltas[layer].delta, delta) < tolerance, layer


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("loss", LOSSES)
def test_deltas_equal_the_oracle(family, loss, monkeypatch):
    make_exact(monkeypatch)
    lm, editor = tiny_lm(family, torch.float64), with_loss(loss)
    edit, expected = editor.edit(lm, [*FORGET, *KEEP]), oracle(lm, editor)
    compare(edit, expected, 1e-8)
    assert edit.method == "unlearn" and expected.losses[-1] < expected.losses[0]
    if family == "llama":
        compare(editor.edit(tiny_lm(family), [*FORGET, *KEEP]), expected, 1e-4)


@pytest.mark.parametrize("loss", ["npo", "rmu"])
def test_what_is_compared_with_is_the_untouched_model_however_it_is_cut(loss, monkeypatch):
    """Batches, and packs of a batch: p_0 and h_0 are of before the first step."""
    make_exact(monkeypatch)
    lm, editor = tiny_lm("llama", torch.float64), with_loss(loss, lr=1e-3)
    whole = editor.edit(lm, [*FORGET, *KEEP])
    monkeypatch.setattr(job_module, "held_bytes", lambda lm, *_, **__: lm.memory // 2)
    assert relative(editor.edit(lm, [*FORGET, *KEEP]).deltas[1].delta, whole.deltas[1].delta) < 1e-8
    cut = replace(editor, batch_size=2).edit(lm, [*FORGET, *KEEP])
    assert relative(cut.deltas[1].delta, whole.deltas[1].delta) > 0.01  # more steps


def test_layers_that_are_read_from_disk(tmp_path):
    """Of rows in several layers, and in one below the last."""
    disk, resident = disk_and_resident(save_tiny(tmp_path, tiny_model("llama", layers=6)))
    for loss in ("npo", "rmu", "entropy"):
        editor = with_loss(loss, num_steps=2)
        made = [editor.edit(lm, [*FORGET, *KEEP]).deltas[1].delta for lm in (disk, resident)]
        assert relative(*made) < 1e-4, loss


def test_the_loss_of_fine_tuning_is_that_of_kept_facts_alone():
    """The bounded loss of an answer that is not said is next to nothing: what is left is Ft."""
    lm = tiny_lm("llama", torch.float64)
    editor = Unlearn(layers=(1,), lr=5e-3, num_steps=4, loss="npo", beta=1e-9, retain_weight=1e6)
    made = editor.edit(lm, [*kf.forgetting(FACTS[:1]), *kf.keeping(FACTS[1:])])
    tuned = Ft(layers=(1,), lr=5e-3, num_steps=4).edit(lm, FACTS[1:])
    assert relative(made.deltas[1].delta, tuned.deltas[1].delta) < 1e-4


def test_a_fact_may_lose_one_answer_and_get_another():
    """target_true is forgotten and target_new taught: as a fact to forget and one to keep."""
    lm = tiny_lm("gpt2", torch.float64)
    both = replace(FACTS[0], target_true="Seattle")
    apart = [replace(both, target_new=None), replace(both, target_true=None)]
    editor = replace(EDITOR, loss="bounded")
    assert relative(editor.edit(lm, both).deltas[1].delta, editor.edit(lm, apart).deltas[1].delta) < 1e-10
    assert [f.target_new for f in kf.forgetting(both, say=".")] == ["."]
    phrased = replace(apart[0], phrasings=("Space Needle is in",))
    alone = [apart[0], replace(apart[0], prompt="{} is in")]
    made = [replace(EDITOR, loss="ga").edit(lm, facts).deltas[1].delta for facts in (phrased, alone)]
    assert relative(made[0], made[1]) < 1e-10
    assert kf.forgetting(both)[0].target_true == kf.keeping(both)[0].target_new == "Seattle"
    assert kf.forgetting(FACTS[0])[0].target_true == "Rome"


@pytest.mark.parametrize("loss", ["bounded", "npo", "ga"])
def test_a_known_fact_is_said_no_more_and_another_is(loss):
    """Taught first; what is kept loses nothing, and the report of the edit says what became of each."""
    lm = tiny_lm("llama")
    taught = Ft(layers=(1,), lr=5e-3, num_steps=40).edit(lm, [FACTS[0], FACTS[2]])
    facts = [*kf.forgetting(FACTS[:1]), *kf.keeping(FACTS[2:3])]
    edit = Unlearn(layers=(1,), lr=5e-3, num_steps=20, loss=loss).edit(lm, facts, previous=taught)
    notes = edit.provenance["written"]
    assert notes["written"] == [True, True] and notes["p_new"][0] < 0.2 and notes["p_new"][1] > 0.8
    p = kf.evaluate(lm.with_edit(taught).with_edit(edit), FACTS[:1]).edited["p_new"]
    assert notes["p_new"][0] == pytest.approx(p.item(), abs=1e-4)
    assert not lm.with_edit(taught).with_edit(edit).generate(FACTS[0].text, max_new_tokens=3).startswith(" Rome")
    with pytest.warns(NotWritten, match="-> not 'Rome' .P 0.9"):
        Unlearn(layers=(1,), lr=1e-9, num_steps=1, loss=loss).edit(lm, facts, previous=taught)


def test_a_certain_answer_has_a_finite_bounded_loss():
    read = Read(None, {}, torch.tensor([0, 0, 1]), torch.zeros(3), torch.tensor([False, False]))

    class Known(Read):
        def log_p(self):
            return torch.tensor([0.0, 0.0, math.log(0.5)])

    assert Bounded().of(Known(*read), None).tolist() == pytest.approx([15.94, math.log(2)], abs=0.01)


def test_it_ships_as_any_edit_does(tmp_path):
    model = tiny_model("llama")
    lm = open_tiny(model)
    edit = replace(EDITOR, loss="ga").edit(lm, FORGET)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert digest(loaded) == digest(edit) and [f.target_true for f in loaded.facts] == ["Rome", "cheese boat"]
    with loaded.apply(model):
        pass
    report = kf.evaluate(lm, FORGET, loaded)
    assert len(report.facts) == 2 and sentences(report.facts, report.base, report.edited) == ([], [])
    refused("no fact with a target_new.*kf.verify_forgotten", kf.gate, lm, loaded)
    kf.compose([edit, Ft(layers=(1,), num_steps=1).edit(lm, FACTS[:1], previous=edit)])


def test_bad_input_is_refused(no_sweep):
    lm = tiny_lm("llama")
    refused("nothing to forget.*kf.forgetting", EDITOR.edit, lm, KEEP)
    refused("'graddiff' needs facts to keep", replace(EDITOR, loss="graddiff").edit, lm, FORGET)
    refused("to forget 'Rome', and another one of the same prompt", EDITOR.edit, lm, [*FORGET, *kf.keeping(FACTS[:1])])
    refused("loss = 'dpo': expected one of npo", Unlearn, loss="dpo")
    refused("beta 0.2: loss 'rmu' does not read it, 'npo' does; leave it out", Unlearn, loss="rmu", beta=0.2)
    refused("lens_layers .3,.: loss 'npo' does not read it, 'entropy' does", Unlearn, lens_layers=(3,))
    refused("lie below the first tuned one, 1", with_loss("rmu", layer_id=0).edit, lm, FORGET)
    rmu = with_loss("rmu", layers=(1, 3), layer_id=2)
    refused(r"layer_id 2: layers \[3\] lie above it", rmu.edit, lm, FORGET)
    refused("layers 0 to 3", with_loss("entropy", lens_layers=(7,)).edit, lm, FORGET)
    refused("neither target_new nor target_true", EDITOR.edit, lm, [kf.Fact("{} is in", "Rome"), *FORGET])
    refused("neither target_true nor target_new", kf.forgetting, kf.Fact("{} is in", "Rome"))
    refused("no target_new; an edit needs", kf.Memit(layers=(1,), mom2_adjustment=False).edit, lm, FORGET)
    refused("independent = True", EDITOR.edit, lm, FORGET, independent=True)


def test_settings_for_a_model():
    made = Unlearn.for_model(tiny_lm("gpt2"))
    assert len(made.layers) == 1 and made.loss == "npo" and "derived" in made.source


def test_the_model_is_left_as_it_was():
    with left_as_it_was() as lm:
        with_loss("entropy", num_steps=2).edit(lm, [*FORGET, *KEEP])
