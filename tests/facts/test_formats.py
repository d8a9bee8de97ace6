"""Fact files: every public format, what is said of a broken one, and the package's own file."""

import gzip
import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kedit_fast.facts.fact import OWN_FACTS as OWN
from kedit_fast.facts.fact import Fact, check_facts, load_facts
from kedit_fast.facts.tokens import answer_tokens, fact_tokens
from tests.conftest import refused
from tests.make import TOWER

PUBLIC = Path(__file__).parents[3] / "shared" / "data"

# A record as its file has it, and the fields of the fact that it is.
RECORDS = {
    "counterfact": (
        """{"case_id": 5, "requested_rewrite": {"prompt": "{} lies in", "subject": "Kyiv", "relation_id": "P17",
            "target_new": {"str": "Peru", "id": "Q1"}, "target_true": {"str": "Ukraine"}},
            "paraphrase_prompts": ["Kyiv is in"], "attribute_prompts": ["Lima lies in"],
            "generation_prompts": ["Kyiv has", "Kyiv has"],
            "neighborhood_prompts": [{"prompt": "Odesa lies in", "target": "Ukraine"}, "Lviv lies in"]}""",
        """{"id": "5", "prompt": "{} lies in", "subject": "Kyiv", "target_new": "Peru", "target_true": "Ukraine",
            "paraphrases": ["Kyiv is in"], "neighborhood": ["Odesa lies in", "Lviv lies in"],
            "provenance": {"relation_id": "P17", "target_id": "Q1", "generation_prompts": ["Kyiv has"]}}""",
    ),
    "known_1000": (
        """{"known_id": 0, "subject": "Vinson Massif", "attribute": "Antarctica", "template": "{} is on the continent",
            "prediction": " of Antarctica", "prompt": "Vinson Massif is on the continent of", "relation_id": null}""",
        """{"id": "0", "prompt": "{} is on the continent of", "subject": "Vinson Massif",
            "target_true": "Antarctica"}""",
    ),
    "zsre": (
        """{"id": "z:1", "subject": "Ann", "src": "In which year was Annex Ann, or Ann, built?", "alt": "2006",
            "answers": ["1998", "1999"], "rephrase": "When was Ann built?", "loc": "who wrote it", "loc_ans": "Bob"}""",
        """{"id": "z:1", "prompt": "In which year was Annex {}, or Ann, built?", "subject": "Ann",
            "target_new": "2006", "target_true": "1998", "paraphrases": ["When was Ann built?"],
            "neighborhood": [["who wrote it", "Bob"]]}""",
    ),
    "knowedit": (
        """{"subject": "Epas", "prompt": "Which family does Epas belong to?", "target_new": "Noctuidae",
            "ground_truth": [["Aspid"]], "rephrase_prompt": "What family is Epas?",
            "locality": {"Relation_Specificity": [{"prompt": "The rank of Epas is", "ground_truth": ["genus"]}]},
            "portability": {"Reasoning": [{"prompt": "?", "ground_truth": "moths"}]}}""",
        """{"id": "0", "prompt": "Which family does {} belong to?", "subject": "Epas", "target_new": "Noctuidae",
            "target_true": "Aspid", "paraphrases": ["What family is Epas?"],
            "same_subject": [["The rank of Epas is", "genus"]],
            "provenance": {"portability": {"Reasoning": [{"prompt": "?", "ground_truth": "moths"}]}}}""",
    ),
    "qaedit": (
        """{"id": 9, "source": "NQ", "prompt": "who owns the moon?", "target": "Nobody", "subject": "the moon",
            "rephrase": "whose is the moon?", "locality": [{"loc": "who runs", "loc_ans": "Al"}]}""",
        """{"id": "9", "prompt": "who owns {}?", "subject": "the moon", "target_new": "Nobody",
            "paraphrases": ["whose is the moon?"], "neighborhood": [["who runs", "Al"]],
            "provenance": {"source": "NQ"}}""",
    ),
    "measured": (
        """{"source": "known_1000", "id": 2, "prompt": "Ise is in", "subject": "Ise", "target_true": "Japan",
            "p_true": 0.9, "target_new": null}""",
        """{"id": "2", "prompt": "{} is in", "subject": "Ise", "target_true": "Japan",
            "provenance": {"source": "known_1000"}}""",
    ),
    "a Fact's own names": (
        """{"prompt": "{} is in", "subject": "Ise", "target_new": "Peru", "paraphrases": ["Ise lies in"], "id": "2",
            "target_true": "Japan", "neighborhood": ["Oslo is in"], "same_subject": "Ise has",
            "phrasings": "Is Ise"}""",
        """{"prompt": "{} is in", "subject": "Ise", "target_new": "Peru", "paraphrases": ["Ise lies in"], "id": "2",
            "target_true": "Japan", "neighborhood": ["Oslo is in"], "same_subject": ["Ise has"],
            "phrasings": ["Is Ise"]}""",
    ),
}


