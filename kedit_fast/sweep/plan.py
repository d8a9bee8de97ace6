"""What a sweep holds, and how work is cut so that it fits the memory, before the first layer."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kedit_fast.basics.state import wide
from kedit_fast.basics.words import sized
from kedit_fast.kernels.target_logprob import LOGITS
from kedit_fast.sweep.runs import Runs

T = TypeVar("T")
# Rows that go through a block in one call on a CPU. Small enough that a call's intermediates stay in cache, large
# enough for the products: see bench/results for the figure by size.
CALL_ROWS = 2048
# On a GPU as many as pass in so many bytes: 15,900 rows of Llama-3-8B's shape, 37,000 of GPT-2-XL's. Counted, not timed
# there yet (``bench counts``): small calls leave the card waiting for the host.
CALL_BYTES = 2 << 30
LEAST_CALLS = 8  # that the memory has room for
COPIES = 8  # tensors as large as gathered keys, or as a chunk of logits, that are alive at once while they are made
LOGIT_SHARE = 32  # one of so many parts of the memory may hold a chunk of logits
PLACE = 64  # bytes that a place to be read takes in tables: run, position, target, and where it lies in a call
TABLES = 32  # int64 numbers of a run at a position, as declared, in its pack, and its slots

# What autograd keeps of a row in a layer beside its keys, values and query, measured on blocks of all families: at most
# 8 numbers of the stream's width in fp32 (norms are computed there, whatever the model's dtype), 3 of the MLP's width.
SAVED, SAVED_FF = 8, 3


@dataclass(frozen=True)
class RowCost:
    """Bytes a row holds: ``kept`` for the whole layer (hidden state in and out, key, value), ``passing`` in a call.

    Attention and head have a call's share to themselves: the MLP's intermediates are not alive beside theirs.
    position: of a run's tables, for each position of the longest run; rows: of a call; logits: bytes of a chunk of them
    """

    kept: int
    passing: int
    position: int = 0
    rows: int = CALL_ROWS
    logits: int = 0

    @classmethod
    def of(cls, lm) -> "RowCost":
        itemsize = lm.dtype.itemsize
        return cls(
            kept=itemsize * (3 * lm.d_model + 2 * lm.n_key_heads * lm.head_dim),
            passing=passing_bytes(lm),
            position=TABLES,
            rows=call_rows(lm),
            logits=COPIES // 2 * wide(lm.dtype).itemsize * _logits(lm),
        )

    @property
    def call(self) -> int:
        """Bytes that a block call holds, or what its rows' logits do."""
        return max(self.rows * self.passing, self.logits)


