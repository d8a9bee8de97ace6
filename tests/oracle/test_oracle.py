"""The oracle against what must hold for it: identities of tracing, ROME and MEMIT, and Hugging Face's own outputs."""

from __future__ import annotations

import copy
import functools

import numpy
import pytest
import torch

from tests.oracle.access import (
    add_delta,
    changing,
    embedding,
    layers,
    lookup,
    read_key,
    read_value,
    site_module,
    subject_span,
    target_ids,
    weight_out_in,
)
from tests.oracle.memit import memit_update
from tests.oracle.rome import rome_update
from tests.oracle.tracing import batched_loop, restored_layers, trace_oracle
from tests.oracle.values import Fact, keys, optimize_value
from tests.tiny import DISTINCT, PROMPTS, tiny_model, tiny_tokenizer

TRACED = ("gpt2", "gptj", "llama", "gemma2", "olmo2", "mistral")
EDITED = ("gpt2", "gptj", "llama", "gemma2")
CONTEXTS = ("{}", "The city of Paris. {}", "Because I was born. {}")
# A window of 4 reaches from subject to end.
FACTS = tuple(Fact(prompt.template, prompt.subject, " New York") for prompt in (PROMPTS[3], PROMPTS[5]))
N_LAYERS = 3


@functools.cache
def shared_model(family: str, dtype: torch.dtype = torch.float64):
    """One model for all tests of a family; the oracle must leave it as it is."""
    return tiny_model(family, dtype, layers=N_LAYERS).requires_grad_(False)


def moment(width: int = 80) -> torch.Tensor:
    """A positive definite second moment, far from the identity."""
    sample = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample *= torch.linspace(0.3, 2.0, width, dtype=torch.float64)
    return sample.T @ sample / len(sample)


