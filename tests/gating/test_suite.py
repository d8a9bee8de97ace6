"""Suites and thresholds: what their files hold, and which mistakes in them are refused."""

import dataclasses
import inspect
import json
import math

import pytest

from kedit_fast.basics.intervals import Interval
from kedit_fast.facts.fact import Fact
from kedit_fast.gating import Check, Suite, Thresholds, load_suite
from kedit_fast.gating.suite import Question, Translation, merged
from tests.conftest import refused

COUNTERFACT = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "{} is in the city of", "subject": "Big Ben", "relation_id": "P131",
        "target_new": {"str": "Rome"}, "target_true": {"str": "London"},
    },
    "paraphrase_prompts": ["Big Ben stands in"],
    "neighborhood_prompts": ["The Tower Bridge is in the city of"],
}  # fmt: skip
EASYEDIT = {
    "subject": "Vimeo", "prompt": "Vimeo is in", "target_new": "Rome",
    "portability": {"one_hop": [{"prompt": "Vimeo's country is", "ground_truth": [["Italy"]]}]},
}  # fmt: skip


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def suite_file(tmp_path, **fields):
    return write(tmp_path / "suite.json", {"format": "kedit_fast.suite"} | fields)


def test_a_suite_file(tmp_path):
    record = COUNTERFACT | {"portability": [{"prompt": "Big Ben is in the country of", "answer": "Italy"}]}
    path = suite_file(
        tmp_path,
        facts=[record],
        portability=[{"prompt": "a b", "answer": "c"}],
        specificity=["one", {"prompt": "two", "answer": "three"}],
        text="text",
        context=["before"],
        doubt=["{prompt} Sure? {prompt}"],
        languages=[{"language": "German", "relation_id": "P131", "prompt": "{} steht in"}],
    )
    suite = load_suite(path)
    about = (("big ben", "{} is in the city of"),)
    assert suite.portability == (Question("a b", "c"), Question("Big Ben is in the country of", "Italy", about))
    assert suite.specificity == (Question("one"), Question("two", "three"))
    assert (suite.text, suite.context, suite.name) == (("text",), ("before",), "suite.json")
    assert suite.languages[0].speaks_of(suite.facts[0])
    assert not suite.languages[0].speaks_of(Fact("{} is", "Big Ben"))
    assert Translation("x", "Big Ben est", subject="BIG ben").speaks_of(suite.facts[0])


def test_the_example_in_the_help_is_a_suite_with_every_field(tmp_path):
    """What help(kedit_fast.load_suite) shows can be copied into a file."""
    text = inspect.getdoc(load_suite)
    example = text[text.index("    {") :]
    example = example[: example.index("\n\n")]
    (tmp_path / "example.json").write_text(example, encoding="utf-8")
    record = json.loads(example)
    names = {field.name for field in dataclasses.fields(Suite)} - {"name"}
    assert set(record) == names | {"format"}
    suite = load_suite(tmp_path / "example.json")
    assert all(getattr(suite, name) for name in names) and len(suite.portability) == 2
    (fact,) = suite.facts
    assert fact.paraphrases and fact.neighborhood and fact.same_subject
    assert all(entry.speaks_of(fact) for entry in suite.languages)
    assert all(name in text[text.index(example) + len(example) :] for name in names)
    assert "load_suite" in inspect.getdoc(Suite)


def test_fact_files_are_suites_as_they_are(tmp_path):
    suite = load_suite(write(tmp_path / "cf.json", [COUNTERFACT]), write(tmp_path / "ee.json", [EASYEDIT]))
    assert [fact.subject for fact in suite.facts] == ["Big Ben", "Vimeo"] and suite.name == "cf.json, ee.json"
    assert suite.facts[0].paraphrases == ("Big Ben stands in",)
    assert suite.portability == (Question("Vimeo's country is", "Italy", (("vimeo", "{} is in"),)),)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"specifity": []}, "unknown fields specifity"),
        ({"format": "other"}, "without \"format\""),
        ({"facts": [{"prompt": "x"}]}, "facts, entry 0"),
        ({"facts": {}}, "facts: expected a list"),
        ({"specificity": [3]}, "expected a prompt or an object"),
        ({"portability": [{"prompt": "a", "answer": 3}]}, "the answer to 'a' is 3"),
        ({"doubt": ["Are you sure?"]}, "expected a text with {prompt}"),
        ({"text": [1]}, "text: expected texts"),
        ({"languages": [{"language": "German", "prompt": "{} ist"}]}, "either relation_id or subject"),
        ({"languages": [{"language": "German", "relation_id": "P1", "prompt": "ist"}]}, "needs one {}"),
        ({"languages": [{"lang": "German"}]}, "has not the fields of a translation"),
    ],
)  # fmt: skip
def test_mistakes_in_a_suite(tmp_path, fields, says):
    with pytest.raises(ValueError, match=says.replace("{", r"\{").replace("}", r"\}")) as error:
        load_suite(suite_file(tmp_path, **fields))
    assert "suite.json" in str(error.value)


