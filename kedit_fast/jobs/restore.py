"""Writing rows: noise on the subject's embeddings, and restored (or frozen) contributions of a layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_fast.kernels.rows import add_noise
from kedit_fast.sweep.sites import Site


@dataclass(frozen=True)
class _Corrupt:
    """Changes embeddings at places run [k], pos [k]."""

    run: Tensor
    pos: Tensor

    def sites(self, layer):
        return (Site.embed,) if layer == 0 else ()

    def reads(self, layer):
        return None


@dataclass(frozen=True)
class AddNoise(_Corrupt):
    """Adds noise [k, d] fp64 (level times draw)."""

    noise: Tensor

    def at(self, site, layer, x, call):
        which, row = call.find(self.run, self.pos)
        return add_noise(x, self.noise[which], row) if len(which) else None


@dataclass(frozen=True)
class Toward(_Corrupt):
    """Moves embeddings that share of the way to those of other tokens [k]."""

    lm: object
    tokens: Tensor
    share: float

    def at(self, site, layer, x, call):
        which, row = call.find(self.run, self.pos)
        row = row.to(x.device)
        theirs = self.lm.embed(self.tokens[which])
        return x.index_copy(0, row, x[row].lerp(theirs, self.share))


class Restore:
    """Replaces a site's value at places by another run's value at the same site, layer and position.

    ``site``: attn_out or mlp_out; for write i: in layers [begin[i], end[i]), at (run[i], pos[i]), the value of
    ``from_run[i]``. From the clean run this restores a window; from the corrupted run it freezes (severed traces).
    """

    def __init__(self, site: Site, run: Tensor, pos: Tensor, from_run: Tensor, begin: Tensor, end: Tensor):
        self.site, self.run, self.pos, self.from_run = site, run, pos, from_run
        self.begin, self.end = begin, end
        places, self._source = torch.stack([from_run, pos], 1).unique(dim=0, return_inverse=True)
        self._source_run, self._source_pos = places.unbind(1)
        self._layer, self._values = -1, None
        self._first, self._stop = (int(begin.min()), int(end.max())) if len(run) else (0, 0)

    def sites(self, layer):
        return (self.site,) if self._first <= layer < self._stop else ()

    def reads(self, layer):
        return (self._source_run, self._source_pos) if self.sites(layer) else None

    def at(self, site, layer, x, call):
        if layer != self._layer or self._values is None:
            self._layer = layer
            self._values = x.new_zeros(len(self._source_run), x.shape[1])
            self._writes = ((self.begin <= layer) & (layer < self.end)).nonzero()[:, 0]
        which, row = call.find(self._source_run, self._source_pos)
        self._values[which.to(x.device)] = x[row.to(x.device)]
        active = self._writes
        which, row = call.find(self.run[active], self.pos[active])
        if not len(which):
            return None
        out = x.clone()
        out[row.to(x.device)] = self._values[self._source[active[which]].to(x.device)]
        return out
