"""RECT: what changes weights most, relatively, is kept (Gu et al. 2024, arXiv:2401.04700).

MEMIT's Δ, of which each layer keeps the entries that change their weight most, by |Δ / W|; the others are dropped.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.state import wide
from kedit_fast.editors.memit import Memit
from kedit_fast.edits.deltas import FLOATS, Delta, Dense, storable, weight_under
from kedit_fast.model.family import projection
from kedit_fast.model.lm import LM


@dataclass(frozen=True)
class Rect(Memit):
    """RECT: MEMIT whose updates keep only the entries that change their weights most.

    MEMIT's hyper-parameters, and

    keep_share: of a layer's entries that are kept (published 0.2 to 0.4)

    Differs: the published code drops entries when all layers are solved; here the layers above a layer are solved for
    what is kept of it.
    """

    keep_share: float = 0.4

    METHOD: ClassVar = "rect"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"RECT": {}}
    UNREAD: ClassVar = {"independent": "RECT makes one matrix for all facts; edit them one by one, or by MEMIT"}

    def __post_init__(self):
        super().__post_init__()
        checks.number("keep_share", self.keep_share, above=0, most=1, like=0.4)

    def check(self, lm: LM) -> None:
        """Raises ValueError for layers that do not fit, and for packed weights, which have no entries to compare."""
        super().check(lm)
        for layer in self.layers:
            if (dtype := projection(lm.model, layer).weight.dtype) not in FLOATS:
                raise ValueError(f"RECT compares Δ with W, and the weights of layer {layer} are packed ({dtype})")

    def solve_bytes(self, lm: LM) -> int:
        """The factor, or later five dense matrices (Δ, W, what compares them); and what is kept of each layer."""
        dense = wide(lm.dtype).itemsize * lm.d_model * lm.d_ff
        return max(super().solve_bytes(lm), 5 * dense) + len(self.layers) * dense

    def kept(self, lm: LM, layer: int, delta: Delta) -> Delta:
        """The entries of Δ that are largest beside W, as it is with the edits below."""
        dense = delta.dense()
        weight = weight_under(lm.source.weight(layer, "down").to(dense), lm.edits, (layer, "down"))
        return Dense(storable(sparsified(dense, weight, self.keep_share), lm.dtype))


def sparsified(delta: Tensor, weight: Tensor, share: float) -> Tensor:
    """Δ with that share of its entries, those with the largest |Δ| / (|W| + 1e-8)."""
    relative = delta.abs() / (weight.abs() + 1e-8)
    n = max(1, round(share * delta.numel()))
    least = relative.flatten().kthvalue(delta.numel() - n + 1).values
    return torch.where(relative >= least, delta, 0.0)