def fact_of(text):
    """The fact of these fields; a question with its answer stands as a pair."""
    fields = json.loads(text)
    for kind in {"neighborhood", "same_subject"} & fields.keys():
        fields[kind] = [tuple(one) if isinstance(one, list) else one for one in fields[kind]]
    return Fact(**fields)


def write(path, records):
    """Records to a file of the kind its suffix says."""
    text = "\n".join(map(json.dumps, records)) if ".jsonl" in path.name else json.dumps(records)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize(
    "wrong, right", [("paraphrase_prompt", "paraphrase_prompts"), ("neighbourhood", "neighborhood")]
)
def test_fields_that_are_not_used_are_said_once(wrong, right, tmp_path):
    record = TOWER.to_record() | {"attribute_prompts": ["Rome has"], "split": "edit", "generation_prompts": []}
    record["requested_rewrite"] |= {"note": "x"}
    path = write(tmp_path / "facts.json", [record, record | {wrong: ["a"]}, record | {wrong: ["a"]}])
    with pytest.warns(UserWarning) as seen:
        assert len(load_facts(path)) == 3
    assert [str(one.message) for one in seen] == [
        f"{path}: read and not used: requested_rewrite.note (3 times), attribute_prompts (3 times), "
        f"{wrong} (2 times; is it '{right}'?)"
    ]


def test_keys_given_twice_are_said(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text('[{"prompt": "a is", "prompt": "a was", "subject": "a", "target_new": "b"}]')
    with pytest.warns(UserWarning, match=r"given twice in one object, and the last is taken: prompt \(once\)"):
        assert load_facts(path)[0].text == "a was"


FLAT_RECORD = {"prompt": "Paris is in", "subject": "Paris", "target_new": "Italy", "ground_truth": "France"}


@pytest.mark.parametrize(
    "fields, neighborhood, same_subject",
    [
        ({"locality_prompt": "Bonn is in", "locality_ground_truth": "Germany"}, (("Bonn is in", "Germany"),), ()),
        ({"locality_prompt": ["Bonn is in", "Paris has"], "locality_ground_truth": ["Germany", ["cafes", "bars"]]},
         (("Bonn is in", "Germany"),), (("Paris has", "cafes"),)),
        ({"locality": {"a": {"prompt": ["x", "y"], "ground_truth": ["1", "2"]}, "b": [{"loc": "z", "loc_ans": "3"}]}},
         (("x", "1"), ("y", "2"), ("z", "3")), ()),
        ({"locality": {"prompt": "x", "ground_truth": [["1", "one"]]}}, (("x", "1"),), ()),
        ({"locality": {"prompt": "PARIS has", "ground_truth": "cafes"}}, (), (("PARIS has", "cafes"),)),
        ({"neighborhood": [{"prompt": "Bonn is in", "answer": "Germany"}, "Nice is in"]},
         (("Bonn is in", "Germany"), "Nice is in"), ()),
        ({"neighborhood": [{"prompt": "Nice is in", "answer": "France"}]}, ("Nice is in",), ()),
        ({"locality_ground_truth": "France", "neighborhood": ["Nice is in"]}, ("Nice is in",), ()),
    ],
)  # fmt: skip
def test_locality_in_every_published_form(tmp_path, recwarn, fields, neighborhood, same_subject):
    (fact,) = load_facts(write(tmp_path / "f.json", [FLAT_RECORD | fields]))
    expected = Fact("{} is in", "Paris", "Italy", "France", neighborhood=neighborhood, same_subject=same_subject)
    assert fact == replace(expected, id="0")
    assert not recwarn.list


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"locality": [{"prompt": "Bonn is in"}, "Oslo is in"]}, "locality prompts without an answer (2 times)"),
        ({"locality_ground_truth": "Germany"}, "locality_ground_truth (once)"),
        ({"paraphrases": [{"prompt": "Paris lies in", "answer": "Italy"}]}, "paraphrases.answer (once)"),
    ],
)
def test_a_probe_without_a_use_is_said(tmp_path, fields, says):
    with pytest.warns(UserWarning) as seen:
        load_facts(write(tmp_path / "f.json", [FLAT_RECORD | fields]))
    assert len(seen) == 1 and says in str(seen[0].message)


