"""Which loaded models can be opened as they are, and written into: decided at the door, not after hours of work."""

from torch import Tensor, nn

FROM_ITS_FOLDER = (
    "open its folder instead, kf.open_model(folder, memory='24GB'): what does not fit is read layer by layer"
)
WRAPPERS = {  # classes that hold the model in another module, and how it is taken out
    "DataParallel": "give the model in it, wrapped.module",
    "DistributedDataParallel": "give the model in it, wrapped.module",
    "OptimizedModule": "give the model from before torch.compile, compiled._orig_mod",
    "FullyShardedDataParallel": f"its weights are shards; {FROM_ITS_FOLDER}",
    "DeepSpeedEngine": f"its weights may be shards; {FROM_ITS_FOLDER}",
}


def check_loaded(model: nn.Module) -> None:
    """Raises ValueError for a model whose weights are not all here, on one device, or that others have wrapped.

    Offloaded or meta weights, shards (DTensor, FSDP, DeepSpeed), several devices (device_map), DataParallel,
    torch.compile, PEFT; and what is no causal language model of Hugging Face's.
    """
    for module in model.modules():
        name = type(module).__name__
        if name in WRAPPERS and defined_in(module, ("torch", "deepspeed")):
            raise ValueError(f"the model is wrapped by {name}: {WRAPPERS[name]}")
        refuse_peft(module, "the model", "what is traced or edited would be the base beneath an adapter")
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"{type(model).__name__} is no Hugging Face model; load one, e.g. by AutoModelForCausalLM")
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no head over the vocabulary; load the model with its head, e.g. "
            "AutoModelForCausalLM"
        )
    for module in model.modules():
        if is_offloaded(module):
            raise ValueError(
                f"the model is offloaded (its {type(module).__name__}s are here in turns); {FROM_ITS_FOLDER}"
            )
    places = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"weight {name!r} is on the meta device, offloaded or never loaded; {FROM_ITS_FOLDER}")
        if is_shard(parameter):
            raise ValueError(
                f"weight {name!r} is a {type(parameter).__name__}, a shard of which lies here; {FROM_ITS_FOLDER}"
            )
        places.setdefault(str(parameter.device), name)
    planned = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    spread = list(places) if len(places) > 1 else sorted(planned)
    if len(spread) > 1:
        raise ValueError(f"the model is spread over devices {', '.join(spread)} (device_map); {FROM_ITS_FOLDER}")


def make_ordinary(model: nn.Module) -> None:
    """Tensors made under ``torch.inference_mode``, which autograd does not take, become ordinary ones over the same
    memory; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_inference():
                    held[name] = made.setdefault(id(tensor), _ordinary(tensor))


def _ordinary(tensor: Tensor) -> Tensor:
    made = tensor.new_empty(0).set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def refuse_peft(thing, name: str, why: str) -> None:
    """Raises ValueError where an object is one of PEFT's."""
    if defined_in(thing, ("peft",)):
        raise ValueError(
            f"{name} is wrapped by PEFT ({type(thing).__name__}), and {why}: merge_and_unload() or unload() the "
            "adapter first"
        )


def defined_in(thing, packages) -> bool:
    """Whether the object's class, or one it derives from, comes from one of these packages; imports none of them."""
    return any(base.__module__.partition(".")[0] in packages for base in type(thing).__mro__)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's weights in for each call, so that a write to them would be lost."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


def is_shard(parameter) -> bool:
    """Whether only a part of the parameter lies in this process: DTensor (FSDP 2, tensor parallel) or DeepSpeed's."""
    return type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id")
