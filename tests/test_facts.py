"""Facts: validation, checks before an edit, and the subject's place in a tokenized prompt."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kedit_fast.facts import (
    Fact,
    Question,
    check_facts,
    continuation_tokens,
    encode_span,
    fact_tokens,
    subject_tokens,
    target_tokens,
)

TOWER = Fact(prompt="{} is in the city of", subject="The Eiffel Tower", target_new="Rome", target_true="Paris", id="t")


# ---- Fact


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "It is in Paris"}, r"subject 'Paris' not in prompt 'It is in Paris'; Fact.prompt needs one \{\}"),
        ({"prompt": "{} and {}"}, r"in several places of prompt .* it has 2"),
        ({"prompt": " "}, r"Fact.prompt is empty"),
        ({"subject": None}, r"prompt '\{\} lies in' has a place for a subject .* and Fact.subject is None"),
        ({"subject": " "}, r"Fact.subject is empty"),
        ({"subject": 3}, r"Fact.subject: expected a string, got 3"),
        ({"target_new": ""}, r"Fact.target_new is empty"),
        ({"target_true": ["Rome"]}, r"Fact.target_true: expected a string, got \['Rome'\]"),
        ({"paraphrases": "one prompt"}, r"Fact.paraphrases: expected a tuple of prompts"),
        ({"neighborhood": ["a", None]}, r"Fact.neighborhood: expected a string, got None"),
        ({"neighborhood": [("a", " ")]}, r"Fact.neighborhood: the answer to 'a' is empty"),
        ({"neighborhood": ("a", ("b",))}, r"Fact.neighborhood: expected a string, got \('b',\)"),
        ({"neighborhood": Question("a", "b")}, r"Fact.neighborhood: expected a tuple of prompts"),
        ({"paraphrases": [("a", "b")]}, r"Fact.paraphrases: expected a string, got \('a', 'b'\)"),
        ({"same_subject": 7}, r"Fact.same_subject: expected a tuple of prompts, got 7"),
        ({"id": 4}, r"Fact.id: expected a string, got 4"),
        ({"provenance": "me"}, r"Fact.provenance: expected a mapping"),
    ],
)
def test_fact_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Fact(**{"prompt": "{} lies in", "subject": "Paris"} | fields)


def test_fact_text_keeps_braces():
    assert Fact(prompt="In {}, as {0} says,", subject="{x} {}").text == "In {x} {}, as {0} says,"


def test_fact_is_a_value():
    fact = Fact(prompt="{} lies in", subject="Paris", paraphrases=["a", "b"], provenance={"who": "me"})
    assert fact.paraphrases == ("a", "b")
    assert hash(fact) == hash(Fact(prompt="{} lies in", subject="Paris", paraphrases=("a", "b")))
    assert fact != Fact(prompt="{} lies in", subject="Paris", paraphrases=("a", "b"))


def test_prompts_that_differ_in_white_space_count_once():
    lists = dict.fromkeys(("paraphrases", "neighborhood", "same_subject"), ("a b", " a  b", "A b", "a\tb\n"))
    fact = Fact("{} lies in", "Paris", **lists)
    assert fact.paraphrases == fact.neighborhood == fact.same_subject == ("a b", "A b")


def test_answers_of_their_own():
    fact = Fact(
        "{} lies in", "Paris", "Italy", "France",
        neighborhood=["Lyon lies in", ("Bonn is in", "Germany"), ("Nice is in", " France"), ("Lyon lies  in", "Gaul")],
        same_subject=("Paris has", ("Paris is a", "city")),
    )  # fmt: skip
    bonn, lyon = Question("Bonn is in", "Germany"), Question("Lyon lies  in", "Gaul")
    assert fact.neighborhood == (lyon, bonn, "Nice is in")
    assert fact.questions("neighborhood") == (lyon, bonn, Question("Nice is in", "France"))
    assert fact.questions("same_subject") == (Question("Paris has"), Question("Paris is a", "city"))
    assert Fact.from_record(json.loads(json.dumps(fact.to_record()))) == fact


def test_a_fact_may_have_no_subject():
    fact = Fact("Water boils at", target_new="90 degrees", paraphrases=("The boiling point of water is",))
    assert fact.text == "Water boils at" and fact.label == "'Water boils at'"
    assert Fact.from_record(json.loads(json.dumps(fact.to_record()))) == fact
    assert check_facts([fact], need_new=True) == [fact]
    with pytest.raises(ValueError, match=r"fact 'Water boils at' has no subject: .* or edit by fine-tuning"):
        check_facts([TOWER, fact], need_subject=True)


@pytest.mark.parametrize(
    "fact",
    [
        Fact(prompt="{} lies in", subject="Čapek {}"),
        Fact(
            prompt="Where is {}? In",
            subject="Paris",
            target_new="Italy",
            target_true="France",
            paraphrases=("p", "q"),
            neighborhood=("n",),
            same_subject=("s",),
            id="7",
            provenance={"relation_id": "P17", "who": "me", "why": ["test"]},
        ),
    ],
)
def test_record_round_trip(fact):
    record = json.loads(json.dumps(fact.to_record()))
    assert Fact.from_record(record) == fact
    if fact.id:
        assert record["requested_rewrite"]["relation_id"] == "P17"
        assert record["provenance"] == {"who": "me", "why": ["test"]}


def test_from_record_wants_one_fact():
    rewrite = {"prompt": "{} is", "subject": "x", "target_new": {"str": "y"}}
    with pytest.raises(ValueError, match="record holds 2 facts"):
        Fact.from_record({"requested_rewrite": [rewrite, rewrite]})


# ---- check_facts


def test_check_facts_gives_facts_back():
    facts = [TOWER, Fact(prompt="{} lies in", subject="Paris")]
    assert check_facts(facts) == facts


def test_duplicates_are_warned_of_and_left_out():
    twin = Fact(prompt="{}  is in the CITY of", subject="the eiffel tower", target_new="Rome", id="u")
    with pytest.warns(UserWarning, match=r"1 facts: left out.*: u \("):
        assert check_facts([TOWER, twin]) == [TOWER]


@pytest.mark.parametrize("between", [[], [Fact(prompt=TOWER.prompt, subject=TOWER.subject)]])
def test_contradiction_names_both(between):
    other = Fact(prompt="{} is in the city of ", subject="The Eiffel  tower", target_new="Oslo", id="v")
    with pytest.raises(ValueError, match=r"facts t \(.*\) and v \(.*\) contradict each other: .*'Rome' and 'Oslo'"):
        check_facts([*between, TOWER, other])


def test_pointless_edit_is_warned_of():
    with pytest.warns(UserWarning, match="target_new equals target_true"):
        check_facts([Fact(prompt="{} is in", subject="Lyon", target_new="France", target_true="France")])


def test_other_target_for_one_relation_is_warned_of():
    facts = [
        Fact(prompt=prompt, subject="Lyon", target_new=target, provenance={"relation_id": "P17"})
        for prompt, target in [("{} is in", "Italy"), ("{} belongs to", "Spain")]
    ]
    with pytest.warns(UserWarning, match="same subject and relation_id"):
        assert check_facts(facts) == facts


def test_a_relation_may_be_any_json_value():
    facts = [
        Fact(prompt=prompt, subject="Lyon", target_new="Italy", provenance={"relation_id": ["P17", "P131"]})
        for prompt in ("{} is in", "{} belongs to")
    ]
    assert check_facts(facts) == facts


def test_check_facts_refuses():
    with pytest.raises(ValueError, match="has no target_new"):
        check_facts([Fact(prompt="{} is in", subject="Lyon")], need_new=True)
    with pytest.raises(ValueError, match="no facts"):
        check_facts([])
    with pytest.raises(TypeError, match=r"pass \[fact\]"):
        check_facts(TOWER)
    with pytest.raises(TypeError, match="got dict; read records with load_facts"):
        check_facts([TOWER.to_record()])


# ---- tokens

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
        ("{} is in", "Paris"),
        ("The tower of {} is in", "Paris"),
        ("The tower of {}", "Paris"),
        ("Paris is in {} in Paris", "Paris"),
        ("Paris Paris {} Paris is", "Paris"),
        ("{} is in", "Čapek"),
        ("Karel {} is in", "Čapek"),
        ("{} is in", "東京タワー"),
        ("The tower {} is in", "東京タワー"),
        ("The {} is in", "tower of Paris"),
        ("In {}. The", "Rome"),
        ("In {}'s tower", "Paris"),
    ],
)
def test_subject_span_is_the_subject(tokenizer, context, prompt, subject):
    """The span's tokens, decoded without the offsets' help, are the subject, and it takes them all."""
    ids, (b, e) = fact_tokens(tokenizer, Fact(prompt=prompt, subject=subject), context)
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


def test_lookup_is_the_last_subject_token():
    tokenizer = TOKENIZERS["llama"]
    found = fact_tokens(tokenizer, Fact(prompt="The tower of {} is in", subject="Paris"))
    assert found.lookup == found.span[1] - 1
    assert tokenizer.convert_ids_to_tokens(found.ids[found.lookup]) == "▁Paris"
    assert tokenizer.convert_ids_to_tokens(found.ids[0]) == START


def test_straddling_token_belongs_to_the_subject():
    """A token that takes the subject's last characters and what follows is the lookup token."""
    pieces = ["Pa", "ris'", "s", "(Pa", "ris", " is", "Paris"]
    inner = Tokenizer(models.Unigram([("<unk>", -20.0)] + [(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    ids, span = fact_tokens(tokenizer, Fact(prompt="{}'s", subject="Paris"))
    assert (tokenizer.convert_ids_to_tokens(ids), span) == (["Pa", "ris'", "s"], (0, 2))
    ids, span = fact_tokens(tokenizer, Fact(prompt="({} is", subject="Paris"))
    assert (tokenizer.convert_ids_to_tokens(ids), span) == (["(Pa", "ris", " is"], (0, 2))


def test_blanks_around_the_subject_are_not_counted():
    tokenizer = TOKENIZERS["byte_level_untrimmed"]
    ids, (b, e) = fact_tokens(tokenizer, Fact(prompt="The tower of{}in Rome", subject=" Paris "))
    assert tokenizer.decode(ids[b:e]).strip() == "Paris"


def test_letter_that_looks_like_a_word_mark_stays():
    """Maltese Ġ is also the byte-level sign of a space; as a letter of its own it is part of the subject."""
    pieces = ["Ġ", "▁", "o", "r", "ġ", "▁is"]
    inner = Tokenizer(models.Unigram([("<unk>", -20.0)] + [(piece, -1.0) for piece in pieces], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    ids, (b, e) = fact_tokens(tokenizer, Fact(prompt="{} is", subject="Ġorġ"))
    assert tokenizer.convert_ids_to_tokens(ids[b:e]) == ["Ġ", "o", "r", "ġ"]


def test_subject_tokens(tokenizer):
    text = "Paris is in Paris"
    assert subject_tokens(tokenizer, text, "Paris", "Paris is in {}") == encode_span(tokenizer, text, (12, 17))
    assert subject_tokens(tokenizer, text, "is in") == encode_span(tokenizer, text, (6, 11))
    with pytest.raises(ValueError, match="stands 2 times"):
        subject_tokens(tokenizer, text, "Paris")
    with pytest.raises(ValueError, match="is not the text"):
        subject_tokens(tokenizer, text, "Paris", "Rome is in {}")
    with pytest.raises(ValueError, match=r"expected one \{\}, found 0"):
        subject_tokens(tokenizer, text, "Paris", text)


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
        target_tokens(tokenizer, "☃")


@pytest.mark.parametrize("target", ["Paris", " Paris", "Rome", "Čapek", "東京", "Paris in Rome"])
@pytest.mark.parametrize("prompt", ["The tower is in", "Paris", "東京タワー is in"])
def test_continuation_joins_the_prompt(tokenizer, prompt, target):
    """Prompt ids + continuation = the text's ids; the same ids whatever the prompt; and no special token."""
    ids = continuation_tokens(tokenizer, prompt, target)
    assert tokenizer(prompt)["input_ids"] + ids == tokenizer(f"{prompt} {target.strip()}")["input_ids"]
    assert ids == target_tokens(tokenizer, target)
    assert not set(ids) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name.startswith("byte_level")])
def test_byte_level_targets_are_those_of_the_published_code(name):
    for target in ("Paris", "Čapek", "Paris in Rome"):
        alone = TOKENIZERS[name](" " + target, add_special_tokens=False)["input_ids"]
        assert target_tokens(TOKENIZERS[name], target) == alone


def test_sentencepiece_targets_have_no_empty_word_mark():
    tokenizer = TOKENIZERS["llama_legacy"]
    pieces = tokenizer.convert_ids_to_tokens
    assert pieces(tokenizer(" Paris", add_special_tokens=False)["input_ids"]) == ["▁", "▁Paris"]
    assert pieces(target_tokens(tokenizer, "Paris")) == ["▁Paris"]


def test_prompt_that_ends_in_a_space(tokenizer):
    """No second space; and where the space would merge with the target, the prompt's ids stay as they are."""
    ids = continuation_tokens(tokenizer, "The tower is in ", "Paris")
    joined = tokenizer("The tower is in ")["input_ids"] + ids
    assert tokenizer.decode(joined, skip_special_tokens=True).replace("  ", " ").strip() == "The tower is in Paris"


def test_empty_target_is_refused(tokenizer):
    with pytest.raises(ValueError, match="target is empty"):
        target_tokens(tokenizer, " ")