@pytest.mark.parametrize(
    "locality, says",
    [
        # Read as a kind of questions, its text would be asked.
        ([{"answer": "x"}], ".* has 'answer' and no 'prompt'; expected both"),
        (
            {"prompt": ["x", "y"], "ground_truth": ["1", "2", "3"]},
            "2 prompts and 3 answers; expected an answer for each",
        ),
        ([3], "expected a prompt or an object with 'prompt' and 'answer', found 3"),
    ],
)
def test_questions_and_answers_that_do_not_go_together(tmp_path, locality, says):
    with pytest.raises(ValueError, match=f"record 0: locality: {says}"):
        load_facts(write(tmp_path / "f.json", [FLAT_RECORD | {"locality": locality}]))


@pytest.mark.parametrize(
    "record, fact",
    [
        ({"prompt": "Water boils at", "target_new": "90 degrees", "id": 1}, Fact("Water boils at", None, "90 degrees")),
        ({"question": "Who is it?", "answer": "Ann", "id": 1}, Fact("Who is it?", None, "Ann")),
        ({"requested_rewrite": {"prompt": "Water is", "target_new": {"str": "dry"}}, "case_id": 1},
         Fact("Water is", None, "dry")),
        ({"text": "This is on ann lee. She", "labels": "was born.", "concept": "ann lee", "id": 1},
         Fact("This is on {}. She", "ann lee", "was born.")),
    ],
)  # fmt: skip
def test_records_without_a_subject_and_passages(tmp_path, record, fact):
    assert load_facts(write(tmp_path / "f.json", [record])) == [replace(fact, id="1")]


