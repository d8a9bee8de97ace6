"""The forms of an edit: written edit by edit, quantized again, laid over a quantized base."""

import pytest
import torch

from kedit_fast.edits.deltas import Dense, LowRank, edited_weight, written_delta
from kedit_fast.gating.forms import chain_deltas, growth, quantized_weight, view_of_quantized, view_of_written
from kedit_fast.jobs.score import next_token_probs
from tests.conftest import close, open_tiny, refused
from tests.make import bits, lowrank, make_edit, same_bits
from tests.tiny import DISTINCT, tiny_model

IDS = [5, 17, 23, 42]


def loop_quantized(weight, n_bits, group):
    out = weight.float().clone()
    for row in out:
        for begin in range(0, len(row), group):
            part = row[begin : begin + group]
            step = part.abs().max() / (2 ** (n_bits - 1) - 1)
            if step > 0:
                part.copy_((part / step).round() * step)
    return out.to(weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_bits, group", [(8, 16), (4, 7), (4, 100)])
def test_quantization_against_a_loop(n_bits, group, dtype):
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2, :16] = 0
    got = quantized_weight(weight, n_bits, group)
    assert torch.equal(got, loop_quantized(weight, n_bits, group)) and got.dtype == dtype
    levels = torch.unique(quantized_weight(weight[:1, :5].float(), n_bits, 5)).numel()
    assert levels <= 5 and not torch.equal(got, weight)
    refused("2 to 8 bits", quantized_weight, weight, 16, group)


def test_a_chain_is_rounded_edit_by_edit():
    model = tiny_model("llama", torch.bfloat16)
    lm = open_tiny(model)
    edits = [make_edit(model, {2: lowrank(seed=s, scale=0.01)}) for s in (1, 2)]
    before, after = chain_deltas(lm, edits, torch.bfloat16)[2, "down"]
    want = lm.source.weight(2, "down").detach()
    for edit in edits:
        want = edited_weight(want, edit.deltas[2])
    assert torch.equal(after, want) and torch.equal(before, lm.source.weight(2, "down").detach())
    both = LowRank(*(torch.cat([getattr(e.deltas[2], p) for e in edits], 1) for p in "uv"))
    assert not torch.equal(after, edited_weight(before, both))  # rounded once, it is another matrix
    assert growth({(2, "down"): (before, after)})[2] == pytest.approx(
        float((after.double() - before.double()).norm() / before.double().norm())
    )


@pytest.mark.parametrize("family", DISTINCT)
def test_views_equal_the_written_weights(family):
    """Both views against a model whose weights were overwritten; the opened model keeps its bits."""
    model = tiny_model(family)
    lm, kept = open_tiny(model), bits(model)
    edit = make_edit(model)
    weights = chain_deltas(lm, [edit], torch.float32)
    written, quantized = view_of_written(lm, [edit], weights), view_of_quantized(lm, [edit], weights, 4, 16)
    for view, change in ((written, lambda w: w), (quantized, lambda w: loop_quantized(w, 4, 16))):
        for edited, base_or_view in ((False, view.__class__(**vars(view) | {"edits": ()})), (True, view)):
            other = tiny_model(family)
            theirs = open_tiny(other)
            for layer, delta in edit.deltas.items():
                weight = theirs.source.weight(layer, "down")
                with torch.no_grad():
                    weight.copy_(change(edited_weight(weight, delta) if edited else weight.clone()))
            close("probabilities", next_token_probs(base_or_view, [IDS]), next_token_probs(theirs, [IDS]))
    assert same_bits(model, kept)
    assert quantized.fingerprint == lm.fingerprint


def test_written_view_equals_written_delta():
    model = tiny_model("llama")
    lm, edit = open_tiny(model), make_edit(model)
    view = view_of_written(lm, [edit], chain_deltas(lm, [edit], torch.bfloat16))
    for layer, delta in edit.deltas.items():
        want = written_delta(lm.source.weight(layer, "down"), delta, torch.bfloat16)
        assert torch.equal(view.edits[0].deltas[layer].delta, want.delta)
    assert isinstance(view.edits[0].deltas[1], Dense)
