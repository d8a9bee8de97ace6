"""LEACE: the smallest affine change of rows x after which no linear predictor tells a concept z (Belrose et al. 2023,
arXiv:2306.03819).

    r(x) = x - W⁺ U Uᵀ W (x - μ),   W = (Σ_xx^(1/2))⁺,   U: left singular vectors of W Σ_xz

Cov(r(x), z) is 0, so that of all linear predictors of z none beats the best constant. Rows and labels come in batches
(``LeaceFitter.update``): means and covariances are merged exactly, in fp64 (Chan et al. 1979), so it does not matter
how they are cut. What comes out is the ``Eraser``: two thin factors and a mean.
"""

from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.files import existing_file, reading, replace_file
from kedit_fast.basics.state import own_state, wide

METHODS = ("leace", "orth")
FORMAT = "kedit_fast eraser 1"
ROUNDING = 1e-7  # of a column's mean, below which its standard deviation is rounding


@dataclass(frozen=True, eq=False)
class Eraser:
    """r(x) = x - (x - mu) proj_rightᵀ proj_leftᵀ, for rows x [n, d].

    proj_left: [d, k]; proj_right: [k, d]; mu: [d], 0 where the erasure is linear (affine=False)
    """

    proj_left: Tensor
    proj_right: Tensor
    mu: Tensor

    def __post_init__(self):
        left, right, mu = parts = (self.proj_left, self.proj_right, self.mu)
        if left.ndim != 2 or right.shape != left.T.shape or mu.shape != left.shape[:1]:
            shapes = ", ".join(str(list(x.shape)) for x in parts)
            raise ValueError(f"an eraser's proj_left, proj_right, mu: expected [d, k], [k, d] and [d], got {shapes}")
        if not all(x.is_floating_point() and torch.isfinite(x).all() for x in parts):
            raise ValueError("an eraser's proj_left, proj_right and mu: expected finite floats")

    @property
    def rank(self) -> int:
        """k: of z's covariance with x, one less than there are classes at most."""
        return self.proj_left.shape[1]

    @property
    def P(self) -> Tensor:
        """[d, d] the projection: r(x) = P (x - mu) + mu."""
        return torch.eye(len(self.mu)).to(self.proj_left) - self.proj_left @ self.proj_right

    def __call__(self, x: Tensor) -> Tensor:
        """Erased rows, of x's dtype; computed in fp32, in fp64 for fp64 rows. Raises ValueError for another width."""
        if x.shape[-1:] != self.mu.shape:
            raise ValueError(f"rows {list(x.shape)}: expected [n, {len(self.mu)}], which the eraser was fitted on")
        left, right, mu = (part.to(x.device, wide(x.dtype)) for part in (self.proj_left, self.proj_right, self.mu))
        return (x - ((x - mu) @ right.T) @ left.T).to(x.dtype)

    def save(self, path: checks.AnyPath) -> None:
        """One safetensors file, whole or not at all."""
        tensors = {name: part.detach().cpu().contiguous() for name, part in vars(self).items()}
        with replace_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={"format": FORMAT})

    @classmethod
    @own_state()
    def load(cls, path: checks.AnyPath) -> "Eraser":
        """What ``save`` wrote. Raises ValueError, naming the file, where it is no eraser."""
        path = checks.path("path", path)
        existing_file(path, "an eraser")
        with reading(path, "expected what Eraser.save wrote", "is no eraser"), safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            return cls(*(file.get_tensor(name) for name in ("proj_left", "proj_right", "mu")))


