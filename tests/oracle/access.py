"""Where things are: the modules of a Hugging Face model, their outputs, and the tokens of a subject."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Paths(NamedTuple):
    """Names of the modules that matter; `attn`, `mlp` and `down` are relative to a layer."""

    embed: str
    layers: str
    norm: str
    attn: str
    mlp: str
    down: str


_LLAMA = Paths("model.embed_tokens", "model.layers", "model.norm", "self_attn", "mlp", "mlp.down_proj")
_GPT2 = Paths("transformer.wte", "transformer.h", "transformer.ln_f", "attn", "mlp", "mlp.c_proj")
_WRAPPED = {name: f"model.language_model.{getattr(_LLAMA, name)[6:]}" for name in ("embed", "layers", "norm")}

PATHS = {
    "gpt2": _GPT2,
    "gptj": _GPT2._replace(down="mlp.fc_out"),
    "gpt_neox": Paths(
        "gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm", "attention", "mlp", "mlp.dense_4h_to_h"
    ),
    "gemma3": _LLAMA._replace(**_WRAPPED),
    "mistral3": _LLAMA._replace(**_WRAPPED),
    "phi": _LLAMA._replace(norm="model.final_layernorm", down="mlp.fc2"),
    "starcoder2": _LLAMA._replace(down="mlp.c_proj"),
} | dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"), _LLAMA._replace(down="mlp"))


def paths(model: nn.Module) -> Paths:
    """The table's entry for this model; of a family that is not in it, Llama's names."""
    return PATHS.get(model.config.model_type, _LLAMA)


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in order."""
    return model.get_submodule(paths(model).layers)


def embedding(model: nn.Module) -> nn.Module:
    """The token embedding module."""
    return model.get_submodule(paths(model).embed)


def site_module(model: nn.Module, layer: int, site: str) -> nn.Module:
    """The module whose output is the site's value.

    site: layer_out (the block), attn_out (the attention module), mlp (the MLP module) or mlp_out (the down projection).
    In families with post-norms the last three lie before them; mlp and mlp_out then are the same vector in eval mode.
    """
    block = layers(model)[layer]
    if site == "layer_out":
        return block
    names = {"attn_out": paths(model).attn, "mlp": paths(model).mlp, "mlp_out": paths(model).down}
    return block.get_submodule(names[site])


# --- outputs ---------------------------------------------------------------------------------------------------------


def first(output: Any) -> Tensor:
    """The hidden state of a module's output, which is a tensor or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, hidden: Tensor) -> Any:
    """The same output with another hidden state."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextlib.contextmanager
def changing(edits: list[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """While open, each module's hidden-state output [rows, tokens, d] is passed through its function, in list order."""

    def hook(change: Callable[[Tensor], Tensor]) -> Callable:
        return lambda module, args, output: with_first(output, change(first(output)))

    with contextlib.ExitStack() as stack:
        for module, change in edits:
            stack.enter_context(module.register_forward_hook(hook(change)))
        yield


@contextlib.contextmanager
def changing_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, what the module is given [rows, tokens, width] is passed through a function."""
    handle = module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While open, no parameter asks for a gradient."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@torch.no_grad()
def read_value(model: nn.Module, ids: list[int], position: int, layer: int, site: str) -> Tensor:
    """One output vector [d] of a site: the text runs alone, without padding."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden[0, position].clone())
        return hidden

    with changing([(site_module(model, layer, site), keep)]):
        model(torch.tensor([ids], device=model.device))
    return seen[0]


@torch.no_grad()
def read_key(model: nn.Module, ids: list[int], position: int, layer: int) -> Tensor:
    """One input vector [d_ff] of the down projection: the text runs alone, without padding."""
    seen: list[Tensor] = []
    down = site_module(model, layer, "mlp_out")
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, position].clone()))
    try:
        model(torch.tensor([ids], device=model.device))
    finally:
        handle.remove()
    return seen[0]


# --- weights ---------------------------------------------------------------------------------------------------------


def weight_out_in(down: nn.Module) -> Tensor:
    """The weight as [d, d_ff] (out, in), a view: GPT-2's Conv1D keeps it transposed."""
    return down.weight.T if isinstance(down, Conv1D) else down.weight


@torch.no_grad()
def add_delta(down: nn.Module, delta: Tensor) -> None:
    """W += Δ in place, Δ [d, d_ff] rounded to the weight's dtype first, as the published code does."""
    weight = weight_out_in(down)
    weight += delta.to(weight.dtype)


# --- text ------------------------------------------------------------------------------------------------------------


def subject_span(tok: Any, template: str, subject: str) -> tuple[list[int], tuple[int, int]]:
    """Token ids of the filled template, tokenized as one text with special tokens, and the subject's [begin, end).

    template: has exactly one {}. A token that shares a character with the subject belongs to it.
    """
    prefix, suffix = template.split("{}")
    begin, end = len(prefix), len(prefix) + len(subject)
    encoded = tok(prefix + subject + suffix, return_offsets_mapping=True)
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > begin and a < b]
    return list(encoded["input_ids"]), (inside[0], inside[-1] + 1)


def lookup(tok: Any, template: str, subject: str) -> tuple[list[int], int]:
    """Token ids of the filled template and the index of the lookup token, the last one of the subject."""
    ids, (_, end) = subject_span(tok, template, subject)
    return ids, end - 1


def target_ids(tok: Any, target: str) -> list[int]:
    """Token ids of an answer: a leading space is added where it is missing, special tokens never."""
    return list(tok(target if target.startswith(" ") else " " + target, add_special_tokens=False)["input_ids"])
