"""MALMEN's least squares: one system over all tokens, whatever their number and in whatever packs."""

import torch

from kedit_fast.editors.training_step import edit_task
from kedit_fast.jobs.gradients import GradientTask, gradient_factors
from tests.conftest import tiny_lm
from tests.editors.cases import relative
from tests.editors.networks import FACTS, network


def factors(lm, made, facts):
    return gradient_factors(lm, [edit_task(lm, fact) for fact in facts], made.places).factors


def test_few_tokens_and_many_are_the_normal_equations():
    """In factors of both sides' rows, and, of more than a matrix would take, by HᵀH."""
    lm = tiny_lm("llama", torch.float64)
    made = network(lm, "malmen")
    kinds = set()
    for n in (1, 12):
        found = factors(lm, made, FACTS[:n])
        deltas = made.deltas([found], alone=False)
        for place in made.places:
            h, v = made.shifts(place, found[place])
            inner = h.T @ h + made.scale("ridge", place).exp() * torch.eye(h.shape[1], dtype=h.dtype)
            assert relative(deltas[place][0].dense(), torch.linalg.solve(inner, h.T @ v).T) < 1e-8
            kinds.add(type(deltas[place][0]).__name__)
    assert kinds == {"LowRank", "Dense"}


def test_packs_are_one_system():
    lm = tiny_lm("llama", torch.float64)
    made = network(lm, "malmen")
    whole = made.deltas([factors(lm, made, FACTS)], alone=False)
    parts = made.deltas([factors(lm, made, FACTS[:5]), factors(lm, made, FACTS[5:])], alone=False)
    apart = made.deltas([factors(lm, made, FACTS)], alone=True)
    for place in made.places:
        assert relative(parts[place][0].dense(), whole[place][0].dense()) < 1e-8
        assert relative(apart[place][0].dense(), whole[place][0].dense()) > 1e-3


def test_a_repeated_fact_hardly_counts_twice():
    """What a sum would double: at a small λ the system asks for the same at the same inputs."""
    lm = tiny_lm("llama", torch.float64)
    made = network(lm, "malmen")
    made.scales["ridge"].data.fill_(-12.0)
    task: GradientTask = edit_task(lm, FACTS[0])
    once, twice = (
        made.deltas([gradient_factors(lm, [task] * n, made.places).factors], alone=False)[1, "up"][0].dense()
        for n in (1, 2)
    )
    assert relative(twice, once) < 1e-2
