"""The linear systems of ROME and MEMIT: products with (λC + KᵀK)⁻¹, by Cholesky factors, in fp64.

    Δ = Rᵀ K (λC + KᵀK)⁻¹          Meng et al. 2023 (MEMIT), eq. 14 and 15, with facts as rows
    C⁻¹ k                           Meng et al. 2022 (ROME), eq. 2: ``factor(moment).solve(k)``

K [n, d_ff] are the keys of n facts, R [n, d] the residuals, C [d_ff, d_ff] the second moment of keys over text, λ its
weight. With n < d_ff the inverse is taken through n x n (Woodbury), and the factor of λC serves every batch.

A matrix that is not positive definite, or so nearly singular that fp64 cannot hold its inverse, is an error.
"""

import math
from dataclasses import dataclass

import torch

from kedit_fast.kernels.second_moment import require_finite

# At condition 1e14 fp64 leaves two digits. A second moment short of tokens, singular but for rounding, comes out at
# 1e15 and more; those of SmolLM2-135M lie between 7e2 and 2e4.
MAX_CONDITION = 1e14
_BLOCK = 1024  # rows a step in _one_norm, so that it needs 8 KiB a column beside the matrix
_COLLECT = "collect more tokens, or pass a regularizer such as 1e-6"


@dataclass(frozen=True, eq=False)
class MomentFactor:
    """Cholesky factor of ``weight * (C + regularizer * mean(diag C) * I)``; made by ``factor``, kept across batches.

    lower: [d_ff, d_ff] fp64, lower triangular, on the second moment's device.
    condition: estimate of the 1-norm condition number of the factored matrix (a lower bound, see ``condition``).
    """

    lower: torch.Tensor
    weight: float
    regularizer: float
    condition: float

    @property
    def d_ff(self) -> int:
        return len(self.lower)

    def solve(self, b: torch.Tensor) -> torch.Tensor:
        """The factored matrix's inverse times ``b``; with weight 1, C⁻¹ b.

        b: [d_ff] or [d_ff, m], any float dtype. Returns fp64 of the same shape. 2 d_ff² FLOP a column.
        Raises ValueError for a wrong length, another device, NaN or infinity.
        """
        if b.ndim not in (1, 2) or len(b) != self.d_ff:
            raise ValueError(f"b has shape {list(b.shape)}; expected [{self.d_ff}] or [{self.d_ff}, m]")
        _check_tensor("b", b, self.lower.device)
        columns = b.detach().to(torch.float64).reshape(self.d_ff, -1)
        return _solve(self.lower, columns).reshape(b.shape)


def factor(
    moment: torch.Tensor, weight: float = 1.0, *, regularizer: float = 0.0, n_tokens: int | None = None
) -> MomentFactor:
    """Factors ``weight * (C + regularizer * mean(diag C) * I)``.

    moment: C [d_ff, d_ff] any float dtype, the MEAN of k kᵀ; only its lower triangle is read. Not changed.
    weight: λ > 0.
    regularizer: ε >= 0, relative to the mean diagonal of C; 0 factors C as it is.
    n_tokens: keys behind C, if known: then too few are reported before any work.

    Cost: d_ff³/3 FLOP and 16 d_ff² bytes, half of them returned.
    Raises ValueError for fewer tokens than d_ff without a regularizer, a matrix that is not positive definite or whose
    condition exceeds MAX_CONDITION, NaN or infinity, a wrong shape or argument.
    """
    _check_moment(moment, weight, regularizer)
    _check_tokens(moment, regularizer, n_tokens)
    lower, condition_number = _cholesky(_weighted(moment, weight, regularizer), "the second moment")
    return MomentFactor(lower, float(weight), float(regularizer), condition_number)


def condition(moment: torch.Tensor) -> float:
    """Estimate of ‖C‖₁ ‖C⁻¹‖₁, the 1-norm condition number of a second moment [d_ff, d_ff].

    Infinite where C is not positive definite. ‖C⁻¹‖₁ by Hager's ascent over a few solves (Higham 1988, ACM TOMS 14, the
    method of LAPACK's dlacon): a lower bound, nearly always within a factor 3. The 2-norm condition number lies within
    a factor d_ff of it, in practice within 10.
    Cost: that of ``factor``. Raises ValueError for NaN or infinity and wrong shapes.
    """
    _check_moment(moment, 1.0, 0.0)
    matrix = _weighted(moment, 1.0, 0.0)
    norm = _one_norm(matrix)
    lower, info = torch.linalg.cholesky_ex(matrix)
    return math.inf if int(info) else norm * _inverse_one_norm(lower)


