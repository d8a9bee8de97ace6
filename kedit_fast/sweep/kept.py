"""Long work over a model: what it depends on, its parts in groups that fit the memory, and less memory where that ends.

A run that is killed and one that runs out of memory go on in the same way: what is kept is found again, and what is not
done yet is cut anew. The same cut gives the same bits; another one, of the rest, the same to rounding.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from kedit_fast import __version__
from kedit_fast.basics import checks, ranks
from kedit_fast.basics.parts import Held, Inside, Keep, Parts, check_checkpoint, digest
from kedit_fast.basics.progress import logger
from kedit_fast.basics.words import counted, is_out_of_memory
from kedit_fast.sweep.plan import RowCost, TooLarge

T = TypeVar("T")
R = TypeVar("R")
Run = Held | Parts | Inside
Checkpoint: TypeAlias = "checks.AnyPath | RunFolder | Run | None"  # a folder; or the run that the work is a part of
WAYS_OUT = "end other programs, or take a smaller model, another dtype or another device"
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
    edits = [[change.layer, change.kind, change.record(), *change.tensors().items()] for change in _changes(lm)]
    return {
        "work": what, "version": __version__, "model": lm.fingerprint, "dtype": lm.dtype_name, "device": lm.device.type,
        "memory": lm.memory, "weights": lm.source.name, "number of facts": len(facts),
        "facts": digest(*(fact.to_record() for fact in facts)), **asked,
        "edits below": digest(*_flat(edits)) if edits else None,
    }  # fmt: skip


def _changes(lm) -> Iterator:
    return (change for edit in lm.edits for change in edit.changes)


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
    """What keeps the parts of a piece of work: a folder, the run that it is a part of, or, for None, memory.

    asked: what ``asked_of`` gives, where there is a folder; raises as ``Parts``
    """
    if isinstance(checkpoint, Run):
        yield checkpoint
    elif checkpoint is None:
        yield Held()
    else:
        run = checkpoint if isinstance(checkpoint, RunFolder) else RunFolder(Path(checkpoint), {})
        with Parts(run.folder, asked() | run.more, run.anew) as parts:
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
) -> Iterator[Group]:
    """Items in order, in groups that are a part each, made or found.

    keep, name: a group is kept as "{name}-{number of its first item}"; groups: cuts items, consecutive ones in a group,
    of which only the first is taken: the rest is cut when it is its turn; make: (items, number of the first) -> the
    part; noun: what an item is called. Raises ValueError where a part does not say which items it holds.
    """
    first, n_found = 0, 0
    while first < len(items):
        rest, new = items[first:], []

        def made(first=first, rest=rest, new=new, going_on=n_found == first > 0) -> dict[str, Tensor]:
            if going_on:
                since = getattr(keep, "begun", "")
                run = f" with the run of {since}" if since else ""
                logger.info("going on%s: %d of %s are done", run, first, counted(len(items), noun))
            new.append(next(iter(groups(rest))))
            return make(new[0], first) | {ITEMS: torch.tensor([first, first + len(new[0])])}

        part = dict(keep(f"{name}-{first:06d}", made))
        begin, end = part.pop(ITEMS, torch.tensor([-1, -1])).tolist()
        if begin != first or not first < end <= len(items):
            raise ValueError(f"part {name}-{first:06d} holds {noun}s {begin} to {end} of {len(items)}; begin anew")
        n_found = n_found if new else end
        yield Group(first, items[first:end], part, not new)
        first = end


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
                raise MemoryError(f"out of memory, also with {_gb(memory)} to work in; {WAYS_OUT}") from error
        _empty_caches()  # here the error is gone, and with it what its frames held
        keep.narrow(memory := memory // 2)
        warnings.warn(
            f"out of memory: what is not done yet is cut for {_gb(memory)}, half of what was tried; results differ by "
            "rounding from those of one cut",
            stacklevel=4,  # the line that called the verb
        )


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB"


def _empty_caches() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
