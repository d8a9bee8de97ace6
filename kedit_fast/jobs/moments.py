"""Accumulates the second moment of a site's rows (the keys) in several layers at once."""

import torch

from ..kernels.second_moment import second_moment_
from ..sites import Site
from ..sweep.engine import ALL


class Moments:
    """``sums[layer]`` [d_ff, d_ff]: sum of k kᵀ over every row that passed; lower triangle only."""

    def __init__(self, sums: dict[int, torch.Tensor]):
        self.sums = sums

    def sites(self, layer):
        return (Site.mlp_key,) if layer in self.sums else ()

    def reads(self, layer):
        return ALL

    def at(self, site, layer, x, call):
        second_moment_(self.sums[layer], x)
        return None
