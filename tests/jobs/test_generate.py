"""Generation: Hugging Face's greedy texts for ragged prompts in one batch, and sampling that can be made again."""

import copy

import pytest
import torch

import kedit_fast as kf
from kedit_fast.jobs import generate as generation
from kedit_fast.jobs.generate import generate
from kedit_fast.model.source import Resident
from kedit_fast.sweep import plan
from tests.conftest import close, open_tiny, tiny_lm
from tests.make import make_edit, owned_edit
from tests.tiny import DISTINCT, PROMPTS, tiny_model, tiny_tokenizer

TEXTS = ["The", *(p.template.format(p.subject) for p in PROMPTS[:3])]
PROMPT_IDS = [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]
N_NEW = 8  # longer than the sliding window


def hugging_faces(model, ids, n=N_NEW, eos=-1):
    """Greedy continuation of one prompt by itself."""
    with torch.no_grad():
        made = model.generate(
            torch.tensor([ids]), max_new_tokens=n, do_sample=False, eos_token_id=eos, pad_token_id=1,
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        )  # fmt: skip
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", (*DISTINCT, "qwen2_moe", "gpt_oss"))
def test_greedy_texts_are_hugging_faces(family):
    lm = tiny_lm(family)
    got = generate(lm, PROMPT_IDS, N_NEW, stop=False)
    assert got == [hugging_faces(lm.model, ids) for ids in PROMPT_IDS]
    assert len({tuple(ids) for ids in got}) > 1  # the prompts are told apart


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_each_step_is_the_whole_text_again(family, monkeypatch):
    """The cache gives the logits of a forward over the text so far."""
    lm, seen = tiny_lm(family), []
    head = type(lm).head
    monkeypatch.setattr(type(lm), "head", lambda self, h: seen.append(head(self, h)) or seen[-1])
    made = generate(lm, PROMPT_IDS, N_NEW, stop=False)
    with torch.no_grad():
        for i, (ids, new) in enumerate(zip(PROMPT_IDS, made, strict=True)):
            logits = lm.model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1]
            close(f"text {i}", torch.stack([step[i] for step in seen]), logits)


def test_a_token_costs_a_row_a_text(monkeypatch):
    """Of equal beginnings one is taken up, whichever text it is of; of equal texts each has its last token's row."""
    lm = tiny_lm("llama")
    rows = counted_rows(monkeypatch)
    made = generate(lm, PROMPT_IDS, 4, stop=False)
    beginnings = {tuple(ids[: n + 1]) for ids in PROMPT_IDS for n in range(len(ids))}
    assert len(beginnings) < sum(map(len, PROMPT_IDS))
    assert rows == [len(beginnings), *[len(PROMPT_IDS)] * 3]
    rows.clear()
    asked = [PROMPT_IDS[i] for i in (2, 0, 2, 1, 2, 3)]
    assert generate(lm, asked, 4, stop=False) == [made[i] for i in (2, 0, 2, 1, 2, 3)]
    assert rows == [len(beginnings) + 2, 6, 6, 6]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_texts_that_begin_alike_go_on_as_each_alone(family):
    """Long beginnings, some within others, in no order; behind them texts of other lengths."""
    lm = tiny_lm(family)
    head = tiny_tokenizer()(". ".join([*TEXTS, *TEXTS]))["input_ids"][:70]
    tails = [ids[:3] for ids in PROMPT_IDS]
    asked = [
        head + tails[1],
        head,
        head[:40] + tails[2],
        head + tails[1] + tails[2],
        tails[0],
        head[:69],
        head + tails[3],
    ]
    assert generate(lm, asked, 5, stop=False) == [generate(lm, [ids], 5, stop=False)[0] for ids in asked]
    owned = lm.with_edit(owned_edit(lm.model))
    owners = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    together = generate(owned, asked, 5, stop=False, owners=owners)
    alone = [generate(owned, [ids], 5, stop=False, owners=owners[i : i + 1])[0] for i, ids in enumerate(asked)]
    assert together == alone != generate(lm, asked, 5, stop=False)


def counted_rows(monkeypatch) -> list[int]:
    """Rows of each block call of the first layer, from now on."""
    rows: list[int] = []
    call = Resident.call

    def counted(self, layer, h, kwargs):
        rows.append(h.shape[1]) if layer == 0 else None
        return call(self, layer, h, kwargs)

    monkeypatch.setattr(Resident, "call", counted)
    return rows


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama", "qwen2", "gemma3"])
def test_texts_end_where_hugging_face_ends_them(family):
    """At every end token of the generation config, and at the tokenizer's; the others go on as if alone."""
    model = copy.deepcopy(tiny_model(family))
    lm = open_tiny(model)
    free = generate(lm, PROMPT_IDS, N_NEW, stop=False)
    ends = [free[1][3], free[2][5]]  # tokens that the texts are known to reach
    model.generation_config.eos_token_id = ends
    assert lm.stop_tokens == {*ends, lm.tokenizer.eos_token_id}
    got = generate(lm, PROMPT_IDS, N_NEW)
    for ids, text in zip(PROMPT_IDS, got, strict=True):
        theirs = hugging_faces(model, ids, eos=[*ends, lm.tokenizer.eos_token_id])
        assert text == (theirs[:-1] if theirs[-1] in lm.stop_tokens else theirs)
    assert any(len(text) < N_NEW for text in got)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama", "qwen2", "gemma3"])
