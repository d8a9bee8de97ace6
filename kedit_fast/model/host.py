"""A model whose layers lie in host memory, each packed in one buffer that crosses the bus ahead of its use."""

from torch import Tensor

from kedit_fast.model.disk import Disk
from kedit_fast.model.streamed import Slot, Streamed, aligned


class Host(Streamed):
    """Layers from buffers in host memory, which the device reads by one copy each (pinned, where it is a GPU).

    disk: where they are read from, once; keep: so many layers, the highest, stay on the device beside the ring: those
    that the values of an edit are optimized through
    """

    name = "host"

    def __init__(self, disk: Disk, keep: int = 0):
        super().__init__(disk.model, disk.device, disk.dtype)
        self._disk, n = disk, len(self.layers)
        self._packed = [self._pack(layer) for layer in range(n)]
        for layer in range(n - min(keep, n), n):
            buffer = aligned(self.layer_bytes(layer), self.device)
            buffer.copy_(self._packed[layer])
            self.kept[layer] = self.views(layer, buffer)

    def _pack(self, layer: int) -> Tensor:
        buffer = aligned(self.layer_bytes(layer), pinned=self.device.type != "cpu")
        for name, weight in self.views(layer, buffer).items():
            self._disk.read(f"{self.prefix}.{layer}.{name}", weight)
        return buffer

    @property
    def pass_bytes(self) -> int:
        return sum(len(buffer) for layer, buffer in enumerate(self._packed) if layer not in self.kept)

    def residue(self, name: str) -> int:
        return self._disk.residue(name)

    def fill(self, slot: Slot) -> None:
        packed = self._packed[slot.layer]
        slot.buffer[: len(packed)].copy_(packed, non_blocking=True)

    def tensor(self, name: str) -> Tensor:
        return self._disk.tensor(name)

    def rows(self, layer: int, name: str, index: tuple) -> Tensor:
        return self.views(layer, self._packed[layer])[name][index]
