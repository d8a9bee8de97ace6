"""Changes that act beside the weights, where a route says so."""

from dataclasses import replace

import pytest
import torch

from kedit_fast.edits.edit import Edit, digest
from kedit_fast.edits.memories import MaskedMemory, MemoryChange, SideMemory
from kedit_fast.edits.routes import NearestRoute, prompt_features
from kedit_fast.evaluation.probes import probe, read_edited
from kedit_fast.jobs.collect import Collect
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.runs import RunList, add_under
from kedit_fast.sweep.sites import Site
from tests.conftest import close, open_tiny, refused, tiny_lm
from tests.make import FACTS, bits, same_bits
from tests.tiny import D_MODEL, tiny_model

PROMPT = FACTS[0].text


def remembering(lm, site=Site.layer_out, layer=2):
    """(an edit that knows the row at the end of two prompts, and answers with others; what it answers)."""
    keys = prompt_features(lm, [PROMPT, FACTS[1].text], layer, site)
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(0))
    route = NearestRoute(layer, keys, torch.full((2,), 1e-3), torch.arange(2), site)
    change = MemoryChange(layer, values.flip(0), torch.tensor([1, 0]), site)  # parts in any order
    return Edit("memory", {}, lm.fingerprint, FACTS, [change], route=route), values


def rows_at(view, site, layer, ids, end):
    """[tokens, width] of the site, of a run that goes on from a prompt which ends there."""
    runs = RunList()
    number = add_under(view, runs, [ids], view.owners([ids[: end + 1]]), [end])
    job = Collect(site, [layer], number.expand(len(ids)), torch.arange(len(ids)))
    sweep(view, runs.runs(), [job], last_layer=layer)
    return job.values[layer]


@pytest.mark.parametrize("site", [Site.layer_out, Site.mlp_out, Site.mlp_key, Site.attn_out], ids=str)
def test_the_row_where_the_prompt_ends_becomes_the_entrys_value_and_no_other(site):
    lm = open_tiny(tiny_model("llama"))
    edit, values = remembering(lm, site)
    ids = lm.encode(PROMPT)
    end, longer = len(ids) - 1, lm.encode(PROMPT + " Rome and Rome")
    base, rows = (rows_at(view, site, 2, longer, end) for view in (lm, lm.with_edit(edit)))
    close("value", rows[end], values[0])
    assert torch.equal(rows[:end], base[:end]) and not torch.equal(rows[end], base[end])
    if site is not Site.attn_out:
        assert torch.equal(rows[end + 1 :], base[end + 1 :])
    elsewhere = rows_at(lm.with_edit(edit), site, 2, longer, len(longer) - 1)
    assert torch.equal(elsewhere, base)


def test_prompts_that_begin_alike_end_each_where_it_ends():
    lm = tiny_lm("llama")
    edit, _ = remembering(lm)
    everywhere = replace(edit, route=replace(edit.route, radius=torch.tensor([1e9, 0.0])))
    view, asked = lm.with_edit(everywhere), [PROMPT, PROMPT[:-12], PROMPT + " Rome"]
    probes = [probe(lm, text, [" Rome and Rome"]) for text in asked]
    assert view.owners(asked).tolist() == [0, 0, 0]
    for together, one in zip(read_edited(view, probes), probes, strict=True):
        close("alone", torch.tensor(together.p), torch.tensor(read_edited(view, [one])[0].p))


