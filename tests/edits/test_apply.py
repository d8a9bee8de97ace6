"""Writing an edit into a model and taking it out again, bit for bit."""

import copy
import math

import pytest
import torch
from torch import nn

import kedit_fast.edits.apply as writing
from kedit_fast.edits.deltas import Dense, written_delta
from kedit_fast.model.family import as_out_in, projection
from tests.conftest import open_tiny, refused
from tests.make import bits, logits, lowrank, make_edit, same_bits, watched
from tests.tiny import tiny_model


@pytest.fixture
def model(request):
    family, dtype = getattr(request, "param", ("llama", torch.float32))
    return tiny_model(family, dtype)


each_model = pytest.mark.parametrize(
    "model",
    [(family, dtype) for family in ("gpt2", "llama") for dtype in (torch.float32, torch.bfloat16)],
    indirect=True,
    ids=lambda case: f"{case[0]}-{case[1]}",
)


@each_model
def test_apply_changes_the_model_and_undo_restores_every_bit(model):
    edit, before, base = make_edit(model), bits(model), logits(model)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    handle = edit.apply(model)
    assert not handle.undone
    assert (logits(model) - base).norm() > 0.01 * base.norm()
    down = {f".{layer}.mlp.{name}.weight" for layer in edit.layers for name in ("c_proj", "down_proj")}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == 2
    assert all(any(name.endswith(end) for end in down) for name in changed)
    handle.undo()
    assert handle.undone
    assert same_bits(model, before)
    assert torch.equal(logits(model), base)
    assert all(parameter.data_ptr() == places[name] for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    handle.undo()  # a second time does nothing
    assert same_bits(model, before)


@each_model
def test_context_manager_undoes_after_an_exception_and_what_was_undone_already(model):
    before = bits(model)
    with pytest.raises(ZeroDivisionError), make_edit(model).apply(model) as handle:
        assert not same_bits(model, before)
        raise ZeroDivisionError
    assert handle.undone and same_bits(model, before)
    with make_edit(model).apply(model) as handle:
        handle.undo()
    assert same_bits(model, before)


@each_model
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(model, monkeypatch, error, moment):
    edit, before = make_edit(model), bits(model)
    calls = watched(monkeypatch, writing, "_write", break_at=(2,), error=error, after=moment == "after")
    refused("broken by a test", edit.apply, model, error=error)
    assert len(calls) == 4  # two writes, both put back
    assert same_bits(model, before)


def test_a_second_interrupt_does_not_stop_the_restoring(model, monkeypatch):
    """The third layer's write is interrupted, and putting it back is too: the two below are put back all the same."""
    edit = make_edit(model, deltas={layer: lowrank(seed=layer) for layer in (0, 1, 2)}, keys={})
    before, calls = bits(model), watched(monkeypatch, writing, "_write", break_at=(3, 4), error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        edit.apply(model)
    assert len(calls) == 6
    assert same_bits(model, before)


def test_an_edit_that_another_one_cancels_is_still_below_it(model):
    """The weights are the original ones again, but the edit on top keeps a copy of the edited ones."""
    before, weight = bits(model), as_out_in(projection(model, 2))
    first = make_edit(model, deltas={2: lowrank(seed=2)}, keys={})
    base = weight.detach().clone()
    one = first.apply(model)
    back = Dense(base.double() - weight.detach().double())
    two = make_edit(model, deltas={2: back}, keys={}).apply(model, check_fingerprint=False)
    assert same_bits(model, before)
    refused("Undo the edits that were applied after", one.undo)
    two.undo()
    one.undo()
    assert same_bits(model, before)


def test_an_interrupted_undo_can_be_finished(model, monkeypatch):
    edit, before = make_edit(model), bits(model)
    handle = edit.apply(model)
    with monkeypatch.context() as patch:
        watched(patch, writing, "_write", break_at=(2,), error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            handle.undo()
    assert not handle.undone
    handle.undo()
    assert same_bits(model, before)


def test_edits_come_off_in_the_order_they_lie(model):
    """Those of different layers in any order."""
    first, before = make_edit(model), bits(model)
    second = make_edit(model, deltas={2: lowrank(seed=9)})
    one = first.apply(model)
    between = bits(model)
    with pytest.raises(ValueError, match="made for model"):
        second.apply(model)  # the fingerprint is of the edited model now
    two = second.apply(model, check_fingerprint=False)
    stacked = bits(model)
    refused("Undo the edits that were applied after", one.undo)
    assert same_bits(model, stacked)
    two.undo()
    assert same_bits(model, between)
    one.undo()
    assert same_bits(model, before)
    one = make_edit(model, deltas={1: lowrank(seed=1)}).apply(model)
    other_layer = make_edit(model, deltas={2: lowrank(seed=2)}).apply(model, check_fingerprint=False)
    one.undo()
    other_layer.undo()
    assert same_bits(model, before)


def test_a_model_with_an_edit_written_into_it_is_another_model(model):
    """What is measured meanwhile is not filed under the base model, and the edit does not act twice in silence."""
    lm, edit = open_tiny(model), make_edit(model)
    base = lm.fingerprint
    with edit.apply(model):
        assert lm.fingerprint != base
        refused("undo what was written into its weights", lm.with_edit, edit)
    assert lm.fingerprint == base and lm.with_edit(edit).edits == (edit,)


def test_undo_refuses_a_weight_that_was_changed_otherwise(model):
    edit = make_edit(model)
    handle = edit.apply(model)
    weight = projection(model, 2).weight
    kept = weight[3, 4].item()
    with torch.no_grad():
        weight[3, 4] = torch.nextafter(torch.tensor(kept), torch.tensor(math.inf))
    changed = bits(model)
    refused(r"layer 2.*changed otherwise", handle.undo)
    assert same_bits(model, changed)  # layer 1 neither
    with torch.no_grad():
        weight[3, 4] = kept
    handle.undo()
    assert handle.undone


def test_undo_refuses_a_cast_or_unloaded_model(model):
    handle = make_edit(model).apply(model)
    model.bfloat16()
    refused("another dtype", handle.undo)
    model.to("meta")
    refused("no longer holds", handle.undo)
    model = tiny_model("llama", torch.bfloat16)
    handle, module = make_edit(model).apply(model), projection(model, 1)
    module.weight = nn.Parameter(module.weight.detach().view(torch.float16))  # the same bytes
    refused("layer 1's down projection no longer holds", handle.undo)


def test_a_copy_of_the_model_is_not_touched_by_undo(model):
    base = bits(model)
    with make_edit(model).apply(model):
        twin = copy.deepcopy(model)
        edited = bits(model)
    assert same_bits(model, base)
    assert same_bits(twin, edited)


def test_apply_under_inference_mode_and_to_inference_tensors():
    with torch.inference_mode():
        model = tiny_model("gpt2")
    before = bits(model)
    with make_edit(model).apply(model):
        assert not same_bits(model, before)
    assert same_bits(model, before)
    model = tiny_model("gpt2")
    with torch.inference_mode():
        handle = make_edit(model).apply(model)
    handle.undo()
    assert same_bits(model, before)


@each_model
def test_apply_writes_what_written_delta_says(model):
    edit = make_edit(model)
    before = {layer: as_out_in(projection(model, layer)).detach().clone() for layer in edit.layers}
    with edit.apply(model):
        for layer, weight in before.items():
            written = written_delta(weight, edit.deltas[layer], weight.dtype)
            now = as_out_in(projection(model, layer))
            # fp32: the difference of two fp32 numbers may need more digits than fp32 has.
            assert torch.allclose(now.float(), weight.float() + written.delta, rtol=1e-6, atol=1e-6)
            assert not torch.equal(now, weight)
