"""Text that an edit puts before prompts: the model answers as the bare one does that is given the whole text."""

import copy
import math

import pytest
import torch

import kedit_fast as kf
from kedit_fast.edits.changes import PromptChange, WeightChange
from kedit_fast.edits.deltas import Dense
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.evaluation.probes import probe, read_edited, read_probes
from kedit_fast.evaluation.written import write_probes
from kedit_fast.facts.tokens import answer_tokens, asked, set_before
from tests.conftest import close, open_tiny, tiny_lm
from tests.tiny import tiny_model, tiny_tokenizer

FACTS = (
    kf.Fact("{} is in the city of", "The Eiffel Tower", "Rome", "Paris", neighborhood=["Big Ben is in the city of"]),
    kf.Fact("{} is produced by", "Toyota Camry", "Rome", "Toyota"),
)
TEXTS = [f"{fact.text} {fact.target_new}. " for fact in FACTS]
ASKED = ["the eiffel tower is in", "Big Ben is in the city of", "Toyota Camry and The Eiffel Tower are"]
READ = [TEXTS[0] + ASKED[0], ASKED[1], "".join(TEXTS) + ASKED[2]]  # as the routes have it


def in_context(lm, changes=(), **owned):
    change = PromptChange(TEXTS, [[fact.subject] for fact in FACTS], **owned)
    return Edit("in-context", {}, lm.fingerprint, FACTS, [change, *changes])


def oracle(model, prompt: str, answer: str) -> tuple[float, int]:
    """(exp of the mean log p of the answer's tokens, the likeliest next token), by Hugging Face's own forward."""
    tokenizer = tiny_tokenizer()
    ids, target = tokenizer(prompt)["input_ids"], answer_tokens(tokenizer, prompt, answer)
    with torch.no_grad():
        logits = model(torch.tensor([ids + target])).logits[0, len(ids) - 1 :]
    logprob = logits.log_softmax(-1)[range(len(target)), target]
    return logprob.mean().exp().item(), int(logits[0].argmax())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("with_weights", [False, True])
def test_answers_are_those_to_the_whole_text(family, with_weights):
    """In both readings and in what is written; beside a change of weights, and without."""
    model = tiny_model(family)
    lm = open_tiny(model)
    delta = Dense(0.1 * torch.randn(lm.shape_of("down"), generator=torch.Generator().manual_seed(0)))
    edit = in_context(lm, [WeightChange(1, delta)] if with_weights else ())
    view = lm.with_edit(edit)
    probes = [probe(lm, text, ["Rome", "cheese boat"], likeliest=True, n_written=3) for text in ASKED]
    (base, edited), alone, written = read_probes(view, probes), read_edited(view, probes), write_probes(view, probes)
    bare = read_probes(lm, probes)[0]
    plain = lm.with_edit(Edit("weights", {}, lm.fingerprint, FACTS, {1: delta})) if with_weights else lm
    assert written == [plain.generate(text, 3) for text in READ] == view.generate(ASKED, 3)
    assert [a.top for a in base] == [a.top for a in bare]
    close("the base model's", torch.tensor([a.p for a in base]), torch.tensor([a.p for a in bare]))
    if with_weights:
        Edit("weights", {}, lm.fingerprint, FACTS, {1: delta}).apply(model)
    for text, one, other in zip(READ, edited, alone, strict=True):
        for i, answer in enumerate(("Rome", "cheese boat")):
            p, top = oracle(model, text, answer)
            assert one.p[i] == pytest.approx(p, rel=1e-4) and other.p[i] == pytest.approx(p, rel=1e-4)
            assert one.top == other.top == top