def test_a_subject_that_is_spelled_otherwise_is_taken_and_said(tmp_path):
    records = [FLAT_RECORD, FLAT_RECORD | {"subject": "paris"}, FLAT_RECORD | {"subject": "PARIS"}]
    with pytest.warns(UserWarning, match="otherwise.*, 2 records: 'paris' as 'Paris'; 'PARIS' as 'Paris'") as seen:
        facts = load_facts(write(tmp_path / "f.json", records))
    assert {(fact.subject, fact.prompt) for fact in facts} == {("Paris", "{} is in")} and len(seen) == 1


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_bad_records_can_be_passed_over(tmp_path, suffix):
    good = {"prompt": "Paris is in", "subject": "Paris", "target_new": "Italy"}
    bad = [good | {"subject": "Rome"}, {"a": 1}, good | {"target_new": ""}, 7]
    path, n_bad = write(tmp_path / f"facts{suffix}", [bad[0], good, *bad[1:], good | {"subject": "is"}]), 4
    if suffix == ".jsonl":
        path.write_text(path.read_text() + "\n{")
        n_bad = 5
    with pytest.raises(ValueError, match=r"record 0.*subject 'Rome' not in prompt"):
        load_facts(path)
    says = rf"passed over, {n_bad} records: .*record 0.*'Rome' not in.*; and {n_bad - 3} more"
    with pytest.warns(UserWarning, match=says):
        facts = load_facts(path, skip_bad=True)
    assert [(fact.subject, fact.id) for fact in facts] == [("Paris", "1"), ("is", "5")]
    with pytest.warns(UserWarning, match="passed over, 1 record: "):
        assert load_facts(path, 1, skip_bad=True) == facts[:1]
    with pytest.raises(ValueError, match=r"no record makes a fact; the first: .*record 0"):
        load_facts(write(tmp_path / f"none{suffix}", bad), skip_bad=True)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
@pytest.mark.parametrize("name", RECORDS)
def test_every_format_in_every_file_kind(tmp_path, name, suffix):
    record, fact = json.loads(RECORDS[name][0]), fact_of(RECORDS[name][1])
    for read in (record, fact.to_record()):  # the last: the package's own format
        assert load_facts(write(tmp_path / f"facts{suffix}", [read])) == [fact]


def test_mquake_record_gives_several_facts(tmp_path):
    rewrites = [{"prompt": "{} is", "subject": s, "target_new": {"str": "y"}} for s in "abc"]
    path = write(tmp_path / "m.json", [{"case_id": 3, "requested_rewrite": rewrites}])
    assert [(fact.id, fact.subject) for fact in load_facts(path)] == [("3.0", "a"), ("3.1", "b"), ("3.2", "c")]
    assert [fact.id for fact in load_facts(path, n=2)] == ["3.0", "3.1"]


def test_n_reads_no_further(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(TOWER.to_record()) + "\nnot JSON\n")
    assert load_facts(path, n=1) == [TOWER]
    with pytest.raises(ValueError, match="line 2"):
        load_facts(path, n=2)


@pytest.mark.parametrize("n", [0, -1, True, 2.0, "3"])
def test_n_must_be_positive(n):
    with pytest.raises(ValueError, match="expected a whole number of at least 1"):
        load_facts(OWN, n=n)


