"""λ C of a mixture of experts: a block an expert, of which those are factored that keys are sent to.

With routing held fixed, [W_1 … W_E] is one matrix and the routed keys k̃ = [g_1 k_1 … g_E k_E] are its inputs. C is
kept block by block, C_j = E[g_j² k_j k_jᵀ] over all tokens (0 where a token is sent elsewhere), so that A = λ C is
block-diagonal and

    (A + K̃ᵀK̃)⁻¹ K̃ᵀ = Z (I + K̃ Z)⁻¹ for Z = A⁻¹ K̃ᵀ,  K̃ Z = Σ_j K̃_j A_j⁻¹ K̃_jᵀ        [n, n]
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kedit_fast.kernels.solve import MomentFactor, factor


@dataclass(frozen=True, eq=False)
class Blocks:
    """weight * (C + ridge I) + KₚᵀKₚ, to be solved with.

    matrix: C [E, width, width]; ridge: on every diagonal; kept: Kₚ [nₚ, E · width] fp64, keys of earlier edits
    """

    matrix: Tensor
    weight: float
    ridge: float
    kept: Tensor
    _factors: dict[int, MomentFactor] = field(default_factory=dict, repr=False)

    @property
    def condition(self) -> float:
        """The largest condition number of the blocks that were factored; 0 of none."""
        return max((made.condition for made in self._factors.values()), default=0.0)

    def solve(self, b: Tensor) -> Tensor:
        """The inverse times b [E · width, m], fp64. Raises ValueError, naming the expert, where a block that b reaches
        has no inverse."""
        z = self._blockwise(b)
        if not len(self.kept):
            return z
        p = self._blockwise(self.kept.T)
        inner = torch.eye(len(self.kept), dtype=p.dtype, device=p.device) + self.kept @ p
        return z - p @ torch.linalg.solve(inner, self.kept @ z)

    def update(self, k: Tensor, alone: bool) -> Tensor:
        """v [E · width, n] = (A + K̃ᵀK̃)⁻¹ K̃ᵀ of keys [n, E · width]; alone: each key as if there were no other."""
        z = self.solve(k.T)
        if alone:
            return z / (1 + (k.T * z).sum(0))
        return torch.linalg.solve(torch.eye(len(k), dtype=z.dtype, device=z.device) + k @ z, z, left=False)

    def gains(self, k: Tensor) -> Tensor:
        """kᵀ C⁻¹ k [n] of keys [n, E · width]."""
        k = k.to(self.matrix.device, torch.float64)
        return (k.T * self.solve(k.T)).sum(0) * self.weight

    def _blockwise(self, b: Tensor) -> Tensor:
        parts = b.to(self.matrix.device, torch.float64).view(len(self.matrix), -1, b.shape[1])
        return torch.cat([self._factor(j).solve(part) if part.any() else part for j, part in enumerate(parts)])

    def _factor(self, expert: int) -> MomentFactor:
        if expert not in self._factors:
            block = self.matrix[expert].double()
            block.diagonal().add_(self.ridge)
            try:
                self._factors[expert] = factor(block, self.weight)
            except ValueError as error:
                raise ValueError(f"expert {expert}, to which few tokens may have been sent: {error}") from error
        return self._factors[expert]
