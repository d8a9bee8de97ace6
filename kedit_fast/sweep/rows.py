"""The rows of one pack and where everything lies: the row table that attention and the jobs read, and the keys and
values that outlive a sweep (prefixes for v*/z, the cache of a generation)."""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_fast.sweep.runs import NEVER, Runs, spans


class RowTable:
    """Rows grow as runs branch, and never move: row i is row i in every layer.

    key_rows: [R, T] int64: the KV slot that holds position t of run r, owned or inherited (-1 where there is none).
    Slots below ``base`` belong to a KV store that outlives the sweep; row i of this sweep has slot ``base + i``,
    unless ``slots`` names them (generation writes into the store itself).
    """

    def __init__(self, runs: Runs, first_layer: int, store_table: Tensor | None = None, base: int = 0, slots=None):
        self.runs, self.base, self._slots = runs, base, slots
        self.key_rows = torch.full(runs.tokens.shape, -1, dtype=torch.int64)
        if store_table is not None:
            n, width = len(store_table), min(store_table.shape[1], runs.tokens.shape[1])
            self.key_rows[:n, :width] = store_table[:, :width]
        self.run = torch.empty(0, dtype=torch.int64)
        self.pos = torch.empty(0, dtype=torch.int64)
        self.ends: Tensor = torch.empty(0, dtype=torch.int64)  # where a call may be cut: behind each segment
        self._depth = _depths(runs)
        self._first_layer = first_layer

    def __len__(self) -> int:
        return len(self.run)

    def grow(self, layer: int) -> Tensor:
        """Adds the rows born in the input of ``layer``; gives the row each begins as [m] (-1: its own embedding)."""
        runs = self.runs
        starting = (runs.branch_layer <= layer) if layer == self._first_layer else (runs.branch_layer == layer)
        starting &= runs.branch_layer != NEVER
        joining = runs.narrow & (runs.branch_layer == layer - 1) & (layer > self._first_layer)
        sources = [self._append(joining.nonzero()[:, 0], runs.first_pos + 1, runs.length)]
        stop = torch.where(runs.narrow, runs.first_pos + 1, runs.length)
        for depth in range(int(self._depth[starting].max()) + 1 if starting.any() else 0):
            born = (starting & (self._depth == depth)).nonzero()[:, 0]
            self._inherit(born)
            sources.append(self._append(born, runs.first_pos, stop))
        return torch.cat(sources)

    def at_layer(self, layer: int) -> "RowTable":
        """The table as it is in this layer, whatever grows above."""
        made, runs = copy(self), self.runs
        if ((runs.branch_layer != NEVER) & (runs.branch_layer + runs.narrow.long() > layer)).any():
            made.key_rows = self.key_rows.clone()
        return made

    def ordered(self, h: Tensor) -> Tensor:
        """Rows h [rows, d] in declared order as the table has them: a trie's children stand behind all their parents.

        Raises ValueError for another number of rows.
        """
        if len(h) != len(self):
            raise ValueError(
                f"h has {len(h)} rows and these runs own {len(self)} in their first layer; expected one for each"
            )
        order = (self.run * self.key_rows.shape[1] + self.pos).argsort()
        return h[order.argsort().to(h.device)]

    def _inherit(self, born: Tensor) -> None:
        parent = self.runs.parent[born]
        child = born[parent >= 0]
        before = torch.arange(self.key_rows.shape[1]) < self.runs.length[child, None]
        self.key_rows[child] = torch.where(before, self.key_rows[parent[parent >= 0]], -1)

    def _append(self, born: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Rows at positions [start, stop) for each run of ``born``."""
        which, pos = spans(start[born], stop[born])
        run, count = born[which], (stop - start)[born].clamp(min=0)
        first = pos == self.runs.first_pos[run]
        origin = torch.where(first, self.runs.graft[run], self.runs.source[run])
        begins_as = torch.where(origin >= 0, self.row_of(self.key_rows[origin, pos]), -1)
        row = torch.arange(len(self), len(self) + len(run))
        self.key_rows[run, pos] = self._slots[row] if self._slots is not None else self.base + row
        self.run, self.pos = torch.cat([self.run, run]), torch.cat([self.pos, pos])
        ends = count.cumsum(0)[count > 0] + (len(self) - len(run))
        self.ends = torch.cat([self.ends, ends])
        return begins_as

    def row_of(self, slot: Tensor) -> Tensor:
        """Row of a KV slot; -1 for a slot of the store or none."""
        if self._slots is not None:
            n_slots = int(torch.cat([self._slots, self.key_rows.flatten(), slot.flatten()]).max()) + 1
            where = torch.full((n_slots + 1,), -1)  # the last one stays -1, for slot -1
            where[self._slots] = torch.arange(len(self._slots))
            return where[slot]
        return (slot - self.base).clamp(min=-1)

    @property
    def slots(self) -> Tensor:
        """[rows] the KV slot each row writes."""
        return self._slots if self._slots is not None else torch.arange(self.base, self.base + len(self))


def _depths(runs: Runs) -> Tensor:
    """[R] how many runs stand above each one: rows of one depth can be placed at once."""
    above = torch.stack([runs.parent, runs.source, runs.graft])
    depth = torch.zeros(len(runs), dtype=torch.int64)
    for _ in range(len(runs) + 1):
        new = torch.where(above >= 0, depth[above] + 1, 0).amax(0)
        if torch.equal(new, depth):
            return depth
        depth = new
    raise ValueError("runs name each other as parents in a circle")


class KVStore:
    """Slots of keys and values by layer. ``table`` [runs, T] says which slot holds position t of run r.

    from_layer: keys and values are kept from this layer on, and ``h`` [size, d] is what its rows were on entering it
    on_host: whether they wait there, and come to the device in each sweep
    """

    def __init__(self, from_layer: int = 0, table: Tensor | None = None, size: int = 0, on_host: bool = False):
        self.from_layer, self.table, self.size, self.on_host = from_layer, table, size, on_host
        self.h: Tensor | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def slabs(cls, n_runs: int, n_positions: int) -> "KVStore":
        """An empty store with ``n_positions`` slots in a row for each run: the cache of a generation."""
        table = torch.arange(n_runs * n_positions).view(n_runs, n_positions)
        return cls(table=table, size=n_runs * n_positions)

    def put(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keeps one layer's keys and values [slots, Hkv, D]."""
        if layer >= self.from_layer:
            self._kept[layer] = self._kept_as(keys), self._kept_as(values)

    def enter(self, layer: int, h: Tensor) -> None:
        """Keeps the rows that enter the first layer that is kept."""
        if layer == self.from_layer:
            self.h = self._kept_as(h)

    def _kept_as(self, x: Tensor) -> Tensor:
        return on_host(x.detach()) if self.on_host else x.detach()

    def copy(self, origin: Tensor, target: Tensor) -> None:
        """Gives slots ``target`` [n] the keys and values of slots ``origin`` [n], in all layers."""
        for kept in (each for pair in self._kept.values() for each in pair):
            kept[target.to(kept.device)] = kept[origin.to(kept.device)]

    def room(self, layer: int, n: int, like: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The layer's slots [size + n, Hkv, D], the same memory in every sweep; ``n`` rows of it stand behind."""
        kept = self._kept.get(layer)
        if kept is None or self.on_host or len(kept[0]) < self.size + n:
            # zeros, not empty: a slab's later slots are gathered with the others and only then masked
            grown = tuple(like.new_zeros(self.size + n, *shape) for _ in range(2))
            for new, old in zip(grown, kept or (), strict=False):
                new[: len(old)].copy_(old, non_blocking=True)
            if self.on_host:
                return grown
            self._kept[layer] = kept = grown
        return kept[0].detach(), kept[1].detach()


def on_host(x: Tensor) -> Tensor:
    """A copy in host memory, pinned where it is a GPU's; there once this returns."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type != "cpu").copy_(x)


@dataclass(frozen=True)
class Call:
    """The rows of one block call, as jobs see them: ``x[i]`` at a site belongs to row ``index[i]`` of the pack."""

    table: RowTable
    index: Tensor  # [n] row numbers, ascending
    number: Tensor  # [runs declared] this pack's number of each declared run, -1 where it is in another pack
    again: bool = False  # a backward pass runs the layer once more: a job changes rows as before and keeps nothing

    def find(self, run: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the places (run, pos) [k] lie in this call, and at which row of ``x``.

        A position that the run inherits is found at its parent's row. Runs carry their declared numbers.
        """
        local = self.number[run]
        slot = torch.where(local >= 0, self.table.key_rows[local, pos], -1)
        row = torch.where(slot >= 0, self.table.row_of(slot), -1)
        at = torch.searchsorted(self.index, row).clamp(max=max(len(self.index) - 1, 0))
        here = (row >= 0) & (self.index[at] == row) if len(self.index) else torch.zeros_like(row, dtype=torch.bool)
        which = here.nonzero()[:, 0]
        return which, at[which]

    @property
    def run(self) -> Tensor:
        """[n] this pack's run number of each row."""
        return self.table.run[self.index]

    @property
    def owner(self) -> Tensor:
        """[n] whose edit acts on each row."""
        return self.table.runs.owner[self.run]

    @property
    def pos(self) -> Tensor:
        """[n] position of each row."""
        return self.table.pos[self.index]

    @property
    def prompt_end(self) -> Tensor:
        """[n] position of the last token of the prompt that each row's run goes on from; -1: not said."""
        return self.table.runs.prompt_end[self.run]

    @property
    def tokens(self) -> Tensor:
        """[n] token of each row."""
        return self.table.runs.tokens[self.run, self.pos]
