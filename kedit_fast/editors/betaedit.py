"""BetaEdit: null-space edits that also keep what leaks (Liu et al. 2026, arXiv:2605.09285).

AlphaEdit's null space is only nearly one, and what is written there leaks into text. C is therefore kept inside it as
well, and after many edits the space is taken anew, so that it holds what they use:

    Δᵀ = (P (Kᵀ K + KₚᵀKₚ + λ₁ C) + λ₂ I)⁻¹ P Kᵀ R            with facts as rows
    P from C, and from (KₚᵀKₚ / n + λ₁ C) / (1 + λ₁) anew with the first n = 1,000, 2,000, ... keys of edits below

In the coordinates x = k U this is MEMIT's system with λ₁ Uᵀ C U + λ₂ I in the place of λ C.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.editors.alphaedit import AlphaEdit
from kedit_fast.model.lm import LM
from kedit_fast.moments.second_moment import SecondMoment


@dataclass(frozen=True)
class BetaEdit(AlphaEdit):
    """BetaEdit: AlphaEdit whose null space is taken anew as edits pile up.

    AlphaEdit's hyper-parameters with L2 as λ₂, and

    lambda1: λ₁, the weight of C inside the null space, and beside the keys where that is taken anew: a small one lets
        in what text needs
    P_freq: keys of edits below, each so many of which the null space is taken anew with them in it; 0: never

    Differs: published, it is taken anew with the keys of whole batches.
    """

    lambda1: float = 3000.0
    P_freq: int = 1000

    METHOD: ClassVar = "betaedit"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"BetaEdit": {}}
    IN_FILES: ClassVar = {"lambda2": lambda value: {"L2": value}}

    def space(self, moment: SecondMoment, earlier: Sequence[Tensor] = ()) -> Tensor:
        """C's null space, or that of C and the keys of many edits."""
        n = sum(map(len, earlier)) // self.P_freq * self.P_freq if self.P_freq else 0
        if not n:
            return super().space(moment, earlier)
        keys = torch.cat([*earlier])[:n].double()
        both = (keys.T @ keys / len(keys) + self.lambda1 * moment.matrix.to(keys)) / (1 + self.lambda1)
        eigenvalues, vectors = torch.linalg.eigh(both)
        return self.null_space(eigenvalues, vectors, moment.layer, " and the keys of edits below")

    def solve_bytes(self, lm: LM) -> int:
        """AlphaEdit's, and C with the keys of edits below, of which the null space is taken anew."""
        return super().solve_bytes(lm) + 8 * lm.d_ff**2

    def kept_system(self, moment: SecondMoment, space: Tensor) -> Tensor:
        """λ₁ Uᵀ C U + λ₂ I."""
        return self.lambda1 * (space.T @ moment.matrix.to(space) @ space) + super().kept_system(moment, space)
