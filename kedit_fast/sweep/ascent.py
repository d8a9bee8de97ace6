"""Packs that go up side by side, and down again: one pass over the weights each way, whatever their number.

Autograd holds what it needs of every layer until the backward pass. Where layers come in turns that would be their
weights too, and the rows of all packs. So no graph is kept: of each layer the rows that enter it wait, on the host
where the weights come from there, and on the way down the layer runs again, with a graph of its own for a moment. What
is read at the top (``GraphRows``) are leaves, whose gradients are where the way down begins.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch

from kedit_fast.model.seam import prepared
from kedit_fast.sweep.engine import Job, Pack, sweep
from kedit_fast.sweep.runs import Runs, in_order


class Ascent:
    """One pack: what ``sweep`` takes of one. goes_down: set by whoever has made the gradients of what was read"""

    def __init__(self, runs: Runs, jobs: list[Job], *, grad: bool = False, **how: Any):
        self.runs, self.jobs, self.grad, self.how = runs, jobs, grad, how
        self.is_up = self.goes_down = False
        self.pack: Pack | None = None  # on its way, where it is taken up and down layer by layer

    def layers(self, n_layers: int) -> tuple[int, int]:
        """The first and the last layer."""
        last = self.how.get("last_layer")
        return self.how.get("first_layer", 0), n_layers - 1 if last is None else last


def ascend(lm, ascents: Sequence[Ascent]) -> None:
    """Takes all of them up."""
    for one in ascents:
        one.is_up = True
    if lm.source.in_memory or (len(ascents) == 1 and not ascents[0].grad):
        for one in ascents:
            sweep(lm, one.runs, one.jobs, grad=one.grad, **one.how)
    elif ascents:
        _layer_by_layer(lm, ascents)


def _layer_by_layer(lm, ascents: Sequence[Ascent]) -> None:
    ways = [one.layers(lm.n_layers) for one in ascents]
    up = list(range(min(first for first, _ in ways), max(last for _, last in ways) + 1))
    lm.source.expect(up + up[::-1] if any(one.grad for one in ascents) else up)
    goings = []
    for one, (first, last) in zip(ascents, ways, strict=True):
        lm.check_length(int(one.runs.length.max()))
        jobs, number = in_order(lm, one.jobs), torch.arange(len(one.runs))
        one.pack = Pack(lm, one.runs, number, jobs, *(one.how.get(x) for x in ("store", "slots", "keep", "table")))
        one.pack.waiting = [] if one.grad else None
        goings.append(one.pack.run(first, last, one.how.get("h")))
    with prepared(lm.model, lm.family), torch.no_grad():
        for _ in zip_longest(*goings):
            pass


def descend(lm, ascents: Sequence[Ascent]) -> None:
    """Takes those down that came up layer by layer; of the others autograd has."""
    packs = [one.pack for one in ascents if one.pack is not None]
    for one in ascents:
        one.goes_down, one.pack = False, None
    if not packs:
        return
    top, bottom = max(pack.waiting[-1].layer for pack in packs), min(pack.waiting[0].layer for pack in packs)
    with prepared(lm.model, lm.family), torch.enable_grad():
        for layer in range(top, bottom - 1, -1):
            for pack in packs:
                if pack.waiting and pack.waiting[-1].layer == layer:
                    pack.back()
