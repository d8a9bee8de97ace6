"""Opening a model: a folder, hub id, loaded Hugging Face model, or one that has a name; refused here or not at all."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kedit_fast.basics import checks
from kedit_fast.basics.allocator import give_back_what_is_freed
from kedit_fast.basics.state import own_state
from kedit_fast.basics.words import did_you_mean
from kedit_fast.jobs.compared import check_own_logits
from kedit_fast.model import family as fam
from kedit_fast.model.disk import open_on_disk
from kedit_fast.model.family import family_of
from kedit_fast.model.folder import Checkpoint, read_config, read_model, read_tokenizer
from kedit_fast.model.gemma3 import GEMMA3
from kedit_fast.model.host import Host
from kedit_fast.model.lm import LM
from kedit_fast.model.loaded import check_loaded, make_ordinary
from kedit_fast.model.packaged import packaged_folder
from kedit_fast.model.placement import place
from kedit_fast.model.shape import shape_of
from kedit_fast.model.smollm2 import SMOLLM2
from kedit_fast.model.source import DEFAULT_MEMORY, Resident

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGED = {model.name: model for model in (SMOLLM2, GEMMA3)}  # models by the names that open them


@own_state()
def open_model(
    model: str | Path | nn.Module,
    *,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    accept_licence: bool = False,
) -> LM:
    """Opens a model: a folder, a hub id, a loaded Hugging Face model, "smollm2" (the demo model) or "gemma3".

    memory: bytes (or "8GB") for weights and work together. Of a model that needs more than three quarters of it each
        layer is read ahead of its use: from disk, or for a GPU from host memory where that holds them all; None keeps
        the model in memory. ``print(lm.placement)`` says what goes where (``placement.py``). A limit would not hold
        with glibc's allocator as it is: this process's is told to return large blocks when they are freed
        (``allocator.py``).
    device: where to compute (default: the model's own, else the CPU); dtype: a torch dtype or its name (default: the
        checkpoint's)
    tokenizer: for a loaded model; default: the one saved under the model's name
    accept_licence: "gemma3" is Gemma-3-270M, under the Gemma Terms of Use (ai.google.dev/gemma/terms): True says that
        you accept them, and fetches it; once it is in the cache folder it opens without

    A family that the tests do not cover is compared with the model's own logits first (``compared.py``). Parameters
    that were made under ``torch.inference_mode`` become ordinary ones over the same memory.

    Raises ValueError for terms that are not accepted, an unknown family, a slow tokenizer, NaN in weights, a checkpoint
    that lacks a weight, has it in another shape or is damaged, a loaded model that is wrapped or not all here
    (``loaded.py``); OSError for one that is not there. No remote code is run.
    """
    dtype = None if dtype is None else getattr(torch, checks.dtype("dtype", dtype))
    memory, device = checks.optional(checks.size, "memory", memory), checked_device(device)
    accept_licence = checks.flag("accept_licence", accept_licence)
    checks.instance(
        "model", model, nn.Module | str | Path, "a folder, a hub id, a loaded Hugging Face model, 'smollm2' or 'gemma3'"
    )
    if memory is not None:
        give_back_what_is_freed()
    if isinstance(model, nn.Module):
        lm = _from_loaded(model, tokenizer, memory, device, dtype)
    else:
        checks.path("model", model)
        about = {"opened_as": str(model)}
        if named := PACKAGED.get(str(model)):
            about["note"] = named.note
        folder = named_folder(model, accept_licence=accept_licence)
        lm = _from_folder(folder, tokenizer, memory, device or torch.device("cpu"), dtype, about)
    if not getattr(lm.tokenizer, "is_fast", False):
        raise ValueError("kedit_fast needs a fast tokenizer (subject spans come from its character offsets)")
    _check_weights(lm)
    fam.check_mixture(lm.model)
    check_own_logits(lm)
    return lm


def _from_loaded(model, tokenizer, memory, device, dtype) -> LM:
    check_loaded(model)
    make_ordinary(model)
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
    tokenizer = tokenizer or read_tokenizer(model.config._name_or_path)
    return LM(model, tokenizer, Resident(model), memory or DEFAULT_MEMORY)


def named_folder(name, say: Callable[[str], None] | None = None, accept_licence: bool = False):
    """The folder of a model that has a name here, fetched where need be (``packaged.py``); any other name as it is.

    Raises ValueError for what is nearly such a name, before the hub is asked for it.
    """
    if (model := PACKAGED.get(str(name))) is not None:
        return packaged_folder(model, say, accept_licence=accept_licence)
    may_be_meant = isinstance(name, str) and "/" not in name and not Path(name).is_dir()
    if may_be_meant and (meant := did_you_mean(name, PACKAGED)):
        raise ValueError(f"model {name!r}: no such folder, and no name of a model on the hub{meant}")
    return name


def _from_folder(name, tokenizer, memory, device, dtype, about: dict[str, Any]) -> LM:
    config = read_config(name)
    family = family_of(config)
    tokenizer = tokenizer or read_tokenizer(name)
    classes = fam.auto_class(family)
    placement = place(shape_of(config, dtype), memory, device)
    about |= {"memory": placement.work, "placement": placement}
    if placement.source == "resident":
        model = read_model(name, classes, dtype).to(device)
        return LM(model, tokenizer, Resident(model), **about)
    model_class = classes._model_mapping[type(config)]
    checkpoint = Checkpoint(_local(name), model_class.base_model_prefix, family.stored_as)
    model, disk = open_on_disk(checkpoint, config, model_class, device, dtype)
    return LM(model, tokenizer, Host(disk, placement.keep) if placement.source == "host" else disk, **about)


def _local(name) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json"]))


def _check_weights(lm: LM) -> None:
    """Refuses NaN and infinity in a resident model's weights, which would spread into every result in silence."""
    for name, p in lm.model.named_parameters():
        holds_floats = not p.is_meta and p.is_floating_point() and p.numel()
        if holds_floats and not math.isfinite(p.detach().abs().max().item()):
            raise ValueError(f"weight {name!r} of {lm.name} holds NaN or infinity; the checkpoint is damaged")


def checked_device(device) -> torch.device | None:
    """A device that tensors can be made on. Raises BadArgument for any other."""
    if device is None:
        return None
    wanted = "a device of this machine, e.g. 'cpu' (`kedit-fast info` shows those present)"
    checks.instance("device", device, str | torch.device, wanted)
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (AssertionError, RuntimeError, NotImplementedError):  # torch raises each of them for some device
        found = None
    if found is None or found.type == "meta":
        checks.refuse("device", device, wanted)
    return found
