"""A model that is not in memory as a whole: its layers are read from a safetensors checkpoint, one at a time."""

import json
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kedit_fast.model.family import family_of, is_conv1d, layers_of, projection
from kedit_fast.model.folder import Checkpoint, check_complete
from kedit_fast.model.source import hidden


class Disk:
    """One layer at a time from safetensors; the layer's module stays on meta and its weights are handed in.

    Gives the same bits as ``Resident`` in the same dtype. No prefetch: each layer's weights are read when it is called.
    """

    name, in_memory = "disk", False

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        self.model, self.layers = model, layers_of(model)
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype
        self.prefix = family_of(model.config).layers
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})

    @property
    def pass_bytes(self) -> int:
        return self._checkpoint.n_bytes

    def tensor(self, name: str) -> Tensor:
        """One tensor of the checkpoint in the device and dtype that is computed with."""
        return self._checkpoint.tensor(name).to(device=self._device, dtype=self._dtype)

    def call(self, layer: int, h: Tensor, kwargs: dict) -> Tensor:
        return hidden(functional_call(self.layers[layer], self._weights(layer), (h,), kwargs))

    def part(self, layer: int, path: str, x: Tensor) -> Tensor:
        weights = {n.removeprefix(path + "."): w for n, w in self._weights(layer).items() if n.startswith(path + ".")}
        return functional_call(self.layers[layer].get_submodule(path), weights, (x,))

    def weight(self, layer: int, role: str) -> Tensor:
        weight = self.tensor(f"{self.prefix}.{layer}.{family_of(self.model.config).roles[role]}.weight")
        return weight.T if is_conv1d(projection(self.model, layer, role)) else weight

    def rows(self, layer: int, name: str, index: tuple) -> Tensor:
        """No more than these rows is read."""
        return self._checkpoint.rows(f"{self.prefix}.{layer}.{name}", index).to(self._dtype)

    @contextmanager
    def in_place(self):
        """Each layer holds its weights while it is called."""
        names = [dict(layer.named_parameters()) for layer in self.layers]

        def fill(layer, tensors):
            for name, tensor in tensors.items():
                _put(self.layers[layer], name, tensor)

        with ExitStack() as stack:
            for i, module in enumerate(self.layers):
                stack.callback(fill, i, names[i])
                before = module.register_forward_pre_hook(lambda *_, i=i: fill(i, self._parameters(i)))
                after = module.register_forward_hook(lambda *_, i=i: fill(i, names[i]))
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def _parameters(self, layer: int) -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in self._weights(layer).items()}

    def _weights(self, layer: int) -> dict[str, Tensor]:
        if self._held[0] != layer:  # a layer's calls follow each other: read it once
            names = sorted(name for name, _ in self.layers[layer].named_parameters())
            self._held = (layer, {name: self.tensor(f"{self.prefix}.{layer}.{name}") for name in names})
        return self._held[1]


def open_on_disk(folder: Path, config, model_class, device: torch.device, dtype: torch.dtype | None):
    """A model whose layers stay on disk: (module with embedding, norm and head, ``Disk`` source).

    What no text passes (a wrapper's vision tower) stays on meta. Raises ValueError for tensors that are missing or have
    another shape than the config says, and for damaged files.
    """
    if dtype is not None:
        config.dtype = dtype
    with _parameters_on_meta():
        model = model_class._from_config(config, dtype=config.dtype)
    # Buffers as from_pretrained makes them: built in bf16, GPT-J's rotary tables would be off by 0.03.
    with torch.no_grad():
        model.apply(lambda module: model._init_weights(module) if module._buffers else None)
    model.eval()
    family = family_of(config)
    checkpoint = Checkpoint(folder, model.base_model_prefix, family.stored_as)
    source = Disk(model, checkpoint, device, config.dtype)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight or config.tie_word_embeddings
    around = [model.get_input_embeddings(), model.get_output_embeddings(), model.get_submodule(family.norm)]
    around += [model.get_submodule(family.positions)] if family.positions else []
    loaded = {id(parameter) for module in around for parameter in module.parameters()}
    missing, mismatched = [], []
    for name, parameter in list(model.named_parameters()):
        if id(parameter) not in loaded and not name.startswith(source.prefix + "."):
            continue
        if not checkpoint.has(name):
            if not (tied and parameter is model.get_output_embeddings().weight):
                missing.append(name)
        elif checkpoint.shape(name) != tuple(parameter.shape):
            mismatched.append((name, checkpoint.shape(name), parameter.shape))
        elif id(parameter) in loaded:  # a view of the file, as a resident model has: a copy is aligned otherwise and
            # another path of the BLAS gives other last bits
            _put(model, name, nn.Parameter(source.tensor(name), requires_grad=parameter.requires_grad))
    check_complete(folder, missing, mismatched)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        named = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        model.generation_config = GenerationConfig.from_dict(named)  # its end tokens are more than config's
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        _put(model, name, buffer.to(device))
    return model, source


def _put(model: nn.Module, name: str, tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    (owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers)[leaf] = tensor


@contextmanager
def _parameters_on_meta():
    """Modules built inside hold no weights, but real buffers: rotary tables are not in a checkpoint."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
