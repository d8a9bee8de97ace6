"""NAS: values at a norm."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.nas import anchored, trimmed_mean
from tests.conftest import open_tiny, tiny_lm
from tests.editors import cases
from tests.editors.cases import FACTS, GROUPS, matrices, moments, oracle_facts, relative
from tests.oracle.access import layers, lookup, read_value
from tests.oracle.memit import memit_update
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
SETTINGS = {"v_lr": 1.0, "v_num_grad_steps": 4, "clamp_norm_factor": 0.4}
WEIGHT = 5.0
EDITOR = kf.Nas(layers=(0, 1), mom2_update_weight=WEIGHT, **SETTINGS)


def edit(lm, facts=FACTS, editor=EDITOR, **options):
    return editor.edit(lm, facts, **{"moments": moments(), "contexts": GROUPS} | options)


def written_by_mlp(model, fact, layer):
    """What the residual stream gets of a layer's MLP at the lookup token, as Hugging Face's modules make it."""
    out = read_value(model, *lookup(tiny_tokenizer(), fact.prompt, fact.subject), layer, "mlp_out")
    block = layers(model)[layer]
    if model.config.model_type == "gemma2":
        with torch.no_grad():
            return block.post_feedforward_layernorm(out)
    return out


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_nas_equals_the_oracle(family, monkeypatch):
    cases.make_exact(monkeypatch)
    model = tiny_model(family, torch.float64)
    lm, values = open_tiny(model), []
    plain = memit_update(
        model, tiny_tokenizer(), oracle_facts(), GROUPS, (0, 1), matrices(), WEIGHT, lr=1.0, steps=4, clamp=0.4,
        pull_back=family in cases.POST_NORM,
    )  # fmt: skip
    starts = [written_by_mlp(model, fact, 1) for fact in FACTS]
    stars = [v0 + value.value - value.init for v0, value in zip(starts, plain.values, strict=True)]
    a = 0.495 * max(v.norm() for v in stars).item()  # one is too far from it
    for v0, v, value in zip(starts, stars, plain.values, strict=True):
        new = v0 if v.norm() > 2 * a else v * a / v.norm()
        values.append(value._replace(value=value.init - v0 + new))
    expected = memit_update(
        model, tiny_tokenizer(), oracle_facts(), GROUPS, (0, 1), matrices(), WEIGHT, values=values,
        pull_back=family in cases.POST_NORM,
    )  # fmt: skip
    made = edit(lm, editor=replace(EDITOR, anchor=a))
    assert relative(made.values, expected.z) < 1e-8 and made.provenance["skipped"] == 1
    for layer in EDITOR.layers:
        assert relative(made.deltas[layer].dense(), expected.deltas[layer]) < 1e-7
    assert made.provenance["anchor"] == a


def test_anchored_by_hand():
    start = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 4.0]])
    change, norms = anchored(start, torch.tensor([[0.0, 4.0], [0.0, 1.0], [9.0, 8.0]]), 4.0)
    assert norms.far.tolist() == [False, False, True] and norms.anchor == 4.0
    assert torch.allclose(start + change, torch.tensor([[2.4, 3.2], [0.0, 4.0], [0.0, 4.0]]))


def test_without_an_anchor_it_is_the_mean_of_these_facts():
    norms = torch.arange(1.0, 41.0)
    assert trimmed_mean(norms) == pytest.approx(norms[:38].mean().item()) and trimmed_mean(norms[:3]) == 2.0
    lm = tiny_lm("gpt2")
    made = edit(lm)
    again = edit(lm, editor=replace(EDITOR, anchor=made.provenance["anchor"]))
    assert relative(again.values, made.values) < 1e-6 and made.provenance["skipped"] == 0


def test_settings_for_a_model():
    assert "derived" in kf.Nas.for_model(tiny_lm("gpt2")).source
    assert kf.Nas.for_model(cases.named("gpt2-xl", layers=48)).layers == (13, 14, 15, 16, 17)
