"""Model families: which module plays which role. One entry a family; nothing else in the package names a module.

The engine calls Hugging Face's own decoder blocks, so an entry holds only what lies around them: the layers, the two
output projections of a layer (the sites) and the final norm. The embedding and the head come from
``get_input_embeddings`` and ``get_output_embeddings``.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """Paths of roles (from the model, or from a decoder layer) and the few switches that blocks need."""

    layers: str = "model.layers"
    attn: str = "self_attn"  # in a layer
    attn_proj: str = "self_attn.o_proj"  # in a layer: its output is the site attn_out
    mlp_down: str = "mlp.down_proj"  # in a layer: input is mlp_key, output is mlp_out
    mlp_up: str | None = "mlp.up_proj"  # in a layer
    mlp_gate: str | None = "mlp.gate_proj"  # in a layer; None: the MLP has no gate
    mlp_gate_up: str | None = None  # in a layer: gate and up as one matrix, in this order
    norm: str = "model.norm"
    positions: str | None = None  # learned position table, added to the embedding
    rotary: str | None = "model.rotary_emb"  # None: the block makes its own from position_ids
    rotary_by_type: bool = False  # one rotary table for each layer type (gemma3)
    attention: str = "interface"  # "interface": transformers' attention registry; "_attn": replaced on the instance
    post_norm: str | None = None  # in a layer: the norm between the down projection and the residual add
    text_config: str | None = None  # where the text model's config lies in a wrapper's config
    stored_as: tuple[tuple[str, str], ...] = ()  # beginnings of parameter names, and what checkpoint files have there

    @property
    def mlp(self) -> str:
        """Path in a layer of the MLP, which holds the down projection."""
        return self.mlp_down.rpartition(".")[0]

    @property
    def around(self) -> tuple[str, ...]:
        """Paths of what lies around the layers, beside embedding and head."""
        return (self.norm, self.positions) if self.positions else (self.norm,)

    @property
    def roles(self) -> dict[str, str]:
        """{role: path in a layer} of the MLP's projections: "down", and those of "up", "gate" and "gate_up" that the
        family has."""
        paths = {"down": self.mlp_down, "up": self.mlp_up, "gate": self.mlp_gate, "gate_up": self.mlp_gate_up}
        return {role: path for role, path in paths.items() if path}


_LLAMA = Family()
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
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": replace(_LLAMA, post_norm="post_feedforward_layernorm"),
    "gemma3_text": replace(_LLAMA, post_norm="post_feedforward_layernorm", rotary_by_type=True),
    "gemma3": Family(
        layers="model.language_model.layers",
        norm="model.language_model.norm",
        rotary="model.language_model.rotary_emb",
        rotary_by_type=True,
        post_norm="post_feedforward_layernorm",
        text_config="text_config",
        stored_as=(("model.language_model.", "language_model.model."),),
    ),
    "phi3": replace(_LLAMA, mlp_up=None, mlp_gate=None, mlp_gate_up="mlp.gate_up_proj"),
    "olmo2": replace(_LLAMA, post_norm="post_feedforward_layernorm"),
}


# Families that the parity tests cover. Others are compared with the model's own logits when they are opened.
TESTED = (
    "gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "phi3",
    "olmo2",
)  # fmt: skip
# What families call the factors around their layers, which no entry can say, and the number of their experts.
MULTIPLIERS = (
    "embedding_multiplier", "logits_scaling", "logit_scale", "lm_head_multiplier", "scale_emb", "embedding_scale",
    "logits_multiplier", "mup_width_multiplier", "output_multiplier_scale",
)  # fmt: skip
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
        "in TESTED, so that the parity test covers it"
    )


def peculiarities(config) -> list[str]:
    """What an entry of the table cannot say of a model: a clause for each."""
    configs = [config, *(inner for inner in vars(config).values() if hasattr(inner, "model_type"))]
    found = []
    for each in configs:
        given = {name: getattr(each, name, None) for name in (*MULTIPLIERS, *EXPERTS)}
        factors = [f"{name} = {given[name]}" for name in MULTIPLIERS if given[name] not in (None, 1, True, False)]
        if factors:
            found.append(f"it multiplies embeddings or logits ({', '.join(factors)}), which a sweep would leave out")
        experts = [f"{name} = {given[name]}" for name in EXPERTS if isinstance(given[name], int) and given[name] > 1]
        if experts:
            found.append(
                f"its layers are mixtures of experts ({experts[0]}) and have no single down projection to trace and "
                "edit"
            )
    if getattr(config, "is_encoder_decoder", False):
        found.append("it is an encoder and a decoder, and only decoders are swept")
    return found


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
            "(mixture-of-experts layers keep their experts in one tensor); edit a dense layer instead"
        ) from None


def check_layer(layer: int, n_layers: int) -> None:
    """Raises ValueError unless ``layer`` is one of the model's layers."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n_layers:
        raise ValueError(f"layer {layer!r} is out of range: this model has layers 0 to {n_layers - 1}")


def as_out_in(module: nn.Module) -> Tensor:
    """The weight of a projection as an [out, in] view. GPT-2's Conv1D keeps [in, out]: told by type, never by shape."""
    return module.weight.T if is_conv1d(module) else module.weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether a projection stores its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def auto_class(family: Family):
    """transformers' class that opens the family's models with their head."""
    import transformers

    return transformers.AutoModelForImageTextToText if family.text_config else transformers.AutoModelForCausalLM
