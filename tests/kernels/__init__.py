"""What the kernel tests share: random matrices, and the checks of a solve, whoever computes it."""

import math

import pytest
import torch

from kedit_fast.kernels.solve import MAX_CONDITION, condition, factor, factor_ref, memit_solve, memit_solve_ref
from tests.compare import close


def normal(*shape, seed=0, dtype=torch.float64):
    """The same numbers in every dtype, rounded."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_moment(d, seed=0):
    """A well conditioned second moment with unequal variances."""
    samples = normal(4 * d + 8, d, seed=seed) * torch.linspace(0.3, 2, d, dtype=torch.float64)
    return samples.T @ samples / len(samples)


def check_solve(n, d_ff, way, device="cpu", rel=1e-10):
    """Factor and solve equal their references, and a factor serves both, whoever made it."""
    keys, residual, moment = normal(n, d_ff).float(), normal(n, 3, seed=1), random_moment(d_ff).float()
    on_device = keys.to(device), residual.to(device)
    kept, kept_ref = factor(moment.to(device), 5.0), factor_ref(moment, 5.0)
    close("L", kept.lower, kept_ref.lower, torch.float64)
    assert torch.equal(kept.lower, kept.lower.tril())
    assert kept.condition == pytest.approx(kept_ref.condition, rel=rel)
    close("C⁻¹k", kept.solve(on_device[0].T), kept_ref.solve(keys.T), torch.float64)
    want = memit_solve_ref(keys, residual, moment, 5.0, way=way)
    factors = (kept, kept_ref) if device == "cpu" else (kept,)
    made = [memit_solve(*on_device, one, 5.0, way=way) for one in (moment.to(device), *factors)]
    for u, v in made:
        close("u", u, want[0], torch.float64)
        close("v", v, want[1], torch.float64)


def check_bad_moments():
    """What is not positive definite, or nearly singular, is named and never inverted."""
    moment = random_moment(10)
    moment[3, 3] = 0
    with pytest.raises(ValueError, match=r"minor of order 4, 1 of its diagonal entries are not positive \(neurons"):
        factor(moment)
    assert condition(moment) == math.inf
    nearly = torch.ones(10, dtype=torch.float64)
    nearly[-1] = 2e-15
    with pytest.raises(ValueError, match=r"singular in fp64: condition number 5.0e\+14, at most 1e\+14"):
        factor(torch.diag(nearly))
    assert condition(torch.diag(nearly)) > MAX_CONDITION


def check_inputs_stay():
    """Nothing that a solve is given is worked on in place."""
    moment, keys, b = random_moment(30), normal(4, 30), normal(30, 2)
    kept = factor(moment, 2.0)
    before = [x.clone() for x in (moment, keys, b, kept.lower)]
    kept.solve(b), kept.solve(b[:, 0]), condition(moment)
    for matrix, way in ((moment, "dense"), (moment, "woodbury"), (kept, "dense"), (kept, "woodbury")):
        memit_solve(keys, keys, matrix, 2.0, way=way)
    assert all(torch.equal(x, y) for x, y in zip((moment, keys, b, kept.lower), before, strict=True))
