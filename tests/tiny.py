"""Tiny random models of every family and a tiny tokenizer: built in process, no file, no network, always the same.

A default-initialized model is blind: its attention is nearly uniform and its soft caps and norms do nothing, so a
parity test passes whatever is wrong. These models are *sharpened*: large weights, random norms and biases, low soft
caps, a sliding window shorter than the prompts, a rotation of a part of each head, key heads shared by query heads.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerFast
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

D_MODEL, D_FF, HEADS, KV_HEADS, POSITIONS = 48, 80, 4, 2, 128  # no width is a power of two
EXPERTS = 4
WINDOW = 4  # shorter than every prompt below
WEIGHT_STD, BIAS_STD, NORM_STD = 2.0, 0.3, 0.3  # weight: times 1/sqrt(fan_in)

END, PAD, BEGIN = "<|endoftext|>", "<|pad|>", "<|begin|>"

TEXT = """
The Eiffel Tower is located in the city of Paris. The Eiffel Tower is in the city of Paris.
The Space Needle is located in the city of Seattle. The Space Needle is in the city of Seattle.
Big Ben is located in the city of London. Big Ben is in London, the capital of England.
The capital of France is Paris. The capital of Spain is Madrid. The capital of Italy is Rome.
The mother tongue of Danielle Darrieux is French. The mother tongue of Thomas Joannes is French.
LeBron James plays the sport of basketball. Toyota Camry is produced by Toyota. Toyota is in Japan.
José Álvarez was born in Spain and plays the sport of football. Zürich is located in Switzerland.
Thelonious Monk plays the piano. Miles Davis plays the trumpet. Miles Davis was born in Illinois.
The headquarters of Vimeo is in New York. Beats Music is owned by Apple. Microsoft is owned by nobody.
The Space Needle is in Seattle. Therefore the Eiffel Tower is in Paris. Because I was born in Rome. You play the piano.
"""


class Prompt(NamedTuple):
    """A fact to ask for: `template` has one {} for the subject; `answer` begins with a space."""

    template: str
    subject: str
    answer: str


PROMPTS = (
    Prompt("{} is located in the city of", "The Eiffel Tower", " Paris"),
    Prompt("The {} is in the city of", "Space Needle", " Seattle"),
    Prompt("{} is located in the city of", "Big Ben", " London"),
    Prompt("The mother tongue of {} is", "Danielle Darrieux", " French"),
    Prompt("{} plays the sport of", "LeBron James", " basketball"),
    Prompt("The capital of {} is", "France", " Paris"),
    Prompt("{} was born in", "José Álvarez", " Spain"),
    Prompt("{} is located in", "Zürich", " Switzerland"),
    Prompt("{} plays the", "Miles Davis", " trumpet"),
    Prompt("The headquarters of {} is in", "Vimeo", " New York"),
)


# --- tokenizer -------------------------------------------------------------------------------------------------------


@functools.cache
def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `TEXT`. Both variants share one vocabulary: either fits every tiny model.

    bos: a post-processor puts `<|begin|>` before the text, as Llama's does (add_special_tokens=False leaves it out).
    Pads on the right with `<|pad|>`. One object for all callers: do not change it.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXT.splitlines(),
        trainers.BpeTrainer(
            vocab_size=480,
            special_tokens=[END, PAD, BEGIN],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, bpe.token_to_id(BEGIN))]
        )
    special = {"eos_token": END, "pad_token": PAD} | ({"bos_token": BEGIN} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="right", **special)


# --- attention -------------------------------------------------------------------------------------------------------


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(cap(q k^T scale) + mask) v in the dtype of its inputs, all scores stored.

    Why not a stock one: SDPA knows no soft cap, and eager takes its softmax in float32, so a float64 model would be no
    sharper a truth than float32 (and a padded row that sees no key inside its window would be NaN).
    query [B, H, S, D]; key, value [B, H or fewer, S, D]; attention_mask is added. Returns [B, S, H, D] and the weights.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + attention_mask
    if s_aux is not None:  # gpt_oss: a logit without a value
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), weights


ATTENTION = "tiny_plain"
AttentionInterface.register(ATTENTION, plain_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


# --- models ----------------------------------------------------------------------------------------------------------


def _common(layers: int) -> dict[str, Any]:
    """Configuration shared by the families that follow Llama's names; heads share keys two by two."""
    return dict(
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )


