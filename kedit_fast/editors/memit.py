"""MEMIT: Mass-Editing Memory in a Transformer (Meng et al. 2023, arXiv:2210.07229).

Many facts are written at once into several layers. A vector z for each fact, the output of the last edit layer at the
subject's last token, makes the model say the new answer. The layers, from the lowest on, then each take an equal share
of what is still missing:

    R = (z - current value) / layers left                     [n, d]
    Δ = Rᵀ K (λ C + Kᵀ K)⁻¹                                   [d, d_ff], eq. 14 with facts as rows
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import __version__
from ..deltas import LowRank, as_smallest
from ..edit import Edit
from ..jobs.values import Values, ValueSettings, optimize_values
from ..kernels.solve import memit_solve
from ..moments import SecondMoment
from ..progress import progress
from ..sites import Site
from .common import Prompts, chain, check_finite, storable
from .contexts import memit_contexts
from .hyperparameters import Settings, published
from .statistics import described, factored, fit


@dataclass(frozen=True)
class Memit(Settings):
    """Hyper-parameters under their published names (see ``Settings``); ``edit`` does the work.

    layers: lowest first; the last one is where z lives
    mom2_update_weight: λ, the weight of C against the new keys (published 15,000 to 20,000; d_ff fits small models)
    """

    mom2_update_weight: float = 15_000

    POSITIVE: ClassVar = (*Settings.POSITIVE, "mom2_update_weight")

    def _check(self, lm) -> None:
        super()._check(lm)
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"layers {self.layers}: expected lowest first; z lives at the last one, above all others")

    @classmethod
    def for_model(cls, lm) -> "Memit":
        """Published settings where there are some for this model, else derived ones; ``source`` says which.

        Derived: five early-middle layers from a tenth of the depth on, λ = d_ff, clamp 0.75. On SmolLM2-135M later
        layers reach the same efficacy and lose the neighborhood, and λ = 15,000 fits nothing.
        """
        first = round(0.1 * lm.n_layers)
        layers = tuple(i for i in range(first, first + 5) if i < lm.n_layers)
        derived = cls(
            layers=layers, mom2_update_weight=float(lm.d_ff), source=f"derived for {lm.n_layers} layers, d_ff {lm.d_ff}"
        )
        return published(PUBLISHED, lm) or derived

    def edit(
        self,
        lm,
        facts: Sequence,
        *,
        moments=None,
        corpus=None,
        contexts=None,
        previous: Edit | None = None,
        seed: int = 0,
    ) -> Edit:
        """One Edit that writes all facts. Nothing is changed: use ``lm.with_edit(edit)`` or ``edit.apply(model)``.

        moments: {layer: SecondMoment}, or corpus: text to measure them over ("self": sampled from the model); neither
            is read with mom2_adjustment=False
        contexts: groups of templates [["{}"], ["... {}", ...]]; None generates them from ``seed``
        previous: an edit this one is made on top of (as those that ``lm`` carries); apply both, in order:
            ``provenance["on_top_of"]`` says which. A fact of it that gets another target is warned of

        Raises ValueError, before any work, for facts that contradict each other, lack a target or are too long for the
        model, layers out of range, missing or foreign statistics; later, naming the fact, where a loss or a residual
        turns NaN. Differs: the published code optimizes z with a head projection of its
        own that leaves out logit soft caps; here they are in.
        """
        lm, facts, groups = self._prepared(lm, facts, contexts, previous)
        moments = self._moments(lm, moments, corpus) or _identities(lm, self.layers)
        groups = groups or memit_contexts(lm, self.context_template_length_params, seed=seed)
        prompts = Prompts.of(lm, facts, groups)
        z = optimize_values(lm, prompts.value_tasks(lm), self._value_settings(lm))
        deltas, keys, notes = self._spread(lm, prompts, moments, z)
        return Edit(
            method="memit", hparams=asdict(self), fingerprint=lm.fingerprint, facts=tuple(facts), deltas=deltas,
            values=z.values.cpu(), keys=keys, contexts=groups,
            provenance={"version": __version__, "layers": notes, "values": _value_notes(z)} | chain(lm),
        )  # fmt: skip

    def _value_settings(self, lm) -> ValueSettings:
        last = lm.n_layers - 1
        return ValueSettings(
            layer=self.layers[-1], site=Site.layer_out, lr=self.v_lr, steps=self.v_num_grad_steps,
            weight_decay=self.v_weight_decay, kl_factor=self.kl_factor, clamp=self.clamp_norm_factor,
            loss_layer=last if self.v_loss_layer is None else max(self.v_loss_layer, self.layers[-1]),
        )  # fmt: skip

    def _spread(self, lm, prompts: Prompts, moments, z: Values):
        """The layer loop: ({layer: delta}, {layer: keys [n, d_ff]}, {layer: notes})."""
        deltas, keys, notes = {}, {}, {}
        with progress("solving layers", len(self.layers)) as bar:
            for i, layer in enumerate(self.layers):
                k, out, current = self._measure(lm, prompts, layer, deltas)
                missing = z.values.double() - current
                residual = through_post_norm(lm, layer, out, missing / (len(self.layers) - i))
                check_finite(k, prompts.facts, f"key at layer {layer}")
                check_finite(residual, prompts.facts, f"residual at layer {layer}")
                moment = factored(lm, moments[layer], self.mom2_update_weight, self.regularizer)
                u, v = memit_solve(k, residual, moment, self.mom2_update_weight)
                deltas[layer] = as_smallest(LowRank(storable(lm, u), storable(lm, v)))
                keys[layer] = storable(lm, k)
                g, share = fit(moment, k)
                notes[layer] = {
                    "g": g, "fit": share, "condition": moment.condition, "missing": missing.norm(dim=1).mean().item(),
                } | described(moments[layer])  # fmt: skip
                bar.advance(1, f"layer {layer}: fit {share:.2f}")
        return deltas, keys, notes

    def _measure(self, lm, prompts: Prompts, layer: int, deltas: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [n, d_ff] and bare outputs [n, d] of a layer, and current values [n, d] at the last one, with the layers
        below edited; fp64."""
        if deltas:
            so_far = Edit(method="memit", hparams={}, fingerprint=lm.fingerprint, facts=(), deltas=deltas)
            lm = lm.with_edit(so_far)
        everything = torch.arange(len(prompts.sequences))
        rows = prompts.collect(
            lm,
            {
                Site.mlp_key: (layer, everything),
                Site.mlp_out: (layer, prompts.bare),
                Site.layer_out: (self.layers[-1], prompts.bare),
            },
        )
        return prompts.average(rows[Site.mlp_key]), rows[Site.mlp_out].double(), rows[Site.layer_out].double()