def close(actual: torch.Tensor | float, expected: torch.Tensor | float, tolerance: float = 1e-7) -> bool:
    """Equal to a relative tolerance; gptj's attention is float32 inside, so float64 models are not closer than that."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    return bool((actual - expected).norm() <= tolerance * expected.norm())


# --- tiny models and access ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DISTINCT)
def test_tiny_model_is_sharp_and_access_finds_its_sites(family):
    model, tok = shared_model(family), tiny_tokenizer()
    ids, index = lookup(tok, PROMPTS[0].template, PROMPTS[0].subject)
    out = model(torch.tensor([ids]), output_hidden_states=True)
    assert 1.0 < out.logits.std() < 5.0
    other = model(torch.tensor([[ids[0] + 1, *ids[1:]]])).logits
    assert not close(other[0, -1], out.logits[0, -1], 0.01), "the first token does not matter to the last"
    assert close(tiny_model(family, layers=N_LAYERS)(torch.tensor([ids])).logits, out.logits, 1e-5)

    states = out.hidden_states  # the last one is normed
    assert torch.equal(embedding(model)(torch.tensor(ids))[index], states[0][0, index]) != (
        family in ("gpt2", "granite")
    )
    assert close(read_value(model, ids, index, 1, "layer_out"), states[2][0, index])
    assert torch.equal(read_value(model, ids, index, 1, "mlp"), read_value(model, ids, index, 1, "mlp_out"))
    down = site_module(model, 1, "mlp_out")
    key, value = read_key(model, ids, index, 1), read_value(model, ids, index, 1, "mlp_out")
    assert close(weight_out_in(down) @ key + (0 if down.bias is None else down.bias), value)


@pytest.mark.parametrize(("family", "change"), [("mistral", "window"), ("gemma2", "cap"), ("phi3", "window")])
def test_windows_and_caps_are_felt(family, change):
    model, ids = tiny_model(family), torch.tensor([lookup(tiny_tokenizer(), PROMPTS[0].template, "Big Ben")[0]])
    before = model(ids).logits
    if change == "window":
        model.config.sliding_window += 1
    else:
        model.config.final_logit_softcapping = None
    assert not close(model(ids).logits, before, 0.01)


def test_tokens_of_a_subject():
    plain, bos = tiny_tokenizer(), tiny_tokenizer(bos=True)
    for prompt in PROMPTS:
        text = prompt.template.format(prompt.subject)
        ids, (begin, end) = subject_span(plain, prompt.template, prompt.subject)
        assert plain.decode(ids) == text
        assert plain.decode(ids[begin:end]).strip() == prompt.subject
        assert lookup(plain, prompt.template, prompt.subject)[1] == end - 1
        with_bos, span = subject_span(bos, prompt.template, prompt.subject)
        assert with_bos == [bos.bos_token_id, *ids]
        assert span == (begin + 1, end + 1)
    assert target_ids(bos, "Paris") == target_ids(plain, " Paris") == plain(" Paris")["input_ids"]


# --- tracing ---------------------------------------------------------------------------------------------------------

TRACE = dict(window=3, samples=2, noise=0.9)


# A short prompt whose subject is neither at its beginning nor at its end.
IDS, SPAN = subject_span(tiny_tokenizer(), "The {} is in", "Space Needle")


@pytest.mark.parametrize("family", TRACED)
@pytest.mark.parametrize("kind", ["state", "mlp", "attn"])
def test_trace_identities_and_the_batched_rival(family, kind):
    model, ids, span = shared_model(family), IDS, SPAN
    result = trace_oracle(model, ids, span, kind, **TRACE)
    scores, p_clean, p_corrupted = result["scores"], result["p_clean"], result["p_corrupted"]
    assert scores.shape == (len(ids), N_LAYERS)
    assert close(p_clean, model(torch.tensor([ids])).logits[0, -1].softmax(0).max())
    assert abs(p_clean - p_corrupted) > 1e-3
    assert close(scores[: span[0]], p_corrupted * torch.ones(span[0], N_LAYERS))
    if kind == "state":
        assert close(scores[-1, -1], p_clean)
        assert close(scores[:-1, -1], p_corrupted * torch.ones(len(ids) - 1))
    assert scores[span[0] :].std() > 1e-4

    rival = batched_loop(model, ids, span, kind, **TRACE)
    assert close(rival["scores"], scores)
    assert close(torch.tensor([rival["p_clean"], rival["p_corrupted"]]), torch.tensor([p_clean, p_corrupted]))
    assert rival["answer"] == result["answer"]


def test_windows_are_cut_at_the_ends():
    assert restored_layers("mlp", 6, 10, 12) == range(1, 11)
    assert restored_layers("attn", 6, 5, 12) == range(4, 9)
    assert restored_layers("mlp", 1, 10, 12) == range(0, 6)
    assert restored_layers("mlp", 11, 10, 12) == range(6, 12)
    assert restored_layers("state", 3, 10, 12) == range(3, 4)


def test_corruption_is_numpys_noise_at_the_subject():
    model, ids, (begin, end) = shared_model("gpt2", torch.float32), IDS, SPAN
    draws = numpy.random.RandomState(7).randn(3, end - begin, 48)
    p = []
    for draw in draws:
        embedded = embedding(model)(torch.tensor([ids])).clone()
        embedded[0, begin:end] = (embedded[0, begin:end].double() + 0.9 * torch.from_numpy(draw)).float()
        p.append(model(inputs_embeds=embedded).logits[0, -1].softmax(0)[5])
    trace = functools.partial(trace_oracle, model, ids, (begin, end), "state", samples=3, noise=0.9, seed=7, answer=5)
    assert close(trace()["p_corrupted"], torch.stack(p).mean(), 1e-5)
    assert close(trace(metric="logprob")["p_corrupted"], torch.stack(p).log().mean(), 1e-5)


def test_corruption_by_another_subject():
    model, tok, ids, span = shared_model("llama"), tiny_tokenizer(), IDS, SPAN
    other, _ = subject_span(tok, "The {} is in", "Eiffel Tower")
    assert len(ids) == len(other)
    result = trace_oracle(model, ids, span, "state", corrupt_ids=other)
    p_other = model(torch.tensor([other])).logits[0, -1].softmax(0)[result["answer"]]
    assert close(result["p_corrupted"], p_other)
    assert close(result["scores"][-1, -1], result["p_clean"])
    same = trace_oracle(model, ids, span, "mlp", corrupt_ids=ids, window=2)
    assert close(same["scores"], same["p_clean"] * torch.ones_like(same["scores"]))


def test_severed_trace_by_hand_in_a_parallel_block():
    """gptj: block(h) = h + attn(ln h) + mlp(ln h), so one severed MLP in the last layer is a sum written out."""
    model, ids, span = shared_model("gptj"), IDS, SPAN
    result = trace_oracle(model, ids, span, "state", severed="mlp", answer=5, **TRACE)
    assert close(result["scores"][: span[0]], result["p_corrupted"] * torch.ones(span[0], N_LAYERS))
    assert close(result["scores"][-1, -1], result["p_clean"])

    block = layers(model)[-1]
    clean = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2][0]
    p = []
    for draw in numpy.random.RandomState(1).randn(TRACE["samples"], span[1] - span[0], 48):
        embedded = embedding(model)(torch.tensor([ids])).clone()
        embedded[0, span[0] : span[1]] += TRACE["noise"] * torch.from_numpy(draw)
        corrupted = model(inputs_embeds=embedded, output_hidden_states=True).hidden_states[-2][0]
        mixed = torch.cat([corrupted[:-1], clean[-1:]])
        mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=mixed.dtype).triu(1)[None, None]
        whole = block(mixed[None], attention_mask=mask, position_ids=torch.arange(len(ids))[None])[0][0, -1]
        last = whole - block.mlp(block.ln_1(mixed[-1])) + block.mlp(block.ln_1(corrupted[-1]))
        p.append(model.lm_head(model.transformer.ln_f(last)).softmax(0)[5])
    assert close(result["scores"][-1, -2], torch.stack(p).mean())
    unsevered = trace_oracle(model, ids, span, "state", answer=5, **TRACE)
    assert not close(unsevered["scores"][-1, -2], torch.stack(p).mean(), 1e-3)


# --- values and keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EDITED)
@pytest.mark.parametrize("site", ["mlp_out", "layer_out"])
def test_value_lowers_the_loss_within_its_ball(family, site):
    model, tok = shared_model(family), tiny_tokenizer()
    value = optimize_value(model, tok, FACTS[0], CONTEXTS, 1, site, lr=0.1, steps=8, clamp=0.05)
    place = lookup(tok, FACTS[0].prompt, FACTS[0].subject)
    assert close(value.init, read_value(model, *place, 1, site))
    assert value.n_iterations == len(value.losses) == 8
    assert value.losses[-1] < value.losses[0]
    assert 0.9 < (value.value - value.init).norm() / (0.05 * value.init.norm()) < 1 + 1e-9
    assert value.value.dtype == torch.float64
    single = optimize_value(shared_model(family, torch.float32), tok, FACTS[0], CONTEXTS, 1, site, lr=0.1, steps=4)
    double = optimize_value(model, tok, FACTS[0], CONTEXTS, 1, site, lr=0.1, steps=4)
    assert close(single.value, double.value, 1e-4)
    assert single.value.dtype == torch.float32


def test_first_loss_is_the_cross_entropy_and_the_search_stops_early():
    model, tok = shared_model("gpt2"), tiny_tokenizer()
    fact = Fact("{} plays the", "Miles Davis", " trumpet New York")
    prompt, answer = lookup(tok, fact.prompt, fact.subject)[0], target_ids(tok, fact.target_new)
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    value = optimize_value(model, tok, fact, ["{}"], 1, "layer_out", steps=1)
    assert close(value.losses[0], expected)
    assert torch.equal(value.value, value.init)

    easy = dict(lr=0.5, steps=100, clamp=100.0, weight_decay=0.0, kl_factor=0.0)
    fact = Fact("{}", "Big Ben", " London")  # the lookup token is the last: δ can drive the head
    value = optimize_value(model, tok, fact, ["{}"], 1, "layer_out", **easy)
    assert value.n_iterations < 100
    assert value.losses[-1] < 0.05 <= min(value.losses[:-1])
    ids, index = lookup(tok, fact.prompt, fact.subject)

    def inject(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.index_copy(1, torch.tensor([index]), value.value[None, None])

    with changing([(site_module(model, 1, "layer_out"), inject)]):
        log_p = model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
    assert close(-log_p[target_ids(tok, "London")[0]], value.losses[-1])


def test_kl_and_weight_decay_enter_the_loss():
    model, tok = shared_model("gpt2"), tiny_tokenizer()
    run = functools.partial(optimize_value, model, tok, FACTS[0], ["{}"], 1, lr=0.5, steps=2, clamp=100.0)
    plain = run(weight_decay=0.0, kl_factor=0.0)
    delta = plain.value - plain.init  # the first step of Adam is lr * sign(gradient), whatever is added to the loss
    decayed = run(weight_decay=3.0, kl_factor=0.0)
    assert close(decayed.losses[1] - plain.losses[1], 3.0 * delta.norm() / plain.init.norm() ** 2)

    ids, index = lookup(tok, "{} is a", FACTS[0].subject)
    before = model(torch.tensor([ids])).logits[0, index].log_softmax(0)

    def add(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.index_add(1, torch.tensor([index]), delta[None, None])

    with changing([(site_module(model, 1, "mlp_out"), add)]):
        after = model(torch.tensor([ids])).logits[0, index].log_softmax(0)
    pulled = run(weight_decay=0.0, kl_factor=2.0)
    assert close(pulled.losses[1] - plain.losses[1], 2.0 * (after.exp() * (after - before)).sum())


def test_keys_are_means_of_group_means():
    model, tok = shared_model("llama"), tiny_tokenizer()
    one = [keys(model, tok, FACTS[0], [[context]], 1) for context in CONTEXTS]
    assert close(keys(model, tok, FACTS[0], [CONTEXTS], 1), (one[0] + one[1] + one[2]) / 3)
    assert close(keys(model, tok, FACTS[0], [CONTEXTS[:1], CONTEXTS[1:]], 1), one[0] / 2 + (one[1] + one[2]) / 4)


# --- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EDITED)
@pytest.mark.parametrize("key", ["bare", "averaged"])
def test_rome_makes_the_key_s_value_the_new_one(family, key):
    model, tok = shared_model(family), tiny_tokenizer()
    update = rome_update(model, tok, FACTS[0], CONTEXTS, 1, moment(), key=key, steps=4, lr=0.1)
    edited = copy.deepcopy(model)
    down = site_module(edited, 1, "mlp_out")
    add_delta(down, update.delta)
    assert close(down(update.key), update.value.value, 1e-9)
    assert not close(site_module(model, 1, "mlp_out")(update.key), update.value.value, 1e-2)
    k_star = keys(model, tok, FACTS[0], [CONTEXTS], 1)
    assert close(update.key, k_star, 1e-12) == (key == "averaged")
    v_row = update.delta[update.delta.norm(dim=1).argmax()]  # Δ = right u^T: a row times C is along k*
    assert torch.cosine_similarity(moment() @ v_row, k_star, dim=0).abs() > 1 - 1e-9
    if key == "bare":
        place = lookup(tok, FACTS[0].prompt, FACTS[0].subject)
        assert close(read_value(edited, *place, 1, "mlp_out"), update.value.value)


@pytest.mark.parametrize("family", EDITED)
def test_memit_reaches_z_and_spreads_over_layers(family):
    model, tok, post_norm = shared_model(family), tiny_tokenizer(), family == "gemma2"
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    edit = functools.partial(memit_update, model, tok, FACTS, pull_back=post_norm, steps=4, lr=0.1)
    moments = {layer: moment() for layer in range(N_LAYERS)}

    def bare(edited, layer, site):
        places = [lookup(tok, fact.prompt, fact.subject) for fact in FACTS]
        return torch.stack([read_value(edited, *place, layer, site) for place in places])

    single = edit([["{}"]], [1], moments, 1e-9)
    before_it, after_it = bare(model, 1, "mlp_out"), bare(single.edited, 1, "mlp_out")
    assert close(after_it - before_it, single.shares[1], 1e-4)
    if not post_norm:
        assert close(bare(single.edited, 1, "layer_out"), single.z, 1e-4)
        assert (single.residual_after[1] < 1e-4 * single.residual_before[1]).all()
    else:  # a norm's output has a fixed length, so its direction is all that an edit can set
        assert (single.residual_after[1] < single.residual_before[1]).all()
        norm = layers(model)[1].post_feedforward_layernorm
        wanted = norm(before_it) + single.z - bare(model, 1, "layer_out")
        assert torch.cosine_similarity(norm(after_it), wanted).min() > 1 - 1e-3  # the ridge leaves a part of it

    double = edit([CONTEXTS[:1], CONTEXTS[1:]], [0, 1], moments, 0.1, values=single.values)
    assert (double.residual_after[1] < double.residual_before[0]).all()
    assert torch.equal(double.residual_after[0], double.residual_before[1])
    partly = copy.deepcopy(model)
    for layer, left in ((0, 2), (1, 1)):
        K, share = double.keys[layer], (double.z - bare(partly, 1, "layer_out")) / left
        assert close(double.shares[layer], share, 1e-5) != post_norm
        gain = torch.linalg.inv(0.1 * moment()) @ K.T  # the n x n form of the same solve
        expected = double.shares[layer].T @ (gain @ torch.linalg.inv(torch.eye(len(FACTS)) + K @ gain)).T
        assert close(double.deltas[layer], expected, 1e-5)
        add_delta(site_module(partly, layer, "mlp_out"), expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
