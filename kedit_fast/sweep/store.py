"""Keys and values that outlive a sweep: prefixes for v* and z, the cache of a generation."""

import torch
from torch import Tensor

from kedit_fast.basics.state import upload


class KVStore:
    """Slots of keys and values by layer. ``table`` [runs, T] says which slot holds position t of run r.

    from_layer: keys and values are kept from this layer on, and ``h`` [size, d] is what its rows were on entering it
    on_host: whether they wait there, and come to the device in each sweep
    """

    def __init__(self, from_layer: int = 0, table: Tensor | None = None, size: int = 0, on_host: bool = False):
        self.from_layer, self.table, self.size, self.on_host = from_layer, table, size, on_host
        self.h: Tensor | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def slabs(cls, n_runs: int, n_positions: int) -> "KVStore":
        """An empty store with ``n_positions`` slots in a row for each run: the cache of a generation."""
        table = torch.arange(n_runs * n_positions).view(n_runs, n_positions)
        return cls(table=table, size=n_runs * n_positions)

    def put(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keeps one layer's keys and values [slots, Hkv, D]."""
        if layer >= self.from_layer:
            self._kept[layer] = self._kept_as(keys), self._kept_as(values)

    def enter(self, layer: int, h: Tensor) -> None:
        """Keeps the rows that enter the first layer that is kept."""
        if layer == self.from_layer:
            self.h = self._kept_as(h)

    def _kept_as(self, x: Tensor) -> Tensor:
        return on_host(x.detach()) if self.on_host else x.detach()

    def copy(self, origin: Tensor, target: Tensor) -> None:
        """Gives slots ``target`` [n] the keys and values of slots ``origin`` [n], in all layers."""
        kept = [each for pair in self._kept.values() for each in pair]
        if kept:
            origin, target = upload(kept[0].device, origin, target)
        for each in kept:
            each[target] = each[origin]

    def room(self, layer: int, n: int, like: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The layer's slots [size + n, Hkv, D], the same memory in every sweep; ``n`` rows of it stand behind."""
        kept = self._kept.get(layer)
        if kept is None or self.on_host or len(kept[0]) < self.size + n:
            # zeros, not empty: a slab's later slots are gathered with the others and only then masked
            grown = tuple(like.new_zeros(self.size + n, *shape) for _ in range(2))
            for new, old in zip(grown, kept or (), strict=False):
                new[: len(old)].copy_(old, non_blocking=True)
            if self.on_host:
                return grown
            self._kept[layer] = kept = grown
        return kept[0].detach(), kept[1].detach()


def on_host(x: Tensor) -> Tensor:
    """A copy in host memory, pinned where it is a GPU's; there once this returns."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type != "cpu").copy_(x)
