"""The attention of one block call: its keys and values go to the layer's slots, then it reads through the row table."""

from bisect import bisect_left
from functools import partial

import torch

from kedit_fast.basics.state import upload
from kedit_fast.kernels.attention import grouped
from kedit_fast.kernels.slots import Slots
from kedit_fast.sweep.hooks import Enough
from kedit_fast.sweep.rows import Call


class Attend:
    """The attention of one call: writes the call's keys and values to their slots, then reads through the row table.

    cache: the layer's slots; None where the call has all rows, whose keys and values then are the slots
    """

    def __init__(self, cache: Slots | None, call: Call, keys_only: bool, room: int, call_rows: int):
        self.cache, self.call, self.keys_only, self.room, self.call_rows = cache, call, keys_only, room, call_rows
        self.n_calls = 0

    def __call__(self, query, key, value, *, scale, window, softcap, sinks):
        self.n_calls += 1
        table, call = self.call.table, self.call
        if self.cache is None:
            cache = Slots.of(key, value)
        else:
            cache = self.cache
            cache.write(key, value, table.slots(call.rows_there))
        if self.keys_only:
            raise Enough
        groups = partial(grouped, table.key_rows, call.run, call.pos, table.device)
        return cache.attend(
            query, table.key_rows, call.run, call.pos, scale=scale, window=window, softcap=softcap, sinks=sinks,
            room=self.room, cut=partial(planned, call, self.call_rows),
            groups=partial(call.once, "groups", groups),
        )  # fmt: skip


def planned(call: Call, call_rows: int, heads: int, most: int):
    """What Triton's kernel needs of the rows of a call: all rows are cut into blocks once for all layers; those of a
    call that is not one of theirs, as in the last layer, by themselves. heads, most: as in ``blocks``"""
    return call.once(("attention", heads, most), lambda: _planned(call, call_rows, heads, most))


def _planned(call: Call, call_rows: int, heads: int, most: int):
    from kedit_fast.kernels.triton.attention import Plan, blocks, n_queries, plan

    table = call.table

    def make():
        ends = table.ends
        start, begins = torch.cat([ends.new_zeros(1), ends[:-1]]), table.begins(call_rows)
        queries = n_queries(len(table.run), len(ends), heads, most)
        made = blocks(start, ends, table.run[start], queries // heads)
        first, begin = made[:, 0].contiguous(), torch.tensor(begins)
        begin = begin[torch.searchsorted(begin, first, right=True) - 1]
        relative = made - torch.stack([begin, begin, torch.zeros_like(begin)], 1)  # to the first row of their call
        return first, upload(table.device, relative)[0], queries

    if not _is_planned(call, call_rows):
        return plan(table.key_rows, call.run, call.pos, heads, most, table.device)
    first, made, queries = table.once(("attention", heads, most), make)
    span = torch.searchsorted(first, torch.tensor([call.rows.start, call.rows.stop])).tolist()
    return Plan(made[slice(*span)], table.key_rows_there, table.pos_there[call.rows], queries)


def _is_planned(call: Call, call_rows: int) -> bool:
    """Whether the rows of a call begin where one of all layers' calls does, and end with a run's."""
    if not isinstance(call.rows, slice):
        return False
    begins, ends = call.table.begins(call_rows), call.table.ends
    at, end = bisect_left(begins, call.rows.start), torch.searchsorted(ends, call.rows.stop)
    return begins[at : at + 1] == [call.rows.start] and ends[end : end + 1].tolist() == [call.rows.stop]
