"""Work shared by ranks: the processes of one torch.distributed group, each with the whole model.

Whoever starts them (torchrun, Slurm, Ray) calls the same function with the same arguments on all of them. Inside it
each takes its share, what the shares give is exchanged, and all return the whole. This file alone speaks to
torch.distributed; without a group, and inside ``alone``, every function here is what one process does.

Tensors go over the wire as they are, anything else as JSON: no pickle. An error of one rank is raised on all of them
where they next meet, and the group can be used again; a rank that is gone ends the others with a ConnectionError.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kedit_fast.basics.settings import Launch
from kedit_fast.basics.unfinished import discarding
from kedit_fast.basics.words import is_out_of_memory, short

T = TypeVar("T")
Part = dict[str, Tensor]
WAIT = timedelta(days=7)  # how long a rank waits for the others' shares, which may be of a long trace
ROUND = 4  # groups a rank between two exchanges: fewer leave ranks idle, more tell of results later
ROWS = 1024  # of a triangle in one message
# What an error is on the other ranks: the first of these that it is, or else the last.
KINDS = (TypeError, ValueError, MemoryError, OSError, ImportError, RuntimeError)
_alone: ContextVar[bool] = ContextVar("kedit_fast_alone", default=False)
_TOLD = "_told_to_all_ranks"  # an attribute of errors


# ---- who is there


def n_ranks() -> int:
    """Ranks that share the work; 1 without a group."""
    there = dist.is_available() and dist.is_initialized() and not _alone.get()
    return dist.get_world_size() if there else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if n_ranks() > 1 else 0


def first() -> bool:
    """Whether this process writes what all of them made: logs, statistics, parts of work that they do together."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works as if there were no others, and writes: for what one rank does by itself."""
    token = _alone.set(True)
    try:
        with discarding(False):
            yield
    finally:
        _alone.reset(token)


@contextmanager
def launched(place: Launch, device: str | None = None) -> Iterator[None]:
    """The group of processes that torchrun or another launcher started, ended with the block. Inside, ranks but the
    first discard the files that they write, unless they are ``alone``.

    device: where is computed; each rank takes the GPU that its LOCAL_RANK numbers
    """
    backend, kind = "gloo", torch.device(device or "cpu").type
    if kind != "cpu":
        backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
        torch.accelerator.set_device_index(place.local)
    dist.init_process_group(backend, timeout=WAIT)
    try:
        with discarding(place.rank > 0):
            yield
    finally:
        with suppress(RuntimeError):  # a rank is gone
            dist.destroy_process_group()


# ---- errors


@contextmanager
def joint() -> Iterator[None]:
    """Has an error of one rank in this block raised on all of them: all enter it, and wait for each other at its end.
    Also a decorator: ``@joint()``."""
    if n_ranks() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        if not hasattr(error, _TOLD):
            kind = next((i for i, kind in enumerate(KINDS) if isinstance(error, kind)), len(KINDS) - 1)
            kind = KINDS.index(MemoryError) if is_out_of_memory(error) else kind
            _meet(json.dumps([kind, str(error) or type(error).__name__]).encode(), failed=True)
            _mark(error)
        raise
    _meet()


def _mark(error: Exception) -> Exception:
    setattr(error, _TOLD, True)
    return error


def _meet(mine: bytes = b"", failed: bool = False) -> list[bytes]:
    """What each rank brings. Raises the first failed one's error on those that have not; ConnectionError where one is
    gone."""
    heads = _all(torch.tensor([int(failed), len(mine)]))
    failing = [i for i, head in enumerate(heads) if head[0]]
    sizes = [int(head[1]) if not failing or i in failing else 0 for i, head in enumerate(heads)]
    brought = [bytes(x.numpy()) for x in _all_bytes(_bytes(mine[: sizes[dist.get_rank()]]), sizes)]
    if failing and not failed:
        kind, text = json.loads(brought[failing[0]])
        raise _mark(KINDS[kind](f"rank {failing[0]}: {text}"))
    return brought