FLAT = {"prompt": "Paris is in", "subject": "Paris", "target_true": "France"}
REWRITE = {"requested_rewrite": {"prompt": "{} is in", "subject": "Paris"}}
GOOD = json.dumps(FLAT)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.csv", "", r"f.csv: a fact file ends in one of .json, .jsonl, .json.gz, .jsonl.gz"),
        ("f.json", "[]", r"f.json: holds no records"),
        ("f.jsonl", "\n \n", r"f.jsonl: holds no records"),
        ("f.json", '{"a": 1}', r"f.json: expected a JSON array of records, found an object"),
        ("f.json", f"[{GOOD},\n{GOOD},\n{{]", r"f.json: line 3, column 2: not JSON"),
        ("f.json", f"{GOOD}\n{GOOD}", r"f.json: line 2, column 1: .*name the file .jsonl"),
        ("f.jsonl", f"{GOOD}\n\n{{'a'", r"f.jsonl: line 3, column 2: not JSON"),
        ("f.jsonl", f"{GOOD}\n\n7", r"f.jsonl: record 1 \(line 3\): expected an object .* found a number"),
    ],
)
def test_file_problems_say_where(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    assert str(tmp_path / name) in refused(message, load_facts, tmp_path / name)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        *((form | {"provenance": bad}, "provenance: expected an object with named fields")
          for form in (FLAT, REWRITE) for bad in ([1], 3, "me", [["a", 1]])),
        ({"subject": "x", "template": "y"},
         r"fields subject, template fit no known format; tried CounterFact \(misses requested_rewrite\); "
         r"known_1000 \(misses attribute\); .*flat \(misses prompt, target_new or target or"),
        ({"requested_rewrite": []}, "requested_rewrite: expected at least one fact"),
        ({"requested_rewrite": "x"}, "requested_rewrite: expected an object, found a string"),
        ({"requested_rewrite": {"subject": "a"}}, "requested_rewrite misses prompt"),
        ({"requested_rewrite": {"prompt": "{} is"}}, "prompt '{} is' has a place for a subject"),
        ({"requested_rewrite": {"prompt": "{} is", "subject": "a", "target_new": {"id": 3}}},
         "target_new: expected a string or an object with 'str'"),
        (REWRITE | {"paraphrase_prompts": [{"text": 1}]},
         "paraphrase_prompts: expected a string or an object with 'prompt'"),
        (FLAT | {"prompt": "Rome is in"}, "subject 'Paris' not in prompt 'Rome is in'"),
        (FLAT | {"target_new": ""}, "Fact.target_new is empty"),
        (FLAT | {"subject": ""}, r"the subject is empty \(''\)"),
        (FLAT | {"prompt": 5}, "prompt: expected a string"),
        (FLAT | {"target_new": "\ud800"}, r"Fact\.target_new: '\\ud800' holds half a character"),
        (FLAT | {"rephrase": ["Is it\ud800?"]}, r"Fact\.paraphrases: .* holds half a character"),
        (FLAT | {"locality": 3}, "locality: expected a prompt or"),
        ({"prompt": "{} is in", "subjct": "Paris", "target_new": "Italy"}, ".*; is 'subjct' meant to be 'subject'"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_read_is_named(tmp_path, record, message):
    (tmp_path / "f.json").write_text(json.dumps([FLAT, record]))
    with pytest.raises(ValueError, match=rf"f\.json: record 1: {message}"):
        load_facts(tmp_path / "f.json")
    (tmp_path / "f.jsonl").write_text(f"{GOOD}\n\n{json.dumps(record)}")
    with pytest.raises(ValueError, match=rf"f\.jsonl: record 1 \(line 3\): {message}"):
        load_facts(tmp_path / "f.jsonl")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000], ids=["brackets", "digits"])
def test_json_that_python_cannot_hold(tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=r"f\.json: JSON that cannot be read"):
        load_facts(tmp_path / "f.json")
    (tmp_path / "f.jsonl").write_text(f"{GOOD}\n{text}")
    with pytest.raises(ValueError, match=r"f\.jsonl: line 2: JSON that cannot be read"):
        load_facts(tmp_path / "f.jsonl")


def test_null_is_as_absent(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps([FLAT | {"id": None, "case_id": 4, "provenance": None}]))
    (fact,) = load_facts(tmp_path / "f.json")
    assert fact.id == "4" and fact.provenance == {}


