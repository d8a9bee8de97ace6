"""Integrated gradients over keys against the oracle's loop, their theorem, and what must not change them."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
import kedit_fast.jobs.integrate as integrate_module
from kedit_fast.edits.changes import weight_changes
from kedit_fast.edits.deltas import LowRank
from kedit_fast.jobs.integrate import Asked, held_bytes, integrate
from tests import tiny
from tests.conftest import disk_and_resident, open_tiny, refused, save_tiny, tiny_lm
from tests.editors import cases
from tests.editors.cases import relative
from tests.live import LiveBytes
from tests.oracle import neurons as oracle
from tests.tiny import D_FF, D_MODEL, tiny_model, tiny_tokenizer

STEPS = 4
TEXTS = (("The Space Needle is in the city of", " Seattle"), ("The mother tongue of Danielle Darrieux is", " French"))


def asked(texts=TEXTS):
    ids = [[tiny_tokenizer()(text)["input_ids"] for text in pair] for pair in texts]
    return [Asked(prompt, answer[0], f"fact {i}") for i, (prompt, answer) in enumerate(ids)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_they_are_the_oracles(family, monkeypatch):
    cases.make_exact(monkeypatch)
    lm = tiny_lm(family, torch.float64)
    p, found = integrate(lm, asked(), range(lm.n_layers), STEPS)
    for one, mine, mine_p in zip(asked(), found, p, strict=True):
        want = oracle.attributions(lm.model, one.tokens, [one.answer], STEPS)
        assert relative(mine, want) < 1e-8
        assert mine_p.item() == pytest.approx(oracle.probability(lm.model, *one[:2], 0, 1.0)[0], rel=1e-8)
    assert relative(integrate(tiny_lm(family), asked(), range(lm.n_layers), STEPS)[1], found) < 1e-4


@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("llama", 3), ("gemma2", 1)])
def test_over_a_layer_they_add_up_to_what_its_key_gives(family, layer):
    """Completeness, also where a norm stands behind the key; the sum over points at the right of their steps comes
    closer as 1 / m."""
    lm = tiny_lm(family, torch.float64)
    (one, *_) = asked()
    without = oracle.probability(lm.model, *one[:2], layer, 0.0)[0]
    gaps = []
    for steps in (25, 50, 400):
        p, found = integrate(lm, [one], [layer], steps)
        gaps.append(abs(found.sum().item() - (p.item() - without)))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.01 * abs(p.item() - without)


def test_tokens_that_share_a_sweep_do_not_touch():
    lm = tiny_lm("llama", torch.float64)
    longer = Asked([*asked()[0].tokens, 5, 6], 7)  # begins as another does
    together = [*asked(), longer]
    p, found = integrate(lm, together, [0, 2, 3], STEPS)
    for i, one in enumerate(together):
        alone, map_ = integrate(lm, [one], [0, 2, 3], STEPS)
        assert relative(map_[0], found[i]) < 1e-10 and alone[0] == pytest.approx(p[i].item(), rel=1e-10)


def test_what_does_not_fit_is_cut_by_layers():
    lm, layers = tiny_lm("llama", torch.float64), range(4)
    p, found = integrate(lm, asked(), layers, STEPS)
    longest = asked()[1]
    recomputed = held_bytes(lm, longest, [0], STEPS, recompute=True)
    for memory in (held_bytes(lm, longest, layers, STEPS), held_bytes(lm, longest, [0], STEPS), recomputed):
        cut_p, cut = integrate(replace(lm, memory=memory), asked(), layers, STEPS)
        assert relative(cut, found) < 1e-10 and relative(cut_p, p) < 1e-10
    small = replace(lm, memory=recomputed - 1)
    refused("keys of one layer for fact 1 needs.*larger memory", integrate, small, asked(), layers, STEPS)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("family", "dtype"), [("gpt2", torch.float32), ("gemma2", torch.float64)])
def test_a_token_is_counted_as_what_it_holds(family, dtype, recompute, monkeypatch):
    monkeypatch.setattr(tiny, "D_FF", 400)
    lm, (one, *_) = open_tiny(tiny_model(family, dtype)), asked()
    counted = held_bytes(lm, one, range(4), 20, recompute)
    pack = integrate_module._pack
    with LiveBytes(lm.model) as held:
        pack(lm, [one], list(range(4)), 20, recompute, None)
    assert held.peak <= counted <= 3 * held.peak


def test_layers_that_are_read_from_disk_give_the_same(tmp_path):
    disk, resident = disk_and_resident(save_tiny(tmp_path, tiny_model("gemma2")))
    p, found = integrate(resident, asked(), range(4), STEPS)
    disk_p, from_disk = integrate(disk, asked(), range(4), STEPS)
    assert relative(from_disk, found) < 1e-5 and relative(disk_p, p) < 1e-5


def test_an_edited_down_projection_reads_the_scaled_key():
    """As a model into which the edit is written."""
    lm = open_tiny(tiny_model("llama", torch.float64))
    factors = torch.randn(D_MODEL + D_FF, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    change = weight_changes({1: LowRank(0.1 * factors[:D_MODEL], factors[D_MODEL:])})
    edit = kf.Edit(method="own", hparams={}, fingerprint=lm.fingerprint, facts=(), changes=change)
    p, found = integrate(lm.with_edit(edit), asked(), range(4), STEPS)
    base = integrate(lm, asked(), range(4), STEPS)[1]
    with edit.apply(lm.model):
        written_p, written = integrate(lm, asked(), range(4), STEPS)
    assert relative(found, written) < 1e-10 and relative(p, written_p) < 1e-10 and relative(found, base) > 0.01


def test_a_broken_model_is_named():
    lm = open_tiny(tiny_model("llama"))
    lm.model.model.layers[2].mlp.down_proj.weight.data[0] = torch.nan
    refused("gives NaN after 'The Space Needle", integrate, lm, asked(), range(4), STEPS)


def test_the_model_is_left_as_it_was():
    with cases.left_as_it_was() as lm:
        integrate(lm, asked(), range(4), STEPS)