def agreed(values: dict) -> None:
    """Raises ValueError, on all ranks, where they were not called with the same: {what: a JSON value}."""
    if n_ranks() == 1:
        return
    brought = gathered_json(values)
    for name, value in brought[0].items():
        other = next((i for i, each in enumerate(brought) if each[name] != value), None)
        if other is not None:
            raise _mark(ValueError(
                f"{name}: {short(value)} on rank 0, {short(brought[other][name])} on rank {other}; ranks share work "
                "themselves: call it alike on all of them, or inside kedit_fast.basics.ranks.alone()"
            ))  # fmt: skip


def anyone(says: bool) -> bool:
    """Whether it is so on any rank."""
    return any(gathered_json(says))


# ---- the wire


def _all(x: Tensor) -> list[Tensor]:
    """The tensor of each rank, all of one shape and dtype; on the CPU."""
    x = x.to(_wire("cpu"))
    out = [torch.empty_like(x) for _ in range(n_ranks())]
    with _lost():
        dist.all_gather(out, x)
    return [each.cpu() for each in out]


def _all_bytes(mine: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The bytes of each rank, [sizes[rank]] uint8."""
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(mine)] = mine
    return [x[:n] for x, n in zip(_all(padded) if len(padded) else [padded] * len(sizes), sizes, strict=True)]


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _wire(kind: str) -> str:
    """The kind of device whose tensors the group exchanges: the one asked for, if it can."""
    kinds = [pair.split(":")[0] for pair in str(dist.get_backend_config()).split(",")]
    return kind if kind in kinds else kinds[0]


@contextmanager
def _lost() -> Iterator[None]:
    """Has a failure of the connection said in words."""
    try:
        yield
    except RuntimeError as error:
        raise _mark(ConnectionError(
            f"one of the {n_ranks()} ranks is gone, and what it said last says why. The same call goes on from the "
            f"parts that are kept ({' '.join(str(error).split())[:200]})"
        )) from error  # fmt: skip


# ---- values and tensors


def gathered_json(mine: T) -> list[T]:
    """The JSON value of each rank, by rank."""
    return [mine] if n_ranks() == 1 else [json.loads(each) for each in _meet(json.dumps(mine).encode())]


def gathered(mine: Part) -> list[Part]:
    """The tensors of each rank, by rank, on the CPU; each may bring its own names and shapes."""
    if n_ranks() == 1:
        return [mine]
    spec, body = _packed(mine)
    specs = [json.loads(each) for each in _meet(spec)]
    bodies = _all_bytes(body, [_n_bytes(each) for each in specs])
    return [_unpacked(*each) for each in zip(specs, bodies, strict=True)]


def from_first(make: Callable[[], Part]) -> Part:
    """What ``make`` gives on the first rank, which alone calls it; on the others on the CPU."""
    if n_ranks() == 1:
        return make()
    with joint():
        made = _by_itself(make) if first() else {}
    spec, body = _packed(made)
    spec = json.loads(_meet(spec)[0])
    body = (body if first() else torch.empty(_n_bytes(spec), dtype=torch.uint8)).to(_wire("cpu"))
    if len(body):
        with _lost():
            dist.broadcast(body, 0)
    return made if first() else _unpacked(spec, body.cpu())


def json_from_first(make: Callable[[], T]) -> T:
    """``from_first`` of JSON values."""
    if n_ranks() == 1:
        return make()
    with joint():
        mine = json.dumps(_by_itself(make)).encode() if first() else b""
    return json.loads(_meet(mine)[0])


def summed_on_first_(x: Tensor) -> None:
    """x [n, n], whose lower triangle is in use: becomes the sum over ranks on the first of them, and 0 on the others.

    Rows go in blocks, each as far as its diagonal, so it is little more than the triangle that goes.
    """
    if n_ranks() == 1:
        return
    for begin in range(0, len(x), ROWS):
        block = x[begin : begin + ROWS, : begin + ROWS]
        sent = block.contiguous().to(_wire(x.device.type))
        with _lost():
            dist.reduce(sent, 0)
        block.copy_(sent) if first() else block.zero_()


def _packed(tensors: Part) -> tuple[bytes, Tensor]:
    """(JSON of names, dtypes and shapes; the bytes of all)."""
    spec = [[name, str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in tensors.items()]
    flat = [x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in tensors.values()]
    return json.dumps(spec).encode(), torch.cat(flat) if flat else _bytes(b"")


def _n_bytes(spec: list) -> int:
    return sum(math.prod(shape) * getattr(torch, dtype).itemsize for _, dtype, shape in spec)


def _unpacked(spec: list, body: Tensor) -> Part:
    found, end = {}, 0
    for name, dtype, shape in spec:
        kind = getattr(torch, dtype)
        begin, end = end, end + math.prod(shape) * kind.itemsize
        found[name] = body[begin:end].clone().view(kind).reshape(shape)  # a clone begins where any dtype may
    return found


# ---- shares


def shares(sizes: Sequence[float], n: int) -> list[range]:
    """Numbers of the consecutive items that each of n ranks takes, of like sizes together."""
    whole, before = sum(sizes) or 1, 0.0
    taken = [0] * n
    for size in sizes:  # an item is the rank's in whose share its middle lies
        taken[min(n - 1, int(n * (before + size / 2) / whole))] += 1
        before += size
    return [range(sum(taken[:i]), sum(taken[: i + 1])) for i in range(n)]


def mine(sizes: Sequence[float]) -> range:
    """Numbers of the items that this rank takes of them."""
    return shares(sizes, n_ranks())[rank()]


def shared(
    items: Sequence[T], work: Callable[[Sequence[T]], Part], size: Callable[[T], float] = lambda item: 1
) -> list[Part]:
    """``work(some)`` of the consecutive items that each rank takes, gathered in their order, of those that take any.

    Work on a share is done alone: what it calls shares nothing further. Without a group, and for no items: one part.
    """
    if n_ranks() == 1 or not items:
        return [work(items)]
    own = mine([size(item) for item in items])
    with joint():
        made = _by_itself(work, items[own.start : own.stop]) if own else {}
    return [part for part in gathered(made) if part]


def joined(parts: Sequence[Part]) -> Part:
    """One part of several, with the tensors of each name behind each other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]