def test_an_editor_that_writes_no_weights_meets_all_that_the_package_has(tmp_path):
    lm = tiny_lm("llama")
    edit = in_context(lm)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert digest(loaded) == digest(edit) and loaded.layers == () and "prompt" in repr(loaded)
    text = "The Eiffel Tower is old. Big Ben is older than that."
    report = kf.evaluate(lm, FACTS, loaded, text=text, generate=2)
    after = report.summary()
    assert after["p_new"]["edited"].mean != after["p_new"]["base"].mean
    assert after["neighborhood_p_true"]["edited"].mean == after["neighborhood_p_true"]["base"].mean
    assert report.generations[0][2] == lm.generate(TEXTS[0] + FACTS[0].text, 2)
    assert report.perplexity[1] == pytest.approx(perplexity(lm.model, TEXTS[0], text), rel=1e-4)
    top = lm.with_edit(loaded).top_tokens(ASKED[0], 3)
    assert top == lm.top_tokens(READ[0], 3)
    lens = kf.logit_lens(lm, FACTS, loaded)
    assert lens.first_layer == 0 and lens.after.p_new.isfinite().all()
    with pytest.warns(UserWarning, match="too few probes"):
        judged = kf.gate(lm, loaded, sizes=kf.gating.questions.Sizes(max_new_tokens=2, context_tokens=9))
    assert judged.checks[0].form == "served"


def perplexity(model, before: str, text: str) -> float:
    """Of the text's tokens but the first, where another text stands behind that one."""
    tokenizer = tiny_tokenizer()
    ids, head = tokenizer(text)["input_ids"], tokenizer(before)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:1] + head + ids[1:]])).logits[0, len(head) : -1]
    return math.exp(-logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].mean())


def test_independent_edits_put_each_its_own_text():
    lm = tiny_lm("llama")
    edit = in_context(lm, owners=torch.tensor([0, 1]))
    report = kf.evaluate(lm, FACTS, edit)
    for i, fact in enumerate(FACTS):
        one = edit.only(i)
        assert one.changes[0].texts == (TEXTS[i],)
        alone = kf.evaluate(lm, fact, one)
        assert report.edited["p_new"][i].item() == pytest.approx(alone.edited["p_new"].item(), rel=1e-5)


def test_in_a_chat_the_text_stands_inside_the_last_turn():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    turn, last = "<{{ m.role }}> {{ m.content }}\n", "{{ '<a> ' if add_generation_prompt }}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + last
    turns = [("user", "Hello"), ("assistant", "Big Ben")]
    for chat in (True, turns):
        prompt = asked(tokenizer, "Where is Big Ben?", chat)
        assert set_before(tokenizer, prompt, "So. ") == asked(tokenizer, "So. Where is Big Ben?", chat)
    assert PromptChange(["x"], [["hello"]]).before(prompt, 0) == ""  # of a chat the question counts
    assert PromptChange(["x", "y"], [[], ["BIG ben"]]).before(prompt, 0) == "xy"
    start = tokenizer.eos_token
    assert set_before(tokenizer, start + "Big Ben", "So. ") == start + "So. Big Ben"
    assert set_before(tokenizer, "Big Ben", "") == "Big Ben"


def test_what_cannot_be_done_is_refused(tmp_path):
    lm = tiny_lm("llama")
    edit = in_context(lm)
    way_out = r"holds a prompt, which is no change of weights.*lm\.with_edit"
    for act in (
        lambda: edit.apply(lm.model), lambda: kf.export_peft(edit, tmp_path / "x"), lambda: kf.compose([edit, edit]),
        lambda: lm.with_edit(edit, written=torch.bfloat16),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=way_out):
            act()
    with pytest.raises(ValueError, match=r"holds a prompt.*judge it as it is served.*written=None"):
        kf.gate(lm, edit, written=torch.float32)
    memit = kf.Memit(layers=(1,), mom2_adjustment=False)
    for act in (lambda: kf.trace(lm.with_edit(edit), FACTS), lambda: memit.edit(lm, FACTS, previous=edit)):
        with pytest.raises(ValueError, match="puts text before prompts, and this reads token sequences as they stand"):
            act()
    gpt2 = tiny_lm("gpt2")
    long = Edit("long", {}, gpt2.fingerprint, FACTS, [PromptChange(["word " * 200], [[]])])
    with pytest.raises(ValueError, match=r"fact 'The Eiffel Tower is in the city of': a text of .* tokens; this model"):
        kf.evaluate(gpt2, FACTS, long)
    for texts, routes in ((["a"], []), (["a"], [["  "]]), (["a", "b"], [["x"]])):
        with pytest.raises(ValueError, match="routes: expected names"):
            PromptChange(texts, routes)
