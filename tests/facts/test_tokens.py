"""A fact's prompt, its subject's place in it, and its answers, as tokens of every kind of tokenizer."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import kedit_fast as kf
from kedit_fast.editors.located import Prompts
from kedit_fast.evaluation.benchmark import Case
from kedit_fast.evaluation.benchmarks.counterfact import probes
from kedit_fast.evaluation.probes import probe
from kedit_fast.facts import tokens
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import ChatText, answer_tokens, asked, encode, fact_tokens, follows_directly
from kedit_fast.jobs.collect import collect
from kedit_fast.sweep.runs import RunList
from kedit_fast.sweep.sites import Site
from kedit_fast.tracing.tasks import tasks_of
from tests.make import TOWER
from tests.tiny import tiny_model, tiny_tokenizer

CORPUS = ["Paris Paris is in Rome", "The tower of Paris in Rome", "Karel Čapek is in Paris"] * 3
START = "<s>"


def byte_level(trim=None, prefix=False):
    """Byte-level BPE like GPT-2's; trim: whether offsets leave out the leading space (None: no post-processor)."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    bytes_first = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=285, **bytes_first))
    if trim is not None:
        inner.post_processor = processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def sentencepiece_bpe(legacy):
    """BPE with word marks, byte fallback and a start token: Llama-2's (legacy: marks by normalizer) or its heirs'."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=48, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    known = [piece for piece in model["vocab"] if "Č" not in piece]
    pieces = ["<unk>", START, *(f"<0x{byte:02X}>" for byte in range(256)), *known]
    merges = [tuple(pair) for pair in model["merges"] if "Č" not in "".join(pair)]
    vocab = {piece: at for at, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return with_start(inner, vocab[START])


def unigram():
    """A sentencepiece unigram model with a start token, every character a piece."""
    letters = [*sorted(set("".join(CORPUS) + "東京タワーI.'s")), "▁Paris", "▁is", "▁in", "▁Rome", "▁The", "▁"]
    pieces = [("<unk>", 0.0), (START, 0.0)] + [(piece, -3.0) for piece in letters if piece != " "]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return with_start(inner, 1)


def with_start(inner, start):
    inner.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, start)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=START, unk_token="<unk>")


def word_level():
    """One token a word or punctuation mark."""
    words = ["<unk>", "Paris", "is", "in", "The", "tower", "of", "Karel", "Čapek", "東京タワー", "Rome", ".", "'", "s"]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_level_trimmed": byte_level(trim=True),
    "byte_level_untrimmed": byte_level(trim=False),
    "byte_level_prefix": byte_level(trim=True, prefix=True),
    "byte_level_prefix_untrimmed": byte_level(trim=False, prefix=True),
    "llama_legacy": sentencepiece_bpe(legacy=True),
    "llama": sentencepiece_bpe(legacy=False),
    "unigram": unigram(),
    "word_level": word_level(),
}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS)
def tokenizer(request):
    return request.param


@pytest.mark.parametrize("context", ["{}", "Rome. {}", "The tower of Paris in Rome is {}"])
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        *((prompt, "Paris") for prompt in ("{} is in", "The tower of {} is in", "The tower of {}", "In {}'s tower")),
        *((prompt, "Paris") for prompt in ("Paris is in {} in Paris", "Paris Paris {} Paris is")),
        *((prompt, "Čapek") for prompt in ("{} is in", "Karel {} is in")),
        *((prompt, "東京タワー") for prompt in ("{} is in", "The tower {} is in")),
        ("The {} is in", "tower of Paris"),
        ("In {}. The", "Rome"),
    ],
)
def test_subject_span_is_the_subject(tokenizer, context, prompt, subject):
    """The span's tokens, decoded without the offsets' help, are the subject, and it takes them all."""
    found = fact_tokens(tokenizer, Fact(prompt=prompt, subject=subject), context)
    ids, (b, e) = found.ids, found.span
    assert found.lookup == e - 1
    before, after = context.replace("{}", prompt).split("{}")
    assert ids == tokenizer(before + subject + after)["input_ids"]
    if tokenizer is TOKENIZERS["word_level"]:
        assert [tokenizer.decode(ids[b:e])] == [subject]
        return
    pieces = tokenizer.convert_ids_to_tokens(ids)
    spell = tokenizer.backend_tokenizer.decoder.decode
    assert spell(pieces[b:e]).strip() == subject
    assert pieces[b] not in ("▁", "Ġ", START)
    assert spell([piece for piece in pieces[:b] if piece != START]).strip() == before.strip()


def test_straddling_token_belongs_to_the_subject():
    """A token that takes the subject's last characters and what follows is the lookup token."""
    pieces = ["Pa", "ris'", "s", "(Pa", "ris", " is", "Paris"]
    inner = Tokenizer(models.Unigram([("<unk>", -20.0)] + [(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    ids, span, *_ = fact_tokens(tokenizer, Fact(prompt="{}'s", subject="Paris"))
    assert (tokenizer.convert_ids_to_tokens(ids), span) == (["Pa", "ris'", "s"], (0, 2))
    ids, span, *_ = fact_tokens(tokenizer, Fact(prompt="({} is", subject="Paris"))
    assert (tokenizer.convert_ids_to_tokens(ids), span) == (["(Pa", "ris", " is"], (0, 2))


def test_blanks_around_the_subject_are_not_counted():
    tokenizer = TOKENIZERS["byte_level_untrimmed"]
    ids, (b, e), *_ = fact_tokens(tokenizer, Fact(prompt="The tower of{}in Rome", subject=" Paris "))
    assert tokenizer.decode(ids[b:e]).strip() == "Paris"


def test_letter_that_looks_like_a_word_mark_stays():
    """Maltese Ġ is also the byte-level sign of a space; as a letter of its own it is part of the subject."""
    pieces = ["Ġ", "▁", "o", "r", "ġ", "▁is"]
    inner = Tokenizer(models.Unigram([("<unk>", -20.0)] + [(piece, -1.0) for piece in pieces], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    ids, (b, e), *_ = fact_tokens(tokenizer, Fact(prompt="{} is", subject="Ġorġ"))
    assert tokenizer.convert_ids_to_tokens(ids[b:e]) == ["Ġ", "o", "r", "ġ"]


def test_context_needs_one_place(tokenizer):
    with pytest.raises(ValueError, match=r"context '.*': expected one \{\}, found 2"):
        fact_tokens(tokenizer, TOWER, "{} {}")


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"Slow gives no character offsets.*fast tokenizer"):
        fact_tokens(Slow(), TOWER)


def test_dropped_subject_is_refused():
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "is": 1}, unk_token="<unk>"))
    inner.normalizer = normalizers.Replace("☃", "")
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    with pytest.raises(ValueError, match="covers '☃'; the tokenizer drops"):
        fact_tokens(tokenizer, Fact(prompt="{} is", subject="☃"))
    with pytest.raises(ValueError, match="target ' ☃' has no tokens"):
        answer_tokens(tokenizer, "a", "☃")


@pytest.mark.parametrize("target", ["Paris", " Paris", "Rome", "Čapek", "東京", "Paris in Rome"])
@pytest.mark.parametrize("prompt", ["The tower is in", "Paris", "東京タワー is in"])
def test_continuation_joins_the_prompt(tokenizer, prompt, target):
    """Prompt ids + continuation = the text's ids; the same ids whatever the prompt; and no special token."""
    ids = answer_tokens(tokenizer, prompt, target)
    assert tokenizer(prompt)["input_ids"] + ids == tokenizer(f"{prompt} {target.strip()}")["input_ids"]
    assert ids == answer_tokens(tokenizer, "a", target)
    assert not set(ids) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name.startswith("byte_level")])
