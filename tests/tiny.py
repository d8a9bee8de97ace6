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
    weights = torch.softmax(scores + attention_mask, dim=-1)
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


def _sliding_first(layers: int) -> list[str]:
    """Layer types that alternate, beginning with the sliding window."""
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]


def _gpt2(layers: int) -> dict[str, Any]:
    return dict(n_embd=D_MODEL, n_inner=D_FF, n_layer=layers, n_head=HEADS, n_positions=POSITIONS)


def _gptj(layers: int) -> dict[str, Any]:
    return _gpt2(layers) | dict(rotary_dim=6)  # of 12


def _gpt_neox(layers: int) -> dict[str, Any]:
    config = _common(layers) | dict(use_parallel_residual=True, attention_bias=True)
    del config["num_key_value_heads"]
    return config | dict(rope_parameters=dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=0.5))


def _mistral(layers: int) -> dict[str, Any]:
    return _common(layers) | dict(sliding_window=WINDOW)


def _qwen2(layers: int) -> dict[str, Any]:
    sliding = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=layers // 2)
    return _common(layers) | sliding | dict(tie_word_embeddings=True)


def _qwen3(layers: int) -> dict[str, Any]:
    return _common(layers) | dict(head_dim=16)  # heads * head_dim is not the width


def _gemma2(layers: int) -> dict[str, Any]:
    caps = dict(attn_logit_softcapping=2.0, final_logit_softcapping=5.0, query_pre_attn_scalar=10)
    sliding = dict(sliding_window=WINDOW, layer_types=_sliding_first(layers))
    return _common(layers) | caps | sliding | dict(head_dim=16, tie_word_embeddings=True)


def _gemma3_text(layers: int) -> dict[str, Any]:
    thetas = dict(
        sliding_attention=dict(rope_type="default", rope_theta=100.0),
        full_attention=dict(rope_type="default", rope_theta=10_000.0),
    )
    sliding = dict(sliding_window=WINDOW, layer_types=_sliding_first(layers), rope_parameters=thetas)
    return _common(layers) | sliding | dict(head_dim=16, query_pre_attn_scalar=10, tie_word_embeddings=True)


def _gemma3(layers: int) -> dict[str, Any]:
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=8, patch_size=4, model_type="siglip_vision_model")
    text = _gemma3_text(layers) | dict(vocab_size=_vocab_size())
    return dict(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=_vocab_size() + 2,  # outside the text's vocabulary: no text is taken for an image
        tie_word_embeddings=True,
    )


def _phi3(layers: int) -> dict[str, Any]:
    rope = dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=0.5)
    extra = dict(original_max_position_embeddings=POSITIONS, sliding_window=WINDOW, rope_parameters=rope)
    return _common(layers) | extra


_FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", _gpt2),
    "gptj": ("GPTJForCausalLM", _gptj),
    "gpt_neox": ("GPTNeoXForCausalLM", _gpt_neox),
    "llama": ("LlamaForCausalLM", _common),
    "mistral": ("MistralForCausalLM", _mistral),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3),
    "gemma3_text": ("Gemma3ForCausalLM", _gemma3_text),
    "phi3": ("Phi3ForCausalLM", _phi3),
    "olmo2": ("Olmo2ForCausalLM", _common),
}
FAMILY_NAMES = tuple(_FAMILIES)


def _vocab_size() -> int:
    return len(tiny_tokenizer())


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 4) -> PreTrainedModel:
    """A sharpened random model of one family, in eval mode, with `plain_attention` (gptj: its own, float32 inside).

    family: a name of `FAMILY_NAMES`.
    dtype: weights are drawn in float32 and then cast, so models that differ in dtype only are the same model, rounded.
    """
    class_name, config_of = _FAMILIES[family]
    config = config_of(layers)
    if family != "gemma3":  # the wrapper has its vocabulary in text_config
        config["vocab_size"] = _vocab_size()
    ids = tiny_tokenizer(bos=True)
    config |= dict(bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id)
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**config))
    model.set_attn_implementation("eager" if family == "gptj" else ATTENTION)
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
    if isinstance(module, Conv1D) and name == "weight":
        return 0.0, WEIGHT_STD / math.sqrt(parameter.shape[0])
    if parameter.ndim >= 2:  # an embedding's fan_in is the width too: where it is tied, it is the head
        return 0.0, WEIGHT_STD / math.sqrt(parameter[0].numel())
    if name == "weight":  # a norm; gemma's multiplies by 1 + weight
        return 0.0 if type(module).__name__.startswith("Gemma") else 1.0, NORM_STD
    return 0.0, BIAS_STD
