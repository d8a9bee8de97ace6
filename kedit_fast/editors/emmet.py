"""EMMET: MEMIT's batch as an equality (Gupta et al. 2024, A Unified Framework for Model Editing, arXiv:2403.14236).

One layer is asked to give every fact's value exactly, moving W as little as it can in the metric of C. With facts as
rows, and the weighted A = λ C (and the kept keys of edits below):

    Δ = Rᵀ (K A⁻¹ Kᵀ + ε I)⁻¹ K A⁻¹                           ε = 0 for one fact, which is ROME's update

A⁻¹ Kᵀ (K A⁻¹ Kᵀ + ε I)⁻¹ = (ε A + Kᵀ K)⁻¹ Kᵀ: with ε it is MEMIT of one layer, at the weight ε λ.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.editors.editor import Work
from kedit_fast.editors.hyperparameters import published
from kedit_fast.editors.located import single_descent, single_layer
from kedit_fast.editors.spread import OF_UNIFIED_EDITING, Spread, fitted, identity, only_zero, ridged
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.moments.given import described, factored, gains
from kedit_fast.moments.second_moment import SecondMoment


@dataclass(frozen=True)
class Emmet(Spread):
    """EMMET: several facts in one layer, their values given exactly (or, with ε, nearly).

    MEMIT's hyper-parameters (see ``Spread`` and ``Located``), and

    layers: one (published); several share what is missing as MEMIT's do
    emmet_lambda: ε, of several facts together; 0: the equality itself, which needs facts whose keys differ
    update_norm_lambda: λₙ, what λ C has more on its diagonal
    """

    mom2_update_weight: float = 1.0
    emmet_lambda: float = 0.1
    update_norm_lambda: float = 0.0

    METHOD: ClassVar = "emmet"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"EMMET": {}}
    IN_FILES: ClassVar = OF_UNIFIED_EDITING | {"prob_cutoff": only_zero}

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Emmet":
        """Published settings where there are some for this model, else derived ones; ``source`` says which.

        Derived: the layer that ROME takes, and ε λ = d_ff, as MEMIT's weight.
        """
        weight = lm.d_ff / cls.emmet_lambda
        derived = cls(
            layers=(single_layer(lm),), mom2_update_weight=weight,
            source=f"derived for {lm.n_layers} layers, d_ff {lm.d_ff}", **single_descent(lm),
        )  # fmt: skip
        return published(PUBLISHED, lm) or derived

    def is_regularized(self) -> bool:
        """With λₙ C need not have an inverse."""
        return super().is_regularized() or self.update_norm_lambda > 0

    def ridge(self, moment: SecondMoment) -> float:
        """λₙ on the diagonal of λ C."""
        return ridged(self.regularizer, self.update_norm_lambda, self.mom2_update_weight, moment)

    def update(
        self, work: Work, layer: int, k: Tensor, residual: Tensor, earlier: list[Tensor]
    ) -> tuple[Tensor, Tensor, dict]:
        """Δ = Rᵀ (K A⁻¹ Kᵀ + ε I)⁻¹ K A⁻¹."""
        moment = work.moments.get(layer) or identity(work.lm, layer)
        a = factored(work.lm, moment, self.mom2_update_weight, self.ridge(moment), earlier)
        half = a.solve(k.T.to(a.lower.device)).to(k.device)
        if work.independent:
            v = half / (k.T * half).sum(0)
        else:
            inner = k @ half
            inner.diagonal().add_(self.emmet_lambda * (len(k) > 1))
            v = half @ _inverse(inner)
        against = 0.0 if len(k) == 1 or work.independent else self.emmet_lambda * self.mom2_update_weight
        return residual.T, v, fitted(gains(a, k), against) | {"condition": a.condition} | described(moment)


def _inverse(inner: Tensor) -> Tensor:
    """Of K A⁻¹ Kᵀ + ε I [n, n]. Raises ValueError where facts have one key."""
    lower, info = torch.linalg.cholesky_ex(inner)
    pivots = lower.diagonal()
    if int(info) or pivots.min() < SINGULAR * pivots.max():
        raise ValueError(
            f"the keys of {len(inner)} facts are not independent, so no weight gives each of them its value; raise "
            "emmet_lambda"
        )
    return torch.cholesky_inverse(lower)


def _published(name: str, layer: int, last: int, steps: int, weight: float) -> Emmet:
    return Emmet(
        layers=(layer,),
        v_loss_layer=last,
        v_num_grad_steps=steps,
        mom2_update_weight=weight,
        source=f"published for {name}",
    )


SINGULAR = 1e-7  # the least of a factor's pivots to the largest: rounding alone leaves 1e-8 where two keys are one
PUBLISHED = {
    "gpt2-xl": _published("gpt2-xl", 17, 47, 20, 1000.0),
    "gpt-j-6B": _published("gpt-j-6B", 5, 27, 25, 1.0),
}
