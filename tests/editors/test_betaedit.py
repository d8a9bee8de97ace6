"""BetaEdit against the published form of its system."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from tests.conftest import tiny_lm
from tests.editors.cases import FACTS, GROUPS, apart, moments, relative, values_at

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
EDITOR = kf.BetaEdit(
    layers=(1,), v_lr=1.0, v_num_grad_steps=4, clamp_norm_factor=0.4, nullspace_threshold=0.0, nullspace_share=0.5,
    L2=0.3, lambda1=2.0, P_freq=3,
)  # fmt: skip


def edit(lm, facts=FACTS, editor=EDITOR, **options):
    return editor.edit(lm, facts, **{"moments": moments(), "contexts": GROUPS} | options)


def projection(C, share=0.5):
    """Of the directions of smallest singular values."""
    vectors = torch.linalg.svd(C).U.flip(1)[:, : round(share * len(C))]
    return vectors @ vectors.T


def published_form(P, C, k, earlier, residual):
    """(P (K K^T + K_p K_p^T + lambda_1 C) + lambda_2 I)^-1 P K R^T, transposed; keys as rows here."""
    system = P @ (k.T @ k + earlier.T @ earlier + EDITOR.lambda1 * C) + EDITOR.L2 * torch.eye(len(P), dtype=P.dtype)
    return torch.linalg.solve(system, P @ k.T @ residual).T


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_is_the_published_system(family):
    lm = tiny_lm(family, torch.float64)
    C, made = moments()[1].matrix.double(), edit(lm)
    residual = made.values - values_at(lm, FACTS, 1)
    expected = published_form(projection(C), C, made.keys[1], made.keys[1][:0], residual)
    assert relative(made.deltas[1].dense(), expected) < 1e-8 and made.method == "betaedit"


@pytest.mark.parametrize("n", [2, 3])
def test_from_so_many_keys_on_the_null_space_is_taken_anew(n):
    lm = tiny_lm("llama", torch.float64)
    C, first = moments()[1].matrix.double(), edit(lm, FACTS[:n])
    second = edit(lm, FACTS[3:], previous=first)
    earlier = first.keys[1]
    protected = C if n < EDITOR.P_freq else (earlier.T @ earlier / n + EDITOR.lambda1 * C) / (1 + EDITOR.lambda1)
    residual = second.values - values_at(lm.with_edit(first), FACTS[3:], 1)
    expected = published_form(projection(protected), C, second.keys[1], earlier, residual)
    assert relative(second.deltas[1].dense(), expected) < 1e-7


def test_without_its_weight_it_is_alphaedit():
    lm = tiny_lm("gpt2", torch.float64)
    plain = {name: value for name, value in vars(EDITOR).items() if name not in ("lambda1", "P_freq")}
    beta = replace(EDITOR, lambda1=0.0)
    assert apart(edit(lm, editor=beta), edit(lm, editor=kf.AlphaEdit(**plain))) < 1e-8


def test_settings_for_a_model():
    derived = kf.BetaEdit.for_model(tiny_lm("gpt2"))
    assert derived.lambda1 == 3000 and derived.nullspace_threshold == 0 and "derived" in derived.source


def test_the_fit_is_the_share_that_a_layer_gives():
    lm = tiny_lm("llama", torch.float64)
    made = edit(lm, FACTS[:1])
    asked = (made.values - values_at(lm, FACTS[:1], 1))[0]
    given = made.deltas[1].dense() @ made.keys[1][0]
    assert made.provenance["layers"]["1"]["fit"] == pytest.approx((given.norm() / asked.norm()).item(), rel=1e-6)
