"""A model that is not in memory as a whole: its layers are read from a safetensors checkpoint, ahead of their use."""

import json
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kedit_fast.model.family import family_of, refuse_experts
from kedit_fast.model.folder import Checkpoint, check_complete
from kedit_fast.model.streamed import ALIGN, Slot, Streamed, aligned, put


class Disk(Streamed):
    """Layers from a checkpoint's files, in their dtype or turned into another one as they are read.

    Gives the same bits as a loaded model: on the CPU weights lie as far from a multiple of ALIGN as in the files, which
    a loaded model maps, for products choose their kernels by that too.
    """

    name = "disk"

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        super().__init__(model, device, dtype)
        self._checkpoint = checkpoint

    @property
    def pass_bytes(self) -> int:
        return self._checkpoint.n_bytes

    def residue(self, name: str) -> int:
        stored = self._checkpoint.stored(name)
        return stored.begin % ALIGN if self._as_stored(stored) else 0

    def _as_stored(self, stored) -> bool:
        return self.device.type == "cpu" and stored.kind == self.dtype and stored.is_aligned

    def fill(self, slot: Slot) -> None:
        for name, weight in slot.weights.items():
            self.read(f"{self.prefix}.{slot.layer}.{name}", weight)

    def read(self, name: str, weight: Tensor) -> None:
        """Reads one weight of the model into a tensor of its shape."""
        stored = self._checkpoint.stored(name)
        if weight.device.type == "cpu" and stored.kind == weight.dtype:
            stored.read_into(weight)
        else:
            weight.copy_(stored.read())

    def tensor(self, name: str) -> Tensor:
        shape = self._checkpoint.stored(name).shape
        size = torch.Size(shape).numel() * self.dtype.itemsize
        weight = aligned(size, self.device, self.residue(name)).view(self.dtype).view(shape)
        self.read(name, weight)
        return weight

    def around(self, name: str) -> Tensor:
        """A weight that stays, of what lies around the layers: a view of the file where that can be."""
        stored = self._checkpoint.stored(name)
        return stored.mapped() if self._as_stored(stored) else self.tensor(name)

    def rows(self, layer: int, name: str, index: tuple) -> Tensor:
        """No more than these rows is read."""
        return self._checkpoint.stored(f"{self.prefix}.{layer}.{name}").part(index).to(self.dtype)


def open_on_disk(checkpoint: Checkpoint, config, model_class, device: torch.device, dtype: torch.dtype | None):
    """A model whose layers stay in its checkpoint: (module with embedding, norm and head, ``Disk`` source).

    What no text passes (a wrapper's vision tower) stays on meta. Raises ValueError for tensors that are missing or have
    another shape than the config says, and for damaged files.
    """
    refuse_experts(
        family_of(config),
        f"a {config.model_type} checkpoint stores the experts one by one and the model stacks them, so that its layers "
        "are not read from disk: it takes the model in memory (more memory=, --memory, or none)",
    )
    if dtype is not None:
        config.dtype = dtype
    with _parameters_on_meta():
        model = model_class._from_config(config, dtype=config.dtype)
    # Buffers as from_pretrained makes them: built in bf16, GPT-J's rotary tables would be off by 0.03.
    with torch.no_grad():
        model.apply(lambda module: model._init_weights(module) if module._buffers else None)
    model.eval()
    family = family_of(config)
    source = Disk(model, checkpoint, device, config.dtype)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight or config.tie_word_embeddings
    around = [model.get_input_embeddings(), model.get_output_embeddings(), *map(model.get_submodule, family.around)]
    loaded = {id(parameter) for module in around for parameter in module.parameters()}
    missing, mismatched = [], []
    for name, parameter in list(model.named_parameters()):
        if id(parameter) not in loaded and not name.startswith(source.prefix + "."):
            continue
        if not checkpoint.has(name):
            if not (tied and parameter is model.get_output_embeddings().weight):
                missing.append(name)
        elif (shape := checkpoint.stored(name).shape) != tuple(parameter.shape):
            mismatched.append((name, shape, parameter.shape))
        elif id(parameter) in loaded:
            put(model, name, nn.Parameter(source.around(name), requires_grad=parameter.requires_grad))
    folder = checkpoint.folder
    check_complete(folder, missing, mismatched)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        named = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        model.generation_config = GenerationConfig.from_dict(named)  # its end tokens are more than config's
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        put(model, name, buffer.to(device))
    return model, source


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