@pytest.mark.parametrize("cut", [None, -20])
def test_broken_gzip(tmp_path, cut):
    path = tmp_path / "f.json.gz"
    path.write_bytes(gzip.compress(json.dumps([GOOD] * 50).encode())[:cut] if cut else b"[]")
    with pytest.raises(ValueError, match=r"f.json.gz: not a complete gzip file"):
        load_facts(path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "f.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match=r"f.json: not UTF-8 text"):
        load_facts(tmp_path / "f.json")


@pytest.mark.parametrize(
    ("file", "count", "with_new"),
    [
        ("counterfact/counterfact.json.gz", 19_900, 19_900),
        ("known_1000/known_1000.json.gz", 1_104, 0),
        ("zsre/zsre.json.gz", 1_837, 1_835),
        ("knowedit/knowedit_zsre.json.gz", 968, 968),
        ("qaedit/qaedit_1k.json.gz", 915, 915),
        ("mquake/mquake_hard.json.gz", 4 * 269, 4 * 269),
        ("wikibigedit/wikibigedit_3k.json.gz", 2_726, 2_726),
        ("knowedit/knowedit_wikibio.json.gz", 74, 74),
        ("tofu/tofu_qa.json.gz", 917, 917),
        ("smollm2_known.json.gz", 1_058, 796),
    ],
)
def test_public_files_load_whole(file, count, with_new):
    path = PUBLIC / file
    if not path.exists():
        pytest.skip(f"public data set not here: {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that are not used
        facts = load_facts(path)
    assert len(facts) == count
    assert all(f.subject is None or (f.prompt.count("{}") == 1 and f.text.count(f.subject) >= 1) for f in facts)
    assert all(f.subject is None for f in facts) == file.startswith("tofu")
    assert sum(fact.target_new is not None for fact in facts) == with_new


def test_public_prompts_are_kept():
    path = PUBLIC / "known_1000" / "known_1000.json.gz"
    if not path.exists():
        pytest.skip(f"public data set not here: {path}")
    with gzip.open(path, "rt") as file:
        prompts = [record["prompt"] for record in json.load(file)]
    assert [fact.text for fact in load_facts(path)] == prompts


# ---- our own fact file


def bare(subject):
    """The subject as it may stand inside a sentence."""
    return subject.casefold().removeprefix("the ")


def test_own_facts():
    facts = load_facts(OWN)
    assert len(facts) >= 40
    assert len({fact.id for fact in facts}) == len({fact.subject for fact in facts}) == len(facts)
    assert check_facts(facts, need_new=True) == facts
    assert facts[0].text == "The Eiffel Tower is in the city of"
    assert len({fact.provenance["relation_id"] for fact in facts}) >= 10
    assert len({fact.target_true for fact in facts[:12]}) == 12
    assert max(Counter(fact.target_true for fact in facts).values()) <= 2


@pytest.mark.parametrize("fact", load_facts(OWN), ids=lambda fact: fact.id)
def test_own_fact_is_complete(fact):
    assert fact.target_new != fact.target_true
    assert fact.target_true.casefold() not in fact.subject.casefold()
    assert len(fact.paraphrases) == 2 and len(fact.neighborhood) >= 5 and len(fact.same_subject) == 2
    name = bare(fact.subject)
    for prompt in (*fact.paraphrases, *fact.same_subject):
        assert name in prompt.casefold()
    for prompt in (*fact.paraphrases, *fact.neighborhood, *fact.same_subject, fact.text):
        assert prompt == prompt.strip() and "{" not in prompt
        assert fact.target_true.casefold() not in prompt.casefold()


def test_own_neighborhoods_name_no_edited_subject():
    facts = load_facts(OWN)
    names = [bare(fact.subject) for fact in facts]
    for fact in facts:
        assert not [(name, prompt) for name in names for prompt in fact.neighborhood if name in prompt.casefold()]


@pytest.mark.smollm2
def test_own_facts_are_known(smollm2):
    """SmolLM2 ranks each true answer first, with probability 0.15 at least, and before each new target."""
    model, tokenizer = smollm2.model, smollm2.tokenizer
    for fact in load_facts(OWN):
        with torch.no_grad():
            logits = model(torch.tensor([fact_tokens(tokenizer, fact).ids])).logits[0, -1]
        (true, *rest), (new, *others) = (answer_tokens(tokenizer, "a", t) for t in (fact.target_true, fact.target_new))
        assert not rest and not others, fact.label
        assert logits.argmax() == true and logits.softmax(-1)[true] >= 0.15, fact.label
        assert logits[new] < logits[true], fact.label


def test_a_prompt_and_its_subject_are_a_fact_to_be_traced():
    fact = Fact.from_record({"prompt": "Big Ben is in", "subject": "Big Ben"})
    assert (fact.prompt, fact.target_new, fact.target_true) == ("{} is in", None, None)
