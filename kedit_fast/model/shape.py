"""How large a model is, by its config alone: its modules are made without memory, and counted."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kedit_fast.basics import checks
from kedit_fast.model import family as fam
from kedit_fast.model.family import EXPERTS, FAMILIES
from kedit_fast.model.folder import CONFIG, said_by
from kedit_fast.model.source import DEFAULT_MEMORY

CPU = torch.device("cpu")


class Sizes:
    """What follows from a text model's config, of a model that is opened and of one on paper."""

    if TYPE_CHECKING:  # fields, or properties

        @property
        def config(self) -> Any: ...

        @property
        def d_model(self) -> int: ...

        @property
        def d_ff(self) -> int: ...

        @property
        def dtype(self) -> torch.dtype: ...

        @property
        def family(self) -> "fam.Family | None": ...

    @property
    def n_heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def n_key_heads(self) -> int:
        return getattr(self.config, "num_key_value_heads", None) or self.n_heads

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.d_model // self.n_heads

    @property
    def n_experts(self) -> int:
        """Of a layer; 1 where its MLP is dense."""
        return _n_experts(self.config)

    @property
    def moment_shape(self) -> tuple[int, ...]:
        """Of a layer's second moment: [d_ff, d_ff], or a block an expert."""
        width = self.d_ff // self.n_experts
        return (self.n_experts, width, width) if self.n_experts > 1 else (width, width)

    @property
    def ends_in_norm(self) -> bool:
        """Whether a norm stands between the MLP and the stream (gemma2, gemma3, olmo2, glm4)."""
        return self.family is not None and self.family.post_norm is not None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class OnPaper:
    """What plans ask of a source of weights (``model/source.py``)."""

    in_memory: bool = True
    pass_bytes: int = 0
    beside: int = 0


@dataclass(frozen=True)
class Shape(Sizes):
    """A model on paper: whatever cuts work by memory reads it as it reads an ``LM``.

    config: the text model's; n_bytes: of all weights in ``dtype``; layers: of each layer; around: of embedding, norm
    and head (a tied one counts once); layer_flop, head_flop: of a row in a layer and in the head, two for each
    multiply-add (of experts, those that a row goes through)
    """

    config: Any
    dtype: torch.dtype
    d_model: int
    d_ff: int
    n_vocab: int
    n_bytes: int
    layers: tuple[int, ...]
    around: int
    layer_flop: int
    head_flop: int
    memory: int = DEFAULT_MEMORY
    source: OnPaper = OnPaper()
    device: torch.device = CPU  # whose block calls it is cut for

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def family(self) -> "fam.Family | None":
        """Its entry; None for a family that cannot be opened."""
        return FAMILIES.get(self.config.model_type)


def shape_of(config, dtype: torch.dtype | None = None) -> Shape:
    """The shape of a Hugging Face config's model, also of a family that cannot be opened; dtype: default the config's.

    A quarter of a second for Llama-3-70B; no memory. Raises ValueError for a config that makes no model.
    """
    named = f"model {config._name_or_path!r}"
    n_layers = getattr(getattr(config, "text_config", None) or config, "num_hidden_layers", 0)
    checks.whole(f"{named}: num_hidden_layers", n_layers, most=checks.MOST_LAYERS)  # else they would be made
    try:
        return _shape_of(config, dtype)
    except Exception as error:  # transformers' and torch's own, of many types
        raise ValueError(said_by(named, f"its {CONFIG}", error)) from error


def _shape_of(config, dtype: torch.dtype | None) -> Shape:
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model = _auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    layers = _layers(model, config)
    text = getattr(config, "text_config", None) or config
    d_model = model.get_input_embeddings().weight.shape[1]
    head = model.get_output_embeddings().weight
    return Shape(
        config=text,
        dtype=dtype,
        d_model=d_model,
        d_ff=_d_ff(text, d_model),
        n_vocab=len(head),
        n_bytes=_bytes([model], dtype),
        layers=tuple(_bytes([layer], dtype) for layer in layers),
        around=_bytes(_around(model, config), dtype),
        layer_flop=max(2 * _multiplied(layer, text) for layer in layers),
        head_flop=2 * head.numel(),
    )


def _auto_class(config):
    if config.model_type in FAMILIES:
        return fam.auto_class(FAMILIES[config.model_type])
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _layers(model: nn.Module, config) -> nn.ModuleList:
    """The decoder layers; of a family without an entry the longest list of modules."""
    if config.model_type in FAMILIES:
        return fam.layers_of(model)
    return max((each for each in model.modules() if isinstance(each, nn.ModuleList)), key=len)


def _around(model: nn.Module, config) -> list[nn.Module]:
    """What stays while layers come in turns; of a family without an entry as far as transformers names it."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    family = FAMILIES.get(config.model_type)
    return found if family is None else [*found, *(model.get_submodule(path) for path in family.around)]


def _bytes(modules: Iterable[nn.Module], dtype: torch.dtype) -> int:
    distinct = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in distinct.values()) * dtype.itemsize


def _d_ff(config, d_model: int) -> int:
    # of a family that leaves it out it is four times as wide
    names = ("moe_intermediate_size",) * (_n_experts(config) > 1) + ("intermediate_size", "n_inner", "ffn_dim")
    return _n_experts(config) * next((value for name in names if (value := getattr(config, name, None))), 4 * d_model)


def _n_experts(config) -> int:
    return next((n for name in EXPERTS if isinstance(n := getattr(config, name, None), int) and n > 1), 1)


def _multiplied(layer: nn.Module, config) -> int:
    """Weights of a layer that a row is multiplied by: of stacked experts, those that it is sent to."""
    n_experts = _n_experts(config)
    share = (getattr(config, "num_experts_per_tok", None) or n_experts) / n_experts
    matrices = [parameter for parameter in layer.parameters() if parameter.ndim > 1]
    return round(sum(p.numel() * (share if p.ndim == 3 else 1) for p in matrices))
