"""ROME: Locating and Editing Factual Associations in GPT (Meng et al. 2022, arXiv:2202.05262).

One fact is one key and one value of a layer's down projection W. k* is the key of the subject's last token, averaged
over contexts; v* is the output that makes the model say the new answer. The rank-one update

    Δ = (v* - W k) (C⁻¹ k*)ᵀ / ((C⁻¹ k*)ᵀ k)                  eq. 2

moves W as little as possible, in the metric of C, so that (W + Δ) k = v*. As published k is the bare prompt's key;
``key="averaged"`` takes k* in both places (R-ROME, Gupta et al. 2024), which avoids the collapse of some edits.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.parts import Keep
from kedit_fast.basics.progress import progress
from kedit_fast.editors.contexts import rome_contexts
from kedit_fast.editors.editor import Found, Work, Written
from kedit_fast.editors.hyperparameters import published
from kedit_fast.editors.located import Located, Prompts, check_finite, single_descent, single_layer
from kedit_fast.edits.chain import edited_so_far
from kedit_fast.edits.changes import weight_changes
from kedit_fast.edits.deltas import LowRank, as_smallest, storable
from kedit_fast.jobs.values import Values, optimize_values
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.moments.given import described, factored, gains
from kedit_fast.sweep.sites import Site


@dataclass(frozen=True)
class Rome(Located):
    """ROME: each fact by one rank-one update of one MLP's down projection.

    Hyper-parameters under their published names (see ``Located``); ``edit`` does the work.

    Several facts are written one after the other, each computed with those before it in place, unless independent.

    layers: one after the other (published: one)
    key: "published" (the bare prompt's key in the divisor, so W' k_0 = v*) or "averaged" (R-ROME, W' k* = v*)

    Differs: C is solved by Cholesky in fp64 (published: an explicit fp32 inverse).
    """

    clamp_norm_factor: float = 4.0
    context_template_length_params: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))
    key: str = "published"

    METHOD: ClassVar = "rome"
    STAGES: ClassVar = ("optimizing values",)
    ALG_NAMES: ClassVar = {"ROME": {}, "R-ROME": {"key": "averaged"}}
    CONTEXTS: ClassVar = staticmethod(rome_contexts)
    FLAT_CONTEXTS: ClassVar = True
    GENTLER: ClassVar[str] = (
        "write it over several layers (kf.Memit, --method memit), or with a smaller clamp_norm_factor or fewer "
        "v_num_grad_steps"
    )

    def __post_init__(self):
        super().__post_init__()
        checks.choice("key", self.key, ["published", "averaged"])

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Rome":
        """Published settings where there are some for this model, else a derived layer (``single_layer``)."""
        derived = cls(layers=(single_layer(lm),), source=f"derived for {lm.n_layers} layers", **single_descent(lm))
        return published(PUBLISHED, lm) or derived

    def write(self, work: Work) -> Written:
        """Fact by fact and layer by layer; independent facts together, for none sees another."""
        lm, facts = work.lm, work.facts
        factors = {layer: factored(lm, moment, 1.0, self.regularizer) for layer, moment in work.moments.items()}
        owner = torch.arange(len(facts)) if work.independent else None
        made: dict[int, list[_Update]] = {layer: [] for layer in self.layers}
        turns, label = [facts] if work.independent else [[fact] for fact in facts], "optimizing values, fact by fact"
        with progress(label, len(turns)) as bar:
            for number, some in enumerate(turns):
                with bar.inside(label) if len(turns) > 1 else nullcontext():
                    prompts = Prompts.of(lm, some, work.contexts)
                    for layer in self.layers:
                        below = edited_so_far(lm, {i: _joined(ups) for i, ups in made.items() if ups}, facts, owner)
                        name = f"values-{number}-layer-{layer}"
                        made[layer].append(self._update(below, prompts, layer, factors.get(layer), work.keep, name))
                bar.advance()
        joined = {layer: _joined(ups) for layer, ups in made.items()}
        last = made[self.layers[-1]]
        return Written(
            weight_changes({i: d if work.independent else as_smallest(d) for i, d in joined.items()}, owner),
            Found.of(*(torch.cat([getattr(up.found, name) for up in last]) for name in ("steps", "loss", "nll"))),
            values=torch.cat([update.found.values for update in last]),
            keys={layer: torch.cat([update.keys for update in ups]) for layer, ups in made.items()},
            layers={
                layer: _noted(work.moments.get(layer), factors.get(layer), ups) for layer, ups in sorted(made.items())
            },
        )

    def _update(self, lm, prompts: Prompts, layer: int, moment, keep: Keep, name: str) -> "_Update":
        """Δ of each fact at one layer, by eq. 2."""
        sites = {Site.mlp_key: layer, Site.mlp_out: layer}
        averaged, bare = prompts.read(lm, averaged=sites, bare=sites if self.key == "published" else {})
        k_star = averaged[Site.mlp_key]
        left = k_star if moment is None else moment.solve(k_star.T.to(moment.lower.device)).T.to(k_star.device)
        left = left / left.norm(dim=1, keepdim=True)
        tasks = prompts.value_tasks(lm, self.kept_prompts)
        v = optimize_values(lm, tasks, self.v_settings(lm, layer), keep, name)
        at = bare if self.key == "published" else averaged
        divisor = (at[Site.mlp_key] * left).sum(1, keepdim=True)
        right = (v.values.double() - at[Site.mlp_out]) / divisor
        check_finite(lm, right, prompts.facts, f"change of the output of layer {layer}")
        g = torch.zeros(0) if moment is None else gains(moment, k_star)
        right, left, keys = (storable(x, lm.dtype) for x in (right.T, left.T, k_star))
        return _Update(right, left, keys, v, g)


@dataclass(frozen=True)
class _Update:
    """Δ = u vᵀ of some facts at one layer, u [d, n], v [d_ff, n], and what it was made of; g: [n] kᵀ C⁻¹ k of their
    keys, none without statistics."""

    u: Tensor
    v: Tensor
    keys: Tensor
    found: Values
    g: Tensor


def _noted(moment, factor, updates: list["_Update"]) -> dict:
    """What there is to say of a layer: of its statistics, where it has some; g: the mean over the facts."""
    if moment is None:
        return {}
    return {"g": torch.cat([up.g for up in updates]).mean().item(), "condition": factor.condition} | described(moment)


def _joined(updates: list[_Update]) -> LowRank:
    return LowRank(torch.cat([x.u for x in updates], 1), torch.cat([x.v for x in updates], 1))


def _rome(name: str, layer: int, clamp: float, last: int) -> Rome:
    return Rome(layers=(layer,), clamp_norm_factor=clamp, v_loss_layer=last, source=f"published for {name}")


PUBLISHED = {
    "gpt2-medium": _rome("gpt2-medium", 8, 3, 23),
    "gpt2-large": _rome("gpt2-large", 12, 4, 35),
    "gpt2-xl": _rome("gpt2-xl", 17, 4, 47),
    "gpt-j-6B": _rome("gpt-j-6B", 5, 4, 27),
    "gpt-neox-20b": _rome("gpt-neox-20b", 15, 4, 43),
}