def call_rows(lm) -> int:
    """Rows of a block call on the model's device."""
    if lm.device.type == "cpu":
        return CALL_ROWS
    return max(CALL_ROWS, min(CALL_BYTES, lm.memory // LEAST_CALLS) // passing_bytes(lm))


def passing_bytes(lm) -> int:
    """Bytes that a row's intermediates take in a block."""
    return lm.dtype.itemsize * (3 * lm.d_ff + 6 * lm.d_model)


def free(lm) -> int:
    """Bytes of ``lm.memory`` beside what a block call holds."""
    return lm.memory - RowCost.of(lm).call


def room(lm) -> int:
    """Numbers (fp32; fp64 for an fp64 model) that attention or head may gather at once, so that all they make of them
    takes no more than a call's share."""
    return call_rows(lm) * passing_bytes(lm) // (COPIES * wide(lm.dtype).itemsize)


def logit_bytes(lm, rows: int) -> int:
    """Bytes of so many rows of logits, as they are worked with."""
    return rows * lm.n_vocab * wide(lm.dtype).itemsize


def graph_bytes(lm, rows: int, gathered: int, scores: int, n_layers: int, *, extra: int = 0, recomputes: bool) -> int:
    """Bytes that a sweep with autograd holds at its height, in its layers, from above.

    rows: that pass; gathered: keys that the reference of attention copies in one layer (runs times the longest one's
        positions); scores: rows times those positions; extra: bytes of a row in a layer that jobs keep; recomputes:
        see ``sweep``
    """
    itemsize, sums = lm.dtype.itemsize, wide(lm.dtype).itemsize
    heads, key_width, width = lm.n_heads, 2 * lm.n_key_heads * lm.head_dim, max(lm.d_model, lm.n_heads * lm.head_dim)
    attention = (width + key_width) * itemsize + heads * sums
    by_layer = (SAVED * width * sums + SAVED_FF * lm.d_ff * itemsize + attention + extra) * rows
    # Of one layer at a time, on the way down: attention once more, and the wide gradients of keys and values.
    once = 2 * heads * scores * sums + key_width * (gathered + rows) * sums
    if not recomputes:
        return n_layers * by_layer + once
    return n_layers * (lm.d_model * itemsize + extra) * rows + min(2, n_layers) * by_layer + once


def logit_rows(lm) -> int:
    """Rows whose logits are made at once."""
    return max(1, _logits(lm) // lm.n_vocab)


def _logits(lm) -> int:
    """Logits that are made at once: of a call's rows, ``LOGITS`` at most, and no more than a part of the memory allows.
    Half as many copies of them are alive as of gathered keys."""
    share = lm.memory // (LOGIT_SHARE * wide(lm.dtype).itemsize)
    return min(max(2 * room(lm), share), LOGITS, call_rows(lm) * lm.n_vocab)


def cut(runs: Runs, cost: RowCost, memory: int, beside: int = 0) -> list[Tensor]:
    """Run numbers of each pack, ascending and closed under ancestors, in declared order. Ancestors are repeated in each
    pack.

    memory: bytes that may be held; beside: those of them that are held beside a pack. Raises ValueError, with the bytes
    needed, when one run and its ancestors do not fit.
    """
    budget = memory - beside - cost.call
    table = cost.position * runs.tokens.shape[1]
    sizes = runs.n_rows * cost.kept + table
    if len(runs) and int(sizes.sum()) <= budget:  # run by run it takes a quarter of a second for 30,000 of them
        return [torch.arange(len(runs))]
    above, size = torch.stack([runs.parent, runs.source, runs.graft], dim=1).tolist(), sizes.tolist()
    packs: list[list[int]] = []
    pack: set[int] = set()
    held = 0
    for run in range(len(runs)):
        new = _with_ancestors(run, above, pack)
        added = sum(size[r] for r in new)
        if pack and held + added > budget:
            packs.append(sorted(pack))
            pack, held = set(), 0
            new = _with_ancestors(run, above, pack)
            added = sum(size[r] for r in new)
        if added > budget:
            need = added + cost.call + beside
            raise too_large("one run with its ancestors", need, memory)
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


def calls(ends: Tensor, size: int) -> list[tuple[int, int]]:
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


def together(
    items: Iterable[T], size: Callable[[T], float], most: float, count: int | None = None
) -> Iterator[list[T]]:
    """Consecutive items whose sizes add up to ``most`` at most, and no more than ``count`` of them; one that is too
    large stands alone. No items make no group."""
    group: list[T] = []
    held = 0.0
    for item in items:
        n = size(item)
        if group and (held + n > most or len(group) == count):
            yield group
            group, held = [], 0.0
        group.append(item)
        held += n
    if group:
        yield group


class TooLarge(ValueError):
    """Something does not fit the memory however it is cut."""


def too_large(what: str, need: int, memory: int) -> TooLarge:
    """The error for it. The need is rounded up, the memory down, to three digits: a need said in the memory's own
    figure would tell nothing."""
    need, memory = math.ceil(need), int(memory)
    need_step, memory_step = (10 ** max(0, len(str(n)) - 3) for n in (need, memory))
    needed, allowed = sized(-(-need // need_step) * need_step), sized(memory // memory_step * memory_step)
    return TooLarge(
        f"{what} needs {needed} and memory allows {allowed}; open the model with a larger memory=, or shorten the text"
    )
