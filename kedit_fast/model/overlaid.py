"""A model in memory with other weights in some of its projections; what is in memory stays as it is."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.func import functional_call

from kedit_fast.model.family import is_conv1d, projection
from kedit_fast.model.source import Resident, block_output


class Overlaid:
    """A source in memory with other weights in some projections."""

    name, in_memory, pass_bytes = "resident", True, 0

    def __init__(self, source: Resident, weights: dict[tuple[int, str], Tensor]):
        """weights: {(layer, role): [out, in]}"""
        self._source, self._weights = source, weights
        self.model, self.layers = source.model, source.layers
        self.rows, self.part = source.rows, source.part  # of what is overlaid, only ``call`` runs in a sweep

    def call(self, layer: int, h: Tensor, kwargs: dict) -> Tensor:
        """Runs one decoder block on packed rows [1, rows, d]."""
        own = {}
        for (at, role), weight in self._weights.items():
            if at == layer:
                module = projection(self.model, layer, role)
                name = next(name for name, each in self.layers[layer].named_modules() if each is module)
                weight = weight.to(device=h.device, dtype=module.weight.dtype)
                own[f"{name}.weight"] = weight.T if is_conv1d(module) else weight
        if not own:
            return self._source.call(layer, h, kwargs)
        return block_output(functional_call(self.layers[layer], own, (h,), kwargs))

    def weight(self, layer: int, role: str) -> Tensor:
        """The weight [out, in] of the projection that plays this role."""
        own = self._weights.get((layer, role))
        return self._source.weight(layer, role) if own is None else own

    def in_place(self) -> AbstractContextManager:
        """A context in which the model's own forward can run: it runs on the weights beneath."""
        return nullcontext()
