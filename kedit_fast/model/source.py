"""Who supplies a model's layers. Nothing above assumes that their weights are in memory."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

from kedit_fast.model.family import as_out_in, layers_of, projection

DEFAULT_MEMORY = 4 << 30  # bytes that a sweep may hold besides the weights


class Source(Protocol):
    """What a sweep and an edit ask of a model's layers.

    name: as people call it; layers: the decoder layers' modules, in order
    in_memory: whether all weights stand in memory all the time: only then can an edit be written into them, and may
        autograd keep those that it multiplied by
    pass_bytes: what a pass over all layers reads from somewhere slower; 0: passes cost nothing to repeat
    beside: bytes of host memory in which rows may wait meanwhile; 0: rows wait where they are computed
    """

    name: str
    layers: nn.ModuleList
    in_memory: bool

    @property
    def pass_bytes(self) -> int: ...

    @property
    def beside(self) -> int: ...

    def expect(self, order: Iterable[int]) -> None:
        """The layers that will be called, in their order: one that reads them from somewhere slower reads ahead."""

    def call(self, layer: int, h: Tensor, kwargs: dict) -> Tensor:
        """Runs one decoder block on packed rows [1, rows, d]."""

    def part(self, layer: int, path: str, x: Tensor) -> Tensor:
        """Runs one submodule of a decoder block."""

    def weight(self, layer: int, role: str) -> Tensor:
        """The weight [out, in] of the projection that plays this role (``Family.roles``)."""

    def rows(self, layer: int, name: str, index: tuple) -> Tensor:
        """``parameter[index]`` of a layer's parameter ``name``, as it is stored."""

    def in_place(self) -> AbstractContextManager:
        """A context in which the model's own forward can run."""


class Resident:
    """The layers of a loaded model, as they are; weights are views of its parameters."""

    name, in_memory, pass_bytes, beside = "resident", True, 0, 0

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, layers_of(model)

    def expect(self, order: Iterable[int]) -> None:
        pass

    def call(self, layer: int, h: Tensor, kwargs: dict) -> Tensor:
        return hidden(self.layers[layer](h, **kwargs))

    def part(self, layer: int, path: str, x: Tensor) -> Tensor:
        return self.layers[layer].get_submodule(path)(x)

    def weight(self, layer: int, role: str) -> Tensor:
        return as_out_in(projection(self.model, layer, role))

    def rows(self, layer: int, name: str, index: tuple) -> Tensor:
        return self.layers[layer].get_parameter(name)[index]

    def in_place(self) -> AbstractContextManager:
        return nullcontext()


def hidden(out) -> Tensor:
    """The hidden states of what a decoder block returns."""
    return out[0] if isinstance(out, tuple) else out
