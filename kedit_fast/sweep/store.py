"""Keys and values that outlive a sweep: prefixes for v*/z, the cache of a generation."""

import torch
from torch import Tensor


class KVStore:
    """Slots of keys and values by layer. ``table`` [runs, T] says which slot holds position t of run r.

    from_layer: keys and values are kept from this layer on, and ``h`` [size, d] is what its rows were on entering it
    """

    def __init__(self, from_layer: int = 0, table: Tensor | None = None, size: int = 0):
        self.from_layer, self.table, self.size = from_layer, table, size
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
            self._kept[layer] = keys.detach(), values.detach()

    def room(self, layer: int, n: int, like: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The layer's slots [size + n, Hkv, D], the same memory in every sweep; ``n`` rows of it stand behind."""
        kept = self._kept.get(layer)
        if kept is None or len(kept[0]) < self.size + n:
            # zeros, not empty: a slab's later slots are gathered with the others and only then masked
            grown = tuple(like.new_zeros(self.size + n, *shape) for _ in range(2))
            for new, old in zip(grown, kept or (), strict=False):
                new[: len(old)] = old
            self._kept[layer] = kept = grown
        return kept[0].detach(), kept[1].detach()
