"""AlphaEdit: null-space constrained editing (Fang et al. 2025, arXiv:2410.02355).

MEMIT's sweeps and layer loop with another system. Let U hold the directions of key space that text hardly uses, the
eigenvectors of C whose eigenvalue is below a threshold, and P = U Uᵀ. Only these directions are written:

    Δ = Rᵀ K P (KₚᵀKₚ P + Kᵀ K P + L2 I)⁻¹                    its closed form, with facts as rows

In the coordinates x = k U this is MEMIT's own system with C = I and λ = L2, and Δ = Δₓ Uᵀ. Keys Kₚ of edits below are
kept, so edits in sequence disturb neither what text needs nor each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.editors.editor import Work
from kedit_fast.editors.hyperparameters import published
from kedit_fast.editors.located import derived_descent, early_middle
from kedit_fast.editors.spread import Spread, fitted, solved
from kedit_fast.kernels.solve import factor
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.moments.given import described, gains
from kedit_fast.moments.second_moment import SecondMoment


@dataclass(frozen=True)
class AlphaEdit(Spread):
    """AlphaEdit: MEMIT whose updates are kept to the null space of C, so that what text needs is left alone.

    MEMIT's hyper-parameters (see ``Spread`` and ``Located``), and

    nullspace_threshold: eigenvalues of C below it are the null space; in units of C, so it fits one kind of model.
        0: take ``nullspace_share`` instead
    nullspace_share: the share of all directions that is the null space, those of the smallest eigenvalues
    L2: the weight of the ridge

    Not used: mom2_update_weight (C only says where not to write). Needs second moments.
    Differs: published, P K is solved for by LU over the whole key space in fp32; here in the null space's own
    coordinates in fp64, which is the same Δ.
    """

    nullspace_threshold: float = 2e-2
    nullspace_share: float = 0.9
    L2: float = 10.0

    GENTLER: ClassVar[str] = "edit fewer facts at once, or with a larger L2 or fewer v_num_grad_steps"
    METHOD: ClassVar = "alphaedit"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"AlphaEdit": {}}
    POSITIVE: ClassVar[tuple[str, ...]] = (*Spread.POSITIVE, "L2")

    def __post_init__(self):
        super().__post_init__()
        checks.number("nullspace_share", self.nullspace_share, above=0, most=1, like=0.9)

    def check(self, lm: LM) -> None:
        """Raises ValueError for layers that do not fit, and without second moments."""
        super().check(lm)
        if not self.mom2_adjustment:
            name = type(self).__name__
            raise ValueError(f"mom2_adjustment False: {name} needs second moments, for its null space is theirs")

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "AlphaEdit":
        """Published settings where there are some for this model, else derived ones; ``source`` says which.

        Derived: MEMIT's layers and the smallest 90 % of C's directions; an absolute threshold does not carry over, for
        C's scale differs from model to model.
        """
        source = f"derived for {lm.n_layers} layers"
        derived = cls(
            layers=early_middle(lm), nullspace_threshold=0.0, L2=DERIVED_L2, source=source, **derived_descent(lm)
        )
        return published(PUBLISHED, lm, cls) or derived

    def check_moments(self, moments: Mapping[int, SecondMoment]) -> None:
        """Raises ValueError where a null space is empty."""
        for moment in moments.values():
            self.space(moment)  # an empty one is an error before any work

    def solve_bytes(self, lm: LM) -> int:
        """Of every layer the eigenvectors, which are kept, and what finding the last ones takes: C in fp64 and LAPACK's
        two matrices; the system in the null space is less."""
        return (len(self.layers) + 3) * 8 * lm.d_ff**2

    def update(
        self, work: Work, layer: int, k: Tensor, residual: Tensor, earlier: list[Tensor]
    ) -> tuple[Tensor, Tensor, dict]:
        """The system above, solved in the null space's coordinates x = k U."""
        moment = work.moments[layer]
        space = self.space(moment, earlier).to(work.lm.device)
        x, earlier = k @ space, [keys.to(space) @ space for keys in earlier]
        kept = factor(self.kept_system(moment, space), kept=torch.cat(earlier) if earlier else None)
        u, v = solved(kept, x, residual, work.independent)
        notes = {"null_space": space.shape[1] / len(space), "condition": kept.condition}
        return u, space @ v, notes | fitted(self.L2 * gains(kept, x), self.L2) | described(moment)

    def space(self, moment: SecondMoment, earlier: Sequence[Tensor] = ()) -> Tensor:
        """U [d_ff, r] fp64, orthonormal columns: C's null space, whatever the keys [nₚ, d_ff] of edits below."""
        return self.null_space(*moment.spectrum, moment.layer)

    def kept_system(self, moment: SecondMoment, space: Tensor) -> Tensor:
        """[r, r] what stands beside the keys in the null space's coordinates: L2 I."""
        return self.L2 * torch.eye(space.shape[1]).to(space)

    def null_space(self, eigenvalues: Tensor, vectors: Tensor, layer: int, also: str = "") -> Tensor:
        """The eigenvectors of a second moment, ascending by eigenvalue, that are its null space. also: what it is of
        beside C. Raises ValueError where none is."""
        if self.nullspace_threshold:
            n = int((eigenvalues < self.nullspace_threshold).sum())
        else:
            n = round(self.nullspace_share * len(eigenvalues))
        if not n:
            raise ValueError(
                f"layer {layer}: no eigenvalue of C{also} is below nullspace_threshold {self.nullspace_threshold} "
                f"(smallest {eigenvalues[0]:.2g}), so nothing may be written; raise it, or set it to 0 and give "
                "nullspace_share"
            )
        return vectors[:, :n]


DERIVED_L2 = 10.0


def _published(name: str, layers: tuple[int, ...], last: int, steps: int, l2: float) -> AlphaEdit:
    return AlphaEdit(
        layers=layers, v_loss_layer=last, v_num_grad_steps=steps, L2=l2, clamp_norm_factor=0.75, v_lr=0.5,
        source=f"published for {name}",
    )  # fmt: skip


PUBLISHED = {
    "gpt2-xl": _published("gpt2-xl", (13, 14, 15, 16, 17), 47, 20, 10.0),
    "gpt-j-6B": _published("gpt-j-6B", (3, 4, 5, 6, 7, 8), 27, 25, 10.0),
}