def dealt(
    groups: Sequence[T], make: Callable[[T], Part], size: Callable[[T], float], holder: Callable[[T], int | None]
) -> Iterator[Part]:
    """``make(group)`` of every group, in order, each made by one rank, alone: by its holder, if it has one, else by
    whoever has least, the largest first.

    A few groups a rank are exchanged at a time; without ranks each comes as it is made.
    """
    if n_ranks() == 1:
        yield from map(make, groups)
        return
    step = ROUND * n_ranks()
    for some in (range(i, min(i + step, len(groups))) for i in range(0, len(groups), step)):
        owner = _owners([size(groups[i]) for i in some], [holder(groups[i]) for i in some])
        with joint():
            made = {i: _by_itself(make, groups[i]) for i, who in zip(some, owner, strict=True) if who == rank()}
        found: dict[int, Part] = {i: {} for i in some}
        for part in gathered({f"{i} {name}": x for i, each in made.items() for name, x in each.items()}):
            for name, x in part.items():
                number, _, name = name.partition(" ")
                found[int(number)][name] = x
        yield from found.values()


def busy(sizes: Sequence[float]) -> float:
    """The share of the time that ranks work, on average, when groups of these sizes are dealt to them."""
    load = [0.0] * n_ranks()
    for size, who in zip(sizes, _owners(sizes, [None] * len(sizes)), strict=True):
        load[who] += size
    return sum(load) / (len(load) * max(load)) if any(load) else 1.0


def _owners(sizes: Sequence[float], holders: Sequence[int | None]) -> list[int]:
    """Which rank takes each; those that are held cost nothing."""
    load, owner = [0.0] * n_ranks(), list(holders)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if owner[i] is None:
            owner[i] = load.index(min(load))
            load[owner[i]] += sizes[i]
    return owner


def _by_itself(work: Callable, *args):
    with alone():
        return work(*args)
