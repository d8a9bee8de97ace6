"""What MEMIT and its kin share: its algorithm 1, for any linear system.

A vector z for each fact, the output of a layer at the subject's last token, makes the model say the new answer. The
edit layers, from the lowest on, then each write a share of what is still missing there. How a layer's weight has to
change for that, Δ = u vᵀ with Δ k close to the share of each key k, is the method's own system.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics.bits import json_of, json_tensor
from kedit_fast.basics.progress import progress
from kedit_fast.editors.editor import Found, Work, Written
from kedit_fast.editors.located import Entered, Located, Prompts, check_finite
from kedit_fast.edits.chain import edited_so_far
from kedit_fast.edits.changes import weight_changes
from kedit_fast.edits.deltas import Delta, LowRank, as_smallest, storable
from kedit_fast.jobs.values import Values, optimize_values
from kedit_fast.kernels.solve import MomentFactor, memit_solve
from kedit_fast.model.experts import routes
from kedit_fast.model.lm import LM
from kedit_fast.moments.blocks import Blocks
from kedit_fast.moments.second_moment import SecondMoment
from kedit_fast.sweep.sites import Site

DAMPING = 1e-2  # μ of ``through_post_norm``


@dataclass(frozen=True)
class Spread(Located):
    """The hyper-parameters that they share beside ``Located``'s, and algorithm 1. A method of this kind is its
    ``update``, and what else differs.

    layers: lowest first
    mom2_update_weight: λ, the weight of C against the new keys (published 15,000 to 20,000; d_ff fits small models)
    keep_previous: whether the keys of edits below are kept (published: no, each batch forgets those before it)
    """

    mom2_update_weight: float = 15_000
    keep_previous: bool = True

    GENTLER: ClassVar[str] = "edit fewer facts at once, or with a larger mom2_update_weight or fewer v_num_grad_steps"
    STAGES: ClassVar = ("optimizing values", "solving layers")
    POSITIVE: ClassVar[tuple[str, ...]] = (*Located.POSITIVE, "mom2_update_weight")

    def check(self, lm: LM) -> None:
        """Raises ValueError for layers that the model does not have, or that are not in order."""
        super().check(lm)
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"layers {self.layers}: expected lowest first; z lives at the last one, above all others")

    # ---- what a method says

    def update(
        self, work: Work, layer: int, k: Tensor, residual: Tensor, earlier: list[Tensor]
    ) -> tuple[Tensor, Tensor, dict]:
        """(u [d, n], v [d_ff, n], notes) of Δ = u vᵀ.

        k: K [n, d_ff]; residual: R [n, d], what the layer's down projection should give more at those keys; earlier:
        the keys [nₚ, d_ff] of edits below that are to be kept
        """
        raise NotImplementedError

    def top(self, layer: int) -> int:
        """The layer whose output is to become z when this one is written: the last one."""
        return self.layers[-1]

    def values(self, lm: LM, prompts: Prompts, top: int, work: Work, name: str) -> tuple[Values, dict]:
        """z of all facts at the output of layer ``top``, and what the edit's provenance is to say of them."""
        tasks = prompts.value_tasks(lm, self.kept_prompts)
        return optimize_values(lm, tasks, self.z_settings(lm, top), work.keep, name), {}

    def read(self, lm: LM, prompts: Prompts, layer: int, top: int, z: Tensor, left: int) -> "Asked":
        """What a layer is asked for: an equal share of what is missing at ``top``, where so many layers, itself among
        them, are still to give theirs."""
        read = prompts.read(lm, averaged={Site.mlp_key: layer}, bare={Site.mlp_out: layer, Site.layer_out: top})
        missing = z - read.bare[Site.layer_out]
        share = through_post_norm(lm, layer, read.bare[Site.mlp_out], missing / left)
        return Asked(read.averaged[Site.mlp_key], missing, share)

    def ridge(self, moment: SecondMoment) -> float:
        """What C gets on its diagonal, relative to its mean there."""
        return self.regularizer

    def kept(self, lm: LM, layer: int, delta: Delta) -> Delta:
        """What of Δ is written: all of it."""
        return delta

    # ---- algorithm 1

    def write(self, work: Work) -> Written:
        """The values, then the layers."""
        solving = _Layers(self, work)
        solving.aim(self.layers[0])
        with progress("solving layers", len(self.layers)) as bar:
            for layer in self.layers:
                if self.top(layer) not in solving.z:
                    with bar.inside("solving layers"):
                        solving.aim(layer)
                solving.add(layer)
                bar.advance(1, f"layer {layer}: missing {solving.notes[layer]['missing']:.2f}")
        return solving.written()


