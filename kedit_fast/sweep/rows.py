"""The rows of one pack and where everything lies: the row table that attention and the jobs read."""

from bisect import bisect_left
from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from kedit_fast.basics.state import upload
from kedit_fast.sweep.plan import calls
from kedit_fast.sweep.runs import NEVER, Runs, spans

T = TypeVar("T")
PLACES_KEPT = 64  # lists of places whose rows a table holds at once: a job's own, and one a layer of others


class RowTable:
    """Rows grow as runs branch, and never move: row i is row i in every layer, so all of them are planned at once.

    key_rows: [R, T] int64: the KV slot that holds position t of run r, owned or inherited (-1 where there is none), as
    it is once all runs have grown; run, pos: [rows] of all that ever will be; ends: behind which of them a call may be
    cut. ``len`` is how many there are by now: ``grow`` goes to a layer. Slots below ``base`` belong to a KV store that
    outlives the sweep; row i of this sweep has slot ``base + i``, unless ``slots`` names them (generation writes into
    the store itself).
    """

    def __init__(
        self, runs: Runs, first_layer: int, last_layer: int = NEVER - 1, *, store_table: Tensor | None = None,
        base: int = 0, slots: Tensor | None = None, device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.runs, self.base, self._slots, self.device = runs, base, slots, torch.device(device)
        self.key_rows = torch.full(runs.tokens.shape, -1, dtype=torch.int64)
        if store_table is not None:
            n, width = len(store_table), min(store_table.shape[1], runs.tokens.shape[1])
            self.key_rows[:n, :width] = store_table[:, :width]
        self.run = torch.empty(0, dtype=torch.int64)
        self.pos = torch.empty(0, dtype=torch.int64)
        self.ends: Tensor = torch.empty(0, dtype=torch.int64)
        self._made: dict[Hashable, Any] = {}  # tables on the device, and what was found; all layers share it
        self._plan(first_layer, last_layer)

    def __len__(self) -> int:
        return self._n

    def begins(self, size: int) -> list[int]:
        """First rows of block calls of about ``size`` rows: the same in every layer, for rows stay where they are."""
        return self.once(("calls", size), lambda: [first for first, _ in calls(self.ends, size)])

    def calls(self, size: int) -> list[slice]:
        """The rows that there are by now as block calls."""
        begins = self.begins(size)
        begins = begins[: bisect_left(begins, self._n)]
        return [slice(*span) for span in zip(begins, [*begins[1:], self._n], strict=True)]

    def grow(self, layer: int) -> Tensor:
        """Adds the rows born in the input of ``layer``; gives the row each begins as [m] (-1: its own embedding), on
        the device."""
        before, self._n = self._grown.get(layer, (self._n, self._n))
        return self.once("sources", lambda: upload(self.device, self.sources))[0][before : self._n]

    def begun(self) -> "RowTable":
        """The table before its first layer."""
        made = copy(self)
        made._n = 0
        return made

    def at_layer(self, layer: int) -> "RowTable":
        """The table as it is in this layer, whatever grows above."""
        made = copy(self)
        made._n = max((n for at, (_, n) in self._grown.items() if at <= layer), default=0)
        return made

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What was made by this name for one layer serves all of them."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def pos_there(self) -> Tensor:
        """``pos`` on the device."""
        return self.once("pos", lambda: upload(self.device, self.pos))[0]

    @property
    def key_rows_there(self) -> Tensor:
        """``key_rows`` on the device."""
        return self.once("key rows", lambda: upload(self.device, self.key_rows))[0]

    def found(self, run: Tensor, pos: Tensor, number: Tensor) -> "Places":
        """Where places (run, pos) [k] are by now: asked for again and again, it is looked for once, as long as it stays
        the same. number: as in ``Call``"""
        known: dict[tuple[int, int], Places] = self.once("places", dict)
        key = id(run), id(pos)
        held = known.get(key)
        if held is None or not held.holds(self._n):
            if len(known) >= PLACES_KEPT:
                known.clear()
            known[key] = held = Places(self, run, pos, number)
        return held

    def rows_of(self, run: Tensor, pos: Tensor) -> Tensor:
        """[k] the row of position pos of this pack's run by now: its own, or, before it has one, what stands there
        above it; -1 where there is none, or the run (-1: of another pack) has not begun."""
        row = torch.full_like(run, -1)
        left = (run >= 0) & (self._born[run] <= self._n)
        while left.any():
            at, where = run[left], pos[left]
            mine = self.row_of(self.key_rows[at, where])
            row[left] = torch.where(mine < self._n, mine, -1)
            later = left.clone()
            later[left] = mine >= self._n
            run = torch.where(later, self.runs.parent[run], run)
            left = later & (run >= 0)
        return row

    def ordered(self, h: Tensor) -> Tensor:
        """Rows h [rows, d] in declared order as the table has them: a trie's children stand behind all their parents.

        Raises ValueError for another number of rows.
        """
        if len(h) != len(self):
            raise ValueError(
                f"h has {len(h)} rows and these runs own {len(self)} in their first layer; expected one for each"
            )

        def order() -> Tensor | None:
            place = (self.run[: self._n] * self.key_rows.shape[1] + self.pos[: self._n]).argsort().argsort()
            return None if torch.equal(place, torch.arange(len(place))) else upload(self.device, place)[0]

        found = self.once("order", order)
        return h if found is None else h[found]

    # ---- the plan

    def _plan(self, first_layer: int, last_layer: int) -> None:
        runs = self.runs
        begun = runs.branch_layer[runs.branch_layer != NEVER]
        joined = runs.branch_layer[runs.narrow & (runs.branch_layer != NEVER)] + 1
        layers = {first_layer, *torch.cat([begun, joined]).unique().tolist()}
        depth, sources, self._n, self._grown = _depths(runs), [], 0, {}
        self._born = torch.where(runs.branch_layer == NEVER, 0, NEVER)  # rows that there are once a run has begun
        for layer in sorted(layer for layer in layers if first_layer <= layer <= last_layer):
            before = self._n
            sources += self._planned(layer, layer == first_layer, depth)
            self._grown[layer] = before, self._n
        self.sources = torch.cat(sources)  # [rows] the row that each begins as, -1: its own embedding
        self._n = 0

    def _planned(self, layer: int, is_first: bool, depth: Tensor) -> list[Tensor]:
        """The rows born in the input of ``layer``: what each begins as."""
        runs = self.runs
        starting = (runs.branch_layer <= layer) if is_first else (runs.branch_layer == layer)
        starting &= runs.branch_layer != NEVER
        joining = runs.narrow & (runs.branch_layer == layer - 1) & (not is_first)
        sources = [self._append(joining.nonzero()[:, 0], runs.first_pos + 1, runs.length)]
        stop = torch.where(runs.narrow, runs.first_pos + 1, runs.length)
        for level in range(int(depth[starting].max()) + 1 if starting.any() else 0):
            born = (starting & (depth == level)).nonzero()[:, 0]
            self._inherit(born)
            sources.append(self._append(born, runs.first_pos, stop))
        self._born[starting] = self._n
        return sources

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
        row = torch.arange(self._n, self._n + len(run))
        self.key_rows[run, pos] = self._slots[row] if self._slots is not None else self.base + row
        self.run, self.pos = torch.cat([self.run, run]), torch.cat([self.pos, pos])
        self.ends = torch.cat([self.ends, count.cumsum(0)[count > 0] + self._n])
        self._n += len(run)
        return begins_as

    def row_of(self, slot: Tensor) -> Tensor:
        """Row of a KV slot; -1 for a slot of the store or none."""
        if self._slots is not None:
            n_slots = int(torch.cat([self._slots, self.key_rows.flatten(), slot.flatten()]).max()) + 1
            where = torch.full((n_slots + 1,), -1)  # the last one stays -1, for slot -1
            where[self._slots] = torch.arange(len(self._slots))
            return where[slot]
        return (slot - self.base).clamp(min=-1)

    def slots(self, rows: slice | Tensor) -> slice | Tensor:
        """The KV slots that these rows write: a slice where they stand together, as ``Call.rows_there`` has them."""
        if self._slots is not None:
            return self.once("slots", lambda: upload(self.device, self._slots))[0][rows]
        if isinstance(rows, slice):
            return slice(self.base + rows.start, self.base + rows.stop)
        return self.base + rows


class Places:
    """Rows of places (run, pos) [k] in a pack, in the order of the rows: which: [m] of them; row: [m] int64, on the CPU
    and on the device."""

    def __init__(self, table: RowTable, run: Tensor, pos: Tensor, number: Tensor):
        self.asked = run, pos  # held, so that nothing else has their id
        row, local = table.rows_of(number[run], pos), number[run]
        own = table.row_of(table.key_rows[local, pos])
        self._n = len(table)
        self._settled = bool(((row == own) | (local < 0)).all())  # so it is in all layers above
        order = row.argsort(stable=True)
        self.which = order[int((row < 0).sum()) :]
        self.row = row[self.which]
        self.there = upload(table.device, self.which, self.row)

    def holds(self, n: int) -> bool:
        """Whether it is the same with n rows."""
        return n == self._n or (n > self._n and self._settled)


class There:
    """A job's table (``here``), taken to a device where it is first asked for."""

    def __init__(self, table: Tensor):
        self.here = self._there = table

    def __len__(self) -> int:
        return len(self.here)

    def on(self, device: torch.device) -> Tensor:
        """The table on this device."""
        if self._there.device != device:
            (self._there,) = upload(device, self.here)
        return self._there


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


@dataclass(frozen=True)
class Call:
    """The rows of one block call, as jobs see them: ``x[i]`` at a site belongs to row ``index[i]`` of the pack."""

    table: RowTable
    rows: slice | Tensor  # of the pack: from a row to another, or [n] row numbers, ascending
    number: Tensor  # [runs declared] this pack's number of each declared run, -1 where it is in another pack
    again: bool = False  # a backward pass runs the layer once more: a job changes rows as before and keeps nothing

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What was made of these rows in one layer serves all that have this call."""
        made: dict[Hashable, tuple[Any, T]] = self.table.once("calls made", dict)  # {(name, rows): (which, what)}
        # by where rows that stand together begin: a layer's last call may have grown, and is made anew
        together = isinstance(self.rows, slice)
        key, which = (name, self.rows.start if together else id(self.rows)), self.rows.stop if together else self.rows
        held = made.get(key)
        if held is None or (held[0] != which if together else held[0] is not which):
            made[key] = held = which, make()
        return held[1]

    def find(self, run: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the places (run, pos) [k] lie in this call, and at which row of ``x``, in the order of the rows;
        both on x's device.

        A position that the run inherits is found at its parent's row. Runs carry their declared numbers. What a job
        asks for call by call are the same tensors, so that they are looked for once.
        """
        if not isinstance(self.rows, slice):
            found_here = partial(self._found_alone, run, pos)
            return self.once(("found", id(run), id(pos)), found_here)[1]
        found = self.table.found(run, pos, self.number)
        which, row = (each[self._span(found)] for each in found.there)
        return which, row - self.rows.start if self.rows.start else row

    def _found_alone(self, run: Tensor, pos: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What was asked, held so that nothing else has its id, and where it is found."""
        which, row = upload(self.table.device, *self.find_here(run, pos))
        return (run, pos), (which, row)

    def find_here(self, run: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """``find`` on the CPU."""
        found = self.table.found(run, pos, self.number)
        if isinstance(self.rows, slice):
            span = self._span(found)
            return found.which[span], found.row[span] - self.rows.start
        at = torch.searchsorted(self.rows, found.row).clamp(max=max(len(self.rows) - 1, 0))
        here = self.rows[at] == found.row if len(self.rows) else torch.zeros_like(found.row, dtype=torch.bool)
        return found.which[here], at[here]

    def _span(self, found: Places) -> slice:
        """Which of places in the order of the rows lie in this call, whose rows stand together."""
        ends = torch.tensor([self.rows.start, self.rows.stop])
        return slice(*torch.searchsorted(found.row, ends).tolist())

    @property
    def index(self) -> Tensor:
        """[n] row numbers, ascending."""
        return torch.arange(self.rows.start, self.rows.stop) if isinstance(self.rows, slice) else self.rows

    @cached_property
    def rows_there(self) -> slice | Tensor:
        """``rows``, on the device."""
        rows = self.rows
        return rows if isinstance(rows, slice) else self.once("rows", lambda: upload(self.table.device, rows)[0])

    @property
    def run(self) -> Tensor:
        """[n] this pack's run number of each row."""
        return self.table.run[self.rows]

    @property
    def owner(self) -> Tensor:
        """[n] whose edit acts on each row."""
        return self.table.runs.owner[self.run]

    @property
    def pos(self) -> Tensor:
        """[n] position of each row."""
        return self.table.pos[self.rows]

    @property
    def prompt_end(self) -> Tensor:
        """[n] position of the last token of the prompt that each row's run goes on from; -1: not said."""
        return self.table.runs.prompt_end[self.run]

    @property
    def tokens(self) -> Tensor:
        """[n] token of each row."""
        return self.table.runs.tokens[self.run, self.pos]
