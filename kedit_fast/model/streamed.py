"""Layers that are fetched ahead of their use, into a ring of buffers that hold one layer each.

A sweep says which layers it will ask for (``expect``), so the next one is on its way while this one computes: a reader
thread fills its buffer, on a GPU by a stream of its own between two events, "ready" and "free". A wrong guess costs
time, never a result, and is counted.

A buffer is free once the next layer is asked for. Under autograd too: a layer that the backward pass runs again saves
views of its weights, and they are done with when the next lower one is run again.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kedit_fast.model.family import family_of, is_conv1d, layers_of, projection
from kedit_fast.model.placement import SLOTS, host_memory, room_beside
from kedit_fast.model.source import hidden

ALIGN = 256  # bytes: where tensors begin in a buffer, so that products choose the kernels that they choose otherwise
SPOIL = False  # tests set it: a buffer that is free again holds NaN, so whoever still reads it is seen


class Slot:
    """A buffer of the ring: the layer that it holds or will hold, its weights by name, and who fills it."""

    def __init__(self, n_bytes: int, device: torch.device):
        self.buffer = aligned(n_bytes, device)
        self.layer: int | None = None
        self.weights: dict[str, Tensor] = {}
        self.filled: Future | None = None
        self.ready = self.free = None  # events, on a GPU


class Streamed(ABC):
    """A model whose layers' modules stay on meta: their weights are handed in, a layer at a time.

    Who derives from it says where they come from: ``fill`` (a whole layer, into a buffer), ``tensor`` (one, to keep),
    ``rows``, ``pass_bytes``; and ``residue``, how far behind a multiple of ALIGN a tensor begins.
    fetched: layers that were fetched; missed: those of them that nobody had expected; waited: seconds spent on waiting
    """

    name = ""
    in_memory = False

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.model, self.layers, self.device, self.dtype = model, layers_of(model), device, dtype
        self.prefix = family_of(model.config).layers
        self.fetched, self.missed, self.waited = 0, 0, 0.0
        self.kept: dict[int, dict[str, Tensor]] = {}  # layers that stay beside the ring
        self._order: deque[int] = deque()
        self._begin: list[int] = []
        self._slots: list[Slot] = []
        self._now: Slot | None = None
        self._stream = None if device.type in ("cpu", "mps") else torch.cuda.Stream(device)
        self._reader = ThreadPoolExecutor(1, "layers")

    # ---- what a kind of source says

    @property
    @abstractmethod
    def pass_bytes(self) -> int:
        """What a pass over all layers reads."""

    @cached_property
    def beside(self) -> int:
        """Bytes of host memory in which rows may wait; asked once, for each layer of each pack wants to know."""
        return room_beside(self.device, host_memory())

    @abstractmethod
    def rows(self, layer: int, name: str, index: tuple) -> Tensor:
        """``parameter[index]`` of a layer's parameter."""

    @abstractmethod
    def fill(self, slot: Slot) -> None:
        """Writes the weights of the slot's layer into its buffer, on the device; its ``weights`` are views of that."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One weight of the model, of its own memory, in the device and dtype that is computed with."""

    def residue(self, name: str) -> int:
        """Bytes beyond a multiple of ALIGN at which a weight begins where a loaded model has it."""
        return 0

    # ---- what a sweep asks

    def expect(self, order: Iterable[int]) -> None:
        """The layers that will be asked for, in their order."""
        self._order = deque(layer for layer in order if layer not in self.kept)
        self._begin = list(self._order)[:1]
        self._fetch_ahead()

    def call(self, layer: int, h: Tensor, kwargs: dict) -> Tensor:
        """Runs one decoder block on packed rows [1, rows, d]."""
        return hidden(functional_call(self.layers[layer], self._weights(layer), (h,), kwargs))

    def part(self, layer: int, path: str, x: Tensor) -> Tensor:
        """Runs one submodule of a decoder block, whose weights alone are read."""
        module = self.layers[layer].get_submodule(path)
        weights = {name: self.tensor(f"{self.prefix}.{layer}.{path}.{name}") for name, _ in module.named_parameters()}
        return functional_call(module, weights, (x,))

    def weight(self, layer: int, role: str) -> Tensor:
        """The weight [out, in] of the projection that plays this role, of its own memory."""
        weight = self.tensor(f"{self.prefix}.{layer}.{family_of(self.model.config).roles[role]}.weight")
        return weight.T if is_conv1d(projection(self.model, layer, role)) else weight

    @contextmanager
    def in_place(self):
        """A context in which the model's own forward can run: each layer holds its weights while it is called."""
        names = [dict(layer.named_parameters()) for layer in self.layers]

        def hold(layer: int, tensors: dict[str, Tensor]) -> None:
            for name, tensor in tensors.items():
                put(self.layers[layer], name, tensor)

        def frozen(layer: int) -> dict[str, Tensor]:
            return {name: nn.Parameter(weight, requires_grad=False) for name, weight in self._weights(layer).items()}

        with ExitStack() as stack:
            for i, module in enumerate(self.layers):
                stack.callback(hold, i, names[i])
                before = module.register_forward_pre_hook(lambda *_, i=i: hold(i, frozen(i)))
                after = module.register_forward_hook(lambda *_, i=i: hold(i, names[i]))
                stack.callback(before.remove)
                stack.callback(after.remove)
            self.expect(range(len(self.layers)))
            yield

    # ---- the ring

    @property
    def ring_bytes(self) -> int:
        """What the ring's buffers hold."""
        return SLOTS * max(map(self.layer_bytes, range(len(self.layers))))

    def layer_bytes(self, layer: int) -> int:
        """Bytes of a layer in a buffer."""
        return self._layouts[layer][1]

    def views(self, layer: int, buffer: Tensor) -> dict[str, Tensor]:
        """{name: a layer's weight} as they lie in a buffer."""
        places, size = self._layouts[layer][0], self.dtype.itemsize
        return {
            name: buffer[begin : begin + shape.numel() * size].view(self.dtype).view(shape)
            for name, (begin, shape) in places.items()
        }

    @cached_property
    def _layouts(self) -> list[tuple[dict[str, tuple[int, torch.Size]], int]]:
        """Of each layer ({name: where it begins in a buffer, its shape}, bytes of all)."""
        return [self._layout(layer) for layer in range(len(self.layers))]

    def _layout(self, layer: int) -> tuple[dict[str, tuple[int, torch.Size]], int]:
        places, end = {}, 0
        for name, parameter in sorted(self.layers[layer].named_parameters()):
            begin = -(-end // ALIGN) * ALIGN + self.residue(f"{self.prefix}.{layer}.{name}")
            places[name] = begin, parameter.shape
            end = begin + parameter.numel() * self.dtype.itemsize
        return places, end

    def _weights(self, layer: int) -> dict[str, Tensor]:
        """A layer's weights, there to be computed with until another layer is asked for."""
        if layer in self.kept:
            return self.kept[layer]
        if self._now is None or self._now.layer != layer:
            self._release()
            slot = self._holding(layer)
            if slot is None:
                self.missed += 1
                slot = self._fetch(layer, ())
            while layer in self._order and self._order.popleft() != layer:
                pass
            self._now = slot
            began = time.perf_counter()
            slot.filled.result()
            self.waited += time.perf_counter() - began
            if slot.ready is not None:
                torch.cuda.current_stream(self.device).wait_event(slot.ready)
            self._fetch_ahead()
        return self._now.weights

    def _holding(self, layer: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.layer == layer), None)

    def _release(self) -> None:
        slot, self._now = self._now, None
        if slot is None:
            return
        if self._stream is not None:
            slot.free = torch.cuda.current_stream(self.device).record_event()
        if SPOIL:
            for weight in slot.weights.values():
                weight.fill_(torch.nan)
            slot.layer = None

    def _fetch_ahead(self) -> None:
        """Begins to fetch the layers that come next, as many as the ring has room for beside the present one."""
        coming: list[int] = []
        for layer in self._order or self._begin:  # behind the last one: another pass may begin as this one did
            if (self._now is not None and layer == self._now.layer) or layer in coming:
                continue
            if len(coming) == SLOTS - (self._now is not None):
                break
            coming.append(layer)
        for layer in coming:
            if self._holding(layer) is None:
                self._fetch(layer, coming)

    def _fetch(self, layer: int, wanted: Iterable[int]) -> Slot:
        """Begins to fill a buffer that holds neither the present layer nor one of ``wanted``."""
        if not self._slots:
            n_bytes = self.ring_bytes // SLOTS
            self._slots = [Slot(n_bytes, self.device) for _ in range(SLOTS)]
        others = [slot for slot in self._slots if slot is not self._now and slot.layer not in wanted]
        slot = min(others, key=lambda one: one.layer is not None)
        if slot.filled is not None:
            slot.filled.exception()  # the reader is done with it; what went wrong there concerned a layer nobody wants
        slot.layer, slot.weights = layer, self.views(layer, slot.buffer)
        self.fetched += 1
        slot.filled = self._reader.submit(self._fill, slot)
        return slot

    def _fill(self, slot: Slot) -> None:
        """In the reader's thread."""
        if self._stream is None:
            self.fill(slot)
            return
        with torch.cuda.stream(self._stream):
            if slot.free is not None:
                self._stream.wait_event(slot.free)
            self.fill(slot)
            slot.ready = self._stream.record_event()


def aligned(n_bytes: int, device: torch.device | None = None, residue: int = 0, pinned: bool = False) -> Tensor:
    """[n_bytes] uint8 that begin ``residue`` bytes behind a multiple of ALIGN."""
    whole = torch.empty(n_bytes + 2 * ALIGN, dtype=torch.uint8, device=device, pin_memory=pinned)
    return whole[-whole.data_ptr() % ALIGN + residue :][:n_bytes]


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """A parameter or buffer in the place of the one of that name."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    (owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers)[leaf] = tensor
