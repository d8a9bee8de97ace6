"""The sweep: the only loop over layers in the package.

``sweep(lm, runs, jobs)`` takes the declared runs up the model, all of them together, one layer at a time. A job says
at which sites of which layers it reads or writes; it knows rows, not facts, and no other job.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kedit_fast.basics.state import upload
from kedit_fast.kernels.attention import attention, grouped
from kedit_fast.kernels.rows import branch_rows
from kedit_fast.model.seam import attend_with, prepared
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
    whole = grad or h is not None or store is not None or keep is not None
    cuts = [torch.arange(len(runs))] if whole else cut(runs, RowCost.of(lm), lm.memory, held + runs.nbytes)

    def taken(which: Tensor) -> Runs:  # one pack at a time: all of them would be the runs' tables once more
        return runs if len(which) == len(runs) else runs.take(which)

    work = sum(taken(which).row_layers(first_layer, last_layer) for which in cuts)
    jobs = in_order(lm, jobs)
    up = list(range(first_layer, last_layer + 1))
    lm.source.expect((up + up[::-1] if grad else up) * len(cuts))
    with prepared(lm.model, lm.family), torch.set_grad_enabled(grad):
        for which in cuts:
            number = torch.full((len(runs),), -1)
            number[which] = torch.arange(len(which))
            pack = Pack(lm, taken(which), number, jobs, store, slots, keep)
            pack.recomputes = grad and (recompute or not lm.source.in_memory)
            for rows in pack.run(first_layer, last_layer, h):
                if advance is not None:
                    advance(rows / work)


class Pack:
    """One pack on its way up, and down again where what enters its layers is waiting (``ascent.py``)."""

    def __init__(self, lm, runs, number, jobs, store, slots, keep):
        self.lm, self.runs, self.number, self.jobs = lm, runs, number, jobs
        self.store, self.slots, self.keep = store, slots, keep
        self.again = self.recomputes = False
        self.waiting: list[_Entering] | None = None
        self.start = self.grad = None  # rows that the pack was given, with their graph; gradient of those on their way
        self.room, self.call_rows = room(lm), call_rows(lm)
        self.n_positions = int(runs.length.max()) if len(runs) else 0
        self._tables: dict[str | None, tuple[Tensor, Tensor]] = {}

    def run(self, first: int, last: int, h: Tensor | None) -> Iterator[int]:
        """Goes up layer by layer; gives the number of rows after each."""
        base = 0 if self.store is None or self.slots is not None else self.store.size
        table = RowTable(
            self.runs, first, last, store_table=None if self.store is None else self.store.table, base=base,
            slots=self.slots, device=self.lm.device,
        )  # fmt: skip
        for layer in range(first, last + 1):
            source = table.grow(layer)
            if layer == first:
                h = self._embed(table) if h is None else self._begun(h, table)
            elif len(source):
                h = branch_rows(h, source)
            if self.keep is not None:
                self.keep.enter(layer, h)
            if self.waiting is not None:
                waits = on_host(h) if self.lm.source.beside else h
                self.waiting.append(_Entering(layer, waits, table.at_layer(layer), layer == last))
            h = (self._recomputed if self.recomputes else self._layer)(layer, h, table, layer == last)
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
        out = self._layer(layer, h, table, is_last)
        self.again = False
        ends = [(out, self.grad), *(job.back(layer) for job in self.jobs if hasattr(job, "back"))]
        if ends := [end for end in ends if end[1] is not None]:
            torch.autograd.backward(*zip(*ends, strict=True))
        self.grad = h.grad
        if not self.waiting and self.grad is not None and self.start is not None and self.start.requires_grad:
            self.start.backward(self.grad)

    # ---- one layer

    def _recomputed(self, layer: int, h: Tensor, table: RowTable, is_last: bool) -> Tensor | None:
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
        with prepared(self.lm.model, self.lm.family):
            self.again = True
            try:
                yield
            finally:
                self.again = False

    def _layer(self, layer: int, h: Tensor, table: RowTable, is_last: bool) -> Tensor | None:
        read = self._rows_read(layer, table) if is_last else None
        parts: list[slice | Tensor] = list(table.calls(self.call_rows))
        alone = read is None and len(parts) == 1 and self.store is None and self.keep is None
        cache = None if alone else self._cache(layer, h, table)
        if read is not None:
            keys_only = torch.ones(len(table), dtype=torch.bool)
            keys_only[read] = False
            for rows in keys_only.nonzero()[:, 0].split(self.call_rows):
                self._block(layer, h, self._call(table, _together(rows)), cache, keys_only=True)
            parts = [_together(rows) for rows in read.split(self.call_rows)]
        final = last_read(self.jobs, layer) if is_last else None
        outs = [self._block(layer, h, self._call(table, rows), cache, final=final) for rows in parts]
        if self.keep is not None:
            self.keep.put(layer, *cache)
        outs = [out for out in outs if out is not None]
        return torch.cat(outs) if len(outs) > 1 else outs[0] if outs else None

    def _call(self, table: RowTable, rows: slice | Tensor) -> Call:
        return Call(table, rows, self.number, self.again)

    def _rows_read(self, layer: int, table: RowTable) -> Tensor | None:
        """Rows [n] that some job reads in the last layer; None: all of them."""
        wanted = [job.reads(layer) for job in self.jobs]
        if any(w is ALL for w in wanted) or self.keep is not None:
            return None
        rows = [table.found(*w, self.number).row for w in wanted if w is not None]
        return torch.cat(rows).unique() if rows else None

    def _cache(self, layer: int, h: Tensor, table: RowTable) -> tuple[Tensor, Tensor]:
        """Room for this layer's keys and values: slots of the store, then a slot a row."""
        shape = (self.lm.n_key_heads, self.lm.head_dim)
        if self.store is not None:
            return self.store.room(layer, len(table) if self.slots is None else 0, h, shape)
        # zeros, not empty: slots of later calls are gathered with the others and only then masked, and 0 * NaN is NaN
        return h.new_zeros(len(table), *shape), h.new_zeros(len(table), *shape)

    def _block(self, layer, h, call: Call, cache, *, keys_only=False, final: Site | None = None) -> Tensor | None:
        """One call of Hugging Face's block on the rows of ``call``; its layer_out, or None where it was left early.

        final: the site behind which nobody looks, None: all of the block is wanted
        """
        if not len(call):
            return None
        pos = call.table.pos_there[call.rows_there]
        attend = _Attend(cache, call, keys_only, self.room, self.call_rows)
        x = h if len(call) == len(h) else h[call.rows_there]
        with attend_with(attend), hooked(self.lm, self.jobs, layer, call, final):
            try:
                out = self.lm.source.call(layer, x[None], self._block_kwargs(layer, pos)).squeeze(0)
            except Enough:
                out = None
        if attend.n_calls != 1:
            raise RuntimeError(
                f"the attention of layer {layer} of this {self.lm.model.config.model_type} model was called "
                f"{attend.n_calls} times, not once: its blocks do not go through transformers' attention interface"
            )
        return out if out is None else through(self.jobs, Site.layer_out, layer, out, call)

    def _block_kwargs(self, layer: int, pos: Tensor) -> dict:
        kwargs = {"attention_mask": None, "position_ids": pos[None]}
        if self.lm.family.rotary is not None:
            kwargs["position_embeddings"] = tuple(t[pos][None] for t in self._rotary(layer))
        return kwargs

    def _rotary(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's rotary tables over this pack's positions, made once for all layers of a type."""
        kind = self.lm.config.layer_types[layer] if self.lm.family.rotary_by_type else None
        if kind not in self._tables:
            self._tables[kind] = self.lm.rotary(layer, self.n_positions)
        return self._tables[kind]


class _Entering(NamedTuple):
    """The rows h [rows, d] that entered a layer."""

    layer: int
    h: Tensor
    table: RowTable
    is_last: bool


class _Attend:
    """The attention of one call: writes the call's keys and values to their slots, then reads through the row table.

    cache: of the layer's slots; None where the call has all rows, whose keys and values then are the slots
    """

    def __init__(self, cache: tuple[Tensor, Tensor] | None, call: Call, keys_only: bool, room: int, call_rows: int):
        self.cache, self.call, self.keys_only, self.room, self.call_rows = cache, call, keys_only, room, call_rows
        self.n_calls = 0

    def __call__(self, query, key, value, *, scale, window, softcap, sinks):
        self.n_calls += 1
        table, call = self.call.table, self.call
        if self.cache is None:
            keys, values = key.contiguous(), value.contiguous()
        else:
            keys, values = self.cache
            slots = table.slots(call.rows_there)
            keys[slots], values[slots] = key, value
        if self.keys_only:
            raise Enough
        groups = partial(grouped, table.key_rows, call.run, call.pos, table.device)
        return attention(
            query, keys, values, table.key_rows, call.run, call.pos, scale=scale, window=window, softcap=softcap,
            sinks=sinks, room=self.room, cut=partial(planned, call, self.call_rows),
            groups=partial(call.once, "groups", groups),
        )  # fmt: skip


def planned(call: Call, call_rows: int, heads: int, most: int):
    """What Triton's kernel needs of the rows of a call: all rows are cut into blocks once for all layers. None where a
    call is not one of theirs, as in the last layer. heads, most: as in ``blocks``"""
    from kedit_fast.kernels.triton.attention import Plan, blocks, n_queries

    table = call.table

    def make():
        ends = table.ends
        start, begins = torch.cat([ends.new_zeros(1), ends[:-1]]), table.begins(call_rows)
        queries = n_queries(len(table.run), len(ends), heads, most)
        made = blocks(start, ends, table.run[start], queries // heads)
        first, begin = made[:, 0].contiguous(), torch.tensor(begins)
        begin = begin[torch.searchsorted(begin, first, right=True) - 1]
        relative = made - torch.stack([begin, begin, torch.zeros_like(begin)], 1)  # to the first row of their call
        return first, upload(table.device, relative)[0], set(begins), set(ends.tolist()), queries

    first, made, begins, stops, queries = table.once(("attention", heads, most), make)
    if not isinstance(call.rows, slice) or call.rows.start not in begins or call.rows.stop not in stops:
        return None
    span = torch.searchsorted(first, torch.tensor([call.rows.start, call.rows.stop])).tolist()
    return Plan(made[slice(*span)], table.key_rows_there, table.pos_there[call.rows], queries)


def _together(index: Tensor) -> slice | Tensor:
    """Ascending rows as a slice where they stand together."""
    first, stop = int(index[0]) if len(index) else 0, int(index[-1]) + 1 if len(index) else 0
    return slice(first, stop) if stop - first == len(index) else index
