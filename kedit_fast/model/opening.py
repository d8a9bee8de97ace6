"""Opening a model: a folder, a hub id, a loaded Hugging Face model, or the demo model; refused here or not at all."""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from ..state import own_state
from . import family as fam
from .family import family_of
from .lm import DEFAULT_MEMORY, LM
from .source import Checkpoint, Resident, check_complete, check_index, open_on_disk, open_tensors

DEMO_MODEL = "smollm2"  # the name that opens SmolLM2-135M-Instruct


@own_state()
def open_model(model, *, memory=None, device=None, dtype=None, tokenizer=None) -> LM:
    """Opens a model: a folder, a hub id, a loaded Hugging Face model, or "smollm2" (the demo model).

    memory: bytes (or "8GB") for weights and sweeps together. A checkpoint larger than half of it stays on disk and is
        read layer by layer; None keeps the model in memory.
    device: where to compute (default: the model's own, else the CPU); dtype: a torch dtype or its name (default: the
        checkpoint's)
    tokenizer: for a loaded model; default: the one saved under the model's name

    Raises ValueError for an unknown family, a slow tokenizer, NaN in weights, a checkpoint that lacks a weight, has it
    in another shape or is damaged; OSError for one that is not there. No remote code is run.
    """
    dtype = _dtype(dtype)
    memory = _bytes(memory)
    if not isinstance(model, nn.Module | str | Path) or not str(model):
        raise ValueError(f"model {model!r}: expected a folder, a hub id, a loaded Hugging Face model, or 'smollm2'")
    if isinstance(model, nn.Module):
        lm = _from_loaded(model, tokenizer, memory, device, dtype)
    else:
        lm = _from_folder(model, tokenizer, memory, torch.device(device or "cpu"), dtype)
    if not getattr(lm.tokenizer, "is_fast", False):
        raise ValueError("kedit_fast needs a fast tokenizer (subject spans come from its character offsets)")
    _check_weights(lm)
    return lm


def _from_loaded(model, tokenizer, memory, device, dtype) -> LM:
    from transformers import AutoTokenizer

    family_of(model.config)
    here = model.get_input_embeddings().weight
    elsewhere = device is not None and torch.empty(0, device=device).device != here.device  # "cuda" is cuda:0
    if (dtype is not None and dtype != here.dtype) or elsewhere:
        raise ValueError(
            f"this loaded model is {here.dtype} on {here.device}; a loaded model is used as it is: "
            "convert it first with model.to(...)"
        )
    if tokenizer is None and not model.config._name_or_path:
        raise ValueError("this loaded model has no name to find its tokenizer by; give tokenizer=")
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=False)
    return LM(model, tokenizer, Resident(model), memory or DEFAULT_MEMORY)


def _from_folder(name, tokenizer, memory, device, dtype) -> LM:
    import transformers

    about = {"opened_as": str(name)}
    if str(name) == DEMO_MODEL:
        from .smollm2 import NOTE, smollm2_folder

        name, about["note"] = smollm2_folder(), NOTE
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        why = str(error).splitlines()[0]
        raise OSError(f"model {str(name)!r} is no folder here and not found on the Hugging Face hub: {why}") from error
    family = family_of(config)
    tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    classes = fam.auto_class(family)
    if memory is not None:
        folder = _local(name)
        if Checkpoint(folder).n_bytes > memory // 2:
            model, source = open_on_disk(folder, config, classes._model_mapping[type(config)], device, dtype)
            return LM(model, tokenizer, source, memory // 2, **about)
    model = _loaded(name, classes, dtype).to(device)
    return LM(model, tokenizer, Resident(model), memory // 2 if memory else DEFAULT_MEMORY, **about)


def _loaded(name, classes, dtype) -> nn.Module:
    """The model with every weight from its checkpoint: transformers only logs those it had to make up."""
    check_index(Path(name))
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # both are told to us, and refused below
    try:
        model, info = classes.from_pretrained(name, dtype=dtype or "auto", trust_remote_code=False, **told)
    except SafetensorError as error:  # it does not say of which file
        for path in sorted(Path(name).glob("*.safetensors")):
            open_tensors(path)
        raise ValueError(f"a weight file of {name} is cut short or damaged ({error}); fetch it again") from error
    check_complete(
        name,
        [n for n, _ in model.named_parameters() if n in info["missing_keys"]],
        sorted(info["mismatched_keys"]),
    )
    return model


def _local(name) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json"]))


def _check_weights(lm: LM) -> None:
    """Refuses NaN and infinity in a resident model's weights, which would spread into every result in silence."""
    for name, p in lm.model.named_parameters():
        if (
            not p.is_meta
            and p.is_floating_point()
            and not math.isfinite(p.detach().abs().max().item() if p.numel() else 0)
        ):
            raise ValueError(f"weight {name!r} of {lm.name} holds NaN or infinity; the checkpoint is damaged")


def _dtype(dtype) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
    found = getattr(torch, short.get(str(dtype), str(dtype)), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; give float32, bfloat16, float16 or float64")
    return found


def _bytes(memory) -> int | None:
    if memory is None or isinstance(memory, int):
        return memory
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    text = str(memory).strip().upper()
    unit = next((u for u in sorted(units, key=len, reverse=True) if text.endswith(u)), None)
    try:
        return int(float(text.removesuffix(unit or "")) * units.get(unit, 1))
    except ValueError:
        raise ValueError(f"memory {memory!r} is not a size; give bytes or a text such as '24GB'") from None