def memit_solve(
    keys: torch.Tensor,
    residual: torch.Tensor,
    moment: torch.Tensor | MomentFactor,
    weight: float,
    *,
    way: str | None = None,
    regularizer: float = 0.0,
    n_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The update of MEMIT as two factors: Δ = u vᵀ = Rᵀ K (λC + KᵀK)⁻¹.

    keys: K [n, d_ff]; residual: R [n, d], what the layer's output should change by at those keys; any float dtypes.
    moment: C [d_ff, d_ff] (see ``factor``), or ``factor(C, weight)`` kept from an earlier batch.
    weight: λ > 0; must equal the factor's where one is given.
    way: "dense" factors λC + KᵀK, "woodbury" goes through n x n; None takes dense from n = d_ff on. Both give the
       same to about 1e-16 times the condition number. Dense also bears a singular C, if the keys make up for it.
    regularizer, n_tokens: as in ``factor``; belong to the factor where one is given.

    Returns u = Rᵀ [d, n] and v = (λC + KᵀK)⁻¹ Kᵀ [d_ff, n], both fp64 on the moment's device.
    Cost in FLOP: dense 4 n d_ff² + d_ff³/3; Woodbury 2 n d_ff² + 4 n² d_ff + n³/3 beside the factor's d_ff³/3.
    Raises ValueError as ``factor`` does, for shapes that do not fit, and for an unknown way.
    """
    _check_facts(keys, residual, moment)
    if way not in (None, "dense", "woodbury"):
        raise ValueError(f"way = {way!r}; expected 'dense', 'woodbury' or None")
    n, d_ff = keys.shape
    k, u = keys.detach().to(torch.float64), residual.detach().to(torch.float64).T.contiguous()
    if n == 0:
        return u, k.T.contiguous()
    dense = way == "dense" or (way is None and n >= d_ff)
    if isinstance(moment, MomentFactor):
        _check_kept(moment, weight, regularizer, n_tokens)
    elif dense:
        _check_moment(moment, weight, regularizer)
    else:
        moment = factor(moment, weight, regularizer=regularizer, n_tokens=n_tokens)
    return u, _dense(k, moment, weight, regularizer) if dense else _woodbury(k, moment.lower)


def _dense(k, moment, weight, regularizer):
    """v [d_ff, n] by the factor of A = λC + KᵀK itself."""
    if isinstance(moment, MomentFactor):
        matrix = moment.lower @ moment.lower.T
    else:
        matrix = _weighted(moment, weight, regularizer)
    matrix.addmm_(k.T, k)
    lower, _ = _cholesky(matrix, "λC + KᵀK")
    return _solve(lower, k.T)


def _woodbury(k, lower):
    """v [d_ff, n] from L, L Lᵀ = λC: with G = L⁻¹ Kᵀ, (L Lᵀ + KᵀK)⁻¹ Kᵀ = L⁻ᵀ G (I + Gᵀ G)⁻¹."""
    g = torch.linalg.solve_triangular(lower, k.T, upper=False)
    inner = torch.eye(len(k), dtype=k.dtype, device=k.device).addmm_(g.T, g)
    # I + GᵀG has no eigenvalue below 1, so this factor exists whatever the keys are.
    right = torch.cholesky_solve(g.T, torch.linalg.cholesky(inner)).T
    return torch.linalg.solve_triangular(lower.T, right, upper=True)


def _solve(lower, columns):
    """(L Lᵀ)⁻¹ columns [d_ff, m]."""
    # torch.cholesky_solve copies the factor first: 10x slower for one column, 1.8x for 100 (d_ff 3072, one CPU thread).
    half = torch.linalg.solve_triangular(lower, columns, upper=False)
    return torch.linalg.solve_triangular(lower.T, half, upper=True)


def _weighted(moment, weight, regularizer):
    """weight * (C + regularizer * mean(diag C) * I), a new fp64 matrix."""
    matrix = moment.detach().to(torch.float64) * weight
    if regularizer:
        diagonal = matrix.diagonal()
        diagonal += regularizer * diagonal.mean()
    return matrix


def _cholesky(matrix, name):
    """Factor and condition estimate of a matrix given by its lower triangle, or the error that says why not."""
    norm, diagonal = _one_norm(matrix), matrix.diagonal().clone()
    lower, info = torch.linalg.cholesky_ex(matrix)
    d_ff, silent = len(matrix), int((diagonal <= 0).sum())
    if int(info):
        dead = f", {silent} of its diagonal entries are not positive (neurons that never fire)" if silent else ""
        raise ValueError(
            f"{name} [{d_ff}, {d_ff}] is not positive definite (minor of order {int(info)}{dead}): a second moment of "
            f"fewer than d_ff = {d_ff} tokens is singular; {_COLLECT}"
        )
    condition_number = norm * _inverse_one_norm(lower)
    if not condition_number <= MAX_CONDITION:
        raise ValueError(
            f"{name} [{d_ff}, {d_ff}] is singular in fp64: condition number {condition_number:.1e}, at most "
            f"{MAX_CONDITION:.0e} can be solved; {_COLLECT}"
        )
    return lower, condition_number


def _one_norm(matrix):
    """Largest column sum of |A| of a symmetric matrix, from its lower triangle."""
    sums = torch.zeros(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for begin in range(0, len(matrix), _BLOCK):
        rows = matrix[begin : begin + _BLOCK].tril(begin).abs_()
        sums += rows.sum(0)
        sums[begin : begin + _BLOCK] += rows.sum(1) - rows.diagonal(begin)
    return float(sums.max())


def _inverse_one_norm(lower, steps: int = 5):
    """Lower bound of ‖(L Lᵀ)⁻¹‖₁ that is nearly always within a factor 3 (see ``condition``)."""
    size = len(lower)
    x = torch.full((size, 1), 1 / size, dtype=lower.dtype, device=lower.device)
    estimate = 0.0
    for _ in range(steps):
        y = _solve(lower, x)
        estimate = max(estimate, float(y.abs().sum()))
        gradient = _solve(lower, torch.where(y >= 0, 1.0, -1.0).to(y.dtype))
        steepest = int(gradient.abs().argmax())
        if float(gradient[steepest].abs()) <= float((gradient * x).sum()):
            break
        x = torch.zeros_like(x)
        x[steepest] = 1
    # The ascent can stop at a saddle; Higham's alternating vector catches the matrices that make it do so.
    ramp = torch.linspace(1, 2, size, dtype=lower.dtype, device=lower.device)
    ramp[1::2] *= -1
    return max(estimate, 2 * float(_solve(lower, ramp[:, None]).abs().sum()) / (3 * size))


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


def _check_tokens(moment, regularizer, n_tokens):
    d_ff = len(moment)
    if n_tokens is not None and n_tokens < d_ff and not regularizer:
        raise ValueError(
            f"the second moment has rank ≤ n_tokens = {n_tokens} < d_ff = {d_ff} and so no inverse; {_COLLECT}"
        )


def _check_facts(keys, residual, moment):
    if keys.ndim != 2 or residual.ndim != 2 or len(keys) != len(residual):
        raise ValueError(
            f"keys {list(keys.shape)} and residual {list(residual.shape)}: expected [n, d_ff] and [n, d], a row a fact"
        )
    matrix = moment.lower if isinstance(moment, MomentFactor) else moment
    if matrix.ndim != 2 or matrix.shape[1] != keys.shape[1]:
        raise ValueError(f"keys {list(keys.shape)} do not fit the second moment {list(matrix.shape)}: d_ff differs")
    _check_tensor("keys", keys, matrix.device)
    _check_tensor("residual", residual, matrix.device)


def _check_kept(kept, weight, regularizer, n_tokens):
    if weight != kept.weight:
        raise ValueError(f"weight = {weight}, but the factor was made with {kept.weight}; factor the moment again")
    if regularizer or n_tokens is not None:
        raise ValueError("regularizer and n_tokens belong to factor(); memit_solve was given a MomentFactor")
