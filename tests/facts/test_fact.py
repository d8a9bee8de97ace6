"""Facts: validation and checks before an edit."""

import json

import pytest

from kedit_fast.facts.fact import Fact, Question, check_facts
from tests.make import TOWER

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
        ({"id": 4}, r"Fact.id = 4: expected a text"),
        ({"provenance": "me"}, r"Fact.provenance: expected a mapping"),
        ({"chat": "yes"}, r"Fact.chat: expected True or messages \[\{.*got 'yes'"),
        ({"chat": [{"role": "system"}]}, "Fact.chat: expected True or messages"),
        ({"prompt": []}, "Fact.prompt as messages: the last must be the user's"),
        ({"prompt": [("assistant", "{} is")]}, "the last must be the user's"),
        ({"prompt": [("user", "It is")]}, r"Fact.prompt needs one \{\}"),
        ({"phrasings": "one prompt"}, r"Fact.phrasings: expected a tuple of prompts"),
        ({"phrasings": ["It is in Rome"]}, r"Fact.phrasings: subject 'Paris' not in prompt 'It is in Rome'"),
        ({"phrasings": ["{}, or {}, is in"]}, r"Fact.phrasings: .*in several places of prompt"),
        ({"phrasings": ["{} is in"], "paraphrases": ["paris  is in"]}, "'paris  is in' is among the phrasings"),
        ({"phrasings": ["{} is in"], "paraphrases": ["{}  is in"]}, "'Paris  is in' is among the phrasings"),
        (
            {"neighborhood": ["{} lies in"]},
            r"neighborhood: '{} lies in' has a place for a subject",
        ),
        ({"attached": 1}, "Fact.attached: expected True, False or None"),
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


def test_a_place_for_the_subject_is_filled_in():
    """It would be asked literally else, and pass for a wording that was not trained on."""
    same = ["{}'s mayor is", ("{} is a", "city"), "Paris's  mayor is"]
    fact = Fact("{} lies in", "Paris", paraphrases=["Where is {}? In", "Where is Paris?  In"], same_subject=same)
    assert fact.paraphrases == ("Where is Paris? In",) and Fact.from_record(fact.to_record()) == fact
    assert [question.prompt for question in fact.questions("same_subject")] == ["Paris's mayor is", "Paris is a"]


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


def test_phrasings_are_the_fact_in_other_words():
    """Whole prompts or templates, each once, the prompt itself never; facts of their own to whoever trains on them."""
    phrasings = ["You find {} in", "Paris lies in", "In PARIS you are in", "you find Paris  in", "So Paris is in"]
    fact = Fact("{} lies in", "Paris", "Italy", "France", chat=True, attached=False, id="7", phrasings=phrasings)
    assert fact.phrasings == ("You find {} in", "In PARIS you are in", "So Paris is in")
    first, second, third = fact.phrased()
    assert (first.prompt, first.subject, second.prompt, second.subject) == (
        "You find {} in", "Paris", "In {} you are in", "PARIS",
    )  # fmt: skip
    assert third == Fact("So {} is in", "Paris", "Italy", "France", chat=True, attached=False, id="7")
    record = json.loads(json.dumps(fact.to_record()))
    assert Fact.from_record(record) == fact and record["phrasing_prompts"] == list(fact.phrasings)
    whole = Fact("Paris lies in", target_new="Italy", phrasings=("Where is Paris? In",))
    assert [one.text for one in whole.phrased()] == ["Where is Paris? In"]
    assert "phrasing_prompts" not in TOWER.to_record() and not TOWER.phrased()


def test_a_fact_may_have_no_subject():
    fact = Fact("Water boils at", target_new="90 degrees", paraphrases=("The boiling point of water is",))
    assert fact.text == "Water boils at" and fact.label == "'Water boils at'"
    assert Fact.from_record(json.loads(json.dumps(fact.to_record()))) == fact
    assert check_facts([fact], need_new=True) == [fact]
    with pytest.raises(ValueError, match=r"fact 'Water boils at' has no subject: .* or edit by fine-tuning"):
        check_facts([TOWER, fact], need_subject=True)


PROVENANCE = {"relation_id": "P17", "who": "me", "why": ["test"]}


@pytest.mark.parametrize(
    "fact",
    [
        Fact(prompt="{} lies in", subject="Čapek {}"),
        Fact("Where is {}? In", "Paris", "Italy", "France", ("p", "q"), ("n",), ("s",), "7", PROVENANCE),
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


def test_duplicates_are_warned_of_and_left_out():
    twin = Fact(prompt="{}  is in the CITY of", subject="the eiffel tower", target_new="Rome", id="u")
    with pytest.warns(UserWarning, match=r"^1 fact: left out.*: u \("):
        assert check_facts([TOWER, twin]) == [TOWER]


@pytest.mark.parametrize("between", [[], [Fact(prompt=TOWER.prompt, subject=TOWER.subject)]])
def test_contradiction_names_both(between):
    other = Fact(prompt="{} is in the city of ", subject="The Eiffel  tower", target_new="Oslo", id="v")
    with pytest.raises(ValueError, match=r"facts t \(.*\) and v \(.*\) contradict each other: .*'Rome' and 'Oslo'"):
        check_facts([*between, TOWER, other])


def test_pointless_edit_is_warned_of():
    with pytest.warns(UserWarning, match="target_new equals target_true"):
        check_facts([Fact(prompt="{} is in", subject="Lyon", target_new="France", target_true="France")])


@pytest.mark.parametrize("relation", ["P17", ["P17", "P131"]])  # any JSON value
def test_another_target_for_one_relation_is_warned_of(relation):
    about = {"subject": "Lyon", "provenance": {"relation_id": relation}}
    facts = [Fact("{} is in", target_new="Italy", **about), Fact("{} belongs to", target_new="Spain", **about)]
    with pytest.warns(UserWarning, match="same subject and relation_id"):
        assert check_facts(facts) == facts


def test_facts_that_lack_what_is_needed_can_be_left_out():
    facts = [TOWER, Fact("{} is in", "Lyon"), Fact("Water is", target_new="dry")]
    with pytest.warns(UserWarning, match="2 facts: left out: no target_new, or no subject: 'Lyon is in', 'Water is'"):
        assert check_facts(facts, need_new=True, need_subject=True, skip_bad=True) == [TOWER]


def test_check_facts_gives_facts_back_or_refuses():
    with pytest.raises(ValueError, match="has no target_new"):
        check_facts([Fact(prompt="{} is in", subject="Lyon")], need_new=True)
    with pytest.raises(ValueError, match="facts is empty"):
        check_facts([])
    facts = [TOWER, Fact(prompt="{} lies in", subject="Paris")]
    assert check_facts(TOWER) == [TOWER] and check_facts(facts) == facts
    with pytest.raises(TypeError, match=r"facts = .*: expected Facts.* or what load_facts gives"):
        check_facts([TOWER.to_record()])
