"""RECT: what changes weights most, relatively, is kept (Gu et al. 2024, arXiv:2401.04700).

MEMIT's Δ, of which each layer keeps the entries that change their weight most, by |Δ / W|; the others are dropped.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.editors.memit import Memit
from kedit_fast.edits.deltas import Delta, Dense, storable
from kedit_fast.model.lm import LM


@dataclass(frozen=True)
class Rect(Memit):
    """MEMIT's hyper-parameters, and

    keep_share: of a layer's entries that are kept (published 0.2 to 0.4)
    """

    keep_share: float = 0.4

    METHOD: ClassVar = "rect"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"RECT": {}}
    UNREAD: ClassVar = {"independent": "RECT's update is of one matrix for all facts; edit them one by one"}

    def __post_init__(self):
        super().__post_init__()
        checks.number("keep_share", self.keep_share, above=0, most=1, like=0.4)

    def kept(self, lm: LM, layer: int, delta: Delta) -> Delta:
        """The entries of Δ that are largest beside W."""
        dense, weight = delta.dense(), lm.source.weight(layer, "down")
        return Dense(storable(sparsified(dense, weight.to(dense), self.keep_share), lm.dtype))


def sparsified(delta: Tensor, weight: Tensor, share: float) -> Tensor:
    """Δ with that share of its entries, those with the largest |Δ / W|; 0 / 0 counts as 0."""
    relative = (delta / weight).abs().nan_to_num(0.0, posinf=torch.inf)
    n = max(1, round(share * delta.numel()))
    least = relative.flatten().kthvalue(delta.numel() - n + 1).values
    return torch.where(relative >= least, delta, 0.0)
