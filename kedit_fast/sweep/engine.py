"""The sweep: the only loop over layers in the package.

``sweep(lm, runs, jobs)`` takes the declared runs up the model, all of them together, one layer at a time. A job says
at which sites of which layers it reads or writes; it knows rows, not facts, and no other job.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kedit_fast.basics.state import upload
from kedit_fast.kernels.attention import runs_on_triton
from kedit_fast.kernels.rows import branch_rows
from kedit_fast.kernels.slots import Slots
from kedit_fast.model.seam import among, attend_with, prepared, ready
from kedit_fast.sweep.attend import Attend
from kedit_fast.sweep.hooks import Enough, hooked, last_read, through
from kedit_fast.sweep.plan import RowCost, call_rows, cut, room
from kedit_fast.sweep.rows import Call, RowTable
from kedit_fast.sweep.runs import Runs, in_order
from kedit_fast.sweep.sites import Site
from kedit_fast.sweep.store import KVStore, on_host

ALL = object()  # what ``Job.reads`` gives for every row


class Job(Protocol):
    """What is read or written in a sweep."""

    def sites(self, layer: int) -> tuple[Site, ...]:
        """Where the job wants to see rows in this layer (``Site.embed`` for layer 0 comes before it)."""

    def reads(self, layer: int):
        """Rows whose values the job needs in the sweep's last layer: ``ALL``, None, or places (run [k], pos [k]).

        Rows that nobody reads there serve as keys only and stop at the attention.
        """

    def at(self, site: Site, layer: int, x: Tensor, call: Call) -> Tensor | None:
        """Sees the rows x [n, width] of one call; a tensor given back takes their place. Never writes into x."""


def sweep(
    lm,
    runs: Runs,
    jobs: list[Job],
    *,
    first_layer: int = 0,
    last_layer: int | None = None,
    h: Tensor | None = None,
    store: KVStore | None = None,
    slots: Tensor | None = None,
    keep: KVStore | None = None,
    table: RowTable | None = None,
    grad: bool = False,
    recompute: bool = False,
    held: int = 0,
    advance: Callable[[float], None] | None = None,
) -> None:
    """Takes ``runs`` from the input of ``first_layer`` through ``last_layer`` (default: the last one).

    h: [rows, d] the input of ``first_layer`` when it is not the embedding, a row for each (run, position) in declared
        order; such a sweep is one pack
    store: keys and values of an earlier sweep; its runs are the first of ``runs`` (branch_layer NEVER)
    slots: [rows] the store's slots that the rows write their keys and values to (generation)
    keep: a store that keeps this sweep's keys and values; the sweep is then one pack
    table: ``row_table`` of the same runs, layers and store, for a sweep that is taken again and again: all that was
        planned, looked for and uploaded is there; such a sweep is one pack
    grad: keeps autograd on, for jobs that optimize; such a sweep is one pack
    recompute: of a sweep with grad, keep the rows that enter each layer, and let the backward pass run each layer again
        (so it is anyway where weights are read layer by layer)
    held: bytes of ``lm.memory`` that jobs and caller hold meanwhile
    advance: told after each layer which share of the sweep that was; the shares add up to 1

    One weight pass a pack. Raises ValueError when runs do not fit ``lm.memory`` or are too long. Leaves the model as it
    was, always.
    """
    last_layer = lm.n_layers - 1 if last_layer is None else last_layer
    lm.check_length(int(runs.length.max()) if len(runs) else 0)
    if keep is not None and store is not None:
        raise ValueError("a sweep reads a store or keeps one, not both")
    whole = grad or any(given is not None for given in (h, store, keep, table))
    cuts = [torch.arange(len(runs))] if whole else cut(runs, RowCost.of(lm), lm.memory, held + runs.nbytes)

    def taken(which: Tensor) -> Runs:  # one pack at a time: all of them would be the runs' tables once more
        return runs if len(which) == len(runs) else runs.take(which)

    work = sum(taken(which).row_layers(first_layer, last_layer) for which in cuts)
    jobs = in_order(lm, jobs)
    up = list(range(first_layer, last_layer + 1))
    lm.source.expect((up + up[::-1] if grad else up) * len(cuts))
    around = ready()
    with prepared(lm.model, lm.family), torch.set_grad_enabled(grad):
        for which in cuts:
            number = torch.full((len(runs),), -1)
            number[which] = torch.arange(len(which))
            pack = Pack(lm, taken(which), number, jobs, store, slots, keep, table, around)
            pack.recomputes = grad and (recompute or not lm.source.in_memory)
            for rows in pack.run(first_layer, last_layer, h):
                if advance is not None:
                    advance(rows / work)


def row_table(lm, runs: Runs, first: int, last: int, store: KVStore | None, slots: Tensor | None = None) -> RowTable:
    """The rows of a sweep of these runs through layers first to last, over a store as ``sweep`` takes it."""
    base = 0 if store is None or slots is not None else store.size
    stored = None if store is None else store.table
    return RowTable(runs, first, last, store_table=stored, base=base, slots=slots, device=lm.device)


class Pack:
    """One pack on its way up, and down again where what enters its layers is waiting (``ascent.py``).

    around: models that stay prepared for as long as the pack's graph is there, see ``seam.among``
    """

    def __init__(self, lm, runs, number, jobs, store, slots, keep, table=None, around=()):
        self.lm, self.runs, self.number, self.jobs = lm, runs, number, jobs
        self.store, self.slots, self.keep, self.table = store, slots, keep, table
        self.again = self.recomputes = False
        self.around = around
        self.waiting: list[_Entering] | None = None
        self.start = self.grad = None  # rows that the pack was given, with their graph; gradient of those on their way
        self.room, self.call_rows = room(lm), call_rows(lm)
        self.family, self.of_slots = lm.family, (lm.n_key_heads, lm.head_dim)  # asked of the config once, not a call
        self.n_positions = int(runs.length.max()) if len(runs) else 0

    def run(self, first: int, last: int, h: Tensor | None) -> Iterator[int]:
        """Goes up layer by layer; gives the number of rows after each."""
        table = self.table  # which has no rows yet, so that it is false
        if table is None:
            table = row_table(self.lm, self.runs, first, last, self.store, self.slots)
        table = table.begun()
        outs: list[Tensor] = []
        for layer in range(first, last + 1):
            source = table.grow(layer)
            if layer == first:
                h = self._embed(table) if h is None else self._begun(h, table)
            else:
                h = branch_rows(outs, source) if len(source) else _joined(outs)
                outs = []  # not held while the layer runs
            if self.keep is not None:
                self.keep.enter(layer, h)
            if self.waiting is not None:
                waits = on_host(h) if self.lm.source.beside else h
                self.waiting.append(_Entering(layer, waits, table.at_layer(layer), layer == last))
            outs = (self._recomputed if self.recomputes else self._layer)(layer, h, table, layer == last)
            yield len(table)
        if self.keep is not None:
            self.keep.table, self.keep.size = table.key_rows, len(table)

    def _embed(self, table: RowTable) -> Tensor:
        """Rows of layer 0: embeddings as the jobs leave them; a row that begins as another's is its copy."""
        call = self._call(table, slice(0, len(table)))
        (tokens,) = upload(self.lm.device, call.tokens)
        x = self.lm.embed(tokens)
        x = through(self.jobs, Site.embed, 0, x, call)
        source = table.sources[: len(table)]
        origin = torch.where(source >= 0, source, torch.arange(len(table)))
        while not torch.equal(origin, origin[origin]):
            origin = origin[origin]
        if (source >= 0).any():
            x = x[upload(x.device, origin)[0]]
        return self.lm.enter(x, table.pos_there[: len(table)])

    def _begun(self, h: Tensor, table: RowTable) -> Tensor:
        """Rows h [rows, d] as the table has them; on a way that goes down again they stay behind with their graph."""
        if self.waiting is None:
            return table.ordered(h)
        with torch.enable_grad():
            self.start = table.ordered(h)
        return self.start.detach()

    def back(self) -> None:
        """Takes the gradients down through the highest layer that waits: it runs again, as it ran before."""
        layer, h, table, is_last = self.waiting.pop()
        h = h.to(self.lm.device, non_blocking=True).requires_grad_()
        self.again = True
        outs = self._layer(layer, h, table, is_last)
        self.again = False
        out = _joined(outs) if outs else None
        ends = [(out, self.grad), *(job.back(layer) for job in self.jobs if hasattr(job, "back"))]
        if ends := [end for end in ends if end[1] is not None]:
            torch.autograd.backward(*zip(*ends, strict=True))
        self.grad = h.grad
        if not self.waiting and self.grad is not None and self.start is not None and self.start.requires_grad:
            self.start.backward(self.grad)

    # ---- one layer

    def _recomputed(self, layer: int, h: Tensor, table: RowTable, is_last: bool) -> list[Tensor]:
        """The layer, of which autograd keeps the rows that enter it: the backward pass runs it again, with its weights
        read again. So a step takes two weight passes, whatever the number of rows, and no layer's weights are kept:
        autograd keeps every weight that it multiplied by, and of weights that are read layer by layer it must not."""
        return checkpoint(
            self._layer,
            layer,
            h,
            table.at_layer(layer),
            is_last,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), self._running_again()),
        )

    @contextmanager
    def _running_again(self):
        with among(self.around), prepared(self.lm.model, self.lm.family):
            self.again = True
            try:
                yield
            finally:
                self.again = False

    def _layer(self, layer: int, h: Tensor, table: RowTable, is_last: bool) -> list[Tensor]:
        """What each call of the layer gives."""
        parts, keys_only = self._last_calls(layer, table) if is_last else (table.calls(self.call_rows), None)
        alone = keys_only is None and len(parts) == 1 and self.store is None and self.keep is None
        cache = None if alone else self._cache(layer, h, table)
        for rows in keys_only or ():
            self._block(layer, h, self._call(table, rows), cache, keys_only=True)
        final = last_read(self.jobs, layer) if is_last else None
        outs = [self._block(layer, h, self._call(table, rows), cache, final=final) for rows in parts]
        if self.keep is not None:
            self.keep.put(layer, cache.keys, cache.values)
        return [out for out in outs if out is not None]

    def _call(self, table: RowTable, rows: slice | Tensor) -> Call:
        return Call(table, rows, self.number, self.again)

    def _last_calls(self, layer: int, table: RowTable) -> tuple[list[slice | Tensor], list[slice | Tensor] | None]:
        """The last layer's calls, of rows that some job reads there; and those of the others, which serve as keys only
        (None: all are read)."""
        wanted = [job.reads(layer) for job in self.jobs]
        if any(w is ALL for w in wanted) or self.keep is not None or not any(w is not None for w in wanted):
            return table.calls(self.call_rows), None
        places = [table.found(*w, self.number) for w in wanted if w is not None]

        def cut() -> tuple:
            read = torch.cat([each.row for each in places]).unique()
            rest = torch.ones(len(table), dtype=torch.bool)
            rest[read] = False
            parts = (rows.split(self.call_rows) for rows in (read, rest.nonzero()[:, 0]))
            return *([_together(rows) for rows in each] for each in parts), places  # held, so that nothing has their id

        return table.once(("last calls", *map(id, places)), cut)[:2]

    def _cache(self, layer: int, h: Tensor, table: RowTable) -> Slots:
        """Room for this layer's keys and values: slots of the store, then a slot a row."""
        if self.store is not None:
            room = self.store.room(layer, len(table) if self.slots is None else 0, h, self.of_slots)
            return Slots.again(*room, table.base)
        # The kernel reads written slots alone. The reference gathers those of later calls with the others and masks
        # them only then, and 0 * NaN is NaN.
        new = h.new_empty if runs_on_triton(h) else h.new_zeros
        return Slots(new(len(table), *self.of_slots), new(len(table), *self.of_slots))

    def _block(self, layer, h, call: Call, cache, *, keys_only=False, final: Site | None = None) -> Tensor | None:
        """One call of Hugging Face's block on the rows of ``call``; its layer_out, or None where it was left early.

        final: the site behind which nobody looks, None: all of the block is wanted
        """
        if not len(call):
            return None
        pos = call.table.pos_there[call.rows_there]
        attend = Attend(cache, call, keys_only, self.room, self.call_rows)
        x = h if len(call) == len(h) else h[call.rows_there]
        with attend_with(attend), hooked(self.lm, self.jobs, layer, call, final):
            try:
                out = self.lm.source.call(layer, x[None], self._block_kwargs(layer, pos, call.table)).squeeze(0)
            except Enough:
                out = None
        if attend.n_calls != 1:
            raise RuntimeError(
                f"the attention of layer {layer} of this {self.lm.model.config.model_type} model was called "
                f"{attend.n_calls} times, not once: its blocks do not go through transformers' attention interface"
            )
        return out if out is None else through(self.jobs, Site.layer_out, layer, out, call)

    def _block_kwargs(self, layer: int, pos: Tensor, table: RowTable) -> dict:
        kwargs = {"attention_mask": None, "position_ids": pos[None]}
        if self.family.rotary is not None:
            # over this pack's positions, once for all layers of a type
            kind = self.lm.config.layer_types[layer] if self.family.rotary_by_type else None
            angles = table.once(("rotary", kind), lambda: self.lm.rotary(layer, self.n_positions))
            kwargs["position_embeddings"] = tuple(t[pos][None] for t in angles)
        return kwargs


class _Entering(NamedTuple):
    """The rows h [rows, d] that entered a layer."""

    layer: int
    h: Tensor
    table: RowTable
    is_last: bool


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _together(index: Tensor) -> slice | Tensor:
    """Ascending rows as a slice where they stand together."""
    first, stop = int(index[0]) if len(index) else 0, int(index[-1]) + 1 if len(index) else 0
    return slice(first, stop) if stop - first == len(index) else index
