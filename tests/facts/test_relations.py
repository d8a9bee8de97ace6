"""What facts that name their relations say of each other: other wordings, and other questions about a subject."""

from dataclasses import replace

import kedit_fast as kf
from kedit_fast.facts.relations import Relations
from tests.conftest import refused


def fact(subject, relation, prompt="{} is in", new="Rome", true="Paris"):
    return kf.Fact(prompt, subject, target_new=new, target_true=true, provenance={"relation_id": relation})


def test_other_relations_fit_the_subject_and_cannot_rightly_move():
    relations = Relations([
        fact("Ada", "born in", "{} was born in", true="London"),
        fact("Ada", "field", "{} works on", true="numbers"),
        fact("Bo", "born in", "{} was born in", true="Oslo"),
        fact("Bo", "field", "{} studies", true="numbers"),
        fact("Cy", "field", "{} studies", true="plants"),
        fact("Cy", "died in", "{} died in", true="Rome"),
        fact("Di", "born in", "{} was born in", true="Bonn"),
        fact("Di", "died in", "{} died in", true="Bonn"),
        fact("Toyota", "maker", "{} is made by", true="Toyota"),
    ])  # fmt: skip
    born_in_rome = fact("Eve", "born in", "{} was born in", new="Rome")
    assert relations.others(born_in_rome, 3) == ("Eve studies",), "who died in Rome may have been born there"
    born_in_lima = replace(born_in_rome, target_new="Lima")
    assert relations.others(born_in_lima, 3) == ("Eve studies", "Eve died in")
    assert relations.others(born_in_lima, 1) == ("Eve studies",) and relations.others(fact("Vimeo", None), 3) == ()


def test_wordings_are_the_relations_other_prompts():
    made = [fact(f"S{i}", "P1", prompt) for i, prompt in enumerate(("{} is in", "{} has"))]
    made += [fact(f"T{i}", "P1", "{} lies in") for i in range(2)] + [fact("U", "P2", "{} speaks")]
    relations = Relations(made)
    assert relations.wordings(made[0], 3) == ("{} lies in", "{} has"), "the commonest first"
    assert relations.wordings(made[0], 1) == ("{} lies in",) and relations.wordings(made[0], 0) == ()
    assert relations.wordings(replace(made[0], paraphrases=("So. S0 has",)), 3) == ("{} lies in",), "it is held out"
    asked = replace(made[0], same_subject=("S0 Has",))
    assert relations.wordings(asked, 3) == ("{} lies in",), "the words of another relation too"
    assert relations.wordings(made[-1], 3) == () == relations.wordings(fact("V", None), 3)


def test_what_a_fact_lacks_is_filled_in():
    every = [fact("Ada", "a"), fact("Ada", "b", "{} has"), fact("Bo", "a", "{} lies in"), fact("Cy", "b", "{} owns")]
    ada, has, bo, cy = kf.related(every)
    assert [one.phrasings for one in (ada, has, bo, cy)] == [("{} lies in",), ("{} owns",), ("{} is in",), ("{} has",)]
    assert ada.same_subject == ("Ada has",) and bo.same_subject == ("Bo has",) and cy.same_subject == ("Cy is in",)
    own = replace(every[0], phrasings=("{} stands in",), same_subject=("Ada eats",))
    assert kf.related(own, every) == [own], "what it has stays"
    assert kf.related(every[:1], every, phrasings=0, same_subject=0) == every[:1]
    bare = kf.Fact("Paris is in", target_new="Rome", provenance={"relation_id": "a"})
    assert kf.related([bare, every[0]])[0] == bare and kf.related([bare], every) == [bare]
    refused("phrasings = -1", kf.related, every, phrasings=-1)


def test_no_prompt_is_taken_that_the_fact_is_asked_already():
    """Neither its own prompt, as another relation's words, nor one that stands inside a held-out wording."""
    every = [fact("Ada", "a"), fact("Ada", "b"), fact("Bo", "b", "{} has"), fact("Bo", "b", "{}  IS in")]
    assert kf.related(every)[0].same_subject == ("Ada has",), "the commonest words of b are its own prompt"
    held_out = replace(every[0], paraphrases=("In 1900 Ada has a house in",))
    assert kf.related(held_out, every)[0].same_subject == ()
    words = [fact(str(i), "c", prompt) for i, prompt in enumerate(("{} works as", "{} WORKS  as", "{} is a"))]
    asked = replace(words[2], subject="Cy", paraphrases=("Today Cy works as a",))
    assert Relations(words).wordings(asked, 3) == () and Relations(words).wordings(fact("V", "c"), 3)[1:] == (
        "{} is a",
    )


def test_questions_of_a_chat_are_not_mixed_with_statements():
    chat = [replace(one, chat=True) for one in (fact("Ada", "a", "Where is {}?"), fact("Bo", "a", "What place is {}?"))]
    plain = [fact("Cy", "a"), fact("Di", "a", "{} lies in")]
    found = kf.related([*chat, *plain])
    assert [one.phrasings for one in found] == [
        ("What place is {}?",),
        ("Where is {}?",),
        ("{} lies in",),
        ("{} is in",),
    ]


def test_answers_are_compared_whatever_the_case():
    every = [fact("Ada", "a"), fact("Ada", "b", "{} has", true="rome ")]
    assert kf.related(every)[0].same_subject == ()
