"""What the kernel tests share: random matrices, and the check of a solve against its reference."""

import pytest
import torch

from kedit_fast.kernels.solve import condition, factor, factor_ref, memit_solve, memit_solve_ref
from tests.compare import close


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_moment(d, seed=0):
    """A well conditioned second moment with unequal variances."""
    samples = normal(4 * d + 8, d, seed=seed) * torch.linspace(0.3, 2, d, dtype=torch.float64)
    return samples.T @ samples / len(samples)


def check_solve(n, d_ff, way):
    """Factor and solve equal their references, and a factor serves both, whoever made it."""
    keys, residual, moment = normal(n, d_ff).float(), normal(n, 3, seed=1), random_moment(d_ff).float()
    kept, kept_ref = factor(moment, 5.0, regularizer=1e-3), factor_ref(moment, 5.0, regularizer=1e-3)
    close("L", kept.lower, kept_ref.lower, torch.float64)
    assert torch.equal(kept.lower, kept.lower.tril())
    assert kept.condition == pytest.approx(kept_ref.condition, rel=1e-10)
    close("C⁻¹k", kept.solve(keys.T), kept_ref.solve(keys.T), torch.float64)
    for matrix in (moment, kept, kept_ref):
        got = memit_solve(keys, residual, matrix, 5.0, way=way)
        want = memit_solve_ref(keys, residual, matrix, 5.0, way=way)
        close("u", got[0], want[0], torch.float64)
        close("v", got[1], want[1], torch.float64)


def check_inputs_stay():
    """Nothing that a solve is given is worked on in place."""
    moment, keys, b = random_moment(30), normal(4, 30), normal(30, 2)
    kept = factor(moment, 2.0)
    before = [x.clone() for x in (moment, keys, b, kept.lower)]
    kept.solve(b), kept.solve(b[:, 0]), condition(moment)
    for matrix, way in ((moment, "dense"), (moment, "woodbury"), (kept, "dense"), (kept, "woodbury")):
        memit_solve(keys, keys, matrix, 2.0, way=way)
    assert all(torch.equal(x, y) for x, y in zip((moment, keys, b, kept.lower), before, strict=True))
