"""KE's rescaling, and its constraint."""

import pytest
import torch

from kedit_fast.editors.ke import KeTraining, Rescaling
from kedit_fast.editors.training_step import edit_task
from kedit_fast.jobs.gradients import gradient_factors
from tests.conftest import tiny_lm
from tests.editors.cases import relative
from tests.editors.networks import FACTS, network


def test_shares_sum_to_one():
    rescaling = Rescaling((9, 5), 4, 3)
    for parameter in rescaling.parameters():
        torch.nn.init.normal_(parameter)
    r_a, r_b, c_a, c_b, eta = rescaling(torch.randn(6, 4))
    assert torch.allclose(r_a.sum(1), torch.ones(6)) and torch.allclose(r_b.sum(1), torch.ones(6))
    assert r_a.shape == r_b.shape == (6, 9) and c_a.shape == c_b.shape == (6, 5) and ((eta > 0) & (eta < 1)).all()


def test_before_training_it_is_a_step_down_the_gradient():
    lm = tiny_lm("llama", torch.float64)
    made = network(lm, "ke", noise=0.0)
    found = gradient_factors(lm, [edit_task(lm, FACTS[0])], made.places).factors
    for place, update in made.transformed(found, alone=True).items():
        x, delta = made.sized(place, found[place])
        step = made.settings["edit_lr"] * made.settings["max_scale"] / 2
        assert relative(update.out.T @ update.into, -step * delta.T @ x) < 1e-6


def test_the_multiplier_rises_where_the_constraint_is_broken_and_never_falls_below_0():
    settings, dual = KeTraining(kl_margin=0.2, least_margin=0.15, dual_lr=0.5), {}
    dual = settings.begin()
    assert dual == {"multiplier": 1.0, "margin": 0.2} and settings.weights(dual) == (1.0, 1.0)
    settings.after_step(dual, 0.6)
    assert settings.weights(dual).locality == pytest.approx(1.2)
    for _ in range(20):
        settings.after_step(dual, 0.0)
    assert dual["multiplier"] == 0.0
    settings.after_validation(dual, 0.9)
    assert dual["margin"] == 0.2
    settings.after_validation(dual, 0.91)
    assert dual["margin"] == pytest.approx(0.16)
    settings.after_validation(dual, 1.0)
    assert dual["margin"] == 0.15
