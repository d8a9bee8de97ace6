"""ROME: Locating and Editing Factual Associations in GPT (Meng et al. 2022, arXiv:2202.05262).

One fact is one key and one value of a layer's down projection W. k* is the key of the subject's last token, averaged
over contexts; v* is the output that makes the model say the new answer. The rank-one update

    Δ = (v* - W k) (C⁻¹ k*)ᵀ / ((C⁻¹ k*)ᵀ k)                  eq. 2

moves W as little as possible, in the metric of C, so that (W + Δ) k = v*. As published k is the bare prompt's key;
``key="averaged"`` takes k* in both places (R-ROME, Gupta et al. 2024), which avoids the collapse of some edits.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .. import __version__
from ..deltas import LowRank, as_smallest
from ..edit import Edit
from ..jobs.values import ValueSettings, optimize_values
from ..sites import Site
from .common import Prompts, chain, check_finite, storable
from .contexts import rome_contexts
from .hyperparameters import Settings, published
from .statistics import described, factored, fit


@dataclass(frozen=True)
class Rome(Settings):
    """Hyper-parameters under their published names (see ``Settings``); ``edit`` does the work.

    layers: one after the other (published: one)
    key: "published" (the bare prompt's key in the divisor, so W' k_0 = v*) or "averaged" (R-ROME, W' k* = v*)
    """

    clamp_norm_factor: float = 4.0
    context_template_length_params: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))
    key: str = "published"

    def __post_init__(self):
        super().__post_init__()
        if self.key not in ("published", "averaged"):
            raise ValueError(f'key {self.key!r}: expected "published" or "averaged"')

    @classmethod
    def for_model(cls, lm) -> "Rome":
        """Published settings where there are some for this model, else a derived layer at a sixth of the depth."""
        derived = cls(layers=(lm.n_layers // 6,), source=f"derived for {lm.n_layers} layers")
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
        """One Edit; several facts are written one after the other, each computed with those before it in place.

        Arguments and errors as in ``Memit.edit``. Differs: C is solved by Cholesky in fp64 (published: an explicit
        fp32 inverse).
        """
        lm, facts, groups = self._prepared(lm, facts, contexts, previous)
        moments = self._moments(lm, moments, corpus)
        factors = {layer: factored(lm, moment, 1.0, self.regularizer) for layer, moment in moments.items()}
        groups = groups or rome_contexts(lm, self.context_template_length_params, seed=seed)
        groups = [[t for group in groups for t in group]]  # flat: every context weighs the same
        made: dict[int, list[_Update]] = {layer: [] for layer in self.layers}
        for fact in facts:
            prompts = Prompts.of(lm, [fact], groups)
            for layer in self.layers:
                made[layer].append(self._update(_with(lm, made), prompts, layer, factors.get(layer)))
        updates = {layer: made[layer] for layer in sorted(made)}
        about = {layer: described(moment) for layer, moment in moments.items()}
        notes = {layer: [update.notes | about.get(layer, {}) for update in updates[layer]] for layer in updates}
        return Edit(
            method="rome", hparams=asdict(self), fingerprint=lm.fingerprint, facts=tuple(facts),
            deltas={i: as_smallest(_joined(ups)) for i, ups in updates.items()},
            values=torch.cat([u.value for u in made[self.layers[-1]]]).cpu(),
            keys={i: torch.cat([u.key for u in ups]) for i, ups in updates.items()}, contexts=groups,
            provenance={"version": __version__, "layers": notes} | chain(lm),
        )  # fmt: skip

    def _update(self, lm, prompts: Prompts, layer: int, moment) -> "_Update":
        """Δ of one fact at one layer."""
        everything = torch.arange(len(prompts.sequences))
        rows = prompts.collect(lm, {Site.mlp_key: (layer, everything), Site.mlp_out: (layer, everything)})
        keys, outs = rows[Site.mlp_key].double(), rows[Site.mlp_out].double()
        averaged = prompts.average(keys)[0]
        left = averaged if moment is None else moment.solve(averaged)
        left = left / left.norm()
        v = optimize_values(lm, prompts.value_tasks(lm), self._value_settings(lm, layer))
        bare = int(prompts.bare[0])
        key, out = (keys[bare], outs[bare]) if self.key == "published" else (averaged, prompts.average(outs)[0])
        right = (v.values[0].double() - out) / (key @ left)
        check_finite(right[None], prompts.facts, f"change of the output of layer {layer}")
        notes = {"steps": int(v.steps[0]), "loss": float(v.loss[0]), "p_new": float((-v.nll[0]).exp())}
        if moment is not None:
            notes |= {"g": fit(moment, averaged[None])[0], "condition": moment.condition}
        return _Update(
            storable(lm, right[:, None]), storable(lm, left[:, None]), v.values, storable(lm, averaged[None]), notes
        )

    def _value_settings(self, lm, layer: int) -> ValueSettings:
        return ValueSettings(
            layer=layer, site=Site.mlp_out, lr=self.v_lr, steps=self.v_num_grad_steps, weight_decay=self.v_weight_decay,
            kl_factor=self.kl_factor, clamp=self.clamp_norm_factor, loss_layer=lm.n_layers - 1,
        )  # fmt: skip


@dataclass(frozen=True)
class _Update:
    """One fact's Δ = u vᵀ at one layer, u [d, 1], v [d_ff, 1], and what it was made of."""

    u: Tensor
    v: Tensor
    value: Tensor
    key: Tensor
    notes: dict


def _joined(updates: list[_Update]) -> LowRank:
    return LowRank(torch.cat([x.u for x in updates], 1), torch.cat([x.v for x in updates], 1))


def _with(lm, made: dict[int, list[_Update]]):
    """The model with all updates made so far."""
    deltas = {layer: _joined(updates) for layer, updates in made.items() if updates}
    if not deltas:
        return lm
    return lm.with_edit(Edit(method="rome", hparams={}, fingerprint=lm.fingerprint, facts=(), deltas=deltas))


def _rome(name: str, layer: int, clamp: float, last: int) -> Rome:
    return Rome(layers=(layer,), clamp_norm_factor=clamp, v_loss_layer=last, source=f"published for {name}")


PUBLISHED = {
    "gpt2-medium": _rome("gpt2-medium", 8, 3, 23),
    "gpt2-large": _rome("gpt2-large", 12, 4, 35),
    "gpt2-xl": _rome("gpt2-xl", 17, 4, 47),
    "gpt-j-6B": _rome("gpt-j-6B", 5, 4, 27),
    "gpt-neox-20b": _rome("gpt-neox-20b", 15, 4, 43),
}
