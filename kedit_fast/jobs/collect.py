"""Reading rows: the value of a site at given places, in given layers."""

import torch
from torch import Tensor

from ..sites import Site
from ..sweep.engine import sweep


class Collect:
    """``values[layer]`` [k, width]: the site's value at places run [k], pos [k] in each of ``layers``.

    NaN at a place that no row of the sweep had.
    """

    def __init__(self, site: Site, layers, run: Tensor, pos: Tensor):
        self.site, self.layers, self.run, self.pos = site, frozenset(layers), run, pos
        self.values: dict[int, Tensor] = {}

    def sites(self, layer):
        return (self.site,) if layer in self.layers else ()

    def reads(self, layer):
        return (self.run, self.pos) if layer in self.layers else None

    def at(self, site, layer, x, call):
        which, row = call.find(self.run, self.pos)
        if layer not in self.values:
            self.values[layer] = x.new_full((len(self.run), x.shape[1]), torch.nan)
        self.values[layer][which.to(x.device)] = x[row.to(x.device)].detach()
        return None


def collect(lm, runs, site: Site, layers, run: Tensor, pos: Tensor) -> dict[int, Tensor]:
    """One sweep up to the last of ``layers``: {layer: [k, width]}."""
    job = Collect(site, layers, run, pos)
    sweep(lm, runs, [job], last_layer=max(layers))
    return job.values
