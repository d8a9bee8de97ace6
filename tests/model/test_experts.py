"""Stacked experts as one wide down projection: weights, routed keys, and what is refused."""

import copy

import pytest
import torch
import transformers

import kedit_fast as kf
from kedit_fast.edits.changes import WeightChange
from kedit_fast.jobs.collect import collect
from kedit_fast.jobs.score import next_token_probs
from kedit_fast.model.experts import as_wide, n_experts, routes
from kedit_fast.model.family import as_out_in, projection, write_out_in
from kedit_fast.shipping.adapter import export_peft
from kedit_fast.shipping.merge import merge_checkpoint
from kedit_fast.sweep.runs import RunList
from kedit_fast.sweep.sites import Site
from tests.conftest import close, on_disk, open_tiny, refused, relative_error, save_tiny, tiny_lm
from tests.make import bits, lowrank, make_edit, same_bits
from tests.tiny import D_FF, D_MODEL, EXPERTS, MIXTURES, tiny_model

IDS = [5, 17, 23, 42, 9, 300, 2]
LAYER = 1


def keys_of(lm, layer=LAYER):
    """[tokens, d_ff] routed keys of a text, by a sweep."""
    runs = RunList()
    run = runs.add(IDS).expand(len(IDS))
    return collect(lm, runs.runs(), Site.mlp_key, [layer], run, torch.arange(len(IDS)))[layer]


def wide(model):
    """An edit of the second layer's experts, all of them."""
    change = WeightChange(LAYER, lowrank(D_MODEL, D_FF, seed=3, rank=2))
    return make_edit(model, changes=[change], values=None, keys={})


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_is_one_wide_projection(family):
    """What the experts give is W̃ k̃, and what gpt_oss adds to it: g_j b_j of each expert."""
    lm, seen = tiny_lm(family), {}
    experts = projection(lm.model, LAYER)
    hook = experts.register_forward_hook(lambda module, args, out: seen.update(args=args, out=out))
    with torch.no_grad():
        lm.model(torch.tensor([IDS]))
    hook.remove()
    _, index, weights = seen["args"]
    keys = keys_of(lm)
    got = keys @ as_wide(experts).T
    if family == "gpt_oss":
        got = got + (weights[..., None] * experts.down_proj_bias[index]).sum(1)
    close(family, got, seen["out"])
    sent = torch.zeros(len(IDS), EXPERTS, dtype=torch.bool).scatter_(1, index, True)
    assert torch.equal(routes(keys, EXPERTS), sent) and sent.sum(1).eq(2).all() and len(sent.unique(dim=0)) > 1
    assert (n_experts(experts), lm.d_ff, lm.shape_of("down")) == (EXPERTS, D_FF, (D_MODEL, D_FF))


@pytest.mark.parametrize("family", MIXTURES)
def test_weights_are_read_and_written_bit_for_bit(family):
    model = copy.deepcopy(tiny_lm(family).model)
    experts, kept = projection(model, LAYER), bits(model)
    weight = as_out_in(experts).clone()
    assert weight.shape == (D_MODEL, D_FF)
    own = experts.down_proj[2].T if family == "gpt_oss" else experts.down_proj[2]
    assert torch.equal(weight[:, 2 * D_FF // EXPERTS : 3 * D_FF // EXPERTS], own)
    with torch.no_grad():
        write_out_in(experts, weight + 1)
        assert torch.equal(as_out_in(experts), weight + 1)
        write_out_in(experts, weight)
    assert same_bits(model, kept)


@pytest.mark.parametrize("family", MIXTURES)
def test_an_edit_acts_as_if_written_and_is_undone_bit_for_bit(family):
    model = tiny_model(family)
    lm, kept = open_tiny(model), bits(model)
    edit, base = wide(model), next_token_probs(lm, [IDS])[0].log()
    with edit.apply(model):
        with torch.no_grad():
            written = model(torch.tensor([IDS])).logits[0, -1].log_softmax(0)
        changed = {name for name, now in bits(model).items() if not torch.equal(now, kept[name])}
    assert changed == {f"model.layers.{LAYER}.mlp.experts.down_proj"} and same_bits(model, kept)
    assert relative_error(base, written) > 1e-3
    close("view", next_token_probs(lm.with_edit(edit), [IDS])[0].log(), written)
    close("written", next_token_probs(lm.with_edit(edit, written="float32"), [IDS])[0].log(), written)


def test_what_stacked_experts_cannot_do_is_refused(tmp_path):
    model = tiny_model("mixtral")
    save_tiny(tmp_path / "base", model)
    opened = kf.open_model(tmp_path / "base")
    close("loaded", next_token_probs(opened, [IDS]), next_token_probs(open_tiny(model), [IDS]))
    edit, says = wide(model), "edit of it is written with edit.apply"
    refused("no factors for stacked experts.*" + says, export_peft, edit, tmp_path / "adapter", model=model)
    refused("stores the experts one by one.*" + says, merge_checkpoint, tmp_path / "base", edit, tmp_path / "out")
    refused("one by one.*more memory=.*--memory", on_disk, tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_model_of_dense_layers_and_mixtures_is_refused():
    config = tiny_model("qwen3_moe").config
    config.mlp_only_layers = [1]
    refused(r"layers \[1\] of this qwen3_moe model are dense", open_tiny, transformers.Qwen3MoeForCausalLM(config))


def test_gathering_matrices_for_every_row_is_left_to_the_model(monkeypatch):
    """transformers' batched_mm copies an expert's matrices for each row; in a sweep of thousands experts take turns."""
    model = tiny_model("qwen3_moe")
    want = next_token_probs(open_tiny(model), [IDS])
    model.set_experts_implementation("batched_mm")
    monkeypatch.setitem(
        transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "batched_mm", lambda *a: pytest.fail("ran")
    )
    close("turns", next_token_probs(open_tiny(model), [IDS]), want)
    assert model.config._experts_implementation == "batched_mm"
