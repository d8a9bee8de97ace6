"""AlphaEdit against the published form of its system, and what its null space keeps."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from tests.conftest import refused, tiny_lm
from tests.editors.cases import FACTS, GROUPS, apart, moments, relative, values_at

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
EDITOR = kf.AlphaEdit(
    layers=(1, 2), v_lr=1.0, v_num_grad_steps=4, clamp_norm_factor=0.4, nullspace_threshold=0.0, nullspace_share=0.5,
    L2=0.3,
)  # fmt: skip


def edit(lm, facts=FACTS, editor=EDITOR, **options):
    return editor.edit(lm, facts, **{"moments": moments(), "contexts": GROUPS} | options)


def projection(layer, share=0.5):
    eigenvectors = torch.linalg.svd(moments()[layer].matrix.double()).U.flip(1)  # smallest first
    null = eigenvectors[:, : round(share * len(eigenvectors))]
    return null @ null.T


def published_form(P, k, earlier, residual, ridge):
    """Δᵀ = (P (K Kᵀ + Kₚ Kₚᵀ) + L2 I)⁻¹ P K Rᵀ, with keys as columns there; rows here."""
    system = P @ (k.T @ k + earlier.T @ earlier) + ridge * torch.eye(len(P), dtype=P.dtype)
    return torch.linalg.solve(system, P @ k.T @ residual).T


def test_it_is_the_published_system_on_the_null_space():
    lm = tiny_lm("llama", torch.float64)
    made = edit(lm)
    k, nothing = made.keys[1], made.keys[1][:0]
    residual = (made.values - values_at(lm, FACTS, 2)) / 2  # two layers share what is missing
    expected = published_form(projection(1), k, nothing, residual, EDITOR.L2)
    assert relative(made.deltas[1].dense(), expected) < 1e-8
    assert made.provenance["layers"]["1"]["null_space"] == 0.5 and made.method == "alphaedit"


def test_keys_of_edits_below_stand_in_the_system():
    lm = tiny_lm("llama", torch.float64)
    editor = replace(EDITOR, layers=(1,))
    first = edit(lm, FACTS[:2], editor)
    second = edit(lm, FACTS[2:], editor, previous=first)
    residual = second.values - values_at(lm.with_edit(first), FACTS[2:], 1)
    expected = published_form(projection(1), second.keys[1], first.keys[1], residual, EDITOR.L2)
    assert relative(second.deltas[1].dense(), expected) < 1e-8


def test_nothing_is_written_outside_the_null_space():
    lm = tiny_lm("gpt2", torch.float64)
    made = edit(lm, independent=False)
    for layer in EDITOR.layers:
        outside = torch.eye(len(projection(layer)), dtype=torch.float64) - projection(layer)
        delta = made.deltas[layer].dense().double()
        assert (delta @ outside).norm() < 1e-10 * delta.norm()


def test_independent_ones_are_those_of_each_fact_alone():
    lm = tiny_lm("gpt2", torch.float64)
    together = edit(lm, independent=True)
    for i, fact in enumerate(FACTS):
        assert apart(together.only(i), edit(lm, [fact])) < 1e-8


def test_a_threshold_or_a_share():
    lm = tiny_lm("gpt2", torch.float64)
    eigenvalues = moments()[1].spectrum[0]
    half = float(eigenvalues[len(eigenvalues) // 2])
    editor = replace(EDITOR, layers=(1,))
    by_share = edit(lm, editor=editor)
    by_threshold = edit(lm, editor=replace(editor, nullspace_threshold=half))
    assert relative(by_threshold.deltas[1].dense(), by_share.deltas[1].dense()) < 1e-10
    with pytest.raises(ValueError, match="no eigenvalue of C is below nullspace_threshold 1e-12"):
        edit(lm, editor=replace(editor, nullspace_threshold=1e-12))


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"mom2_adjustment": False}, "needs second moments"),
        ({"nullspace_share": 1.5}, "nullspace_share = 1.5"),
        ({"nullspace_share": 0.0}, r"nullspace_share = 0\.0"),
    ],
)
def test_bad_settings(wrong, match):
    lm = tiny_lm("gpt2")
    with pytest.raises(ValueError, match=match):
        edit(lm, editor=replace(EDITOR, **wrong), moments=None)


def test_settings_for_a_model():
    derived = kf.EDITORS["alphaedit"].for_model(tiny_lm("gpt2"))
    assert derived.nullspace_threshold == 0 and "derived" in derived.source


def test_an_empty_null_space_is_found_before_any_work(monkeypatch):
    """Hours. Experiments ask for statistics once, for all rounds or layers; what an edit refuses is refused there."""
    monkeypatch.setattr("kedit_fast.editors.spread.optimize_values", lambda *args: pytest.fail("work began"))
    lm, editor = tiny_lm("gpt2"), replace(EDITOR, layers=(1,), nullspace_threshold=1e-12)
    given = {"moments": moments(), "contexts": GROUPS}
    refused("no eigenvalue", editor.edit, lm, FACTS, **given)
    refused("no eigenvalue", kf.edit_in_rounds, lm, FACTS, editor, per_round=2, **given)
    refused("no eigenvalue", kf.edit_by_layer, lm, FACTS, editor, layers=(1, 2), log=None, **given)
