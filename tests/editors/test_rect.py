"""RECT: MEMIT's update, of which the largest relative changes stay."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.rect import sparsified
from tests.conftest import open_tiny, refused, tiny_lm
from tests.editors.cases import FACTS, GROUPS, moments, relative
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
EDITOR = kf.Rect(layers=(0, 1), mom2_update_weight=5.0, v_lr=1.0, v_num_grad_steps=4, keep_share=0.3)


def edit(lm, facts=FACTS, editor=EDITOR, **options):
    return editor.edit(lm, facts, **{"moments": moments(), "contexts": GROUPS} | options)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_largest_relative_changes_are_kept(family):
    lm = tiny_lm(family, torch.float64)
    made, memit = edit(lm), edit(lm, editor=kf.Memit(**{k: v for k, v in vars(EDITOR).items() if k != "keep_share"}))
    whole, weight = memit.deltas[0].dense(), lm.source.weight(0, "down")
    order = (whole / weight).abs().flatten().argsort(descending=True)
    expected = torch.zeros(whole.numel(), dtype=whole.dtype)
    kept = order[: round(0.3 * len(order))]
    expected[kept] = whole.flatten()[kept]
    assert torch.equal(made.deltas[0].dense(), expected.view_as(whole))
    assert relative(made.keys[1], memit.keys[1]) > 1e-6, "the layer above sees what was kept below"


def test_sparsified_by_hand():
    delta = torch.tensor([[1.0, -4.0, 3.0], [0.0, 2.0, -6.0]])
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.0, 4.0, 1.0]])  # relative: 1, 4, inf; 0 / 0, 0.5, 6
    assert torch.equal(sparsified(delta, weight, 0.5), torch.tensor([[0.0, -4.0, 3.0], [0.0, 0.0, -6.0]]))
    assert torch.equal(sparsified(delta, weight, 1.0), delta)


def test_bad_settings():
    for wrong in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="keep_share"):
            replace(EDITOR, keep_share=wrong)
    refused("independent = True", edit, tiny_lm("gpt2"), independent=True)


def test_what_edits_below_wrote_belongs_to_the_weight():
    lm = tiny_lm("llama", torch.float64)
    editor = replace(EDITOR, layers=(1,), keep_previous=False)
    first = edit(lm, FACTS[:2], editor)
    second = edit(lm, FACTS[2:], editor, previous=first)
    with first.apply(lm.model, check_fingerprint=False):
        written = edit(lm, FACTS[2:], editor)
    assert relative(second.deltas[1].dense(), written.deltas[1].dense()) < 1e-10


def test_what_cannot_be_done_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("kedit_fast.editors.spread.optimize_values", lambda *args: pytest.fail("work began"))
    model = tiny_model("llama")
    lm = open_tiny(model)
    refused("each fact is an edit of its own here: RECT", kf.edit_by_layer, lm, FACTS, EDITOR, layers=[0], log=None)
    down = model.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    refused("the weights of layer 0 are packed", edit, lm)
