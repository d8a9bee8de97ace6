"""The logit lens against hooks on Hugging Face's own forward, on the weights as they are and really edited."""

import pytest
import torch

from kedit_fast.evaluation.logit_lens import LogitLens, logit_lens
from kedit_fast.facts.fact import Fact
from kedit_fast.pictures.figure import figure_alt, figure_png
from tests.conftest import close, open_tiny, refused
from tests.make import bits, make_edit, owned_edit, same_bits
from tests.tiny import tiny_model

FACTS = [
    Fact("{} is in the city of", "The Eiffel Tower", "Rome", "Paris"),
    Fact("{} plays the", "Miles Davis", target_new="piano"),
    Fact("The capital of {} is", "Spain", target_true="Madrid"),
    Fact("{} is in the city of", "Big Ben", "Rome", "London"),
]


@torch.no_grad()
def oracle(lm, fact, target):
    """(p, rank) [L] of a target's first token: a forward with a hook on every block, then final norm and head."""
    token = lm.tokenizer(" " + target, add_special_tokens=False)["input_ids"][0]
    kept = []
    hooks = [
        block.register_forward_hook(lambda m, args, out: kept.append(out[0] if isinstance(out, tuple) else out))
        for block in lm.source.layers
    ]
    logits = lm.model(torch.tensor([lm.encode(fact.text)])).logits[0, -1]
    for hook in hooks:
        hook.remove()
    rows = [lm.head(h.reshape(-1, h.shape[-1])[-1:])[0] for h in kept]
    close("the last layer is the model's output", rows[-1], logits)
    p = torch.stack([row.float().softmax(0)[token] for row in rows])
    rank = torch.tensor([1.0 + int((row > row[token]).sum()) for row in rows])
    return p, rank


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2"])
def test_equals_hooks(family):
    model = tiny_model(family)
    lm, kept, edit = open_tiny(model), bits(model), make_edit(model)
    lens = logit_lens(lm, FACTS, edit)
    assert same_bits(model, kept) and lens.first_layer == 1
    check(lm, lens.before)
    with edit.apply(model):
        check(lm, lens.after)
    assert torch.equal(lens.before.p_new[:, 0].nan_to_num(), lens.after.p_new[:, 0].nan_to_num())
    assert not torch.equal(lens.before.p_new[0, 1:], lens.after.p_new[0, 1:])


def check(lm, lens):
    for i, fact in enumerate(FACTS):
        for target, p, rank in (
            (fact.target_true, lens.p_old[i], lens.rank_old[i]),
            (fact.target_new, lens.p_new[i], lens.rank_new[i]),
        ):
            if target is None:
                assert p.isnan().all() and rank.isnan().all()
                continue
            want_p, want_rank = oracle(lm, fact, target)
            close("p", p, want_p)
            assert torch.equal(rank, want_rank)


@pytest.fixture(scope="module")
def lens():
    model = tiny_model("llama")
    return logit_lens(open_tiny(model), FACTS, make_edit(model))


def test_packs_and_alone_agree(lens):
    model = tiny_model("llama")
    small = open_tiny(model, memory=6_500_000)
    cut = logit_lens(small, FACTS, make_edit(model))
    alone = logit_lens(small, FACTS[0], make_edit(model))
    for a, b in zip((*lens.before, *lens.after), (*cut.before, *cut.after), strict=True):
        close("cut", b.nan_to_num(), a.nan_to_num())
    close("alone", alone.after.p_old, lens.after.p_old[:1])


def test_says_where_the_old_answer_is(lens):
    ranks = torch.tensor([[200.0, 5.0, 3.0, 40.0]] * len(FACTS))
    ranks[1] = torch.nan
    ranks[3] = torch.tensor([200.0, 100.0, 12.0, 11.0])
    after = lens.after._replace(rank_old=ranks)
    made = LogitLens(lens.facts, lens.before, after, 1)
    assert "after layers 1-2; highest after layer 2 (rank 3" in made.where(0)
    assert "no old answer is known" in made.where(1) and "not among the 10 likeliest" in made.where(3)
    found = made.summary()
    assert (found["n"], found["present_after"], found["ends_after"]) == (3, pytest.approx(2 / 3), 0.0)
    assert repr(made) == "LogitLens(4 facts, 4 layers, edited from layer 1)"
    broken = lens.after._replace(rank_old=ranks.clone())
    broken.rank_old[0, 1:] = torch.nan  # of the others one has the answer, one has not
    wrecked = LogitLens(lens.facts, lens.before, broken, 1)
    assert wrecked.where(0).endswith("cannot be looked for: the model gives NaN after layers 1-3")
    assert (wrecked.summary()["present_after"], wrecked.summary()["ends_after"]) == (0.5, 0.0)
    broken.rank_old[:, 1:] = torch.nan
    assert wrecked.summary()["present_after"] is None is wrecked.summary()["ends_after"]
    still = torch.tensor([[1.0, 1.0, 1.0, 1.0]] * len(FACTS))
    assert "and still at the end" in LogitLens(lens.facts, lens.before._replace(rank_old=still)).where(0)


def test_pictures(lens, tmp_path):
    figure = lens.plot(tmp_path / "lens.png", model="tiny")
    assert (tmp_path / "lens.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" == figure_png(figure)[:8]
    assert len(figure.axes[0].lines) == 5  # four answers and the first edited layer
    assert "median" in figure_alt(figure)
    assert len(lens.plot(fact=2).axes[0].lines) == 3  # no new answer
    page = lens._repr_html_()
    assert "<img" in page and "&#x27;Paris&#x27;" in page
    assert len(logit_lens(open_tiny(tiny_model("llama")), FACTS[2]).plot().axes[0].lines) == 1


def test_errors_come_before_work(no_sweep):
    model = tiny_model("llama")
    lm = open_tiny(model)
    for facts, error in (([], ValueError), (["x"], TypeError), ([Fact("{} is", "x")], ValueError)):
        with pytest.raises(error):
            logit_lens(lm, facts)
    refused("independent edits", logit_lens, lm, FACTS, owned_edit(model))