def test_it_is_saved_and_acts_through_its_route_alone(tmp_path):
    model = tiny_model("llama")
    lm, before = open_tiny(model), bits(model)
    edit, _ = remembering(lm)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert repr(loaded) == repr(edit) and "memory" in repr(edit) and digest(loaded) == digest(edit)
    asked = [probe(lm, PROMPT, ["Rome", "cheese boat"])]
    assert read_edited(lm.with_edit(loaded), asked)[0].p != read_edited(lm, asked)[0].p
    assert read_edited(lm.with_edit(loaded.only(1)), asked)[0].p == read_edited(lm, asked)[0].p
    assert same_bits(model, before)
    refused("a memory at layer 2 acts on prompts that a route gives it", replace, edit, route=None)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(values=torch.zeros(3)), r"expected floats \[n, width\], got torch.float32 \[3\]"),
        (dict(values=torch.ones(1, 3).long()), "expected floats"),
        (dict(values=torch.full((1, D_MODEL), torch.nan)), "the memory at layer 2 hold NaN"),
        (dict(layer=-1), "a whole number from 0"),
        (dict(owners=torch.tensor([0, 1])), "one for each of 1 values"),
        (dict(values=torch.ones(2, D_MODEL), owners=torch.tensor([0, 0])), "none twice"),
        (dict(site="nowhere"), "'nowhere' is not a valid Site"),
    ],
)
def test_parts_that_do_not_fit_are_refused(wrong, says):
    change = MemoryChange(2, torch.zeros(1, D_MODEL), torch.zeros(1, dtype=torch.int64))
    refused(says, replace, change, **wrong)


def side(**changes):
    deltas = [torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]), torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])]
    return replace(SideMemory.of_deltas(2, deltas, torch.float32), **changes)


def masked(**changes):
    columns, masks = torch.tensor([1, 4, 6]), torch.tensor([[1, 6], [4, 6]])
    return replace(MaskedMemory(2, columns, torch.arange(6.0).view(2, 3), masks, torch.tensor([0, 1])), **changes)


def test_sparse_memories_keep_what_is_not_zero_and_act_by_entry():
    memory = side()
    assert memory.mask.shape == (2, 1) and memory.values.tolist() == [2.0, 3.0, 4.0]
    jobs = [memory.job() for _ in range(2)]  # a sweep each
    both = [job.made(torch.ones(1, 3), 1) for job in jobs]
    assert torch.equal(*both) and [*memory._dense] == [1] and memory.dense(1) is memory.dense(1)
    second = memory.of_entries(torch.tensor([1]))
    assert second.owners.tolist() == [0] and second.dense(0).tolist() == [[4, 0, 0], [0, 0, 0]]
    x = torch.arange(7.0)[None]
    assert masked().job().made(x, 1).tolist() == [[4 * 1 + 6 * 2.0, 4 * 4 + 6 * 5.0]]
    alone = masked().of_entries(torch.tensor([1]))
    assert alone.columns.tolist() == [4, 6] and torch.equal(alone.job().made(x, 0), masked().job().made(x, 1))
    assert side().job().made(torch.tensor([[1.0, 10.0, 100.0]]), 0).tolist() == [[20.0, 300.0]]


@pytest.mark.parametrize(
    ("make", "wrong", "says"),
    [
        (side, dict(values=torch.ones(2)), "keeps 3 entries, values 2"),
        (side, dict(shape=(9, 9)), r"expected uint8 \[m, 11\]"),
        (side, dict(shape=(-2, -3)), "a whole number"),
        (side, dict(shape=(6,)), r"expected \(d, d_ff\)"),
        (masked, dict(columns=torch.tensor([-1, 4, 6])), "name columns"),
        (side, dict(values=torch.tensor([1.0, torch.nan, 2.0])), "hold NaN"),
        (side, dict(owners=torch.tensor([1, 1])), "none twice"),
        (masked, dict(columns=torch.tensor([1, 4])), r"expected \[c\], \[d, c\], \[n, k\]; got \[2\]"),
        (masked, dict(masks=torch.tensor([[1, 2], [4, 6]])), "name columns that it does not hold"),
        (masked, dict(owners=torch.tensor([1])), "one for each of 2 masks"),
    ],
)
def test_parts_of_sparse_memories_that_do_not_fit_are_refused(make, wrong, says):
    refused(says, make, **wrong)


def test_another_models_are_refused():
    lm = tiny_lm("llama")
    refused(r"a side memory of \(2, 3\), this model's is \(48, 80\)", side().check, lm)
    refused("for another model", masked().check, lm)
    narrow = MemoryChange(2, torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    refused("keys of width 3, this model's layer_out has 48", narrow.check, lm)
    refused("this model has layers 0 to 3", replace(narrow, layer=9).check, lm)
