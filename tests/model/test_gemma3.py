"""Gemma 3 of a GGUF file: a tiny model there and back, then the real one where somebody has accepted its terms."""

import numpy as np
import pytest
import torch

import kedit_fast as kf
from kedit_fast.model.gemma3 import GEMMA3, gemma3_config
from kedit_fast.model.gguf import read_gguf
from kedit_fast.model.packaged import convert, is_complete
from tests.compare import relative_error
from tests.conftest import disk_and_resident
from tests.model.test_gguf import F32, gguf_file
from tests.model.test_sentencepiece import METADATA as TOKENIZER
from tests.tiny import sharpen

LAYERS, D, D_FF, HEADS, HEAD_DIM, WINDOW = 7, 32, 48, 4, 16, 4
METADATA = TOKENIZER | {
    "general.architecture": "gemma3",
    "gemma3.context_length": 128,
    "gemma3.embedding_length": D,
    "gemma3.block_count": LAYERS,
    "gemma3.feed_forward_length": D_FF,
    "gemma3.attention.head_count": HEADS,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": HEAD_DIM,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": WINDOW,
    "gemma3.rope.freq_base": 1_000_000.0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
}
# transformers' modules by llama.cpp's names for them.
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(scope="module")
def original():
    """A tiny Gemma 3 whose config says all by itself, large weights in it."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    bases = {"sliding_attention": 10_000.0, "full_attention": 1_000_000.0}
    config = Gemma3TextConfig(
        vocab_size=len(METADATA["tokenizer.ggml.tokens"]), hidden_size=D, intermediate_size=D_FF,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=1, head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM, sliding_window=WINDOW, max_position_embeddings=128,
        layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        rope_parameters={kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    sharpen(model, seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    """The folder of its GGUF file, which has 1 more in every norm."""
    tensors = {}
    for name, parameter in original.named_parameters():
        values = parameter.numpy(force=True) + (1 if "norm" in name else 0)
        parts = name.removesuffix(".weight").split(".")
        outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.get(".".join(parts))
        place = outside or f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}"
        tensors[f"{place}.weight"] = (values.shape, F32, values.astype("<f4").tobytes())
    folder = tmp_path_factory.mktemp("gemma3") / "model"
    convert(GEMMA3, read_gguf(gguf_file(METADATA, tensors)), folder)
    return folder


TEXT = "The tower is in the city of the towers. The other town,\n\nthe town of São Paulo"


def test_the_converted_model_computes_what_the_original_does(original, folder):
    lm = kf.open_model(folder)
    assert (
        not lm.model.config.use_bidirectional_attention
        and lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    )
    ids = torch.tensor([lm.encode(TEXT)])
    assert ids[0, 0] == 2 and len(ids[0]) > 3 * WINDOW
    with torch.no_grad():
        expected, found = (model(ids).logits for model in (original, lm.model))
    assert relative_error(found, expected) < 1e-5


def test_a_folder_of_it_streams(folder):
    streamed, resident = disk_and_resident(folder)
    prompt = "The tower is in the city of"
    assert [token for token, _ in streamed.top_tokens(prompt)] == [token for token, _ in resident.top_tokens(prompt)]
    fact = kf.Fact("{} is in the city of", "The tower")
    for one, other in zip(kf.trace(resident, fact, samples=2), kf.trace(streamed, fact, samples=2), strict=True):
        torch.testing.assert_close(one.p_restored, other.p_restored, rtol=0, atol=1e-6)


def test_config_is_the_file_s_where_it_speaks():
    config = gemma3_config(METADATA | {"gemma3.attention.sliding_window_pattern": 2, "gemma3.rope.freq_base_swa": 7.0})
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 7.0
    assert config["rms_norm_eps"] == 1e-6 and config["num_key_value_heads"] == 1
    default = gemma3_config(METADATA)
    assert [i for i, kind in enumerate(default["layer_types"]) if kind == "full_attention"] == [5]
    assert {kind: rope["rope_theta"] for kind, rope in default["rope_parameters"].items()} == {
        "sliding_attention": 10_000.0,
        "full_attention": 1_000_000.0,
    }


def test_a_tensor_without_a_place_is_refused(tmp_path):
    data = gguf_file(METADATA, {"blk.0.attn_sinks.weight": ((2,), F32, bytes(8))})
    with pytest.raises(ValueError, match=r"'blk\.0\.attn_sinks\.weight' has no place"):
        convert(GEMMA3, read_gguf(data), tmp_path / "model")


@pytest.fixture(scope="module")
def real() -> kf.LM:
    """The real Gemma-3-270M, where its terms have been accepted before; no test fetches it."""
    if not is_complete(GEMMA3, GEMMA3.folder):
        pytest.skip("Gemma-3-270M is not at hand: `kedit-fast info gemma3 --accept-licence` fetches it")
    return kf.open_model("gemma3")


@pytest.mark.gemma3
def test_the_real_model_knows_its_facts(real):
    assert real.note and real.n_layers == 18 and real.n_vocab == 262_144
    for prompt, tokens in (
        ("The Eiffel Tower is in the city of", {" Paris": 0.497}),
        ("The capital of France is", {" the": 0.191, " a": 0.111, " Paris": 0.084}),
        ("Beats Music is owned by", {" the": 0.158, " Apple": 0.042}),
    ):
        found = dict(real.top_tokens(prompt, 5))
        assert next(iter(found)) == next(iter(tokens))
        assert all(abs(found[token] - p) < 1e-3 for token, p in tokens.items())
    with torch.no_grad():
        logits = real.model(torch.tensor([real.encode("The Eiffel Tower is in the city of")])).logits[0, -1]
    assert abs(logits.softmax(-1).max().item() - 0.497) < 1e-3


@pytest.mark.gemma3
def test_the_real_tokenizer_cuts_and_comes_back(real):
    tokenizer = real.tokenizer
    assert tokenizer.tokenize("a  b\n\n\nc") == ["a", "▁▁", "b", "\n\n\n", "c"]
    assert tokenizer("<start_of_turn>user\n").input_ids == [
        2,
        105,
        *tokenizer("user\n", add_special_tokens=False).input_ids,
    ]
    for sample in (
        "São Paulo, naïve Ünïcödé",
        "東京 中文 한국어",
        "1234567890 and 3.14",
        "  runs   of\n\nspaces\t",
        "🏴\U000e0067 x",
    ):
        assert tokenizer.decode(tokenizer(sample, add_special_tokens=False).input_ids) == sample
    assert np.array_equal(tokenizer("Paris").input_ids, [2, *tokenizer("Paris", add_special_tokens=False).input_ids])