class Asked(NamedTuple):
    """Keys [n, d_ff]; what is missing [n, d]; the share of it [n, d] that a down projection is to give more at them."""

    keys: Tensor
    missing: Tensor
    share: Tensor


class _Layers:
    """The layers that are solved so far: kept as parts of the work, and in place for those above."""

    def __init__(self, editor: Spread, work: Work):
        self.editor, self.work = editor, work
        self.prompts, self.entered = Prompts.of(work.lm, work.facts, work.contexts), Entered()
        self.owner = torch.arange(len(work.facts)) if work.independent else None
        self.z: dict[int, Values] = {}
        self.deltas: dict[int, Delta] = {}
        self.there: dict[int, Delta] = {}  # on the model's device, for as long as layers are solved
        self.keys: dict[int, Tensor] = {}
        self.notes: dict[int, dict] = {}
        self.about: dict = {}

    @property
    def below(self) -> LM:
        """The model with the layers edited that are solved so far."""
        return edited_so_far(self.work.lm, self.there, self.work.facts, self.owner)

    def aim(self, layer: int) -> None:
        """Optimizes the values that this layer is solved for."""
        top = self.editor.top(layer)
        name = "values" if top == self.editor.layers[-1] else f"values-layer-{top}"
        self.z[top], about = self.editor.values(self.below, self.prompts, top, self.work, name)
        self.about |= about

    def add(self, layer: int) -> None:
        """Solves a layer, or finds it where an interrupted run had."""
        below = self.below

        def make() -> dict[str, Tensor]:
            tensors, notes = self._share(below, layer)
            kept = {name: storable(tensor, below.dtype) for name, tensor in tensors.items()}
            return kept | {"notes": json_tensor(notes)}

        made = self.work.keep(f"layer-{layer}", make)
        delta = LowRank(made["u"], made["v"])
        self.deltas[layer] = delta if self.work.independent else self.editor.kept(below, layer, as_smallest(delta))
        self.there[layer] = self.deltas[layer].to(device=below.device)
        self.keys[layer], self.notes[layer] = made["keys"], json_of(made["notes"])

    def _share(self, below: LM, layer: int) -> tuple[dict[str, Tensor], dict]:
        """One layer's Δ and keys, and what there is to note."""
        editor, work, top = self.editor, self.work, self.editor.top(layer)
        left = sum(above >= layer and editor.top(above) == top for above in editor.layers)
        self.entered.layer = layer
        prompts = replace(self.prompts, entered=self.entered)
        k, missing, residual = editor.read(below, prompts, layer, top, self.z[top].values.double(), left)
        check_finite(below, k, work.facts, f"key at layer {layer}")
        check_finite(below, residual, work.facts, f"residual at layer {layer}")
        earlier = [edit.keys[layer] for edit in work.lm.edits if layer in edit.keys] if editor.keep_previous else []
        u, v, notes = editor.update(work, layer, k, residual, earlier)
        if below.n_experts > 1:
            notes |= {"rerouted": self._rerouted(below, layer)}
        return {"u": u, "v": v, "keys": k}, notes | {"missing": missing.norm(dim=1).mean().item()}

    def _rerouted(self, below: LM, layer: int) -> float:
        """The share of facts whose lookup token goes to other experts of this layer since those below are edited; what
        is solved for takes routing as it is now."""
        sent = [
            routes(self.prompts.read(lm, averaged={}, bare={Site.mlp_key: layer}).bare[Site.mlp_key], lm.n_experts)
            for lm in (self.work.lm, below)
        ]
        return (sent[0] != sent[1]).any(1).double().mean().item()

    def written(self) -> Written:
        """What the editor gives."""
        z = self.z[self.editor.top(self.editor.layers[-1])]
        found = Found.of(z.steps.tolist(), z.loss, z.nll)
        return Written(weight_changes(self.deltas, self.owner), found, z.values, self.keys, self.notes, self.about)


