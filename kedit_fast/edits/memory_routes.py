"""Routes of memories that stand beside the weights: they read the memory itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.edits.memories import MaskedMemory, SideMemory
from kedit_fast.edits.routes import Prompt, Route, check_floats, prompt_features
from kedit_fast.sweep.sites import Site


@dataclass(frozen=True, eq=False)
class ActivationRoute(Route):
    """The side memory that a prompt moves most: mean over its tokens of ‖x Δ_mᵀ‖, where that is above the memory's
    threshold (WISE, Wang et al. 2024, eq. 4).

    threshold: [m], of each memory of the edit's ``SideMemory``; entry: as in ``Route``. Cost: a sweep up to the layer.
    """

    threshold: Tensor
    entry: Tensor
    memory: SideMemory | None = None
    kind: ClassVar[str] = "activation"
    when: ClassVar[str] = "behind a prompt that moves it most, and beyond its threshold"

    def __post_init__(self):
        check_floats("threshold", self.threshold, 1)

    @property
    def n_entries(self) -> int:
        """As many as memories."""
        return len(self.threshold)

    def bound(self, changes: Sequence) -> "ActivationRoute":
        """With the edit's side memory."""
        return replace(self, memory=_the_one(changes, "side", self.n_entries))

    def _choose(self, lm, prompts: Sequence[Prompt]) -> Tensor:
        """The memory of the largest activation above its threshold."""
        assert self.memory is not None  # bound
        moved = activations(lm, prompts, self.memory)
        above = moved.masked_fill(moved < self.threshold.to(moved), -torch.inf)
        most, memory = above.max(1)
        return torch.where(most.isfinite(), memory, -1)

    def take(self, entries: Tensor, entry: Tensor, facts: Tensor) -> "ActivationRoute":
        """Some memories' thresholds."""
        return replace(self, threshold=self.threshold[entries], entry=entry)

    def tensors(self) -> dict[str, Tensor]:
        """Thresholds and the facts' entries."""
        return {"threshold": self.threshold, "entry": self.entry}


@dataclass(frozen=True, eq=False)
class OverlapRoute(Route):
    """The entry whose mask shares most with a prompt's own, where that is a share of at least ``least`` (MEMOIR, Wang
    et al. 2025, section 3).

    A prompt's mask: of its mean input x of the down projection, the k features that stand farthest from ``background``,
    each sent elsewhere by ``permutation``. background: [d_ff]; permutation: [d_ff] int64; entry: as in ``Route``; the
    masks are those of the edit's ``MaskedMemory``. Cost: one sweep up to the layer.
    """

    least: float
    background: Tensor
    permutation: Tensor
    entry: Tensor
    memory: MaskedMemory | None = None
    kind: ClassVar[str] = "overlap"
    when: ClassVar[str] = "behind a prompt whose features overlap enough with its mask"

    def __post_init__(self):
        check_floats("background", self.background, 1)
        if not torch.equal(self.permutation.sort().values, torch.arange(len(self.background))):
            raise ValueError("a route's permutation: expected each feature once")

    @property
    def n_entries(self) -> int:
        """As many as masks."""
        return int(self.entry.max()) + 1 if len(self.entry) else 0

    def bound(self, changes: Sequence) -> "OverlapRoute":
        """With the edit's masked memory."""
        return replace(self, memory=_the_one(changes, "masked", self.n_entries))

    def check(self, lm) -> None:
        """Raises ValueError for another width than the model's."""
        if len(self.background) != lm.d_ff:
            raise ValueError(f"a route over {len(self.background)} features, this model's keys have {lm.d_ff}")

    def _choose(self, lm, prompts: Sequence[Prompt]) -> Tensor:
        """The entry of the largest overlap, of equal ones the first."""
        assert self.memory is not None  # bound
        masks = self.memory.masks[self.memory.owners.argsort()]
        own = self.masks_of(lm, prompts, self.memory.layer, masks.shape[1])
        stored, seen = (torch.zeros(len(m), len(self.background)).scatter_(1, m, 1.0) for m in (masks, own))
        most, entry = (seen @ stored.T / masks.shape[1]).max(1)
        return torch.where(most >= self.least, entry, -1)

    def masks_of(self, lm, prompts: Sequence[Prompt], layer: int, k: int) -> Tensor:
        """[n, k] int64, ascending: the mask of each prompt."""
        features = prompt_features(lm, prompts, layer, Site.mlp_key, every=True)
        top = (features - self.background.to(features)).abs().topk(k, dim=1).indices
        return self.permutation[top].sort(1).values

    def take(self, entries: Tensor, entry: Tensor, facts: Tensor) -> "OverlapRoute":
        """The entries of the facts that stay."""
        return replace(self, entry=entry)

    def record(self) -> dict:
        """The least share."""
        return {"least": self.least}

    def tensors(self) -> dict[str, Tensor]:
        """Background, permutation and the facts' entries."""
        return {"background": self.background, "permutation": self.permutation, "entry": self.entry}


def activations(lm, prompts: Sequence[Prompt], memory: SideMemory) -> Tensor:
    """[n, m] how far each memory moves each prompt: the mean over its tokens of ‖x Δ_mᵀ‖."""
    deltas = [memory.dense(i) for i in memory.owners.argsort().tolist()]

    def moved(rows: Tensor) -> Tensor:
        return torch.stack([(rows @ delta.to(rows).T).norm(dim=1) for delta in deltas], 1)

    return prompt_features(lm, prompts, memory.layer, Site.mlp_key, every=True, measure=moved)


def _the_one(changes: Sequence, kind: str, n_entries: int):
    """The edit's change of a kind, None where no entries are left. Raises ValueError unless it has each of them."""
    found = [change for change in changes if change.kind == kind]
    owners = [sorted(change.owners.tolist()) for change in found]
    if owners != [list(range(n_entries))] and (found or n_entries):
        raise ValueError(
            f"this route reads the edit's one change of kind {kind!r}, with the entries 0 to {n_entries - 1}; the edit "
            f"has {len(found)}, with the entries {checks.shown(owners)}"
        )
    return found[0] if found else None
