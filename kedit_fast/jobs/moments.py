"""Accumulates the second moment of a site's rows (the keys) in several layers at once."""

import torch

from kedit_fast.jobs.finite import not_finite
from kedit_fast.kernels.second_moment import NotFinite, second_moment_
from kedit_fast.sweep.engine import ALL
from kedit_fast.sweep.sites import Site


class Moments:
    """``sums[layer]`` [d_ff, d_ff]: sum of k kᵀ over every row that passed; lower triangle only. Of a mixture of
    experts a block each [E, width, width], of the rows that are sent to it.

    Raises ValueError for keys with NaN or infinity, of which nothing is added.
    """

    def __init__(self, lm, sums: dict[int, torch.Tensor]):
        self._lm, self.sums = lm, sums

    def sites(self, layer):
        return (Site.mlp_key,) if layer in self.sums else ()

    def reads(self, layer):
        return ALL

    def at(self, site, layer, x, call):
        try:
            sums = self.sums[layer]
            if sums.ndim == 2:
                second_moment_(sums, x)
            else:
                for total, keys in zip(sums, x.view(len(x), len(sums), -1).unbind(1), strict=True):
                    second_moment_(total, keys[keys.any(1)])
        except NotFinite as error:
            raise not_finite(self._lm, f"layer {layer} of {self._lm.name} gives NaN or infinity: {error}") from error
        return None
