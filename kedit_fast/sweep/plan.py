"""Cuts runs into packs that fit the memory, before the first layer. Ancestors are repeated in each pack."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .runs import Runs

# Rows that go through a block in one call. Small enough that a call's intermediates stay in cache, large enough for
# the products: see bench/results for the figure by size.
CALL_ROWS = 2048


@dataclass(frozen=True)
class RowCost:
    """Bytes a row holds: ``kept`` for the whole layer (hidden state in and out, key, value), ``passing`` in a call."""

    kept: int
    passing: int

    @classmethod
    def of(cls, lm) -> "RowCost":
        itemsize = lm.dtype.itemsize
        return cls(
            kept=itemsize * (3 * lm.d_model + 2 * lm.n_key_heads * lm.head_dim),
            passing=itemsize * (3 * lm.d_ff + 6 * lm.d_model),
        )


def cut(runs: Runs, cost: RowCost, memory: int) -> list[Tensor]:
    """Run numbers of each pack, ascending and closed under ancestors, in declared order.

    memory: bytes a pack may hold. Raises ValueError, with the bytes needed, when one run and its ancestors do not fit.
    """
    budget = (memory - CALL_ROWS * cost.passing) // cost.kept
    above = torch.stack([runs.parent, runs.source, runs.graft], dim=1).tolist()
    n_rows = runs.n_rows.tolist()
    packs: list[list[int]] = []
    pack: set[int] = set()
    held = 0
    for run in range(len(runs)):
        new = _with_ancestors(run, above, pack)
        added = sum(n_rows[r] for r in new)
        if pack and held + added > budget:
            packs.append(sorted(pack))
            pack, held = set(), 0
            new = _with_ancestors(run, above, pack)
            added = sum(n_rows[r] for r in new)
        if added > budget:
            need = added * cost.kept + CALL_ROWS * cost.passing
            raise ValueError(
                f"one run with its ancestors needs {need / 1e9:.2f} GB and memory allows {memory / 1e9:.2f} GB; "
                "give open_model a larger memory=, or shorten the text"
            )
        pack.update(new)
        held += added
    if pack:
        packs.append(sorted(pack))
    return [torch.tensor(p, dtype=torch.int64) for p in packs]


def _with_ancestors(run: int, above: list[list[int]], pack: set[int]) -> set[int]:
    """``run`` and those of its ancestors that the pack does not hold yet."""
    new, stack = set(), [run]
    while stack:
        r = stack.pop()
        if r >= 0 and r not in pack and r not in new:
            new.add(r)
            stack.extend(above[r])
    return new


def calls(ends: Tensor, size: int = CALL_ROWS) -> list[tuple[int, int]]:
    """Cuts the rows of a layer into block calls of about ``size`` rows, only behind a segment of one run.

    Parents' rows stand first, so a call reads keys of itself and of earlier calls only.
    """
    cuts, start = [], 0
    stops = ends.tolist()
    for i, stop in enumerate(stops):
        if i + 1 == len(stops) or stops[i + 1] - start > size:
            cuts.append((start, stop))
            start = stop
    return cuts
