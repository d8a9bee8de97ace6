"""The linear systems of ROME and MEMIT: products with (λC + KᵀK)⁻¹, by Cholesky factors, in fp64.

    Δ = Rᵀ K (λC + KᵀK)⁻¹          Meng et al. 2023 (MEMIT), eq. 14 and 15, with facts as rows
    C⁻¹ k                           Meng et al. 2022 (ROME), eq. 2: ``factor(moment).solve(k)``

K [n, d_ff] are the keys of n facts, R [n, d] the residuals, C [d_ff, d_ff] the second moment of keys over text, λ its
weight. With n < d_ff the inverse is taken through n x n (Woodbury), and the factor of λC serves every batch.

A matrix that is not positive definite, or so nearly singular that fp64 cannot hold its inverse, is an error.

The algebra is numpy's OpenBLAS on the CPU, cuSOLVER on CUDA, in place: one [d_ff, d_ff] for λC + KᵀK and its factor.
``*_ref`` do the same in plain torch: the reference, and what runs elsewhere (``dispatch.backend_for``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from kedit_fast.kernels import cusolver, dispatch, openblas
from kedit_fast.kernels.second_moment import require_finite

# At condition 1e14 fp64 leaves two digits. A second moment short of tokens, singular but for rounding, comes out at
# 1e15 and more; those of SmolLM2-135M lie between 7e2 and 2e4.
MAX_CONDITION = 1e14
_BLOCK = 256  # rows a step through a matrix, so that 2 KiB a column are needed beside it
_COLLECT = "collect more tokens, or pass a regularizer such as 1e-6"


@dataclass(frozen=True, eq=False)
class MomentFactor:
    """Cholesky factor of ``weight * (C + regularizer * mean(diag C) * I)``; made by ``factor``, kept across batches.

    lower: [d_ff, d_ff] fp64, lower triangular, on the second moment's device.
    condition: estimate of the 1-norm condition number of the factored matrix (a lower bound, see ``condition``).
    """

    lower: Tensor
    weight: float
    condition: float

    @property
    def d_ff(self) -> int:
        return len(self.lower)

    def solve(self, b: Tensor) -> Tensor:
        """The factored matrix's inverse times ``b``; with weight 1, C⁻¹ b.

        b: [d_ff] or [d_ff, m], any float dtype. Returns fp64 of the same shape. 2 d_ff² FLOP a column.
        Raises ValueError for a wrong length, another device, NaN or infinity.
        """
        if b.ndim not in (1, 2) or len(b) != self.d_ff:
            raise ValueError(f"b has shape {list(b.shape)}; expected [{self.d_ff}] or [{self.d_ff}, m]")
        _check_tensor("b", b, self.lower.device)
        rows = _own_rows(b.detach().reshape(self.d_ff, -1).T)
        return _solve(_algebra(self.lower.device), self.lower, rows).T.reshape(b.shape)


def factor(
    moment: Tensor,
    weight: float = 1.0,
    *,
    kept: Tensor | None = None,
    regularizer: float = 0.0,
    n_tokens: int | None = None,
) -> MomentFactor:
    """Factors ``weight * (C + regularizer * mean(diag C) * I) + KₚᵀKₚ``.

    moment: C [d_ff, d_ff] any float dtype, the MEAN of k kᵀ; only its lower triangle is read. Not changed.
    weight: λ > 0.
    kept: Kₚ [m, d_ff] keys of earlier edits, whose outputs are to stay; any float dtype.
    regularizer: ε >= 0, relative to the mean diagonal of C; 0 factors C as it is.
    n_tokens: keys behind C, if known: then too few are reported before any work.

    Cost: d_ff³/3 FLOP and the 8 d_ff² bytes that are returned; as reference twice as many bytes.
    Raises ValueError for fewer tokens than d_ff without a regularizer, a matrix that is not positive definite or whose
    condition exceeds MAX_CONDITION, NaN or infinity, a wrong shape or argument.
    """
    return _factor(_algebra(moment.device), moment, weight, kept, regularizer, n_tokens)


def factor_ref(
    moment: Tensor,
    weight: float = 1.0,
    *,
    kept: Tensor | None = None,
    regularizer: float = 0.0,
    n_tokens: int | None = None,
) -> MomentFactor:
    """``factor`` in plain torch; same arguments, result and errors."""
    return _factor(_TORCH, moment, weight, kept, regularizer, n_tokens)


def condition(moment: Tensor) -> float:
    """Estimate of ‖C‖₁ ‖C⁻¹‖₁, the 1-norm condition number of a second moment [d_ff, d_ff].

    Infinite where C is not positive definite. ‖C⁻¹‖₁ by Hager's ascent over a few solves (Higham 1988, ACM TOMS 14, the
    method of LAPACK's dlacon): a lower bound, nearly always within a factor 3. The 2-norm condition number lies within
    a factor d_ff of it, in practice within 10.
    Cost: that of ``factor``. Raises ValueError for NaN or infinity and wrong shapes.
    """
    _check_moment(moment, 1.0, 0.0)
    algebra, matrix = _algebra(moment.device), _weighted(moment, 1.0, 0.0)
    norm = algebra.one_norm(matrix)
    lower, minor = algebra.cholesky_(matrix)
    return math.inf if minor else norm * _inverse_one_norm(lambda row: _solve(algebra, lower, row), lower)


def memit_solve(
    keys: Tensor, residual: Tensor, moment: Tensor | MomentFactor, weight: float, *, way: str | None = None
) -> tuple[Tensor, Tensor]:
    """The update of MEMIT as two factors: Δ = u vᵀ = Rᵀ K (λC + KᵀK)⁻¹.

    keys: K [n, d_ff]; residual: R [n, d], what the layer's output should change by at those keys; any float dtypes.
    moment: C [d_ff, d_ff] (see ``factor``), or ``factor(C, weight)`` kept from an earlier batch.
    weight: λ > 0; must equal the factor's where one is given.
    way: "dense" factors λC + KᵀK, "woodbury" goes through n x n; None takes dense from n = d_ff on. Both give the
       same to about 1e-16 times the condition number. Dense also bears a singular C, if the keys make up for it.

    Returns u = Rᵀ [d, n] and v = (λC + KᵀK)⁻¹ Kᵀ [d_ff, n], both fp64 on the moment's device.
    Cost in FLOP: dense 4 n d_ff² + d_ff³/3; Woodbury 2 n d_ff² + 4 n² d_ff + n³/3 beside the factor's d_ff³/3.
    Raises ValueError as ``factor`` does, for shapes that do not fit, and for an unknown way.
    """
    return _memit_solve(_algebra(_matrix(moment).device), keys, residual, moment, weight, way)


def memit_solve_ref(
    keys: Tensor, residual: Tensor, moment: Tensor | MomentFactor, weight: float, *, way: str | None = None
) -> tuple[Tensor, Tensor]:
    """``memit_solve`` in plain torch; same arguments, result and errors."""
    return _memit_solve(_TORCH, keys, residual, moment, weight, way)


class _Algebra(NamedTuple):
    """What the solves are made of, with the signatures of ``openblas``; names with _ may overwrite what they get."""

    cholesky_: Callable
    add_gram_: Callable
    solve_triangular_: Callable
    one_norm: Callable


def _algebra(device) -> _Algebra:
    if dispatch.backend_for("solve", device, torch.float64) != "native":
        return _TORCH
    return _OPENBLAS if device.type == "cpu" else _CUSOLVER


def _factor(algebra, moment, weight, kept, regularizer, n_tokens):
    _check_moment(moment, weight, regularizer)
    d_ff = len(moment)
    if kept is not None:
        if kept.ndim != 2 or kept.shape[1] != d_ff:
            raise ValueError(f"kept has shape {list(kept.shape)}; expected [m, {d_ff}], a row a key")
        _check_tensor("kept", kept, moment.device)
    if n_tokens is not None and n_tokens < d_ff and not regularizer:
        raise ValueError(
            f"the second moment has rank ≤ n_tokens = {n_tokens} < d_ff = {d_ff} and so no inverse; {_COLLECT}"
        )
    matrix = _weighted(moment, weight, regularizer)
    if kept is not None and len(kept):
        algebra.add_gram_(matrix, _own_rows(kept.detach()))
    lower, condition_number = _cholesky(algebra, matrix, "the second moment")
    return MomentFactor(lower, float(weight), condition_number)


def _memit_solve(algebra, keys, residual, moment, weight, way):
    _check_facts(keys, residual, moment)
    if way not in (None, "dense", "woodbury"):
        raise ValueError(f"way = {way!r}; expected 'dense', 'woodbury' or None")
    n, d_ff = keys.shape
    k, u = _own_rows(keys.detach()), residual.detach().to(torch.float64).T.contiguous()
    if n == 0:
        return u, k.T.contiguous()
    dense = way == "dense" or (way is None and n >= d_ff)
    if isinstance(moment, MomentFactor):
        if weight != moment.weight:
            raise ValueError(
                f"weight = {weight}, but the factor was made with {moment.weight}; factor the moment again"
            )
    elif dense:
        _check_moment(moment, weight, 0.0)
    else:
        moment = _factor(algebra, moment, weight, None, 0.0, None)
    return u, _dense(algebra, k, moment, weight) if dense else _woodbury(algebra, k, moment.lower)


def _dense(algebra, k, moment, weight):
    """v [d_ff, n] by the factor of A = λC + KᵀK itself; k is overwritten."""
    if isinstance(moment, MomentFactor):
        matrix = _zeros(moment.d_ff, moment.lower.device)
        algebra.add_gram_(matrix, moment.lower.contiguous(), by_rows=True)
    else:
        matrix = _weighted(moment, weight, 0.0)
    algebra.add_gram_(matrix, k)
    lower, _ = _cholesky(algebra, matrix, "λC + KᵀK")
    return _solve(algebra, lower, k).T


def _woodbury(algebra, k, lower):
    """v [d_ff, n] from L, L Lᵀ = λC: with rows G = K L⁻ᵀ, K (L Lᵀ + KᵀK)⁻¹ = (I + G Gᵀ)⁻¹ G L⁻¹; k is overwritten."""
    g = algebra.solve_triangular_(lower, k, left=False, transposed=True)
    inner = torch.eye(len(g), dtype=g.dtype, device=g.device)
    algebra.add_gram_(inner, g, by_rows=True)
    # I + G Gᵀ has no eigenvalue below 1, so this factor exists whatever the keys are.
    root, _ = algebra.cholesky_(inner)
    for transposed in (False, True):
        g = algebra.solve_triangular_(root, g, left=True, transposed=transposed)
    return algebra.solve_triangular_(lower, g, left=False, transposed=False).T


def _solve(algebra, lower, rows):
    """(L Lᵀ)⁻¹ times each of ``rows`` [m, d_ff], which are overwritten."""
    # Not torch.cholesky_solve, which copies the factor: 10x slower for one row, 1.8x for 100 (d_ff 3072, one thread).
    half = algebra.solve_triangular_(lower, rows, left=False, transposed=True)
    return algebra.solve_triangular_(lower, half, left=False, transposed=False)


def _own_rows(x):
    """A copy in fp64 whose rows lie one after the other, to be worked on in place."""
    return torch.empty(x.shape, dtype=torch.float64, device=x.device).copy_(x)


def _zeros(size, device):
    if device.type != "cpu":
        return torch.zeros(size, size, dtype=torch.float64, device=device)
    # The system's empty pages, in place of writing zeros that are then written over: a third of _weighted's time.
    return torch.from_numpy(numpy.zeros((size, size)))


def _weighted(moment, weight, regularizer):
    """weight * (C + regularizer * mean(diag C) * I): the lower triangle of a new fp64 matrix, zeros above."""
    moment = moment.detach()
    matrix = _zeros(len(moment), moment.device)
    for begin in range(0, len(moment), _BLOCK):
        end = begin + _BLOCK
        torch.mul(moment[begin:end, :end].to(torch.float64), weight, out=matrix[begin:end, :end])
        matrix[begin:end, begin:end].tril_()
    if regularizer:
        diagonal = matrix.diagonal()
        diagonal += regularizer * diagonal.mean()
    return matrix


def _cholesky(algebra, matrix, name):
    """Factor and condition estimate of a matrix given by its lower triangle, or the error that says why not."""
    norm, d_ff = algebra.one_norm(matrix), len(matrix)
    silent = int((matrix.diagonal() <= 0).sum())
    lower, minor = algebra.cholesky_(matrix)
    if minor:
        dead = f", {silent} of its diagonal entries are not positive (neurons that never fire)" if silent else ""
        raise ValueError(
            f"{name} [{d_ff}, {d_ff}] is not positive definite (minor of order {minor}{dead}): a second moment of "
            f"fewer than d_ff = {d_ff} tokens is singular; {_COLLECT}"
        )
    condition_number = norm * _inverse_one_norm(lambda row: _solve(algebra, lower, row), lower)
    if not condition_number <= MAX_CONDITION:
        raise ValueError(
            f"{name} [{d_ff}, {d_ff}] is singular in fp64: condition number {condition_number:.1e}, at most "
            f"{MAX_CONDITION:.0e} can be solved; {_COLLECT}"
        )
    return lower, condition_number


def _inverse_one_norm(solve, like, steps: int = 5):
    """Lower bound of ‖A⁻¹‖₁ that is nearly always within a factor 3 (see ``condition``); A is symmetric.

    solve: A⁻¹ times a row [1, d], which it may overwrite; like: [d, d] of A's dtype and device.
    """
    size = len(like)
    x = like.new_full((1, size), 1 / size)
    estimate = 0.0
    for _ in range(steps):
        y = solve(x.clone())
        estimate = max(estimate, float(y.abs().sum()))
        gradient = solve(torch.where(y >= 0, 1.0, -1.0).to(y.dtype))
        steepest = int(gradient.abs().argmax())
        if float(gradient[0, steepest].abs()) <= float((gradient * x).sum()):
            break
        x = torch.zeros_like(x)
        x[0, steepest] = 1
    # The ascent can stop at a saddle; Higham's alternating vector catches the matrices that make it do so.
    ramp = torch.linspace(1, 2, size, dtype=like.dtype, device=like.device)
    ramp[1::2] *= -1
    return max(estimate, 2 * float(solve(ramp[None]).abs().sum()) / (3 * size))


def _torch_cholesky(matrix):
    lower, info = torch.linalg.cholesky_ex(matrix)
    return lower, int(info)


def _torch_add_gram_(matrix, rows, *, by_rows=False):
    matrix.addmm_(*((rows, rows.T) if by_rows else (rows.T, rows)))


def _torch_solve_triangular(lower, b, *, left, transposed):
    return torch.linalg.solve_triangular(lower.T if transposed else lower, b, upper=transposed, left=left)


def _torch_one_norm(matrix):
    sums = torch.zeros(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for begin in range(0, len(matrix), _BLOCK):
        rows = matrix[begin : begin + _BLOCK].tril(begin).abs_()
        sums += rows.sum(0)
        sums[begin : begin + _BLOCK] += rows.sum(1) - rows.diagonal(begin)
    return float(sums.max())


_TORCH = _Algebra(_torch_cholesky, _torch_add_gram_, _torch_solve_triangular, _torch_one_norm)
_OPENBLAS = _Algebra(openblas.cholesky_, openblas.add_gram_, openblas.solve_triangular_, openblas.one_norm)
_CUSOLVER = _Algebra(cusolver.cholesky_, cusolver.add_gram_, cusolver.solve_triangular_, _torch_one_norm)


def _check_tensor(name, x, device):
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}; expected a floating-point dtype")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and the second moment on {device}; move one of them")
    require_finite(name, x)


def _check_moment(moment, weight, regularizer):
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1] or not len(moment):
        raise ValueError(f"the second moment has shape {list(moment.shape)}; expected [d_ff, d_ff]")
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"weight = {weight}; expected a finite number above 0 (mom2_update_weight, λ)")
    if not (regularizer >= 0 and math.isfinite(regularizer)):
        raise ValueError(f"regularizer = {regularizer}; expected 0 or a small positive number")
    _check_tensor("moment", moment, moment.device)


def _matrix(moment):
    return moment.lower if isinstance(moment, MomentFactor) else moment


def _check_facts(keys, residual, moment):
    if keys.ndim != 2 or residual.ndim != 2 or len(keys) != len(residual):
        raise ValueError(
            f"keys {list(keys.shape)} and residual {list(residual.shape)}: expected [n, d_ff] and [n, d], a row a fact"
        )
    matrix = _matrix(moment)
    if matrix.ndim != 2 or matrix.shape[1] != keys.shape[1]:
        raise ValueError(f"keys {list(keys.shape)} do not fit the second moment {list(matrix.shape)}: d_ff differs")
    _check_tensor("keys", keys, matrix.device)
    _check_tensor("residual", residual, matrix.device)