class LeaceFitter:
    """Means and covariances of rows x [n, d] and labels z, in batches; ``eraser`` is what follows from all so far.

    x_dim, z_dim: d and the number of classes, or of z's columns
    method: "leace", or "orth": W = I, the orthogonal projection off the span of Σ_xz
    affine: whether the mean of x stays as it is; without it the erasure is linear (mu = 0) and erases as much
    constrain_cov_trace: an oblique projection may stretch what is left: where the trace of the covariance would grow it
        is mixed with the orthogonal one, whose kernel is the same, until it does not
    shrinkage: W is of Σ_xx shrunk towards a multiple of I (Bodnar et al. 2014), for few rows; it changes what is
        smallest, not what is erased
    svd_tol: singular values of W Σ_xz, with each column of z in its standard deviations (correlations), up to it count
        as none; 0.01 as published, where columns are as they come, so that a rare class or small numbers count as none
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        method: str = "leace",
        affine: bool = True,
        constrain_cov_trace: bool = True,
        shrinkage: bool = True,
        svd_tol: float = 0.01,
    ) -> None:
        self.x_dim = checks.whole("x_dim", x_dim, least=1, like=576)
        self.z_dim = checks.whole("z_dim", z_dim, least=1, like=2)
        self.method = checks.choice("method", method, METHODS)
        self.affine = checks.flag("affine", affine)
        self.constrain_cov_trace = checks.flag("constrain_cov_trace", constrain_cov_trace)
        self.shrinkage = checks.flag("shrinkage", shrinkage)
        self.svd_tol = checks.number("svd_tol", svd_tol, least=0)
        self.n = 0
        self._mean = torch.zeros(x_dim + z_dim, dtype=torch.float64)  # of x and z side by side
        self._scatter = torch.zeros(x_dim + z_dim, x_dim + z_dim, dtype=torch.float64)

    @own_state()
    def update(self, x: Tensor, z: Tensor) -> "LeaceFitter":
        """Adds rows x [n, d] with labels z: [n] class numbers, or [n, z_dim] numbers. Gives itself.

        Raises ValueError for another width, for classes that there are not, and for rows that are not finite.
        """
        checks.instance("x", x, Tensor, f"a tensor [n, {self.x_dim}]")
        checks.instance("z", z, Tensor, f"a tensor [n] or [n, {self.z_dim}]")
        if x.ndim != 2 or x.shape[1] != self.x_dim or z.ndim == 0 or len(x) != len(z):
            raise ValueError(
                f"x {list(x.shape)} with z {list(z.shape)}: expected rows [n, {self.x_dim}] and a label for each"
            )
        if not len(x):
            return self
        both = torch.cat([x.detach().double().cpu(), self._columns(z)], 1)
        if not torch.isfinite(both).all():
            raise ValueError("x or z hold NaN or infinity; nothing was added")
        n, mean = len(both), both.mean(0)
        apart = mean - self._mean
        centered = both - mean
        self._scatter += centered.T @ centered + torch.outer(apart, apart) * (self.n * n / (self.n + n))
        self._mean = self._mean + apart * (n / (self.n + n))
        self.n += n
        return self

    def _columns(self, z: Tensor) -> Tensor:
        """[n, z_dim] fp64."""
        if z.ndim == 2 and z.shape[1] == self.z_dim:
            return z.detach().double().cpu()
        if z.ndim != 1 or z.dtype.is_floating_point or not (0 <= int(z.min()) <= int(z.max()) < self.z_dim):
            raise ValueError(
                f"z: expected [n] class numbers from 0 to {self.z_dim - 1}, or [n, {self.z_dim}] numbers; got "
                f"{z.dtype} {list(z.shape)}"
            )
        return torch.nn.functional.one_hot(z.detach().cpu().long(), self.z_dim).double()

    # ---- what follows

    @property
    def mean_x(self) -> Tensor:
        """[d]"""
        return self._mean[: self.x_dim]

    @property
    def sigma_xx(self) -> Tensor:
        """[d, d] covariance of x, of all n rows."""
        return self._sigma[: self.x_dim, : self.x_dim]

    @property
    def sigma_xz(self) -> Tensor:
        """[d, z_dim] covariance of x and z."""
        return self._sigma[: self.x_dim, self.x_dim :]

    @property
    def _sigma(self) -> Tensor:
        if self.n < 2:
            raise ValueError(f"{self.n} rows: expected 2 at least to know a covariance; call update with more")
        return self._scatter / self.n

    @property
    def _spread_of_z(self) -> Tensor:
        """[z_dim] standard deviations; infinite for columns that are constant but for rounding."""
        spread = self._sigma.diagonal()[self.x_dim :].sqrt()
        return spread.where(spread > ROUNDING * self._mean[self.x_dim :].abs(), torch.inf)

    @property
    @own_state()
    def eraser(self) -> Eraser:
        """The eraser of all rows so far, fp64. Raises ValueError for fewer than two rows."""
        d, sigma = self.x_dim, self.sigma_xx
        eye = torch.eye(d, dtype=torch.float64)
        W, W_inverse = (eye, eye) if self.method == "orth" else _whitening(self._shrunk(sigma))
        U, s, _ = torch.linalg.svd(W @ self.sigma_xz / self._spread_of_z, full_matrices=False)
        if self.method == "orth":  # singular values are no correlations there: those of zero are none
            U = U[:, s > s[:1] * d * torch.finfo(s.dtype).eps]
        else:
            U = U[:, s > max(self.svd_tol, d * torch.finfo(s.dtype).eps)]
        left, right = W_inverse @ U, U.T @ W
        if self.constrain_cov_trace and self.method == "leace" and left.shape[1]:
            right = _capped(left, right, sigma)
        return Eraser(left, right, self.mean_x.clone() if self.affine else torch.zeros(d, dtype=torch.float64))

    @own_state()
    def with_labels(self, x: Tensor, z: Tensor) -> Tensor:
        """Rows x [n, d] erased by an oracle that is told their labels z: x - Σ_xz Σ_zz⁺ (z - μ_z), which changes them
        less than any eraser that is not."""
        sigma_zz = self._sigma[self.x_dim :, self.x_dim :]
        moved = (self._columns(z) - self._mean[self.x_dim :]) @ torch.linalg.pinv(sigma_zz, rtol=1e-10, hermitian=True)
        return (x - (moved @ self.sigma_xz.T).to(x.device)).to(x.dtype)

    def _shrunk(self, sigma: Tensor) -> Tensor:
        """α Σ + (1 - α) tr(Σ)/d I, α = 1 - tr(Σ)²/n / (‖Σ‖² - tr(Σ)²/d) held between 0 and 1."""
        if not self.shrinkage:
            return sigma
        d, trace = len(sigma), sigma.trace()
        spread = sigma.square().sum() - trace**2 / d
        alpha = 1 - trace**2 / self.n / spread if spread > 0 else torch.zeros(())
        alpha = alpha.clamp(0, 1)
        return alpha * sigma + (1 - alpha) * trace / d * torch.eye(d, dtype=sigma.dtype)


def _whitening(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ^(1/2))⁺ and its pseudo-inverse Σ^(1/2), of the span that Σ [d, d] has."""
    values, vectors = torch.linalg.eigh(sigma)
    known = values > values[-1] * len(sigma) * torch.finfo(values.dtype).eps
    values = values.clamp(min=0)
    return (vectors * torch.where(known, values.rsqrt(), 0.0)) @ vectors.T, (
        vectors * torch.where(known, values.sqrt(), 0.0)
    ) @ vectors.T


def _capped(left: Tensor, right: Tensor, sigma: Tensor) -> Tensor:
    """right [k, d] as it is where tr(P Σ Pᵀ) is at most tr(Σ), P = I - left right; else mixed with left⁺, by which P is
    the orthogonal projection of the same kernel, until the two are equal."""
    eye = torch.eye(len(sigma), dtype=sigma.dtype)
    across = torch.linalg.pinv(left)
    P, Q = eye - left @ right, eye - left @ across
    x, y, z = ((a @ sigma @ b.T).trace() for a, b in ((P, P), (P, Q), (Q, Q)))
    if x <= sigma.trace():
        return right
    # α²x + 2α(1 - α)y + (1 - α)²z = tr(Σ): z is below and x above it, so one root lies between 0 and 1
    a, b, c = x - 2 * y + z, 2 * (y - z), z - sigma.trace()
    alpha = (-b + (b * b - 4 * a * c).clamp(min=0).sqrt()) / (2 * a)
    return alpha * right + (1 - alpha) * across
