"""ENCORE: early stopping and norm-constrained MEMIT (Gupta et al. 2025, arXiv:2502.01636).

MEMIT that does not go on once it has what it wants: a value is done when the new answer has been the likeliest for some
steps, and a ridge keeps the weights from growing,

    Δ = Rᵀ K (λ C + Kₚᵀ Kₚ + λₙ I + Kᵀ K)⁻¹
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kedit_fast.basics import checks
from kedit_fast.editors.hyperparameters import published
from kedit_fast.editors.memit import Memit
from kedit_fast.editors.spread import OF_UNIFIED_EDITING, ridged
from kedit_fast.jobs.values import ValueSettings
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.model.shape import Shape
from kedit_fast.moments.second_moment import SecondMoment


@dataclass(frozen=True)
class Encore(Memit):
    """ENCORE: MEMIT whose values stop early, with a ridge that keeps the weights from growing.

    MEMIT's hyper-parameters, and

    update_norm_lambda: λₙ; in units of C, so it fits one kind of model
    hits: steps that have to find each target token the likeliest, in every context, until a value is done (published as
        a negative prob_cutoff); 0: MEMIT's rule alone

    Differs: the published code counts answers of one token alone, and looks away from the bare prompt.
    """

    update_norm_lambda: float = 10.0
    hits: int = 4

    METHOD: ClassVar = "encore"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"ENCORE": {}}
    IN_FILES: ClassVar = OF_UNIFIED_EDITING | {"prob_cutoff": lambda value: _hits(value), "emmet_lambda": lambda _: {}}

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Encore":
        """Published settings where there are some for this model, else MEMIT's, with λₙ / λ as published."""
        plain = Memit.for_model(lm)
        about = {"source": f"memit's, {plain.source}", "update_norm_lambda": SHARE * plain.mom2_update_weight}
        derived = cls(**vars(plain) | about)
        return published(PUBLISHED, lm) or derived

    def is_regularized(self) -> bool:
        """With λₙ C need not have an inverse."""
        return super().is_regularized() or self.update_norm_lambda > 0

    def z_settings(self, lm: LM | Shape, top: int | None = None) -> ValueSettings:
        """MEMIT's, with the early stop."""
        return replace(super().z_settings(lm, top), hits=self.hits)

    def ridge(self, moment: SecondMoment) -> float:
        """λₙ on the diagonal of λ C."""
        return ridged(self.regularizer, self.update_norm_lambda, self.mom2_update_weight, moment)


def _hits(value: Any) -> dict:
    """Of a published prob_cutoff: negative, so many steps; positive, a mean probability, which ends no value here."""
    return {"hits": -checks.whole("prob_cutoff", value, least=-1000, most=0, like=-4)}


SHARE = 10 / 20_000  # λₙ / λ
PUBLISHED = {
    "gpt2-xl": Encore(
        layers=(13, 14, 15, 16, 17), v_num_grad_steps=20, v_loss_layer=47, mom2_update_weight=20_000,
        update_norm_lambda=10.0, hits=4, source="published for gpt2-xl",
    ),
}  # fmt: skip
