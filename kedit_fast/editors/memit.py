"""MEMIT: Mass-Editing Memory in a Transformer (Meng et al. 2023, arXiv:2210.07229).

Many facts are written at once into several layers. A vector z for each fact, the output of the last edit layer at the
subject's last token, makes the model say the new answer. The layers, from the lowest on, then each take an equal share
of what is still missing:

    R = (z - current value) / layers left                     [n, d]
    Δ = Rᵀ K (λ C + Kᵀ K)⁻¹                                   [d, d_ff], eq. 14 with facts as rows

Of a mixture of experts [W_1 … W_E] is one matrix, with the routed keys as its inputs and routing held fixed: one exact
solve, n x n, for all experts of a layer (``moments/blocks.py``).

What an earlier edit wrote belongs to what is to be kept, so λ C then holds KₚᵀKₚ of its keys as well.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kedit_fast.editors.editor import Work
from kedit_fast.editors.hyperparameters import published
from kedit_fast.editors.located import derived_descent, early_middle
from kedit_fast.editors.spread import Spread, fitted, identity, solved
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.moments.given import described, gains, system


@dataclass(frozen=True)
class Memit(Spread):
    """MEMIT: many facts at once, solved for in a few layers' down projections, each of which gives a share.

    Hyper-parameters under their published names (see ``Spread`` and ``Located``); ``edit`` does the work.

    Differs: the published code optimizes z with a head projection of its own that leaves out logit soft caps; here they
    are in.
    """

    METHOD: ClassVar = "memit"
    EXPERTS: ClassVar = True
    ALG_NAMES: ClassVar[dict[str, dict]] = {"MEMIT": {}}

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Memit":
        """Published settings where there are some for this model, else derived ones; ``source`` says which.

        Derived: early-middle layers (``early_middle``), λ = d_ff, clamp 0.75. On SmolLM2-135M later layers reach the
        same efficacy and lose the neighborhood, and λ = 15,000 fits nothing.
        """
        layers = early_middle(lm)
        derived = cls(
            layers=layers,
            mom2_update_weight=float(lm.d_ff),
            regularizer=EXPERTS_RIDGE if lm.n_experts > 1 else 0.0,
            source=f"derived for {lm.n_layers} layers, d_ff {lm.d_ff}",
            **derived_descent(lm),
        )
        return published(PUBLISHED, lm, cls) or derived

    def update(
        self, work: Work, layer: int, k: Tensor, residual: Tensor, earlier: list[Tensor]
    ) -> tuple[Tensor, Tensor, dict]:
        """Δ = Rᵀ K (λ C + Kᵀ K)⁻¹, eq. 14."""
        weight, moment = self.mom2_update_weight, work.moments.get(layer) or identity(work.lm, layer)
        c = system(work.lm, moment, weight, self.ridge(moment), earlier)
        u, v = solved(c, k, residual, work.independent)
        return u, v, fitted(gains(c, k), weight) | {"condition": c.condition} | described(moment)


EXPERTS_RIDGE = 1e-4  # an expert that few tokens are sent to has no inverse without one
_COMMON: dict[str, Any] = {"v_weight_decay": 0.5, "clamp_norm_factor": 0.75, "kl_factor": 0.0625, "v_lr": 0.5}
PUBLISHED = {
    "gpt2-xl": Memit(
        layers=(13, 14, 15, 16, 17), v_num_grad_steps=20, v_loss_layer=47, mom2_update_weight=20_000,
        source="published for gpt2-xl", **_COMMON,
    ),
    "gpt-j-6B": Memit(
        layers=(3, 4, 5, 6, 7, 8), v_num_grad_steps=25, v_loss_layer=27, mom2_update_weight=15_000,
        source="published for gpt-j-6B", **_COMMON,
    ),
}  # fmt: skip