def test_other_files(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    refused(r"bad\.json: line 1", load_suite, tmp_path / "bad.json")
    with pytest.raises(OSError):
        load_suite(tmp_path / "none.json")


def test_a_suites_fact_adds_to_the_edits_own():
    mine = Fact("{} is in", "Big Ben", "Rome", paraphrases=("Big Ben, in",), id="1")
    theirs = Fact(
        "{} is  in", "big ben", None, "London", paraphrases=("Big Ben,  in ", "Find Big Ben in"),
        neighborhood=("Tower Bridge is in", ("The Louvre is in", "Paris")), same_subject=[("Big Ben weighs", "13.7 t")],
    )  # fmt: skip
    other = Fact("{} is in", "Vimeo", "Rome")
    facts, controls = merged([mine], Suite(facts=(theirs, other)))
    assert controls == [other] and len(facts) == 1
    assert (facts[0].target_new, facts[0].target_true, facts[0].id) == ("Rome", "London", "1")
    assert facts[0].paraphrases == ("Big Ben, in", "Find Big Ben in")
    assert facts[0].neighborhood == ("Tower Bridge is in", Question("The Louvre is in", "Paris"))
    assert facts[0].same_subject == (Question("Big Ben weighs", "13.7 t"),)


def test_a_suites_neighbors_keep_the_suites_answer():
    mine = Fact("{} is in", "Big Ben", "Rome", "London", neighborhood=("Tower Bridge is in",))
    theirs = Fact("{} is in", "Big Ben", "Rome", "England", neighborhood=("Stonehenge is in",))
    (fact,), _ = merged([mine], Suite(facts=(theirs,)))
    assert [q.answer for q in fact.questions("neighborhood")] == ["London", "England"]


MQUAKE = {
    "case_id": 7,
    "requested_rewrite": [
        {"prompt": "{} lives in", "subject": "Ann", "target_new": {"str": "Rome"}, "question": "Where does Ann live?"},
        {"prompt": "{} is in", "subject": "Rome", "target_new": {"str": "Spain"}},
    ],
    "questions": ["In which country does Ann live?", "Ann's country?"], "new_answer": "Spain",
}  # fmt: skip


def test_questions_of_a_case_follow_from_all_its_edits(tmp_path):
    suite = load_suite(write(tmp_path / "m.json", [MQUAKE]))
    places = (("ann", "{} lives in"), ("rome", "{} is in"))
    assert [(q.prompt, q.answer) for q in suite.portability] == [(text, "Spain") for text in MQUAKE["questions"]]
    assert all(set(q.about) == set(places) for q in suite.portability)
    assert suite.facts[0].paraphrases == ("Where does Ann live?",)
    inside = load_suite(suite_file(tmp_path, facts=[MQUAKE]))
    assert inside.facts == suite.facts and inside.portability == suite.portability


def test_portability_in_parallel_lists(tmp_path):
    record = EASYEDIT | {"portability": {"hops": {"prompt": ["a", "b"], "ground_truth": [["x", "X"], "y"]}}}
    suite = load_suite(write(tmp_path / "p.json", [record]))
    assert [(q.prompt, q.answer) for q in suite.portability] == [("a", "x"), ("b", "y")]
    record["portability"]["hops"]["ground_truth"].pop()
    refused("2 prompts and 1 answers; expected an answer for each", load_suite, write(tmp_path / "p.json", [record]))


def test_what_a_suite_holds_and_nobody_reads_is_said(tmp_path):
    path = suite_file(tmp_path, facts=[COUNTERFACT | {"paraphrase_prompt": ["Big Ben"]}, {"a": 1}])
    refused("facts, entry 1: fields a fit no known format", load_suite, path)
    with pytest.warns(UserWarning) as seen:
        assert len(load_suite(path, skip_bad=True).facts) == 1
    said = [str(one.message) for one in seen]
    assert "paraphrase_prompt (once; is it 'paraphrase_prompts'?)" in said[0]
    assert "passed over, 1 record: " in said[1] and "entry 1" in said[1]


def test_thresholds_of_a_file(tmp_path):
    path = write(tmp_path / "t.json", {"min_answered": 0.5, "max_leak": None, "policy": {"max_facts": 7}})
    limits = Thresholds.from_json(path)
    assert (limits.min_answered, limits.max_leak, limits.policy.max_facts) == (0.5, None, 7)
    assert (limits.min_probes, limits.min_generalization, limits.max_perplexity_drift) == (50, 0.85, 0.005)


@pytest.mark.parametrize(
    "record, says",
    [
        ({"min_eficacy": 0.9}, "unknown fields min_eficacy"),
        ({"min_answered": 90}, "0.9, not 90"),
        ({"min_answered": None}, "min_answered = None"),
        ({"min_probes": 0}, "at least 1"),
        ({"measure": "best"}, "expected one of generated"),
        ({"policy": {"max_facts": 0}}, "at least 1"),
        ({"policy": {"facts": 3}}, "unknown fields facts"),
        ({"confident": 1}, "True or False"),
        ([], "expected an object"),
    ],
)
def test_mistakes_in_thresholds(tmp_path, record, says):
    assert "t.json" in refused(says, Thresholds.from_json, write(tmp_path / "t.json", record))


@pytest.mark.parametrize(
    "value, n, changes, verdict",
    [
        (0.9, 50, dict(limit=0.9, required=50), "pass"),
        (0.89, 50, dict(limit=0.9, required=50), "fail"),
        (1.0, 49, dict(limit=0.9, required=50), "fail"),
        (1.0, 0, dict(limit=0.9), "fail"),
        (math.nan, 50, dict(limit=0.9), "fail"),
        (math.nan, 50, dict(limit=0.9, rises=False), "fail"),
        (0.02, 500, dict(limit=0.02, rises=False), "pass"),
        (0.021, 500, dict(limit=0.02, rises=False), "fail"),
        (0.95, 50, dict(limit=0.9, confident=True), "fail"),
        (0.0, 50, dict(limit=0.06, rises=False, confident=True), "pass"),
        (0.5, 50, {}, "reported"),
        (math.nan, 0, {}, "not measured"),
    ],
)
def test_verdicts(value, n, changes, verdict):
    check = Check.of("x", "form", Interval(value, value - 0.05, value + 0.05, n), **changes)
    assert check.verdict == verdict and bool(check.reason) == (verdict == "fail")


@pytest.mark.parametrize(
    "value, n, changes, reason",
    [
        (7 / 11, 11, dict(limit=0.9, required=50), "11 found, at least 50 needed; 63.64% is below 90.00%"),
        (1.0, 11, dict(limit=0.9, required=50), "11 found, at least 50 needed"),
        (7 / 11, 60, dict(limit=0.9, required=50), "63.64% is below 90.00%"),
        (0.5, 2, dict(limit=0.1, required=3, rises=False), "2 found, at least 3 needed; 50.00% is above 10.00%"),
        (0.5, 2, dict(limit=0.5, required=3, confident=True),
         "2 found, at least 3 needed; 45.00% (the interval's worse end) is below 50.00%"),
        (math.nan, 2, dict(limit=0.1, required=3), "2 found, at least 3 needed; is not a number"),
        (math.nan, 0, dict(limit=0.1), "0 found, at least 1 needed"),
    ],
)  # fmt: skip
def test_reasons(value, n, changes, reason):
    assert Check.of("x", "form", Interval(value, value - 0.05, value + 0.05, n), **changes).reason == reason
