"""A loaded model's layers with other weights in some projections; what is in memory stays as it is."""

from torch import Tensor
from torch.func import functional_call

from kedit_fast.model.family import as_stored, projection, weight_name
from kedit_fast.model.source import Resident, hidden


class Overlaid(Resident):
    """Of what is overlaid only ``call`` runs in a sweep; all else but ``weight`` goes by the weights beneath."""

    def __init__(self, source: Resident, weights: dict[tuple[int, str], Tensor]):
        """weights: {(layer, role): [out, in]}"""
        super().__init__(source.model)
        self._weights = weights

    def call(self, layer: int, h: Tensor, kwargs: dict) -> Tensor:
        own = {}
        for (at, role), weight in self._weights.items():
            if at == layer:
                module = projection(self.model, layer, role)
                name = next(name for name, each in self.layers[layer].named_modules() if each is module)
                parameter = weight_name(module)
                weight = weight.to(device=h.device, dtype=getattr(module, parameter).dtype)
                own[f"{name}.{parameter}"] = as_stored(module, weight)
        if not own:
            return super().call(layer, h, kwargs)
        return hidden(functional_call(self.layers[layer], own, (h,), kwargs))

    def weight(self, layer: int, role: str) -> Tensor:
        own = self._weights.get((layer, role))
        return super().weight(layer, role) if own is None else own
