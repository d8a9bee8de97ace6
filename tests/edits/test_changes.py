"""Changes of every kind: of each matrix of the MLP, and a memory; each as it acts in a sweep and as it ships."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import kedit_fast as kf
from kedit_fast.edits.changes import MemoryChange, WeightChange
from kedit_fast.edits.deltas import Dense
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.jobs.score import next_token_probs
from kedit_fast.model.family import FAMILIES, as_out_in, projection
from kedit_fast.sweep.sites import Site
from tests.conftest import close, open_tiny, refused, relative_error
from tests.make import FACTS, bits, logits, lowrank, make_edit, same_bits
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


# ---- a memory


def remembering(lm, site=Site.layer_out, layer=2, radius=1e-3):
    """(an edit that knows the row at the last token of IDS, and answers with another; what it answers)."""
    generator = torch.Generator().manual_seed(0)
    key = row_at(lm, site, layer)
    value = torch.randn(1, key.shape[1], generator=generator)
    change = MemoryChange(layer, key, value, torch.tensor([radius]), site)
    return Edit("grace", {}, lm.fingerprint, FACTS[:1], [change]), value


def row_at(lm, site, layer):
    from kedit_fast.jobs.collect import collect
    from kedit_fast.sweep.runs import RunList, add_under

    runs = RunList()
    number = add_under(lm, runs, [IDS])
    return collect(lm, runs.runs(), site, [layer], number, torch.tensor([len(IDS) - 1]))[layer]


@pytest.mark.parametrize("site", [Site.layer_out, Site.mlp_out, Site.mlp_key, Site.attn_out], ids=str)
def test_a_row_near_a_key_becomes_its_value(site):
    lm = open_tiny(tiny_model("llama"))
    edit, value = remembering(lm, site)
    close("value", row_at(lm.with_edit(edit), site, 2), value)
    far = replace(edit, changes=[replace(edit.changes[0], keys=edit.changes[0].keys + 1)])
    assert torch.equal(row_at(lm.with_edit(far), site, 2), row_at(lm, site, 2))


def test_of_several_keys_the_nearest_counts_and_only_within_its_radius():
    lm = open_tiny(tiny_model("llama"))
    edit, value = remembering(lm)
    change = edit.changes[0]
    keys = torch.cat([change.keys + 0.02, change.keys + 0.01])
    near = replace(change, keys=keys, values=torch.cat([-value, value]), radius=torch.tensor([9.0, 9.0]))
    close("nearest", row_at(lm.with_edit(replace(edit, changes=[near])), Site.layer_out, 2), value)
    outside = replace(near, radius=torch.tensor([9.0, 0.01]))
    view = lm.with_edit(replace(edit, changes=[outside]))
    assert torch.equal(row_at(view, Site.layer_out, 2), row_at(lm, Site.layer_out, 2))


def test_a_memory_is_saved_and_is_no_change_of_weights(tmp_path):
    model = tiny_model("llama")
    lm = open_tiny(model)
    edit, value = remembering(lm)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert repr(loaded) == repr(edit) and "layers 2, memory" in repr(edit) and digest(loaded) == digest(edit)
    close("value", row_at(lm.with_edit(loaded), Site.layer_out, 2), value)
    save_checkpoint(tmp_path / "base")
    for meet in (
        lambda: loaded.apply(model),
        lambda: kf.export_peft(loaded, tmp_path / "adapter"),
        lambda: kf.merge_checkpoint(tmp_path / "base", loaded, tmp_path / "merged"),
        lambda: kf.compose([loaded, make_edit(model)]),
        lambda: kf.gate(lm, loaded),
        lambda: lm.with_edit(loaded, written=torch.bfloat16),
    ):
        refused(r"a memory at layer 2, which is no change of weights.*lm\.with_edit", meet)
    assert {path.name for path in tmp_path.iterdir()} == {"edit.safetensors", "base"}
    kf.EditHistory(tmp_path / "edits").add(loaded)


def test_independent_memories_act_on_their_own_fact():
    lm = open_tiny(tiny_model("llama"))
    edit, value = remembering(lm)
    change = edit.changes[0]
    two = replace(
        change, keys=change.keys.repeat(2, 1), values=torch.cat([value, -value]), radius=change.radius.repeat(2),
        owners=torch.tensor([1, 0]),
    )  # fmt: skip
    both = replace(edit, facts=FACTS[:2], changes=[two])
    assert both.independent
    for fact, wanted in ((0, -value), (1, value)):
        close(f"fact {fact}", row_at(lm.with_edit(both.only(fact)), Site.layer_out, 2), wanted)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(values=torch.zeros(1, 3)), r"expected \[n, width\] twice and \[n\], got \[1, 48\], \[1, 3\], \[1\]"),
        (dict(radius=torch.tensor([1])), "a memory holds floats"),
        (dict(values=torch.full((1, D_MODEL), torch.nan)), "the memory at layer 2 hold NaN"),
        (dict(layer=-1), "a whole number from 0"),
        (dict(owners=torch.tensor([0, 1])), "one for each of 1 keys"),
        (dict(site="nowhere"), "'nowhere' is not a valid Site"),
    ],
)
def test_parts_of_a_memory_that_do_not_fit_are_refused(wrong, says):
    change = MemoryChange(2, torch.zeros(1, D_MODEL), torch.zeros(1, D_MODEL), torch.ones(1))
    refused(says, replace, change, **wrong)
    narrow = MemoryChange(2, torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1))
    with pytest.raises(ValueError, match="the memory's keys are 3 wide, this model's layer_out 48"):
        open_tiny(tiny_model("llama")).with_edit(Edit("grace", {}, "", FACTS[:1], [narrow]))
