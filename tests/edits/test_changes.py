"""A change of each matrix of the MLP, as it acts in a sweep and as it ships."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import kedit_fast as kf
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import Dense
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.jobs.score import next_token_probs
from kedit_fast.model.family import FAMILIES, as_out_in, projection
from tests.conftest import close, open_tiny, refused, relative_error
from tests.make import bits, logits, lowrank, make_edit, same_bits
from tests.shipping.checkpoints import save_checkpoint
from tests.tiny import D_FF, D_MODEL, DISTINCT, tiny_model

IDS = [5, 17, 23, 42]
ROLES = [(family, role) for family in DISTINCT for role in FAMILIES[family].roles]


def edit_of(model, role, dense=False):
    """Layers 1 and 2 of one role."""
    lm = open_tiny(model)
    out, into = lm.shape_of(role)
    deltas = {layer: lowrank(out, into, seed=layer, rank=layer) for layer in (1, 2)}
    deltas = {layer: Dense(delta.dense()) for layer, delta in deltas.items()} if dense else deltas
    return make_edit(model, changes=[WeightChange(i, delta, role) for i, delta in deltas.items()], values=None, keys={})


def viewed(model, edit):
    """Log-probabilities of the next token, the edit on top of untouched weights."""
    return next_token_probs(open_tiny(model).with_edit(edit), [IDS])[0].log()


def next_token(logits):
    return logits[0, -1].float().log_softmax(0)


@pytest.mark.parametrize(("family", "role"), ROLES, ids=" ".join)
def test_a_matrix_of_any_role_acts_as_if_written(family, role):
    model = tiny_model(family)
    edit, before, base = edit_of(model, role), bits(model), next_token(logits(model))
    with edit.apply(model):
        applied = next_token(logits(model))
        weight = as_out_in(projection(model, 2, role)).clone()
    assert same_bits(model, before)
    assert torch.equal(weight, kf_edited(as_out_in(projection(model, 2, role)), edit.weights[2, role]))
    assert relative_error(base, applied) > 1e-3
    close(f"{family} {role}", viewed(model, edit), applied)
    if family in ("llama", "gpt2", "phi3"):
        close("dense", viewed(model, edit_of(model, role, dense=True)), applied)


def kf_edited(weight, delta):
    return (weight.double() + delta.u.double() @ delta.v.double().T).to(weight.dtype)


@pytest.mark.parametrize(("family", "role"), [("llama", "up"), ("llama", "gate"), ("gpt2", "up"), ("phi3", "gate_up")])
def test_a_matrix_of_any_role_ships(family, role, tmp_path):
    """with_edit = apply = PEFT = the merged checkpoint; saved and loaded; undone bit for bit."""
    model = save_checkpoint(tmp_path / "base", family)
    edit, before = edit_of(model, role), bits(model)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert digest(loaded) == digest(edit) and list(loaded.weights) == [(1, role), (2, role)]
    with loaded.apply(model):
        applied, weights = next_token(logits(model)), bits(model)
    assert same_bits(model, before)
    made = kf.export_peft(loaded, tmp_path / "adapter", model=model)
    assert made.ranks == {f"1 {role}": 1, f"2 {role}": 2}
    wrapped = PeftModel.from_pretrained(tiny_model(family), str(tmp_path / "adapter")).eval()
    close("peft", next_token(logits(wrapped)), applied)
    kf.merge_checkpoint(tmp_path / "base", loaded, tmp_path / "merged")
    merged = kf.open_model(tmp_path / "merged")
    assert same_bits(merged.model, weights)
    kf.unmerge(tmp_path / "merged")
    tensors = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in tensors), strict=True))


def test_edits_of_several_roles_are_composed():
    model = tiny_model("llama")
    lm, edits = open_tiny(model), [edit_of(model, role) for role in ("down", "up", "gate")]
    with pytest.warns(UserWarning, match="edit 2, 3 of 3 was made without"):
        both = kf.compose(edits)
    assert list(both.weights) == [(1, "down"), (1, "gate"), (1, "up"), (2, "down"), (2, "gate"), (2, "up")]
    with both.apply(model):
        applied = next_token(logits(model))
    close("composed", viewed(model, both), applied)
    close("rounded", next_token_probs(lm.with_edit(both, written=torch.float32), [IDS])[0].log(), applied)


def test_a_role_that_the_family_does_not_have_is_refused():
    model, lm = tiny_model("gpt2"), open_tiny(tiny_model("gpt2"))
    edit = make_edit(None, changes=[WeightChange(1, lowrank(D_FF, D_MODEL), "gate")], values=None, keys={})
    for meet in (lm.with_edit, lambda e: e.apply(model, check_fingerprint=False)):
        refused("a gpt2 model has no 'gate' projection; it has 'down', 'up'", meet, edit)
    refused("one of the roles down, up, gate, gate_up", WeightChange, 1, lowrank(), "sideways")
    refused("several of one matrix", make_edit, changes=[WeightChange(1, lowrank()), WeightChange(1, lowrank(seed=3))])
