"""MEMIT: Mass-Editing Memory in a Transformer (Meng et al. 2023, arXiv:2210.07229).

Many facts are written at once into several layers. A vector z for each fact, the output of the last edit layer at the
subject's last token, makes the model say the new answer. The layers, from the lowest on, then each take an equal share
of what is still missing:

    R = (z - current value) / layers left                     [n, d]
    Δ = Rᵀ K (λ C + Kᵀ K)⁻¹                                   [d, d_ff], eq. 14 with facts as rows

What an earlier edit wrote belongs to what is to be kept, so λ C then holds KₚᵀKₚ of its keys as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_fast.basics.bits import json_of, json_tensor
from kedit_fast.basics.progress import progress
from kedit_fast.editors.editor import Found, Work, Written
from kedit_fast.editors.hyperparameters import published
from kedit_fast.editors.located import Located, Prompts, check_finite
from kedit_fast.edits.chain import edited_so_far
from kedit_fast.edits.changes import weight_changes
from kedit_fast.edits.deltas import Delta, LowRank, as_smallest, storable
from kedit_fast.jobs.values import Values, optimize_values
from kedit_fast.kernels.solve import MomentFactor, memit_solve
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.moments.given import described, factored, gains
from kedit_fast.moments.second_moment import SecondMoment
from kedit_fast.sweep.sites import Site


@dataclass(frozen=True)
class Memit(Located):
    """Hyper-parameters under their published names (see ``Located``); ``edit`` does the work.

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
    POSITIVE: ClassVar[tuple[str, ...]] = (*Located.POSITIVE, "mom2_update_weight")

    def check(self, lm: LM) -> None:
        """Raises ValueError for layers that the model does not have, or that are not in order."""
        super().check(lm)
        check_order(self.layers)

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Memit":
        """Published settings where there are some for this model, else derived ones; ``source`` says which.

        Derived: five early-middle layers from a tenth of the depth on, λ = d_ff, clamp 0.75. On SmolLM2-135M later
        layers reach the same efficacy and lose the neighborhood, and λ = 15,000 fits nothing.
        """
        layers = early_middle(lm.n_layers)
        derived = cls(
            layers=layers, mom2_update_weight=float(lm.d_ff), source=f"derived for {lm.n_layers} layers, d_ff {lm.d_ff}"
        )
        return published(PUBLISHED, lm) or derived

    def write(self, work: Work) -> Written:
        """Algorithm 1: z of all facts, then the layers."""
        return spread(work, self, self._update)

    def _update(
        self, work: Work, layer: int, k: Tensor, residual: Tensor, earlier: list[Tensor]
    ) -> tuple[Tensor, Tensor, dict]:
        """(u, v, notes) of Δ = u vᵀ = Rᵀ K (λ C + Kᵀ K)⁻¹, eq. 14."""
        weight, moment = self.mom2_update_weight, work.moments.get(layer) or _identity(work.lm, layer)
        c = factored(work.lm, moment, weight, self.regularizer, earlier)
        g = gains(c, k).mean().item()
        u, v = solved(c, k, residual, work.independent)
        return u, v, {"g": g, "fit": g / (g + weight), "condition": c.condition} | described(moment)


def spread(work: Work, editor, update: Callable) -> Written:
    """MEMIT's algorithm 1 for any system: each layer, from the lowest on, writes an equal share of what is missing.

    update: (work, layer, K [n, d_ff], R [n, d], the keys [nₚ, d_ff] of edits below that are to be kept) ->
        (u [d, n], v [d_ff, n], notes) of Δ = u vᵀ, with Δ k close to r
    """
    lm, layers, top = work.lm, editor.layers, editor.layers[-1]
    prompts = Prompts.of(lm, work.facts, work.contexts)
    z = optimize_values(lm, prompts.value_tasks(lm), editor.z_settings(lm), work.keep)
    solving = _Layers(work, z)

    def share(lm, layer: int, left: int) -> tuple[dict[str, Tensor], dict]:
        """One layer's Δ; lm: with the layers below edited."""
        read = prompts.read(lm, averaged={Site.mlp_key: layer}, bare={Site.mlp_out: layer, Site.layer_out: top})
        k, m, h = read.averaged[Site.mlp_key], read.bare[Site.mlp_out], read.bare[Site.layer_out]
        missing = z.values.double() - h
        residual = through_post_norm(lm, layer, m, missing / left)
        check_finite(lm, k, work.facts, f"key at layer {layer}")
        check_finite(lm, residual, work.facts, f"residual at layer {layer}")
        earlier = [edit.keys[layer] for edit in work.lm.edits if layer in edit.keys] if editor.keep_previous else []
        u, v, notes = update(work, layer, k, residual, earlier)
        return {"u": u, "v": v, "keys": k}, notes | {"missing": missing.norm(dim=1).mean().item()}

    with progress("solving layers", len(layers)) as bar:
        for done, layer in enumerate(layers):
            solving.add(layer, partial(share, left=len(layers) - done))
            bar.advance(1, f"layer {layer}: missing {solving.notes[layer]['missing']:.2f}")
    return solving.written()


class _Layers:
    """The layers that are solved so far: kept as parts of the work, and in place for those above."""

    def __init__(self, work: Work, z: Values):
        self.work, self.z = work, z
        self.owner = torch.arange(len(work.facts)) if work.independent else None
        self.deltas: dict[int, Delta] = {}
        self.keys: dict[int, Tensor] = {}
        self.notes: dict[int, dict] = {}

    def add(self, layer: int, share: Callable) -> None:
        """Solves a layer, or finds it where an interrupted run had."""
        below = edited_so_far(self.work.lm, self.deltas, self.work.facts, self.owner)

        def make() -> dict[str, Tensor]:
            tensors, notes = share(below, layer)
            kept = {name: storable(tensor, below.dtype) for name, tensor in tensors.items()}
            return kept | {"notes": json_tensor(notes)}

        made = self.work.keep(f"layer-{layer}", make)
        delta = LowRank(made["u"], made["v"])
        self.deltas[layer] = delta if self.work.independent else as_smallest(delta)
        self.keys[layer], self.notes[layer] = made["keys"], json_of(made["notes"])

    def written(self) -> Written:
        """What the editor gives."""
        found = Found.of(self.z.steps.tolist(), self.z.loss, self.z.nll)
        return Written(weight_changes(self.deltas, self.owner), found, self.z.values, self.keys, self.notes)


def check_order(layers: Sequence[int]) -> None:
    """Raises ValueError unless the layers stand lowest first."""
    if list(layers) != sorted(layers):
        raise ValueError(f"layers {layers}: expected lowest first; z lives at the last one, above all others")


def solved(kept: MomentFactor, k: Tensor, residual: Tensor, alone: bool) -> tuple[Tensor, Tensor]:
    """u = Rᵀ and v = (A + Kᵀ K)⁻¹ Kᵀ of Δ = u vᵀ, for the kept A = λ C.

    alone: each fact as if there were no other, v = A⁻¹ k / (1 + kᵀ A⁻¹ k) (Sherman and Morrison)
    """
    here, k, residual = k.device, k.to(kept.lower.device), residual.to(kept.lower.device)
    if alone:
        half = kept.solve(k.T)
        u, v = residual.T, half / (1 + (k.T * half).sum(0))
    else:
        u, v = memit_solve(k, residual, kept, kept.weight)
    return u.to(here), v.to(here)


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