def test_the_models_own_repetition_penalty(family):
    """Of prompt and text, as Hugging Face has it: each text of a ragged batch by itself; one of its own is had, too."""
    model = copy.deepcopy(tiny_model(family))
    lm = open_tiny(model)
    assert lm.repetition_penalty == 1
    free = generate(lm, PROMPT_IDS, N_NEW, stop=False)
    for penalty in (1.3, 0.6):
        model.generation_config.repetition_penalty = penalty
        got = generate(lm, PROMPT_IDS, N_NEW, stop=False)
        assert got == [hugging_faces(model, ids) for ids in PROMPT_IDS] != free
        assert generate(lm, PROMPT_IDS, N_NEW, stop=False, repetition_penalty=1) == free
    model.generation_config.repetition_penalty = None
    assert generate(lm, PROMPT_IDS, N_NEW, stop=False, repetition_penalty=0.6) == got
    with pytest.raises(ValueError, match=r"repetition_penalty = 0: expected a finite number above 0"):
        generate(lm, PROMPT_IDS, N_NEW, repetition_penalty=0)


def test_a_penalty_is_on_logits_in_fp32():
    """bf16 logits are taken to fp32 first; a token that stands in the text twice is penalized once."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5], [0.5, 3.0, 0.0, -1.0]], dtype=torch.bfloat16)
    got = generation._penalized(logits, torch.tensor([[0, 1, 0], [3, 2, 2]]), 1.1)
    torch.testing.assert_close(got, torch.tensor([[2 / 1.1, -2.2, 1.0, 0.5], [0.5, 3.0, 0.0, -1.1]]))


def test_the_tokenizers_end_token_ends_a_text():
    model = tiny_model("llama")
    lm = open_tiny(model)
    free = generate(lm, PROMPT_IDS, N_NEW, stop=False)
    end = free[1][3]
    tokenizer = type("Ends", (), {"eos_token_id": end, "is_fast": True})()
    got = generate(type(lm)(model, tokenizer, lm.source), PROMPT_IDS, N_NEW)
    ends = {end, model.generation_config.eos_token_id}
    assert got == [ids[: next((i for i, t in enumerate(ids) if t in ends), len(ids))] for ids in free]


def test_a_chat_is_the_template_continued():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:\n"
    lm = kf.open_model(tiny_model("llama"), tokenizer=tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is Big Ben?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert lm.chat(messages, 4, stop=False) == lm.generate(text, 4, stop=False)
    assert lm.chat("Where?", 4, stop=False) == lm.chat([{"role": "user", "content": "Where?"}], 4, stop=False)
    with pytest.raises(ValueError, match="no chat template"):
        tiny_lm("llama").chat("Where?")


def test_sampling_can_be_made_again():
    lm = tiny_lm("gpt2")
    ids = PROMPT_IDS[:1] * 6
    a, b, c = (generate(lm, ids, 6, temperature=1.0, seed=seed, stop=False) for seed in (3, 3, 4))
    assert a == b != c and len({tuple(t) for t in a}) > 1
    assert generate(lm, ids, 6, temperature=1.0, top_k=1, seed=3, stop=False) == generate(lm, ids, 6, stop=False)
    state = torch.get_rng_state()
    generate(lm, ids, 2, temperature=1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # no one else's randomness is used


def test_sampled_tokens_are_among_the_k_likeliest():
    lm, k = tiny_lm("gpt2"), 3
    with torch.no_grad():
        top = lm.model(torch.tensor(PROMPT_IDS[1:2])).logits[0, -1].topk(k).indices.tolist()
    made = [t[0] for t in generate(lm, PROMPT_IDS[1:2] * 200, 1, temperature=5.0, top_k=k, seed=0, stop=False)]
    assert set(made) == set(top)


def test_frequencies_of_samples_follow_the_temperature():
    lm, n = tiny_lm("gpt2"), 3000
    with torch.no_grad():
        wanted = (lm.model(torch.tensor([[5]])).logits[0, -1] / 0.5).softmax(-1)
    made = torch.tensor(generate(lm, [[5]] * n, 1, temperature=0.5, seed=1, stop=False)).flatten()
    got = made.bincount(minlength=len(wanted)) / n
    assert (got - wanted).abs().max() < 4 * 0.5 / n**0.5


def test_edits_act():
    model = tiny_model("gptj")
    edit = make_edit(model)
    edited = generate(open_tiny(model).with_edit(edit), PROMPT_IDS, N_NEW, stop=False)
    with edit.apply(model):
        assert edited == [hugging_faces(model, ids) for ids in PROMPT_IDS]
    assert edited != generate(open_tiny(model), PROMPT_IDS, N_NEW, stop=False)


def test_texts_and_single_prompts():
    lm = tiny_lm("llama")
    texts = ["The Eiffel Tower is", "Big Ben"]
    got = lm.generate(texts, 5, stop=False)
    theirs = [hugging_faces(lm.model, lm.encode(text), 5) for text in texts]
    assert got == [tiny_tokenizer().decode(ids, skip_special_tokens=True) for ids in theirs]
    assert lm.generate(texts[0], 5, stop=False) == got[0]


def test_many_texts_are_cut_into_calls(monkeypatch, poisoned_memory):
    whole = generate(tiny_lm("gemma3"), PROMPT_IDS, N_NEW, stop=False)
    monkeypatch.setattr(plan, "CALL_ROWS", 2)
    assert generate(tiny_lm("gemma3"), PROMPT_IDS, N_NEW, stop=False) == whole


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompts of at least one token"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0: expected a whole number of at least 1"),
        ([[1]], {"temperature": 0.7}, "needs a seed"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_lm("gpt2"), prompts, **{"max_new_tokens": 3} | options)
