"""Where a model's weights go, decided by arithmetic before any of them is read.

Memory is what the device may hold, for weights and work together (Python and torch themselves come on top: about
0.3 GB). What fits, with a quarter left to work in, stays there. Of what does not, embedding, norm and head stay, and
the layers come in turns: one computes, the next one is on its way (``streamed.py``), from host memory where that holds
them all, else from disk. What half of the memory still has room for stays as well, the highest layers first: an edit's
values pass them most.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kedit_fast.basics.words import sized
from kedit_fast.model.shape import OnPaper, Shape
from kedit_fast.model.source import DEFAULT_MEMORY

SLOTS = 2  # layers in the ring: the one that computes, and the one on its way
WEIGHTS_SHARE = 0.75  # of the memory that weights may take: the rest is to work in
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
HOST_SHARE, BESIDE = 0.8, 0.15  # of host memory that layers may take, and rows that wait


@dataclass(frozen=True)
class Placement:
    """source: "resident", "host" or "disk"; memory: bytes on the device for all, None: no limit was given;
    weights: of them for weights; work: for sweeps (``LM.memory``); keep: layers that stay beside the ring;
    beside: bytes of host memory in which rows may wait"""

    shape: Shape
    source: str
    memory: int | None
    weights: int
    work: int
    keep: int = 0
    beside: int = 0

    @property
    def pass_bytes(self) -> int:
        """What a pass over all layers brings to the device."""
        layers = self.shape.layers
        return 0 if self.source == "resident" else sum(layers[: len(layers) - self.keep])

    def on_paper(self) -> Shape:
        """The shape, as a plan reads a model that is placed so."""
        return replace(
            self.shape,
            memory=self.work,
            source=OnPaper(self.source == "resident", self.pass_bytes, self.beside),
        )

    def __str__(self) -> str:
        shape = self.shape
        of = f"{shape.n_layers} layers of {sized(max(shape.layers))}, {sized(shape.around)} around them"
        lines = [f"weights  {sized(shape.n_bytes)} in {shape.dtype_name}: {of}"]
        if self.source == "resident":
            held = "all weights"
        else:
            ring = sized(SLOTS * max(shape.layers))
            held = f"{sized(shape.around)} around the layers, {ring} for {SLOTS} layers in turn"
            if self.keep:
                held += f", {sized(sum(shape.layers[-self.keep :]))} for the {self.keep} highest, which stay"
        limit = "no limit" if self.memory is None else sized(self.memory)
        lines.append(f"memory   {limit}: {held}; {sized(self.work)} for the work")
        if self.source != "resident":
            where = "host memory" if self.source == "host" else self.source
            lines.append(f"layers   from {where}, {sized(self.pass_bytes)} a pass, read ahead of their use")
        return "\n".join(lines)


def place(shape: Shape, memory: int | None, device: torch.device, host: int | None = None) -> Placement:
    """Where the weights go.

    memory: bytes on the device, for weights and work; None: all weights are to be there, and ``DEFAULT_MEMORY`` beside
        them
    host: bytes of host memory (default: this machine's)
    Raises ValueError where even layer by layer there is no room, with the bytes needed.
    """
    if memory is None:
        return Placement(shape, "resident", None, shape.n_bytes, DEFAULT_MEMORY)
    room = int(WEIGHTS_SHARE * memory)
    if shape.n_bytes <= room:
        return Placement(shape, "resident", memory, shape.n_bytes, memory - shape.n_bytes)
    largest = max(shape.layers)
    weights = shape.around + SLOTS * largest
    if weights > room:
        raise ValueError(
            f"memory = {memory}: layer by layer this model needs {sized(weights / WEIGHTS_SHARE)} at least: "
            f"{sized(shape.around)} for what lies around its layers, {sized(SLOTS * largest)} for {SLOTS} layers, and "
            "a quarter of it to work in"
        )
    host = host_memory() if host is None else host
    beside = room_beside(device, host)
    if device.type == "cpu" or host is None or sum(shape.layers) > HOST_SHARE * host:
        return Placement(shape, "disk", memory, weights, memory - weights, beside=beside)
    keep = min((memory // 2 - weights) // largest, shape.n_layers) if memory // 2 > weights else 0
    weights += keep * largest
    return Placement(shape, "host", memory, weights, memory - weights, keep, beside)


def room_beside(device: torch.device, host: int | None) -> int:
    """Bytes of host memory in which rows may wait, beside layers that lie there; 0: the device is the host."""
    return 0 if device.type == "cpu" else int(BESIDE * (host or 0))


def host_memory() -> int | None:
    """Bytes of this machine's memory, or of what its container may have; None where the system does not say."""
    if not hasattr(os, "sysconf"):
        return None
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no container, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)
