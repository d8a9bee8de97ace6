"""What must hold of a solve, whoever computes it: torch, OpenBLAS, cuBLAS and cuSOLVER, here and on a GPU."""

import math

import pytest
import torch

from kedit_fast.kernels.solve import MAX_CONDITION, condition, factor, factor_ref, memit_solve, memit_solve_ref
from tests.compare import close
from tests.kernels import normal, random_moment


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


SIDES = [(True, (9, 5)), (True, (9, 1)), (False, (5, 9)), (False, (1, 9))]  # whether from the left, and b's shape


def check_triangular(library, left, shape, transposed):
    """L X = B or X L = B in place of B; what stands above the diagonal is not read."""
    lower, b = torch.linalg.cholesky(random_moment(9)).contiguous(), normal(*shape)
    inverse = torch.linalg.inv(lower.T if transposed else lower)
    want = inverse @ b if left else b @ inverse
    assert library.solve_triangular_(with_nan_above(lower), b, left=left, transposed=transposed) is b
    close("b", b, want, torch.float64)


def check_gram(library, d, n, by_rows):
    """A product is added to the lower triangle, and nothing above it is read or written."""
    matrix, rows = (
        with_nan_above(torch.full((d, d), 2.0, dtype=torch.float64)),
        normal(d, n) if by_rows else normal(n, d),
    )
    library.add_gram_(matrix, rows, by_rows=by_rows)
    product = rows @ rows.T if by_rows else rows.T @ rows
    close("lower", matrix.tril().nan_to_num(), (2 + product).tril(), torch.float64)
    assert int(matrix.isnan().sum()) == d * (d - 1) // 2


def check_cholesky(library, d):
    """A factor in place of its matrix, which is given back; above the diagonal nothing is read or written."""
    moment = random_moment(d)
    matrix = with_nan_above(moment)
    lower, minor = library.cholesky_(matrix)
    assert lower is matrix and minor == 0
    close("L", lower.tril(), torch.linalg.cholesky(moment), torch.float64)
    assert int(lower.isnan().sum()) == d * (d - 1) // 2
    return matrix


def with_nan_above(matrix):
    return matrix.tril() + torch.full_like(matrix, math.nan).triu(1)


def check_inputs_stay():
    """Nothing that a solve is given is worked on in place."""
    moment, keys, b = random_moment(30), normal(4, 30), normal(30, 2)
    kept = factor(moment, 2.0)
    before = [x.clone() for x in (moment, keys, b, kept.lower)]
    kept.solve(b), kept.solve(b[:, 0]), condition(moment)
    for matrix, way in ((moment, "dense"), (moment, "woodbury"), (kept, "dense"), (kept, "woodbury")):
        memit_solve(keys, keys, matrix, 2.0, way=way)
    assert all(torch.equal(x, y) for x, y in zip((moment, keys, b, kept.lower), before, strict=True))
