"""A short name for a model's weights: which model an edit or a statistics file was made for."""

import hashlib

import torch
from torch import Tensor, nn

from .family import as_out_in, down_projection, layers_of

ROWS = 2  # rows read from each layer's down projection: any ROME or MEMIT edit changes every row


def fingerprint(model: nn.Module, weight_of=None) -> str:
    """``family-L-d-hash`` (16 hex digits) of a Hugging Face model.

    The hash covers two rows of every layer's down projection and of the token embedding, rounded to bfloat16, so a
    bf16 and an fp32 copy of one model agree, and a 70B model costs about 9 MB read. ``weight_of(layer)`` hands in a
    weight [out, in] that is not in the module (layers on disk).
    """
    digest = hashlib.sha256()
    embedding = model.get_input_embeddings().weight
    n_layers = len(layers_of(model))
    weight_of = weight_of or (lambda layer: as_out_in(down_projection(model, layer)))
    for weight in (embedding, *map(weight_of, range(n_layers))):
        digest.update(str(tuple(weight.shape)).encode())
        digest.update(_sample(weight))
    return f"{model.config.model_type}-{n_layers}-{embedding.shape[1]}-{digest.hexdigest()[:16]}"


def _sample(weight: Tensor) -> bytes:
    if weight.is_meta:
        raise ValueError("this model's weights are not loaded (meta device); open it from its folder instead")
    rows = weight.detach()[:: max(1, weight.shape[0] // ROWS)][:ROWS]
    return rows.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().tobytes()
