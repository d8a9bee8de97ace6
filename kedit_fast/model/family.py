"""Model families: which module plays which role. One entry a family; nothing else in the package names a module.

The engine calls Hugging Face's own decoder blocks, so an entry holds only what lies around them: the layers, the two
output projections of a layer (the sites) and the final norm. The embedding and the head come from
``get_input_embeddings`` and ``get_output_embeddings``.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from kedit_fast.model.experts import as_stacked, as_wide, is_experts


@dataclass(frozen=True)
class Family:
    """Paths of roles (from the model, or from a decoder layer) and the few switches that blocks need."""

    layers: str = "model.layers"
    attn: str = "self_attn"  # in a layer
    attn_proj: str = "self_attn.o_proj"  # in a layer: its output is the site attn_out
    mlp_down: str = "mlp.down_proj"  # in a layer: input is mlp_key, output is mlp_out
    experts: bool = False  # whether ``mlp_down`` holds the stacked matrices of experts (``model/experts.py``)
    mlp_up: str | None = "mlp.up_proj"  # in a layer
    mlp_gate: str | None = "mlp.gate_proj"  # in a layer; None: the MLP has no gate
    mlp_gate_up: str | None = None  # in a layer: gate and up as one matrix, in this order
    norm: str = "model.norm"
    positions: str | None = None  # learned position table, added to the embedding
    rotary: str | None = "model.rotary_emb"  # None: the block makes its own from position_ids
    rotary_by_type: bool = False  # one rotary table for each layer type (gemma3)
    attention: str = "interface"  # "interface": transformers' attention registry; "_attn": replaced on the instance
    fused: bool = False  # whether its RMS norms and its gated MLP compute what ``model/fused.py`` does in their place
    norm_offset: float = 0.0  # what its RMS norms add to their weights
    post_norm: str | None = None  # in a layer: the norm between the down projection and the residual add
    embedding_scale: str | None = None  # in the config: what the embedding's output is multiplied by, outside of it
    residual_scale: str | None = None  # in the config: what attention and MLP are multiplied by before the residual add
    logit_scale: str | None = None  # in the config: what logits are multiplied by
    logit_divisor: str | None = None  # in the config: what they are divided by
    text_config: str | None = None  # where the text model's config lies in a wrapper's config
    stored_as: tuple[tuple[str, str], ...] = ()  # beginnings of parameter names, and what checkpoint files have there

    @property
    def mlp(self) -> str:
        """Path in a layer of the MLP, which holds the down projection."""
        return self.mlp_down.rpartition(".")[0]

    @property
    def mlp_end(self) -> str:
        """Path in a layer of what gives mlp_out: the down projection, or a mixture of experts as a whole."""
        return self.mlp if self.experts else self.mlp_down

    @property
    def adds_as_is(self) -> bool:
        """Whether the residual stream gets what the down projection gives, as it is."""
        return self.post_norm is None and self.residual_scale is None

    @property
    def around(self) -> tuple[str, ...]:
        """Paths of what lies around the layers, beside embedding and head."""
        return (self.norm, self.positions) if self.positions else (self.norm,)

    @property
    def scales(self) -> tuple[str, ...]:
        """Names, in the config, of the factors that the entry knows."""
        named = (self.embedding_scale, self.residual_scale, self.logit_scale, self.logit_divisor)
        return tuple(name for name in named if name)

    @property
    def roles(self) -> dict[str, str]:
        """{role: path in a layer} of the MLP's projections: "down", and those of "up", "gate" and "gate_up" that the
        family has."""
        paths = {"down": self.mlp_down, "up": self.mlp_up, "gate": self.mlp_gate, "gate_up": self.mlp_gate_up}
        return {role: path for role, path in paths.items() if path}


_LLAMA = Family(fused=True)
_GPT2 = Family(
    layers="transformer.h",
    attn="attn",
    attn_proj="attn.c_proj",
    mlp_down="mlp.c_proj",
    mlp_up="mlp.c_fc",
    mlp_gate=None,
    norm="transformer.ln_f",
    positions="transformer.wpe",
    rotary=None,
)

_POST_NORM = replace(_LLAMA, post_norm="post_feedforward_layernorm")
_MIXTURE = replace(_LLAMA, mlp_down="mlp.experts", mlp_up=None, mlp_gate=None, experts=True)
_FUSED = replace(_LLAMA, mlp_up=None, mlp_gate=None, mlp_gate_up="mlp.gate_up_proj")
# A wrapper around a text model of Llama's names.
_WRAPPED = Family(
    fused=True,
    layers="model.language_model.layers",
    norm="model.language_model.norm",
    rotary="model.language_model.rotary_emb",
    text_config="text_config",
    stored_as=(("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
)

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gptj": replace(
        _GPT2, attn_proj="attn.out_proj", mlp_down="mlp.fc_out", mlp_up="mlp.fc_in", positions=None, attention="_attn"
    ),
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        attn="attention",
        attn_proj="attention.dense",
        mlp_down="mlp.dense_4h_to_h",
        mlp_up="mlp.dense_h_to_4h",
        mlp_gate=None,
        norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
        stored_as=(("lm_head.", "embed_out."),),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral3": _WRAPPED,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": _MIXTURE,
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "gpt_oss": _MIXTURE,
    "gemma": replace(_LLAMA, norm_offset=1.0),
    "gemma2": replace(_POST_NORM, norm_offset=1.0),
    "gemma3_text": replace(_POST_NORM, rotary_by_type=True, norm_offset=1.0),
    "gemma3": replace(
        _WRAPPED,
        norm_offset=1.0,
        rotary_by_type=True,
        post_norm="post_feedforward_layernorm",
        stored_as=(("model.language_model.", "language_model.model."),),
    ),
    "phi": replace(
        _LLAMA,
        attn_proj="self_attn.dense",
        mlp_down="mlp.fc2",
        mlp_up="mlp.fc1",
        mlp_gate=None,
        norm="model.final_layernorm",
    ),
    "phi3": _FUSED,
    "olmo": _LLAMA,
    "olmo2": _POST_NORM,
    "olmo3": replace(_POST_NORM, rotary_by_type=True),
    "smollm3": _LLAMA,
    "seed_oss": _LLAMA,
    "exaone4": _POST_NORM,
    "granite": replace(
        _LLAMA,
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    "cohere": replace(_LLAMA, logit_scale="logit_scale"),
    "cohere2": replace(_LLAMA, logit_scale="logit_scale"),
    "glm": _FUSED,
    "glm4": replace(_FUSED, post_norm="post_mlp_layernorm"),
    "stablelm": _LLAMA,
    "starcoder2": replace(_LLAMA, mlp_down="mlp.c_proj", mlp_up="mlp.c_fc", mlp_gate=None),
    "nemotron": replace(_LLAMA, mlp_gate=None),
}


# Families that the parity tests cover. Others are compared with the model's own logits when they are opened.
TESTED = (
    "gpt2", "gptj", "gpt_neox", "llama", "mistral", "ministral3", "mistral3", "qwen2", "qwen3", "gemma", "gemma2",
    "gemma3", "gemma3_text", "phi", "phi3", "olmo", "olmo2", "olmo3", "smollm3", "seed_oss", "exaone4", "granite",
    "cohere", "cohere2", "glm", "glm4", "stablelm", "starcoder2", "nemotron", "mixtral", "qwen2_moe", "qwen3_moe",
    "gpt_oss",
)  # fmt: skip
# What families call the factors around their layers, and the number of their experts.
MULTIPLIERS = (
    "embedding_multiplier", "logits_scaling", "logit_scale", "lm_head_multiplier", "scale_emb", "embedding_scale",
    "logits_multiplier", "mup_width_multiplier", "output_multiplier_scale", "residual_multiplier",
)  # fmt: skip
ATTENTION = ("full_attention", "sliding_attention")  # kinds of layers
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def family_of(config) -> Family:
    """The entry for a Hugging Face config. Raises ValueError for an unknown family, with the entry to write or the
    reason why none would do."""
    name = getattr(config, "model_type", None)
    if name not in FAMILIES:
        raise ValueError(f"unknown model family {name!r}; known: {', '.join(FAMILIES)}. {_way_to_add(name, config)}")
    return FAMILIES[name]


def _way_to_add(name, config) -> str:
    if odd := peculiarities(config):
        return f"No entry makes it one of them: {'; '.join(odd)}"
    return (
        "A new family is one entry in kedit_fast/model/family.py (or in its FAMILIES, before the model is opened), for "
        "a Llama-like model:\n"
        f'    "{name}": Family(layers="model.layers", attn="self_attn", attn_proj="self_attn.o_proj",\n'
        f'        mlp_down="mlp.down_proj", norm="model.norm"),\n'
        "It is compared with the model's own logits each time it is opened, until its name stands in tests/tiny.py and "
        "in TESTED, so that the parity test covers it" + "".join(f"; {why}" for why in unnamed(config))
    )


def unnamed(config) -> list[str]:
    """What its entry could say of a model and does not: a clause for each, with the way out."""
    family, found = FAMILIES.get(getattr(config, "model_type", None), Family()), []
    given = {name: getattr(each, name, None) for each in _configs(config) for name in (*MULTIPLIERS, *EXPERTS)}
    factors = [f"{name} = {given[name]}" for name in MULTIPLIERS if given[name] not in (None, 1, True, False)]
    factors = [each for each in factors if each.split(" = ")[0] not in family.scales]
    if factors:
        said = "by embedding_scale, residual_scale, logit_scale or logit_divisor"
        found.append(f"it multiplies embeddings or logits ({', '.join(factors)}): name that in the entry, {said}")
    experts = [f"{name} = {given[name]}" for name in EXPERTS if isinstance(given[name], int) and given[name] > 1]
    if experts and not family.experts:
        found.append(
            f"its layers are mixtures of experts ({experts[0]}): where they are stacked as transformers has them, the "
            'entry has mlp_down="mlp.experts", mlp_up=None, mlp_gate=None, experts=True'
        )
    return found


def peculiarities(config) -> list[str]:
    """What no entry of the table can say of a model: a clause for each."""
    found = []
    for each in _configs(config):
        kinds = dict.fromkeys(getattr(each, "layer_types", None) or ())
        if other := [kind for kind in kinds if kind not in ATTENTION]:
            found.append(
                f"it has layers of {' and '.join(str(kind).replace('_', ' ') for kind in other)}, and a sweep knows "
                "full attention and sliding windows: rows of many texts lie side by side in it"
            )
        if getattr(each, "attn_temperature_tuning", None):
            found.append(
                "it scales queries by their place in the call (attn_temperature_tuning), not by their position"
            )
    if getattr(config, "is_encoder_decoder", False):
        found.append("it is an encoder and a decoder, and only decoders are swept")
    return found


def _configs(config) -> list:
    """A config, and the text model's in it."""
    inner = getattr(config, "text_config", None)
    return [config] if inner is None else [config, inner]


