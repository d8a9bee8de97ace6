"""Weight sources: who supplies layer i. Nothing above them assumes a model in memory."""

import json
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import file_in
from ..words import counted
from .family import as_out_in, down_projection, family_of, is_conv1d, layers_of, module_at

INDEX = "model.safetensors.index.json"


class Resident:
    """The layers of a loaded model, as they are."""

    name = "resident"

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, layers_of(model)

    def call(self, layer: int, h: Tensor, kwargs: dict) -> Tensor:
        """Runs one decoder block on packed rows [1, rows, d]."""
        out = self.layers[layer](h, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def in_place(self):
        """A context in which the model's own forward can run: always."""
        return nullcontext()

    def part(self, layer: int, path: str, x: Tensor) -> Tensor:
        """Runs one submodule of a decoder block."""
        return module_at(self.layers[layer], path)(x)

    def down_weight(self, layer: int) -> Tensor:
        """The down projection's weight [d, d_ff]."""
        return as_out_in(down_projection(self.model, layer))

    def rows(self, layer: int, name: str, index: tuple) -> Tensor:
        """``parameter[index]`` of a layer's parameter ``name``, as it is stored."""
        return self.layers[layer].get_parameter(name)[index]


class Disk:
    """One layer at a time from safetensors; the layer's module stays on meta and its weights are handed in.

    Gives the same bits as ``Resident`` in the same dtype. No prefetch: each layer's weights are read when it is called.
    """

    name = "disk"

    def __init__(self, model: nn.Module, checkpoint: "Checkpoint", device: torch.device, dtype: torch.dtype):
        self.model, self.layers = model, layers_of(model)
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype
        self.prefix = family_of(model.config).layers
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})

    def _read(self, layer: int) -> dict[str, Tensor]:
        names = {n for n, p in self.layers[layer].named_parameters()}
        return {n: self.tensor(f"{self.prefix}.{layer}.{n}") for n in sorted(names)}

    def tensor(self, name: str) -> Tensor:
        """One tensor of the checkpoint in the device and dtype that is computed with."""
        return self._checkpoint.tensor(name).to(device=self._device, dtype=self._dtype)

    def call(self, layer: int, h: Tensor, kwargs: dict) -> Tensor:
        """Runs one decoder block on packed rows [1, rows, d] with weights read for this call."""
        out = torch.func.functional_call(self.layers[layer], self._weights(layer), (h,), kwargs)
        return out[0] if isinstance(out, tuple) else out

    def part(self, layer: int, path: str, x: Tensor) -> Tensor:
        """Runs one submodule of a decoder block with weights read for this call."""
        weights = {n.removeprefix(path + "."): w for n, w in self._weights(layer).items() if n.startswith(path + ".")}
        return torch.func.functional_call(module_at(self.layers[layer], path), weights, (x,))

    @contextmanager
    def in_place(self):
        """Inside, the model's own forward can run: each layer holds its weights while it is called."""
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
            self._held = (layer, self._read(layer))
        return self._held[1]

    def down_weight(self, layer: int) -> Tensor:
        """The down projection's weight [d, d_ff], read from disk."""
        weight = self.tensor(f"{self.prefix}.{layer}.{family_of(self.model.config).mlp_down}.weight")
        return weight.T if is_conv1d(down_projection(self.model, layer)) else weight

    def rows(self, layer: int, name: str, index: tuple) -> Tensor:
        """``parameter[index]`` of a layer's parameter ``name``, as it is stored: no more than that is read."""
        return self._checkpoint.rows(f"{self.prefix}.{layer}.{name}", index).to(self._dtype)


class Checkpoint:
    """The tensors of a safetensors checkpoint folder, by the model's parameter names."""

    def __init__(self, folder: Path, prefix: str = "", stored_as: tuple[tuple[str, str], ...] = ()):
        self.folder, self._prefix, self._stored_as = Path(folder), prefix, stored_as
        self._file_of = self._index()
        self._open: dict[str, safe_open] = {}

    def _index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.exists():
            return _read_index(index)
        single = self.folder / "model.safetensors"
        if not single.exists():
            raise FileNotFoundError(
                f"{self.folder} has neither model.safetensors nor its index; reading layers from disk needs a "
                "safetensors checkpoint (save_pretrained writes one)"
            )
        with open_tensors(single) as f:
            return dict.fromkeys(f.keys(), single.name)

    def has(self, name: str) -> bool:
        """Whether a parameter is in the checkpoint."""
        return self._stored(name) is not None

    def _stored(self, name: str) -> str | None:
        short = name.removeprefix(self._prefix + ".")  # base models are saved without the head's prefix
        others = [there + name.removeprefix(here) for here, there in self._stored_as if name.startswith(here)]
        return next((n for n in (name, short, *others) if n in self._file_of), None)

    def tensor(self, name: str) -> Tensor:
        """One tensor, a view of the file in the checkpoint's own dtype. Raises ValueError where it is missing."""
        stored, file = self._found(name)
        return file.get_tensor(stored)

    def rows(self, name: str, index: tuple) -> Tensor:
        """``tensor(name)[index]``, read alone."""
        stored, file = self._found(name)
        return file.get_slice(stored)[index]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        stored, file = self._found(name)
        return tuple(file.get_slice(stored).get_shape())

    def _found(self, name: str) -> tuple[str, safe_open]:
        stored = self._stored(name)
        if stored is None:
            raise ValueError(f"{self.folder} has no tensor {name!r}; is it a checkpoint of this model?")
        file = self._file_of[stored]
        if file not in self._open:
            self._open[file] = open_tensors(self.folder / file)
        return stored, self._open[file]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensor files."""
        return sum((self.folder / f).stat().st_size for f in set(self._file_of.values()))


def _read_index(index: Path) -> dict[str, str]:
    """{tensor: file}, each the plain name of a file beside the index."""
    try:
        found = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        for file in dict.fromkeys(found.values()):
            file_in(index.parent, file, index)
        return found
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is damaged ({error}); fetch the checkpoint again") from error


def check_index(folder: Path) -> None:
    """Raises ValueError where the index of a checkpoint folder names files outside it, before anything reads them."""
    index = folder / INDEX
    if index.is_file():
        _read_index(index)


def open_tensors(path: Path) -> safe_open:
    """An open safetensors file. Raises ValueError, naming it, for one that is cut short or something else."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut short or no safetensors file ({error}); fetch or save the checkpoint again"
        ) from error


def check_complete(folder, missing, mismatched) -> None:
    """Raises ValueError for parameters that a checkpoint lacks, or has in another shape.

    missing: their names, in the model's order; mismatched: (name, shape in the checkpoint, the model's shape)
    """
    if missing:
        raise ValueError(f"{folder} lacks {counted(len(missing), 'tensor')} of this model, {missing[0]!r} first")
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise ValueError(
            f"{folder}: tensor {name!r} is {list(stored)}, its config.json says {list(wanted)}; "
            "the checkpoint's files do not belong together"
        )


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
    around = [model.get_input_embeddings(), model.get_output_embeddings(), module_at(model, family.norm)]
    around += [module_at(model, family.positions)] if family.positions else []
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
    owner = module_at(model, path) if path else model
    (owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers)[leaf] = tensor


@contextmanager
def _parameters_on_meta():
    """Modules built inside hold no weights, but real buffers: rotary tables are not in a checkpoint."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        register(
            module,
            name,
            parameter if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad),
        )

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
