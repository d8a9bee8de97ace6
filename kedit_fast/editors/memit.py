"""MEMIT: Mass-Editing Memory in a Transformer (Meng et al. 2023, arXiv:2210.07229).

Many facts are written at once into several layers. A vector z for each fact, the output of the last edit layer at the
subject's last token, makes the model say the new answer. The layers, from the lowest on, then each take an equal share
of what is still missing:

    R = (z - current value) / layers left                     [n, d]
    Δ = Rᵀ K (λ C + Kᵀ K)⁻¹                                   [d, d_ff], eq. 14 with facts as rows

What an earlier edit wrote belongs to what is to be kept, so λ C then holds KₚᵀKₚ of its keys as well.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.basics.parts import Keep
from kedit_fast.basics.progress import progress
from kedit_fast.editors.common import Prompts, check_finite, storable
from kedit_fast.editors.contexts import memit_contexts
from kedit_fast.editors.editor import Editor, Written
from kedit_fast.editors.hyperparameters import Settings, published
from kedit_fast.edits.chain import edited_so_far
from kedit_fast.edits.deltas import LowRank, as_smallest
from kedit_fast.jobs.values import Values, ValueSettings, optimize_values
from kedit_fast.kernels.solve import MomentFactor, factor, memit_solve
from kedit_fast.model.lm import takes_lm
from kedit_fast.moments.given import described, gains
from kedit_fast.moments.second_moment import SecondMoment
from kedit_fast.sweep.sites import Site


@dataclass(frozen=True)
class Memit(Editor):
    """Hyper-parameters under their published names (see ``Settings``); ``edit`` does the work.

    layers: lowest first; the last one is where z lives
    mom2_update_weight: λ, the weight of C against the new keys (published 15,000 to 20,000; d_ff fits small models)
    keep_previous: whether the keys of edits below are kept (published: no, each batch forgets those before it)

    Differs: the published code optimizes z with a head projection of its own that leaves out logit soft caps; here they
    are in.
    """

    mom2_update_weight: float = 15_000
    keep_previous: bool = True

    METHOD: ClassVar = "memit"
    STAGES: ClassVar = ("optimizing values", "solving layers")
    ALG_NAMES: ClassVar = {"MEMIT": {}}
    POSITIVE: ClassVar = (*Settings.POSITIVE, "mom2_update_weight")

    def _check(self, lm) -> None:
        super()._check(lm)
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"layers {self.layers}: expected lowest first; z lives at the last one, above all others")

    @classmethod
    @takes_lm
    def for_model(cls, lm):
        """Published settings where there are some for this model, else derived ones; ``source`` says which.

        Derived: five early-middle layers from a tenth of the depth on, λ = d_ff, clamp 0.75. On SmolLM2-135M later
        layers reach the same efficacy and lose the neighborhood, and λ = 15,000 fits nothing.
        """
        layers = early_middle(lm.n_layers)
        derived = cls(
            layers=layers, mom2_update_weight=float(lm.d_ff), source=f"derived for {lm.n_layers} layers, d_ff {lm.d_ff}"
        )
        return published(PUBLISHED, lm) or derived

    def _contexts(self, lm, seed):
        return memit_contexts(lm, self.context_template_length_params, seed=seed)

    def _write(self, lm, facts, groups, moments, independent: bool, keep: Keep) -> Written:
        """z of all facts, then the layer loop."""
        prompts = Prompts.of(lm, facts, groups)
        z = optimize_values(lm, prompts.value_tasks(lm), self._value_settings(lm), keep)
        owner = torch.arange(len(facts)) if independent else None
        deltas, keys, notes = {}, {}, {}
        with progress("solving layers", len(self.layers)) as bar:
            for i, layer in enumerate(self.layers):
                below = edited_so_far(lm, deltas, facts, owner)
                moment = moments[layer] if moments else _identity(lm, layer)
                share = 1 / (len(self.layers) - i)
                step = _Step(below, prompts, layer, z.values.double(), share, moment, independent)
                made = keep(f"layer-{layer}", lambda step=step: self._solved(step))
                delta = LowRank(made.pop("u"), made.pop("v"))
                deltas[layer] = delta if independent else as_smallest(delta)
                keys[layer] = made.pop("keys")
                # sorted: a part that was read again has its names in another order, and equal edits are equal files
                notes[layer] = {name: made[name].item() for name in sorted(made)} | described(moment)
                bar.advance(1, f"layer {layer}: missing {notes[layer]['missing']:.2f}")
        return Written(deltas, z.values, keys, notes, {"values": _value_notes(z)}, owner)

    def _value_settings(self, lm) -> ValueSettings:
        last = lm.n_layers - 1
        return ValueSettings(
            layer=self.layers[-1], site=Site.layer_out, lr=self.v_lr, steps=self.v_num_grad_steps,
            weight_decay=self.v_weight_decay, kl_factor=self.kl_factor, clamp=self.clamp_norm_factor,
            loss_layer=last if self.v_loss_layer is None else max(self.v_loss_layer, self.layers[-1]),
        )  # fmt: skip

    def _solved(self, step: "_Step") -> dict[str, Tensor]:
        """Δ = u vᵀ of one layer, the keys it stands on, and what there is to note of it."""
        lm, layer, top = step.lm, step.layer, self.layers[-1]
        read = step.prompts.read(lm, averaged={Site.mlp_key: layer}, bare={Site.mlp_out: layer, Site.layer_out: top})
        k, missing = read.averaged[Site.mlp_key], step.z - read.bare[Site.layer_out]
        residual = through_post_norm(lm, layer, read.bare[Site.mlp_out], missing * step.share)
        check_finite(lm, k, step.prompts.facts, f"key at layer {layer}")
        check_finite(lm, residual, step.prompts.facts, f"residual at layer {layer}")
        earlier = [edit.keys[layer] for edit in lm.edits if layer in edit.keys] if self.keep_previous else []
        u, v, notes = self._update(lm, step.moment, k, residual, earlier, step.independent)
        notes["missing"] = missing.norm(dim=1).mean().item()
        return {name: storable(lm, x) for name, x in {"u": u, "v": v, "keys": k}.items()} | {
            name: torch.tensor(x, dtype=torch.float64) for name, x in notes.items()
        }

    def _update(self, lm, moment: SecondMoment, k: Tensor, residual: Tensor, earlier: list[Tensor], alone: bool):
        """(u, v, notes) of Δ = u vᵀ by eq. 14; earlier: keys to be kept; alone: a K of one row for each fact."""
        weight = self.mom2_update_weight
        matrix = with_kept(moment.matrix.to(lm.device), earlier, weight)
        c = factor(matrix, weight, regularizer=self.regularizer, n_tokens=moment.n_tokens)
        g = gains(c, k).mean().item()
        return *solved(c, k, residual, alone), {"g": g, "fit": g / (g + weight), "condition": c.condition}


@dataclass(frozen=True)
class _Step:
    """One turn of the layer loop. z: [n, d] fp64; share: of what is missing; lm: with the layers below edited."""

    lm: object
    prompts: Prompts
    layer: int
    z: Tensor
    share: float
    moment: SecondMoment
    independent: bool


def with_kept(matrix: Tensor, keys: list[Tensor], weight: float) -> Tensor:
    """C + KₚᵀKₚ / λ: λ times it keeps what C stands for and the earlier keys Kₚ, a list of [nₚ, d_ff]."""
    if not keys:
        return matrix
    rows = torch.cat(keys).to(matrix.device, torch.float64)
    return torch.addmm(matrix.double(), rows.T, rows, alpha=1 / weight)


def solved(kept: MomentFactor, k: Tensor, residual: Tensor, alone: bool) -> tuple[Tensor, Tensor]:
    """u = Rᵀ and v = (A + Kᵀ K)⁻¹ Kᵀ of Δ = u vᵀ, for the kept A = λ C.

    alone: each fact as if there were no other, v = A⁻¹ k / (1 + kᵀ A⁻¹ k) (Sherman and Morrison)
    """
    if not alone:
        return memit_solve(k, residual, kept, kept.weight)
    half = kept.solve(k.T)
    return residual.T, half / (1 + (k.T * half).sum(0))


def early_middle(n_layers: int) -> tuple[int, ...]:
    """Five layers from a tenth of the depth on."""
    first = round(0.1 * n_layers)
    return tuple(i for i in range(first, first + 5) if i < n_layers)


def _identity(lm, layer: int) -> SecondMoment:
    """What takes the statistics' place without ``mom2_adjustment``."""
    return SecondMoment(torch.eye(lm.d_ff), lm.d_ff, layer, corpus="identity")


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