def text_config(config):
    """The config of the text model: a wrapper (gemma3) keeps it inside its own."""
    inner = family_of(config).text_config
    return getattr(config, inner) if inner else config


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a Hugging Face model, in order."""
    path = family_of(model.config).layers
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no {path!r}; load the model with its head, e.g. AutoModelForCausalLM"
        ) from None


def role_path(config, role: str) -> str:
    """Path in a layer of the projection that plays a role; ValueError where the family has none."""
    roles = family_of(config).roles
    if role not in roles:
        raise ValueError(
            f"a {config.model_type} model has no {role!r} projection; it has {', '.join(map(repr, roles))}"
        )
    return roles[role]


def projection(model: nn.Module, layer: int, role: str = "down") -> nn.Module:
    """The module of one layer that plays a role (``Family.roles``); the down projection is what ROME and MEMIT edit.

    Raises ValueError for a layer out of range, a role that the family does not have, and for a layer without that
    module (mixture of experts).
    """
    layers = layers_of(model)
    check_layer(layer, len(layers))
    path = role_path(model.config, role)
    try:
        return layers[layer].get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"layer {layer} of this {model.config.model_type} model has no module {path!r} "
            f"({'it is dense' if family_of(model.config).experts else 'it may be a mixture of experts'}); choose a "
            "layer that has"
        ) from None


def check_layer(layer: int, n_layers: int) -> None:
    """Raises ValueError unless ``layer`` is one of the model's layers."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n_layers:
        raise ValueError(f"layer {layer!r} is out of range: this model has layers 0 to {n_layers - 1}")