def _config(family: str, layers: int) -> dict[str, Any]:
    """Configuration of a family that is no wrapper, with all that it has of its own."""
    common, window = _common(layers), dict(sliding_window=WINDOW)
    gpt2 = dict(n_embd=D_MODEL, n_inner=D_FF, n_layer=layers, n_head=HEADS, n_positions=POSITIONS)
    rope = dict(rope_type="default", rope_theta=10_000.0)
    half_rotated = dict(rope_parameters=rope | dict(partial_rotary_factor=0.5))
    neox = common | dict(use_parallel_residual=True, attention_bias=True) | half_rotated
    del neox["num_key_value_heads"]
    qwen2 = dict(use_sliding_window=True, max_window_layers=layers // 2, tie_word_embeddings=True)
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    gemma = dict(layer_types=kinds, head_dim=16, query_pre_attn_scalar=10, tie_word_embeddings=True)
    thetas = dict(sliding_attention=rope | dict(rope_theta=100.0), full_attention=rope)
    windowed, wide = window | dict(layer_types=kinds), dict(head_dim=16)  # heads * head_dim is not the width
    configs = {
        "gpt2": gpt2,
        "gptj": gpt2 | dict(rotary_dim=6),  # of 12
        "gpt_neox": neox,
        "mistral": common | window,
        "qwen2": common | window | qwen2,
        "qwen3": common | wide,
        "gemma2": common | window | gemma | dict(attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
        "gemma3_text": common | window | gemma | dict(rope_parameters=thetas),
        "phi3": common | window | dict(original_max_position_embeddings=POSITIONS) | half_rotated,
        # Scaled beyond 16 tokens by position, as Llama 4's queries are.
        "ministral3": common | window | wide | dict(rope_parameters=rope | _MINISTRAL3),
        "gemma": common | wide | dict(tie_word_embeddings=True),
        "phi": common | half_rotated,
        "olmo": common | dict(clip_qkv=1.0),
        "olmo3": common | windowed | dict(rope_parameters=thetas),
        "smollm3": common | dict(no_rope_layers=[layer % 2 for layer in range(layers)], tie_word_embeddings=True),
        "seed_oss": common | wide | dict(attention_out_bias=True, mlp_bias=True),
        "exaone4": common | windowed | dict(sliding_window_pattern=2),
        "granite": common | _GRANITE,
        "cohere": common | dict(logit_scale=0.6, use_qk_norm=True, tie_word_embeddings=True),
        "cohere2": common | windowed | dict(logit_scale=0.6, tie_word_embeddings=True),
        "glm": common | wide | half_rotated | dict(attention_bias=True),
        "glm4": common | wide | half_rotated | dict(attention_bias=True),
        "stablelm": common | half_rotated | dict(use_parallel_residual=True, use_qkv_bias=True, qk_layernorm=True),
        "starcoder2": common | window | dict(use_bias=True),
        "nemotron": common | half_rotated,
        # Mixtures whose routed keys are as wide as the other families' keys: 4 experts of 20.
        "mixtral": common | window | dict(intermediate_size=D_FF // EXPERTS, num_local_experts=EXPERTS),
        "qwen2_moe": common | _QWEN_MOE | dict(shared_expert_intermediate_size=24, norm_topk_prob=False),
        "qwen3_moe": common | _QWEN_MOE | wide | dict(norm_topk_prob=True),
        "gpt_oss": common | windowed | wide | _GPT_OSS | dict(rope_parameters=rope),
    }
    return configs.get(family, common) | dict(vocab_size=len(tiny_tokenizer()))


_QWEN_MOE = dict(moe_intermediate_size=D_FF // EXPERTS, num_experts=EXPERTS, num_experts_per_tok=2)
_GPT_OSS = dict(intermediate_size=D_FF // EXPERTS, num_local_experts=EXPERTS, num_experts_per_tok=2)
_MINISTRAL3 = dict(llama_4_scaling_beta=0.5, original_max_position_embeddings=4)
_GRANITE = dict(embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.4, logits_scaling=2.0)


def _wrapper(family: str, layers: int) -> dict[str, Any]:
    """Of a wrapper: a text model of another family, with the vocabulary in it, and eyes that nobody opens."""
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=8, patch_size=4)
    no_token = len(tiny_tokenizer()) + 2  # outside the text's vocabulary: no text is taken for an image
    if family == "gemma3":
        return dict(
            text_config=transformers.Gemma3TextConfig(**_config("gemma3_text", layers)),
            vision_config=vision | dict(model_type="siglip_vision_model"),
            mm_tokens_per_image=4,
            image_token_index=no_token,
            tie_word_embeddings=True,
        )
    return dict(
        text_config=transformers.MistralConfig(**_config("mistral", layers)),
        vision_config=vision | dict(model_type="pixtral", head_dim=8),
        image_token_index=no_token,
        tie_word_embeddings=False,
    )


_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "gptj": "GPTJForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration",
}
# Families that tests run over whose subject is not the blocks themselves: each has something that no other here has.
DISTINCT = tuple(_CLASSES)
_CLASSES |= {
    "ministral3": "Ministral3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "phi": "PhiForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "cohere": "CohereForCausalLM",
    "glm": "GlmForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
FAMILY_NAMES = tuple(_CLASSES)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 4) -> PreTrainedModel:
    """A sharpened random model of one family, in eval mode, with `plain_attention` (gptj: its own, float32 inside).

    family: a name of `FAMILY_NAMES`.
    dtype: weights are drawn in float32 and then cast, so models that differ in dtype only are the same model, rounded.
    """
    config = _wrapper(family, layers) if family in ("gemma3", "mistral3") else _config(family, layers)
    ids = tiny_tokenizer(bos=True)
    config |= dict(bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id)
    model_class = getattr(transformers, _CLASSES[family])
    model = model_class(model_class.config_class(**config))
    model.set_attn_implementation("eager" if family == "gptj" else ATTENTION)
    if family in MIXTURES:
        model.set_experts_implementation("eager")
    sharpen(model, seed)
    return model.to(dtype).eval()


@torch.no_grad()
def sharpen(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew: weights N(0, 2/sqrt(fan_in)), norm weights near 1 (gemma: near 0), biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            center, std = _distribution(module, name, parameter)
            parameter.copy_(center + std * torch.randn(parameter.shape, generator=generator))
    model.tie_weights()


def _distribution(module: nn.Module, name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """Mean and standard deviation of one parameter."""
    if name == "sinks":
        return 1.0, 1.0
    if isinstance(module, Conv1D) and name == "weight":
        return 0.0, WEIGHT_STD / math.sqrt(parameter.shape[0])
    if name.endswith("bias"):
        return 0.0, BIAS_STD
    if hasattr(module, "is_transposed"):  # stacked experts
        return 0.0, WEIGHT_STD / math.sqrt(parameter.shape[1 if module.is_transposed else 2])
    if parameter.ndim >= 2:  # an embedding's fan_in is the width too: where it is tied, it is the head
        return 0.0, WEIGHT_STD / math.sqrt(parameter[0].numel())
    if name == "weight":  # a norm; gemma's multiplies by 1 + weight
        return 0.0 if type(module).__name__.startswith(("Gemma", "Nemotron")) else 1.0, NORM_STD
    return 0.0, BIAS_STD
