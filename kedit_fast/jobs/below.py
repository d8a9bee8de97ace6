"""What lies below the layers that change, kept: the rows that enter them, of sequences that are asked many times."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kedit_fast.basics.progress import progress
from kedit_fast.jobs.collect import entering
from kedit_fast.sweep.plan import call_rows, together
from kedit_fast.sweep.runs import RunList, Runs, padded


class Below:
    """The rows that enter a layer; no edit may act below it.

    sequences: token ids, computed now, in this order, so that their bits do not depend on who asks for them when; most:
    bytes that are kept; what is not kept is computed each time
    """

    def __init__(self, lm, sequences: Sequence[Sequence[int]], layer: int, most: int):
        self.layer = layer
        self.rows: dict[tuple[int, ...], Tensor] = {}
        every = list(dict.fromkeys(map(tuple, sequences))) if layer else []
        room, kept = most // (lm.d_model * lm.dtype.itemsize), []
        for ids in every:
            room -= len(ids)
            if room >= 0:
                kept.append(ids)
        with progress("layers below (prompts)", len(kept)) as bar:
            for some in together(kept, len, call_rows(lm)):
                self.rows.update(zip(some, self._computed(lm, some), strict=True))
                bar.advance(len(some))

    @property
    def nbytes(self) -> int:
        """Of the rows that are kept."""
        return sum(rows.nbytes for rows in self.rows.values())

    def __call__(self, lm, packs: Sequence[Runs], layer: int) -> list[Tensor | None]:
        """As ``entering``, of runs that own all their rows."""
        if layer != self.layer or any(at < layer for edit in lm.edits for at in edit.layers):
            raise ValueError(f"the rows that are kept enter layer {self.layer}, below which nothing may change")
        if layer == 0:
            return [None] * len(packs)
        asked = [
            [tuple(ids[:n]) for ids, n in zip(*map(Tensor.tolist, (runs.tokens, runs.length)), strict=True)]
            for runs in packs
        ]
        missing = list(dict.fromkeys(ids for pack in asked for ids in pack if ids not in self.rows))
        found = self.rows | dict(zip(missing, self._computed(lm, missing), strict=True)) if missing else self.rows
        return [torch.cat([found[ids] for ids in pack]).to(lm.device) for pack in asked]

    def _computed(self, lm, sequences: list[tuple[int, ...]]) -> list[Tensor]:
        runs = RunList()
        tokens, length = padded(sequences)
        runs.add(tokens, length=length, owner=-1)
        (rows,) = entering(lm, [runs.runs()], self.layer)
        return list(rows.cpu().split(length.tolist()))
