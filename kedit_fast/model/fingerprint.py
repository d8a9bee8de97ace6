"""A short name for a model's weights: which model an edit or a statistics file was made for."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kedit_fast.model.family import family_of, is_conv1d
from kedit_fast.model.source import Resident, Source

ROWS = 2  # rows read of each matrix: fine-tuning and edits change every row of what they change


def fingerprint(model: nn.Module, source: Source | None = None) -> str:
    """``family-L-d-hash`` (16 hex digits) of a Hugging Face model, whose layers ``source`` supplies (default: it does).

    The hash covers the shape of every parameter that a text passes, two rows [out, in] of each matrix (attention, MLP,
    embedding, position table, head) and the whole of each vector (norms, biases), rounded to bfloat16, so that a bf16
    and an fp32 copy of one model agree. It does not see a change that leaves these two rows as they are.

    Cost: some 30 MB read of a 70B model; 0.02 s for 30 layers in memory. Raises ValueError for a model without weights.
    """
    source = source or Resident(model)
    parts: list[bytes | Tensor] = []
    family = family_of(model.config)
    embedding = model.get_input_embeddings()
    places = [model.get_submodule(path) for path in (family.positions, family.norm) if path]
    for module in (embedding, *places, model.get_output_embeddings()):
        for name, parameter in sorted(module.named_parameters()):
            _add(parts, module, name, parameter.__getitem__)
    for layer, block in enumerate(source.layers):
        for name, _ in sorted(block.named_parameters()):
            _add(parts, block, name, lambda index, at=(layer, name): source.rows(*at, index))
    digest = hashlib.sha256(b"".join(_on_host(parts))).hexdigest()
    return f"{model.config.model_type}-{len(source.layers)}-{embedding.weight.shape[1]}-{digest[:16]}"


def family_name(made_for: str) -> str:
    """The family (``model_type``) that a fingerprint names; "" of an empty one."""
    return made_for.rsplit("-", 3)[0]


def _add(parts: list[bytes | Tensor], root: nn.Module, name: str, read) -> None:
    """Adds the shape and the sample of one parameter; ``read(index)`` gives a part of it."""
    turned = is_conv1d(root.get_submodule(name.rpartition(".")[0]))
    shape = root.get_parameter(name).shape
    shape = shape[::-1] if turned and len(shape) == 2 else shape
    parts.append(str(tuple(shape)).encode())
    for index in _sample(shape):
        rows = read(index[::-1] if turned else index)
        parts.append(_bits(rows.T if turned and rows.ndim == 2 else rows))


def _sample(shape) -> list[tuple]:
    """Indices of the rows that are read: a vector whole, else the first row and the middle one (of the first and the
    middle matrix, where several are stacked)."""
    if len(shape) < 2:
        return [()]
    return [(*(slice(k * n // ROWS, k * n // ROWS + 1) for n in shape[:-1]), slice(None)) for k in range(ROWS)]


def _bits(rows: Tensor) -> Tensor:
    if rows.is_meta:
        raise ValueError("this model's weights are not loaded (meta device); open it from its folder instead")
    return rows.detach().to(torch.bfloat16).contiguous().view(torch.int16).flatten()


def _on_host(parts: list[bytes | Tensor]) -> Iterator[bytes]:
    """The parts in their order; the tensors of a device come from it by one copy."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    held = {device: [x for x in tensors if x.device == device] for device in {x.device for x in tensors}}
    there = {device: iter(torch.cat(some).cpu().split([len(x) for x in some])) for device, some in held.items()}
    for part in parts:
        yield part if isinstance(part, bytes) else next(there[part.device]).numpy().tobytes()