def solved(kept: MomentFactor | Blocks, k: Tensor, residual: Tensor, alone: bool) -> tuple[Tensor, Tensor]:
    """u = Rᵀ and v = (A + Kᵀ K)⁻¹ Kᵀ of Δ = u vᵀ, for the kept A = λ C.

    alone: each fact as if there were no other, v = A⁻¹ k / (1 + kᵀ A⁻¹ k) (Sherman and Morrison)
    """
    if isinstance(kept, Blocks):
        return residual.T, kept.update(k.to(kept.matrix.device), alone).to(k.device)
    here, k, residual = k.device, k.to(kept.lower.device), residual.to(kept.lower.device)
    if alone:
        half = kept.solve(k.T)
        u, v = residual.T, half / (1 + (k.T * half).sum(0))
    else:
        u, v = memit_solve(k, residual, kept, kept.weight)
    return u.to(here), v.to(here)


def ridged(regularizer: float, ridge: float, weight: float, moment: SecondMoment) -> float:
    """The regularizer with which λ C has ``ridge`` more on its diagonal; its own is relative to C's mean diagonal."""
    return regularizer + ridge / (weight * moment.matrix.diagonal().double().mean().item())


def only_zero(value: Any) -> dict:
    """Of a file's setting that is not done here: nothing, where it is off. Raises ValueError."""
    if value:
        raise ValueError("expected 0; there is nothing like it here")
    return {}


# What the published files of EMMET and ENCORE have besides.
OF_UNIFIED_EDITING: dict[str, Callable[[Any], dict]] = {
    "add_prev_edits": lambda value: {"keep_previous": value},
    "norm_control": only_zero,
    "dynamic_multiplier": only_zero,
    "random_vector_preservation": only_zero,
}


def fitted(g: Tensor, against: float) -> dict:
    """Notes of a layer: the mean of g [n] over the facts, what it competes with, and the share of what is missing that
    the layer gives."""
    mean = g.mean().item()
    return {"g": mean, "against": against, "fit": mean / (mean + against)}


def identity(lm, layer: int) -> SecondMoment:
    """What takes the statistics' place without ``mom2_adjustment``."""
    return SecondMoment(torch.eye(lm.moment_shape[-1]).expand(lm.moment_shape), lm.d_ff, layer, corpus="identity")


def through_post_norm(lm, layer: int, out: Tensor, residual: Tensor) -> Tensor:
    """What the down projection's output m [n, d] must change by, for the residual stream to change by ``residual``.

    The same (divided by the factor, where the family has one: granite), unless a norm stands between (gemma2, gemma3,
    olmo2, glm4), which scales entry i by s_i = norm(m)_i / m_i. Then

        r = residual ∘ s / (s² + μ mean(s²))                  minimizes |s ∘ r - residual|² + μ mean(s²) |r|²

    Undamped, entries whose norm weight is next to nothing take all: in Gemma-3-270M, whose weights go from 0 to 789, r
    is as long as m or infinite, and MEMIT of 5 facts moved a layer by 28 times its norm and said none of them. Of ten
    facts P(new) is 0.36, 0.81, 0.95, 0.96 with μ = 0.1, 0.03, 0.01, 0.001 (0.96 at z), and 5, 5, 6, 21 points of the
    neighborhood are lost (layers 2 to 6; facts that it was chosen on). Keeping m's length besides (the norm's own
    curvature), or weighing entries as the next norm does, gave no more. z at the down projection's own output makes
    ||z - h|| grow.
    """
    if not lm.ends_in_norm:
        return residual / lm.into_stream(layer, torch.ones_like(residual))
    scale = torch.where(out == 0, 0.0, lm.into_stream(layer, out) / out)
    return residual * scale / (scale.square() + DAMPING * scale.square().mean(1, keepdim=True))
