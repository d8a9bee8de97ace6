"""Long work over a model: what it depends on, its parts in groups that fit the memory, and less memory where that ends.

A run that is killed and one that runs out of memory go on in the same way: what is kept is found again, and what is not
done yet is cut anew. The same cut gives the same bits; another one, of the rest, the same to rounding.
"""

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from kedit_fast import __version__
from kedit_fast.basics import checks, ranks
from kedit_fast.basics.bits import digest
from kedit_fast.basics.parts import Held, Inside, Keep, Make, Parts, check_checkpoint
from kedit_fast.basics.progress import logger
from kedit_fast.basics.unfinished import discarding
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import counted, is_out_of_memory, sized
from kedit_fast.sweep.plan import RowCost, TooLarge

T = TypeVar("T")
R = TypeVar("R")


class Together:
    """A ``Keep`` of all ranks: a part that they make together is found or written by the first, and all take its bits.

    own: what keeps the parts that a rank makes by itself; memory, begun: as in ``Held``, the first rank's
    """

    def __init__(self, own: "Held | Parts"):
        self.own = own
        self.memory, self.begun = ranks.json_from_first(lambda: [own.memory, own.begun])

    def __call__(self, name: str, make: Make) -> dict[str, Tensor]:
        begun: list[bool] = []

        def with_others() -> dict[str, Tensor]:
            begun.append(ranks.anyone(True))
            return make()

        with ranks.joint():
            part = self.own(name, with_others) if ranks.first() else {}
            if not begun and ranks.anyone(False):
                make()
        return ranks.from_first(lambda: part)

    def narrow(self, memory: int) -> None:
        self.memory = memory
        if ranks.first():
            self.own.narrow(memory)

    def release(self, name: str) -> None:
        if ranks.first():
            self.own.release(name)

    def forget(self, begins: str) -> None:
        if ranks.first() or isinstance(self.own, Held):
            self.own.forget(begins)


Run = Held | Parts | Inside | Together
Checkpoint: TypeAlias = "checks.AnyPath | RunFolder | Run | None"  # a folder; or the run that the work is a part of
WAYS_OUT = "end other programs, or take a smaller model, another dtype or another device"
BUSY = 0.8  # share of the time that ranks must work for groups to be dealt as one process cuts them
ITEMS = "items"  # the tensor of a part that says which items it holds: [first, end]


@dataclass(frozen=True)
class RunFolder:
    """A folder as ``checkpoint``, of a run that more than its work tells apart.

    more: JSON values that are compared as well; anew: whether other work that is there is removed, and not refused
    """

    folder: Path
    more: dict
    anew: bool = False


def asked_of(lm, what: str, facts: Sequence, **asked) -> dict:
    """JSON values of all that the results of a piece of work depend on, for ``Parts``.

    what: the work; facts: with ``to_record``; asked: what is asked of them
    """
    edits = [[getattr(part, "layer", None), part.kind, part.record(), *part.tensors().items()] for part in _parts(lm)]
    return {
        "work": what, "version": __version__, "model": lm.fingerprint, "dtype": lm.dtype_name, "device": lm.device.type,
        "memory": lm.memory, "weights": lm.source.name, "number of facts": len(facts),
        "facts": digest(*(fact.to_record() for fact in facts)), **asked,
        "edits below": digest(*_flat(edits)) if edits else None,
    }  # fmt: skip


def _parts(lm) -> Iterator:
    return (part for edit in lm.edits for part in edit.parts)


def _flat(values) -> Iterator:
    for value in values:
        yield from _flat(value) if isinstance(value, list | tuple) else [value]


def check_run(checkpoint: Checkpoint) -> Checkpoint:
    """A ``checkpoint=`` that can be begun or gone on with; raises as ``check_checkpoint``."""
    if checkpoint is None or isinstance(checkpoint, Run | RunFolder):
        return checkpoint
    return check_checkpoint(checkpoint)


@contextmanager
def begun(checkpoint: Checkpoint, asked: Callable[[], dict]) -> Iterator[Run]:
    """What keeps the parts of a piece of work: a folder, the run that it is a part of, or, for None, memory. Ranks
    begin it together, and an error of one of them ends it on all.

    asked: what ``asked_of`` gives, where there is a folder; raises as ``Parts``
    """
    if isinstance(checkpoint, Run):
        yield checkpoint
        return
    if ranks.n_ranks() > 1:
        ranks.agreed(asked())
    with ranks.joint(), nullcontext(Held()) if checkpoint is None else _in_folder(checkpoint, asked) as own:
        yield own if ranks.n_ranks() == 1 else Together(own)


@contextmanager
def _in_folder(checkpoint: Checkpoint, asked: Callable[[], dict]) -> Iterator[Parts]:
    """A run folder, begun by the first rank, whose it is, and then open to the others."""
    run = checkpoint if isinstance(checkpoint, RunFolder) else RunFolder(Path(checkpoint), {})
    first = ranks.first()
    with ExitStack() as stack:
        for is_turn in (first, not first):
            with ranks.joint(), discarding(False):  # each host may have the folder for itself
                if is_turn:
                    made = Parts(run.folder, asked() | run.more, anew=run.anew and first, beside=not first)
                    parts = stack.enter_context(made)
        yield parts


class Group(NamedTuple):
    """Items that were done together: first is the number of the first one; found: whether they had been done before."""

    first: int
    items: Sequence
    part: dict[str, Tensor]
    found: bool


