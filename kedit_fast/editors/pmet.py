"""PMET: precise model editing in a transformer (Li et al. 2024, arXiv:2308.08742).

MEMIT's z is the residual stream, in which the attention's part stands beside the MLP's, and the MLP is asked for both.
Here a δ at the attention's output of the last edit layer and one at its down projection's output v are optimized
together; the first stands for what attention may do, and is let go. Only v is written, with larger shares,

    R = (v* - v) / sqrt(layers left)                          [n, d]
    Δ = Rᵀ K (λ C + Kᵀ K)⁻¹                                   as in MEMIT

Once the new answer is the likeliest in every prompt its loss weighs a tenth in the next step, so that the KL term comes
down; a value is done where that is below 0.01.
"""

from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar

from torch import Tensor

from kedit_fast.editors.hyperparameters import published
from kedit_fast.editors.located import Prompts
from kedit_fast.editors.memit import Memit
from kedit_fast.editors.spread import Asked, through_post_norm
from kedit_fast.jobs.values import ValueSettings
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.model.shape import Shape
from kedit_fast.sweep.sites import Site

RELAXED, CALM = 0.1, 0.01  # published: of the target's loss once its tokens are the likeliest; nats


@dataclass(frozen=True)
class Pmet(Memit):
    """PMET: MEMIT whose values are optimized beside one of the attention, which is thrown away.

    MEMIT's hyper-parameters, and

    nll_loss_factor: of the target's loss

    Behind a norm (gemma2, gemma3, olmo2) v* is a value before it, so the last layer is asked for v* - v itself; those
    below are asked for what the residual stream gets of it, taken back through their own norms.
    """

    nll_loss_factor: float = 1.0

    METHOD: ClassVar = "pmet"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"PMET": {}}
    POSITIVE: ClassVar[tuple[str, ...]] = (*Memit.POSITIVE, "nll_loss_factor")

    def _check_rest(self, given: dict) -> None:
        """Raises ValueError for a file that writes the attention's output projection as well."""
        written = given.get("rewrite_module_tmps") or []
        if any("attn" in str(name) for name in written):
            raise ValueError(f"rewrite_module_tmps {written}: only the down projection is written here")

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Pmet":
        """Published settings where there are some for this model, else MEMIT's; ``source`` says which."""
        plain = Memit.for_model(lm)
        return published(PUBLISHED, lm) or cls(**vars(plain) | {"source": f"memit's, {plain.source}"})

    def z_settings(self, lm: LM | Shape, top: int | None = None) -> ValueSettings:
        """v* at the down projection's output, with a δ at the attention's beside it."""
        return replace(
            super().z_settings(lm, top), site=Site.mlp_out, beside=Site.attn_out, nll_factor=self.nll_loss_factor,
            relaxed=RELAXED, calm=CALM,
        )  # fmt: skip

    def read(self, lm: LM, prompts: Prompts, layer: int, top: int, z: Tensor, left: int) -> Asked:
        """R of the formula above."""
        found = prompts.read(lm, averaged={Site.mlp_key: layer}, bare={Site.mlp_out: layer})
        k, m = found.averaged[Site.mlp_key], found.bare[Site.mlp_out]
        if layer == top:
            return Asked(k, z - m, (z - m) / sqrt(left))
        v = prompts.read(lm, averaged={}, bare={Site.mlp_out: top}).bare[Site.mlp_out]
        missing = lm.into_stream(top, z) - lm.into_stream(top, v)
        return Asked(k, missing, through_post_norm(lm, layer, m, missing / sqrt(left)))


PUBLISHED = {
    "gpt-j-6B": Pmet(
        layers=(3, 4, 5, 6, 7, 8), v_loss_layer=27, v_lr=0.2, v_num_grad_steps=30, kl_factor=1.0,
        mom2_update_weight=6_000, source="published for gpt-j-6B",
    ),
    "gpt-neox-20b": Pmet(
        layers=(6, 7, 8, 9, 10), v_loss_layer=43, v_num_grad_steps=30, kl_factor=0.8, clamp_norm_factor=0.8,
        mom2_update_weight=15_000, source="published for gpt-neox-20b",
    ),
}  # fmt: skip