def _identities(lm, layers) -> dict[int, SecondMoment]:
    """What takes the statistics' place without ``mom2_adjustment``."""
    return {i: SecondMoment(torch.eye(lm.d_ff), lm.d_ff, i, corpus="identity") for i in layers}


def through_post_norm(lm, layer: int, out: Tensor, residual: Tensor) -> Tensor:
    """What the down projection's output [n, d] must change by, for the residual stream to change by ``residual``.

    The same, unless a norm stands between (gemma2, gemma3, olmo2): y = norm(m) scales each entry by y/m, so the
    residual is taken back through that scale. Without it a fifth of ||z - h|| is removed over three layers of small
    random models, with it three to four fifths; z at the down projection's own output makes ||z - h|| grow.
    """
    if lm.family.post_norm is None:
        return residual
    with torch.no_grad():
        normed = lm.source.part(layer, lm.family.post_norm, out.to(lm.dtype)).double()
    return torch.where(normed == 0, 0.0, residual * out / normed)


def _value_notes(z: Values) -> dict:
    return {
        "steps": z.steps.tolist(),
        "loss": [round(x, 5) for x in z.loss.tolist()],
        "p_new": [round(x, 5) for x in (-z.nll).exp().tolist()],
    }


_COMMON = {"v_weight_decay": 0.5, "clamp_norm_factor": 0.75, "kl_factor": 0.0625, "v_lr": 0.5}
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