def test_byte_level_targets_are_those_of_the_published_code(name):
    for target in ("Paris", "Čapek", "Paris in Rome"):
        alone = TOKENIZERS[name](" " + target, add_special_tokens=False)["input_ids"]
        assert answer_tokens(TOKENIZERS[name], "a", target) == alone


def test_sentencepiece_targets_have_no_empty_word_mark():
    tokenizer = TOKENIZERS["llama_legacy"]
    pieces = tokenizer.convert_ids_to_tokens
    assert pieces(tokenizer(" Paris", add_special_tokens=False)["input_ids"]) == ["▁", "▁Paris"]
    assert pieces(answer_tokens(tokenizer, "a", "Paris")) == ["▁Paris"]


def test_prompt_that_ends_in_a_space(tokenizer):
    """No second space; and where the space would merge with the target, the prompt's ids stay as they are."""
    ids = answer_tokens(tokenizer, "The tower is in ", "Paris")
    joined = tokenizer("The tower is in ")["input_ids"] + ids
    assert tokenizer.decode(joined, skip_special_tokens=True).replace("  ", " ").strip() == "The tower is in Paris"


def test_empty_target_is_refused(tokenizer):
    with pytest.raises(ValueError, match="target is empty"):
        answer_tokens(tokenizer, "a", " ")