def in_groups(
    keep: Keep,
    name: str,
    items: Sequence[T],
    groups: Callable[[Sequence[T]], Iterator[Sequence[T]]],
    make: Callable[[Sequence[T], int], dict[str, Tensor]],
    noun: str = "fact",
    *,
    size: Callable[[T], float],
) -> Iterator[Group]:
    """Items in order, in groups that are a part each, made or found.

    keep, name: a group is kept as "{name}-{number of its first item}"; groups: cuts items, consecutive ones in a group;
    make: (items, number of the first) -> the part; noun: what an item is called; size: what an item costs

    Ranks share the groups: what is not kept is cut into a share for each, and these by ``groups``. What another number
    of them kept is found all the same. Raises ValueError where a part does not say which items it holds.
    """
    own = getattr(keep, "own", keep)
    held = _held(own, name, len(items), noun)
    sizes = [size(item) for item in items]
    spans = list(_spans(held, items, sizes, groups))
    if held:
        n_held, since = sum(end - first for first, (end, _) in held.items()), getattr(keep, "begun", "")
        run = f" with the run of {since}" if since else ""
        logger.info("going on%s: %d of %s are done", run, n_held, counted(len(items), noun))

    def part(span: range) -> dict[str, Tensor]:
        some, where = items[span.start : span.stop], {ITEMS: torch.tensor([span.start, span.stop])}
        return own(f"{name}-{span.start:06d}", lambda: make(some, span.start) | where)

    parts = ranks.dealt(
        spans, part, lambda span: sum(sizes[span.start : span.stop]), lambda span: held.get(span.start, (0, None))[1]
    )
    for span, made in zip(spans, parts, strict=True):
        _extent(f"{name}-{span.start:06d}", made.get(ITEMS), len(items), noun)
        rest = {key: x for key, x in made.items() if key != ITEMS}
        yield Group(span.start, items[span.start : span.stop], rest, span.start in held)


def _extent(part: str, where: Tensor | None, n_items: int, noun: str) -> tuple[int, int]:
    """(number of the first item, end) of a part. Raises ValueError where it does not say so."""
    begin, end = (-1, -1) if where is None else where.tolist()
    if begin != int(part.rpartition("-")[2]) or not begin < end <= n_items:
        raise ValueError(f"part {part} holds {noun}s {begin} to {end} of {n_items}; begin anew")
    return begin, end


def _held(keep: Keep, name: str, n_items: int, noun: str) -> dict[int, tuple[int, int]]:
    """{number of the first item: (end, which rank)} of the parts of that name that a rank has, none over another."""
    mine = []
    for part in getattr(keep, "names", list)():
        if re.fullmatch(re.escape(name) + r"-\d{6,}", part):
            mine.append(_extent(part, keep.look(part, ITEMS), n_items, noun))
    held: dict[int, tuple[int, int]] = {}
    done = 0
    every = [(first, end, who) for who, of_rank in enumerate(ranks.gathered_json(mine)) for first, end in of_rank]
    for first, end, who in sorted(every):
        if first >= done:
            held[first], done = (end, who), end
    return held


def _spans(held: dict[int, tuple[int, int]], items: Sequence[T], sizes: list[float], groups) -> Iterator[range]:
    """The numbers of the items of each group: those that are kept, and what lies between, cut anew: as one process
    cuts it, to the same bits, where that keeps all ranks busy, else a share for each."""
    done, n = 0, ranks.n_ranks()
    for first, end in [*((first, end) for first, (end, _) in held.items()), (len(items), len(items))]:
        cut = list(groups(items[done:first])) if done < first else []
        if cut and ranks.busy(_sizes(cut, sizes[done:first])) < BUSY:
            shares = [range(done + share.start, done + share.stop) for share in ranks.shares(sizes[done:first], n)]
            cut = [group for share in shares if share for group in groups(items[share.start : share.stop])]
        for group in cut:
            yield range(done, done := done + len(group))
        if first < end:
            yield range(first, end)
        done = end


def _sizes(cut: list, sizes: list[float]) -> list[float]:
    """Of each group of consecutive items, by those of the items."""
    left = iter(sizes)
    return [sum(islice(left, len(group))) for group in cut]


def fitting(lm, keep: Run, work: Callable[..., R]) -> R:
    """``work(lm)``; where the machine runs out of memory, again with half of ``lm.memory`` for what is not kept yet.

    A run that goes on begins with what the one before it came to. Warns of each cut. Raises MemoryError where nothing
    fits however it is cut.
    """
    memory = ranks.json_from_first(lambda: keep.memory) or lm.memory
    while True:
        try:
            return work(replace(lm, memory=memory))
        except TooLarge as error:
            if memory == lm.memory:
                raise
            raise MemoryError(f"out of memory: {str(error).partition(';')[0]} to work in; {WAYS_OUT}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if memory // 2 < RowCost.of(lm).call:
                raise MemoryError(f"out of memory, also with {sized(memory)} to work in; {WAYS_OUT}") from error
        _empty_caches()  # here the error is gone, and with it what its frames held
        keep.narrow(memory := memory // 2)
        warn(
            f"out of memory: what is not done yet is cut for {sized(memory)}, half of what was tried; results differ "
            "by rounding from those of one cut",
        )


def _empty_caches() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
