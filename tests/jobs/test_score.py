"""Scoring against Hugging Face's forward, one text at a time, on the weights as they are and as edited."""

import dataclasses

import pytest
import torch

from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import LowRank
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.fact import Fact
from kedit_fast.jobs.score import divergences, likeliest_tokens, next_token_probs, text_logprobs
from kedit_fast.model.opening import open_model
from tests.tiny import D_FF, D_MODEL, TEXT, tiny_model, tiny_tokenizer

TOKENS = tiny_tokenizer()(TEXT)["input_ids"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request):
    return open_model(tiny_model(request.param), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def edit(lm):
    generator = torch.Generator().manual_seed(0)
    delta = LowRank(*(torch.randn(n, 2, generator=generator) * 0.5 for n in (D_MODEL, D_FF)))
    return Edit("by hand", {}, lm.fingerprint, (), {2: delta})


@torch.no_grad()
def oracle(lm, ids, n_given):
    """log p of each token from ``n_given`` on."""
    rows = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.stack([rows[i - 1, ids[i]] for i in range(n_given, len(ids))])


def both(lm, edit, texts):
    """The oracle's (base, edited) for (ids, tokens given)."""
    base = [oracle(lm, *text) for text in texts]
    with edit.apply(lm.model):
        return base, [oracle(lm, *text) for text in texts]


def assert_equal(got, want):
    for side, expected in zip(got, want, strict=True):
        assert [len(x) for x in side] == [len(x) for x in expected]
        torch.testing.assert_close(torch.cat(side), torch.cat(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [100, 20])  # dense and gathered attention
def test_texts(lm, edit, length):
    texts = [TOKENS[:length], TOKENS[: length // 2], TOKENS[50 : 50 + length], TOKENS[:2]]
    want = both(lm, edit, [(ids, 1) for ids in texts])
    assert_equal(text_logprobs(lm.with_edit(edit), texts), want)
    assert_equal(text_logprobs(lm, texts), (want[0], want[0]))
    assert (torch.cat(want[0]) - torch.cat(want[1])).abs().max() > 0.1


def test_likeliest_tokens(lm):
    h = torch.randn(17, D_MODEL, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(likeliest_tokens(lm, h), lm.head(h).argmax(-1))
        assert likeliest_tokens(lm, h[:0]).shape == (0,)


def test_independent_edits_need_an_owner(lm):
    generator = torch.Generator().manual_seed(0)
    delta = LowRank(*(torch.randn(n, 1, generator=generator) for n in (D_MODEL, D_FF)))
    facts = (Fact("{} is", "Big Ben", "Rome"), Fact("{} is", "The Louvre", "Oslo"))
    owned = Edit("by hand", {}, lm.fingerprint, facts, [WeightChange(2, delta, owners=torch.tensor([0]))])
    for read in (next_token_probs, text_logprobs):
        with pytest.raises(ValueError, match=r"carries independent edits.*only\(i\)"):
            read(lm.with_edit(owned), [TOKENS[:5]])
    assert next_token_probs(lm.with_edit(owned.only(0)), [TOKENS[:5]]).shape == (1, lm.n_vocab)


def test_divergences_are_sums_over_the_vocabulary(lm):
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(7, D_MODEL, generator=generator)
    after = before + 0.1 * torch.randn(7, D_MODEL, generator=generator)
    after[2], after[5] = before[2], torch.nan
    small = dataclasses.replace(lm, memory=1)  # one row at a time
    kl, differs = divergences(small, before, after)
    p, q = (lm.head(h).double().softmax(-1) for h in (before, after))
    for i in range(7):
        if i == 5:
            assert kl[i] == torch.inf and differs[i]
            continue
        assert kl[i].item() == pytest.approx((p[i] * (p[i] / q[i]).log()).sum().item(), rel=1e-9, abs=1e-15)
        assert differs[i] == (p[i].argmax() != q[i].argmax())
    assert kl[2] == 0 and differs.any() and not differs.all()
    assert divergences(lm, after, before)[0][5].isnan()
