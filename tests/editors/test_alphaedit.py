"""AlphaEdit against the published form of its system, and what its null space keeps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.edits.deltas import LowRank
from kedit_fast.moments.given import check_room
from kedit_fast.moments.second_moment import SecondMoment
from tests.conftest import refused, tiny_lm
from tests.editors.cases import FACTS, GROUPS, apart, moments, relative, values_at
from tests.live import LiveBytes

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


@pytest.mark.parametrize(
    "editor",
    [
        kf.AlphaEdit(layers=(0, 2), nullspace_threshold=0.0),
        kf.BetaEdit(layers=(0, 2), nullspace_threshold=0.0, P_freq=2),
        kf.Rect(layers=(0, 2)),
    ],
    ids=lambda editor: editor.METHOD,
)
def test_what_a_solve_takes_is_what_is_counted(editor):
    """Matrices of width d_ff, and for RECT dense ones; LAPACK's own work is counted, and seen by nobody here."""
    d_ff = 400
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3 * d_ff, d_ff, generator=generator)
    moments = {i: SecondMoment(keys.T @ keys / len(keys), len(keys), i) for i in editor.layers}
    lm = SimpleNamespace(
        device=torch.device("cpu"), memory=1 << 40, d_ff=d_ff, d_model=d_ff // 4, dtype=torch.float32, edits=(),
        moment_shape=(d_ff, d_ff), n_experts=1,
        source=SimpleNamespace(weight=lambda layer, role: torch.ones(d_ff // 4, d_ff)),
    )  # fmt: skip
    work = SimpleNamespace(lm=lm, moments=moments, independent=False)
    with LiveBytes(torch.nn.Identity()) as held:
        editor.check_moments(moments)
        u, v, _ = editor.update(work, 2, keys[:4].double(), torch.ones(4, d_ff // 4).double(), [keys[4:8]])
        editor.kept(lm, 2, LowRank(u.float(), v.float()))
    rows = 4 * 8 * 256 * d_ff  # what a factor is made by
    assert 0.4 * editor.solve_bytes(lm) <= held.peak <= editor.solve_bytes(lm) + rows
    with pytest.raises(ValueError, match=f"solving a layer of d_ff {d_ff} needs"):
        check_room(SimpleNamespace(**vars(lm) | {"memory": editor.solve_bytes(lm) - 1}), editor.solve_bytes(lm))