# ---- answers: with a space or without


@pytest.mark.parametrize(
    ("prompt", "answer", "direct"),
    [
        ("It is in", "Rome", False),
        ("It is in ", "Rome", True),
        ("Answer:\n", "Rome", True),
        ("Answer:", "Rome", False),
        ("It is in", " Rome", False),
        ('He called it "', "Rome", True),
        ('He called it "Rome" in', "Rome", False),
        ('He called it "Rome"', "in", False),
        ("He said '", "Rome", True),
        ("The Romans'", "city", False),
        ("It lies in (", "Italy", True),
        ("It lies in (the north)", "Italy", False),
        ("Er sagte „", "Rom", True),
        ("Il dit «", "Rome", True),
        ("It costs $", "5", True),
        ("It costs 5", "dollars", False),
        ("Jean-", "Luc", True),
        ("Rome –", "Italy", False),
        ("Rome—", "Italy", True),
        ("See https://en.wikipedia.org/", "Rome", True),
        ("It ends here", ".", True),
        ("It ends here", ", and", True),
        ("It is Rome", "(Italy)", False),
        ("埃菲尔铁塔位于", "罗马", True),
        ("埃菲尔铁塔位于：", "罗马", True),
        ("他生于1990", "年", True),
        ("埃菲尔铁塔位于", "Rome", True),
        ("The Chinese word for water is", "水", False),
        ("In Chinese 罗马 is", "罗马", False),
        ("エッフェル塔は", "ローマ", True),
        ("หอไอเฟลตั้งอยู่ที่", "โรม", True),
        ("에펠탑은", "로마에", False),
        ("Эйфелева башня находится в", "Риме", False),
    ],
)
def test_where_a_space_belongs(prompt, answer, direct):
    assert follows_directly(prompt, answer) is direct
    said = follows_directly(prompt, answer, attached=not direct)
    assert said is (prompt[-1].isspace() or not direct)


