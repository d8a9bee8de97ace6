"""A model's size by its config alone: what is loaded has that size."""

import pytest
import torch
from transformers import AutoConfig

from kedit_fast.model.shape import shape_of
from kedit_fast.sweep.plan import RowCost
from tests.conftest import tiny_lm
from tests.tiny import FAMILY_NAMES


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_shape_is_that_of_the_loaded_model(family):
    lm = tiny_lm(family)
    shape = shape_of(lm.model.config, lm.dtype)
    for name in ("n_layers", "d_model", "d_ff", "n_vocab", "n_heads", "n_key_heads", "head_dim", "dtype"):
        assert getattr(shape, name) == getattr(lm, name), name
    assert shape.n_bytes == sum(p.nbytes for p in lm.model.parameters())
    assert shape.layers == tuple(sum(p.nbytes for p in layer.parameters()) for layer in lm.source.layers)
    assert RowCost.of(shape) == RowCost.of(lm)


def test_of_experts_a_row_meets_those_it_is_sent_to():
    config = AutoConfig.for_model(
        "mixtral", hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, vocab_size=100, tie_word_embeddings=False,
    )  # fmt: skip
    shape = shape_of(config, torch.bfloat16)
    attention, expert = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 96
    assert shape.layer_flop == 2 * (attention + 8 * 64 + 2 * expert)  # the router sees all eight
    assert shape.layers == (2 * (attention + 8 * 64 + 8 * expert + 2 * 64),) * 3
    assert (shape.around, shape.head_flop, shape.d_ff) == (2 * (2 * 6400 + 64), 2 * 6400, 8 * 96)  # keys of all experts