def as_out_in(module: nn.Module) -> Tensor:
    """The weight of a projection as an [out, in] view. GPT-2's Conv1D keeps [in, out]: told by type, never by shape.

    Of experts all of them, one beside the other, as a copy where they are stacked otherwise.
    """
    if is_experts(module):
        return as_wide(module)
    return module.weight.T if is_conv1d(module) else module.weight


def weight_name(module: nn.Module) -> str:
    """What a projection's parameter is called."""
    return "down_proj" if is_experts(module) else "weight"


def write_out_in(module: nn.Module, weight: Tensor) -> None:
    """Copies [out, in] values into a projection's own storage."""
    getattr(module, weight_name(module)).copy_(as_stored(module, weight))


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """[out, in] values as the projection stores them: a view."""
    if is_experts(module):
        return as_stacked(module, weight)
    return weight.T if is_conv1d(module) else weight


def refuse_experts(family: Family, why: str) -> None:
    """Raises ValueError for a mixture of experts; why: and the way out."""
    if family.experts:
        raise ValueError(f"{why}; an edit of it is written with edit.apply(model) and model.save_pretrained(folder)")


def check_mixture(model: nn.Module) -> None:
    """Raises ValueError for a model some of whose layers are mixtures of experts and some are not."""
    family, layers = family_of(model.config), layers_of(model)
    if family.experts:
        dense = [i for i, layer in enumerate(layers) if not hasattr(layer.get_submodule(family.mlp), "experts")]
        if dense:
            raise ValueError(
                f"layers {dense} of this {model.config.model_type} model are dense and the others mixtures of experts "
                "(mlp_only_layers, decoder_sparse_step), whose keys are of two widths; only models whose layers are "
                "all mixtures are opened"
            )


def is_conv1d(module: nn.Module) -> bool:
    """Whether a projection stores its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def auto_class(family: Family):
    """transformers' class that opens the family's models with their head."""
    import transformers

    return transformers.AutoModelForImageTextToText if family.text_config else transformers.AutoModelForCausalLM