# Chinese, where no letter of the two parts is unknown to these tokenizers: byte-level ones know all.
@pytest.mark.parametrize(
    ("prompt", "answer", "joint"),
    [
        ("The tower is in ", "Paris", "The tower is in Paris"),
        ("The tower:\n", "Paris", "The tower:\nParis"),
        ('The tower is "', "Paris", 'The tower is "Paris'),
        ("東京タ", "ワー東京", "東京タワー東京"),
        ("The tower of (", "Rome", "The tower of (Rome"),
        ("The tower in Paris", ".", "The tower in Paris."),
    ],
)
@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "word_level"])
def test_the_joined_ids_spell_the_joint_text(name, prompt, answer, joint):
    """What is scored is what the model would have to write, also where a merge crosses from prompt to answer."""
    tokenizer = TOKENIZERS[name]
    head = encode(tokenizer, prompt)
    ids = answer_tokens(tokenizer, prompt, answer)

    def spell(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    assert spell(head + ids) == spell(tokenizer(joint)["input_ids"])
    assert spell(head) == spell(tokenizer(prompt)["input_ids"]), "the prompt is read as it stands"


WORDS = ["Paris", "Rome", "is", "tower", "Čapek", "東京", "(", '"', "'", ".", ",", "$", "-", "The", "\n"]
SPACED = st.tuples(st.sampled_from(WORDS), st.sampled_from(["", " ", " ", " "])).map("".join)
TEXTS = st.lists(SPACED, min_size=1, max_size=5).map("".join)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(prompt=TEXTS.filter(str.strip), answer=TEXTS.filter(str.strip), attached=st.sampled_from([None, True, False]))
@pytest.mark.parametrize("name", ["byte_level", "byte_level_prefix", "llama_legacy", "llama", "unigram"])
def test_any_prompt_and_answer_join(name, prompt, answer, attached):
    tokenizer = TOKENIZERS[name]
    direct = follows_directly(prompt, answer, attached)
    joint = prompt + (answer.lstrip() if direct else answer if answer[0].isspace() else " " + answer)
    if encode(tokenizer, joint) == encode(tokenizer, prompt):  # unknown characters that this tokenizer joins to one
        with pytest.raises(ValueError, match="has no tokens"):
            answer_tokens(tokenizer, prompt, answer, attached)
        return
    joined = encode(tokenizer, prompt) + answer_tokens(tokenizer, prompt, answer, attached)
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    assert tokenizer.decode(joined, **plain) == tokenizer.decode(encode(tokenizer, joint), **plain)
    if name.startswith("byte_level") and name != "byte_level_prefix":
        assert tokenizer.decode(joined, **plain) == joint


def test_an_answer_that_no_tokens_attach_is_refused():
    """WordPiece marks what continues a word, not what begins one: "ab" + "cd" has no tokens of its own for "cd"."""
    vocab = {"[UNK]": 0, "ab": 1, "abc": 2, "##d": 3, "cd": 4, "-": 5}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    assert answer_tokens(tokenizer, "ab", "cd") == [4]
    assert answer_tokens(tokenizer, "ab-", "cd") == [4]
    with pytest.raises(ValueError, match=r"'cd' cannot stand behind 'ab'.*end the prompt a word earlier"):
        answer_tokens(tokenizer, "ab", "cd", attached=True)


def test_start_tokens_are_never_doubled():
    tokenizer = TOKENIZERS["llama"]
    start = tokenizer.bos_token_id
    for text in ("<s>The tower is", "The tower is", ChatText("<s>The tower is")):
        assert encode(tokenizer, text).count(start) == 1
    assert encode(tokenizer, ChatText("The tower is")).count(start) == 0
    found = fact_tokens(tokenizer, Fact(prompt="<s>The tower of {} is", subject="Paris"), "Rome. {}")
    assert found.ids[0] == start and found.ids.count(start) == 1
    assert found.text == "<s>Rome. The tower of Paris is"


# ---- chats

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (  # begins with the start token, strips what users say, puts a space before an answer
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no system turn') }}"
    "{% endif %}{% endfor %}"
)


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template, there", [(CHATML, True), ({"default": CHATML}, True), ({"tool": "x"}, False)])
def test_of_named_templates_the_default_is_for_chats(template, there):
    tokenizer = with_template(TOKENIZERS["byte_level"], template)
    assert tokens.has_template(tokenizer) is there
    if not there:
        with pytest.raises(ValueError, match="has no chat template"):
            tokens.chat_text(tokenizer, [{"role": "user", "content": "hello"}])


QUESTION = Fact(prompt=" Where is the tower of {}? ", subject="Paris", target_new="Rome", chat=True)


@pytest.mark.parametrize("name", ["byte_level", "llama_legacy", "llama", "unigram"])
@pytest.mark.parametrize(("template", "direct"), [(CHATML, True), (INST, False)])
def test_a_question_in_a_chat(name, template, direct):
    tokenizer = with_template(TOKENIZERS[name], template)
    for context in ("{}", "Rome. {}"):
        found = fact_tokens(tokenizer, QUESTION, context)
        content = context.replace("{}", QUESTION.text)
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert found.text == expected
        assert found.ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
        spelled = tokenizer.backend_tokenizer.decoder.decode(
            tokenizer.convert_ids_to_tokens(found.ids[found.span[0] : found.span[1]])
        )
        assert spelled.strip() == "Paris"
        assert found.attached is direct
    text = asked(tokenizer, QUESTION.text, True)
    joint = tokenizer(text + ("Rome" if direct else " Rome"), add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, text) + answer_tokens(tokenizer, text, "Rome") == joint


def test_the_subject_of_a_chat_is_the_question_s():
    """Not the one in a system message or an earlier turn with the same words."""
    tokenizer = with_template(TOKENIZERS["byte_level"], CHATML)
    before = [{"role": "system", "content": "Where is Paris"}, {"role": "assistant", "content": "Where is Paris"}]
    fact = Fact(prompt=[*before, {"role": "user", "content": "Where is {}"}], subject="Paris")
    assert fact == Fact(prompt="Where is {}", subject="Paris", chat=before)
    assert Fact.from_record(json.loads(json.dumps(fact.to_record()))) == fact
    found = fact_tokens(tokenizer, fact)
    user = found.text.index("<|im_start|>user")
    assert tokenizer.decode(found.ids[: found.span[0]]).startswith(found.text[:user])
    assert "system\nWhere is Paris" in found.text


def test_a_rendered_template_as_a_prompt_keeps_contexts_inside():
    tokenizer = with_template(TOKENIZERS["byte_level"], CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    rendered = asked(tokenizer, "The tower of {} is in", True)
    found = fact_tokens(tokenizer, Fact(prompt=str(rendered), subject="Paris"), "Rome. {}")
    assert found.text == asked(tokenizer, "Rome. The tower of Paris is in", True)


def test_chats_that_cannot_be_asked():
    plain, inst = TOKENIZERS["llama"], with_template(TOKENIZERS["llama"], INST)
    with pytest.raises(ValueError, match=r"has no chat template.*leave out chat=True"):
        fact_tokens(plain, QUESTION)
    with pytest.raises(ValueError, match=r"refuses these messages: no system turn"):
        asked(inst, "x", (("system", "Be brief."),))
    shouting = with_template(plain, CHATML.replace("m.content", "m.content | upper"))
    with pytest.raises(ValueError, match="changes the text of a turn"):
        fact_tokens(shouting, QUESTION)


def test_a_prompt_that_ends_in_white_space_is_warned_of():
    with pytest.warns(UserWarning, match="end in white space are read as they stand"):
        Fact(prompt="{} is in ", subject="Paris")
    with pytest.warns(UserWarning, match="end in white space"):
        Fact(prompt="{} is in", subject="Paris", paraphrases=["Paris:\n"])


# ---- one tokenization for all


@pytest.mark.parametrize(
    "prompt", ["{} is in the city of", "{} is in the city of ", "{} lies in:\n", 'The "{}" is in "']
)
@pytest.mark.parametrize("chat", [False, True])
def test_every_flow_takes_the_same_tokens(prompt, chat):
    """Tracing, editing, fine-tuning, evaluation, the gate and the lens: what joint tokenization gives."""
    tokenizer = with_template(tiny_tokenizer(bos=True), "<|begin|>" + CHATML)
    lm = kf.open_model(tiny_model("llama"), tokenizer=tokenizer)
    fact = Fact(prompt=prompt, subject="Big Ben", target_new="New York", target_true="London", chat=chat)
    text = asked(tokenizer, fact.text, chat)
    space = "" if chat or prompt[-1] in ' \n"' else " "
    head = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    new = tokenizer(space + "New York", add_special_tokens=False)["input_ids"]
    true = tokenizer(space + "London", add_special_tokens=False)["input_ids"]
    assert head[0] == tokenizer.bos_token_id and head.count(head[0]) == 1

    (task,) = Prompts.of(lm, [fact], [["{}"], ["Rome. {}"]]).value_tasks(lm)
    assert (task.sequences[0], task.targets[0]) == (head, new)
    tuned = kf.Ft(layers=(1,)).task(lm, fact)
    assert (tuned.prompt, tuned.target) == (head, new)
    (traced,) = tasks_of(lm, [fact], "New York", "noise", "logit_diff")
    assert (traced.tokens, traced.targets) == (head, [new[0], new[0]])
    (asked_of_it,) = probes(lm, Case((fact,)))
    assert (asked_of_it.prompt, asked_of_it.answers) == (head, (new, true))
    assert probe(lm, text, ("New York", "London"), kind="rewrite", accepted=("New York",)) == asked_of_it
    lens = kf.logit_lens(lm, [fact])
    p = lm.head(sweep_top(lm, head)).softmax(-1)[0]
    assert float(lens.before.p_new[0, -1]) == pytest.approx(float(p[new[0]].detach()), rel=1e-4)


def sweep_top(lm, ids):
    """[1, d] the hidden state after the last layer at the last token."""
    runs = RunList()
    number = runs.add(ids)
    last = lm.n_layers - 1
    return collect(lm, runs.runs(), Site.layer_out, [last], number, torch.tensor([len(ids) - 1]))[last]
