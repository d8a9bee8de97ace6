"""Reading rows: the value of a site at given places, in given layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kedit_fast.sweep.ascent import Ascent, ascend
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.plan import PLACE
from kedit_fast.sweep.runs import RunList, Runs, add_sequences, spans
from kedit_fast.sweep.sites import Site

LEAST_SHARED = 0.05  # of all rows, for what is read to be read of a trie


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
        self.values[layer][which] = x[row].detach()
        return None


class GraphRows:
    """layer_out rows at places run [k], pos [k] of one layer, for a loss: ``take`` after a sweep with grad.

    With their graph; or, on a way that goes down again (``sweep/ascent.py``), leaves whose gradients it begins with.
    """

    def __init__(self, layer: int, run: Tensor, pos: Tensor):
        self.layer, self.run, self.pos = layer, run, pos
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._again: list[tuple[Tensor, Tensor]] = []
        self._leaf: Tensor | None = None

    def sites(self, layer):
        return (Site.layer_out,) if layer == self.layer else ()

    def reads(self, layer):
        return self.run, self.pos

    def at(self, site, layer, x, call):
        which, row = call.find(self.run, self.pos)
        picked = x[row]
        if not call.again:
            self._parts.append((which, picked))
        elif self._leaf is not None:
            self._again.append((which, picked))
        return None

    def take(self) -> Tensor:
        """The rows [k, d], given away: a layer that the backward pass runs again holds its jobs, so a job that still
        held their graph would be in a circle that no garbage collector sees."""
        parts, self._parts = self._parts, []
        rows = _joined(parts)
        if not rows.requires_grad:
            self._leaf = rows.requires_grad_()
        return rows

    def back(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """(the rows once more, with their graph; the gradient of those taken), in their layer on the way down."""
        if layer != self.layer or self._leaf is None:
            return None, None
        again, self._again = self._again, []
        leaf, self._leaf = self._leaf, None
        return _joined(again), leaf.grad


def _joined(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows of several calls in the order of their places."""
    order = torch.cat([which for which, _ in parts]).argsort()
    return torch.cat([x for _, x in parts])[order]


def collect(lm, runs, site: Site, layers, run: Tensor, pos: Tensor, advance=None) -> dict[int, Tensor]:
    """One sweep up to the last of ``layers``: {layer: [k, width]}; advance: as in ``sweep``."""
    job = Collect(site, layers, run, pos)
    held = len(run) * (len(layers) * lm.width_of(site) * lm.dtype.itemsize + PLACE)
    sweep(lm, runs, [job], last_layer=max(layers), held=held, advance=advance)
    return job.values


def entering(lm, packs: Sequence[Runs], layer: int) -> list[Tensor | None]:
    """The rows [rows, d] of each pack that enter ``layer``, in declared order; None: they are the embedding. Where
    layers come in turns, one pass for all packs."""
    if layer == 0:
        return [None] * len(packs)
    jobs, ways = [], []
    for runs in packs:
        run, pos = spans(runs.first_pos, runs.first_pos + runs.n_rows)
        runs, number = _sharing(runs)
        jobs.append(Collect(Site.layer_out, [layer - 1], number[run], pos))
        ways.append(Ascent(runs, jobs[-1:], last_layer=layer - 1))
    ascend(lm, ways)
    return [job.values[layer - 1] for job in jobs]


def _sharing(runs: Runs) -> tuple[Runs, Tensor]:
    """The sequences of runs that own all their rows as a trie, and each one's run in it [R]: for rows that are read and
    have no gradient. As they are where there is little to share, for a trie's attention is made for short texts."""
    as_they_are = runs, torch.arange(len(runs))
    if ((runs.parent >= 0) | (runs.first_pos > 0)).any():
        return as_they_are
    trie, number = RunList(), torch.empty(len(runs), dtype=torch.int64)
    for owner in runs.owner.unique().tolist():
        mine = (runs.owner == owner).nonzero()[:, 0].tolist()
        sequences = [runs.tokens[i, : runs.length[i]].tolist() for i in mine]
        number[mine] = add_sequences(trie, sequences, owner=owner)
    made, n_rows = trie.runs(), int(runs.n_rows.sum())
    return (made, number) if n_rows - int(made.n_rows.sum()) >= LEAST_SHARED * n_rows else as_they_are
