"""What facts imply by tables made by hand: other names, inverses, hops, loops, conflicts, and a model that is asked."""

from dataclasses import replace

import pytest

import kedit_fast as kf
from kedit_fast.evaluation.probes import probe, read_probes
from kedit_fast.experiments.implied import derive, implied
from kedit_fast.facts.knowledge import load_relations
from tests.conftest import open_tiny, refused, tiny_lm
from tests.facts.test_knowledge import TABLE, changed
from tests.tiny import tiny_model

TOWER = kf.Fact("{} is in the city of", "The Eiffel Tower", "Rome", "Paris")
CAPITAL = kf.Fact("The capital of {} is", "France", "London", "Paris")


def told(found):
    """(kind, what is said, what was said before) of each."""
    return [(one.kind, f"{one.fact.text} {one.fact.target_new}", one.fact.target_true) for one in found]


def known(*triples, table=TABLE):
    """The table with more that is known."""
    more = [dict(zip(("subject", "relation", "object"), each, strict=True)) for each in triples]
    return changed("known", to=[*table["known"], *more], table=table)


def test_other_names_and_one_hop():
    found = implied(TOWER, TABLE)
    assert told(found) == [
        ("alias", "La Tour Eiffel is in the city of Rome", "Paris"),
        ("one hop", "The Eiffel Tower is in the country of Italy", "France"),
    ]
    assert found[1].because == ("The Eiffel Tower is in the city of Rome, and Rome is in the country of Italy",)
    assert found[0].because == (
        "La Tour Eiffel is another name of The Eiffel Tower, and The Eiffel Tower is in the city of Rome",
    )
    assert all(one.follows_from == (TOWER,) and one.asked is None and not one.conflict for one in found)
    assert found[1].fact.provenance == {
        "relation_id": "P17", "implied": "one hop", "because": list(found[1].because),
    }  # fmt: skip
    assert str(found[1]).endswith("Italy (one hop: because The Eiffel Tower is in the city of Rome, "
                                  "and Rome is in the country of Italy)")  # fmt: skip


def test_what_was_said_before_is_known_of_the_subject_or_follows_as_it_did():
    table = known(("La Tour Eiffel", "P17", "Gaul"))
    assert told(implied(TOWER, table))[1][2] == "Gaul"  # known of the subject itself, under another name
    unknown = changed("known", 1)  # not where Paris is
    assert told(implied(TOWER, unknown))[1][2] is None
    at_home = replace(TOWER, target_true="Ostia")
    assert told(implied(at_home, known(("Ostia", "P17", "Italia"))))[1][2] is None  # the same as now


def test_two_hops_follow_each_other():
    found = implied(TOWER, known(("France", "P30", "Gondwana")), hops=2)
    assert told(found)[2] == ("two hops", "The Eiffel Tower is on the continent of Europe", "Gondwana")
    why = "The Eiffel Tower is in the city of Rome, and Rome is in the country of Italy, and Italia is on the continent"
    assert found[2].because == (f"{why} of Europe",)
    assert len(implied(TOWER, TABLE, hops=1)) == 2


def test_an_inverse_where_one_is_declared():
    found = implied(CAPITAL, TABLE, hops=2)
    assert told(found) == [
        ("alias", "The capital of La France is London", "Paris"),
        ("inverse", "London is the capital of France", "England"),
        ("two hops", "London is in the country of France", "England"),
    ]
    assert found[1].because == ("The capital of France is London",)
    assert "inverse" not in {one.kind for one in implied(TOWER, TABLE, hops=2)}
    twins = kf.Fact("A twin town of {} is", "Oslo", "Bergen", "Rome")
    assert told(implied(twins, TABLE, hops=3)) == [("inverse", "A twin town of Bergen is Oslo", None)]


def test_an_edit_may_be_the_second_of_two():
    moved = kf.Fact("{} is in the country of", "Paris", "Spain", "France")
    table = known(("Louvre", "P131", "Paris"), ("Prado", "P131", "Madrid"))
    assert told(implied(moved, table)) == [("one hop", "Louvre is in the country of Spain", "France")]
    elsewhere = kf.Fact("{} is in the city of", "Louvre", "Rome", "Paris")  # then it does not follow
    found = told(implied([moved, elsewhere], table))
    assert found == [("one hop", "Louvre is in the country of Italy", "France")]


def test_two_edits_together_and_ways_that_meet_are_one_fact():
    country = kf.Fact("{} is in the country of", "Rome", "Norway", "Italy", id="rome")
    (hop,) = [one for one in implied([TOWER, country], TABLE) if one.kind == "one hop"]
    assert hop.fact.target_new == "Norway" and hop.follows_from == (TOWER, country) and len(hop.because) == 1
    seen = changed("relations", "P27", to={"name": "seen in", "prompt": "{} is seen in", "implies": [
        {"via": "P17", "then": "P17"}]})  # fmt: skip
    both = [TOWER, kf.Fact("{} is seen in", "The Eiffel Tower", "Ostia")]
    found = [one for one in implied(both, known(("Ostia", "P17", "Italia"), table=seen)) if one.kind == "one hop"]
    assert len(found) == 1 and len(found[0].because) == 2 and found[0].follows_from == tuple(both)


def test_loops_end_and_nothing_is_said_of_itself():
    table = changed("relations", "P131", "implies", to=[{"via": "P131", "then": "P131"}])
    table = changed("relations", "P131", "functional", to=False, table=table)
    table = known(("Rome", "P131", "Lazio"), ("Lazio", "P131", "The Eiffel Tower"), table=table)
    found = told(implied(TOWER, table, hops=3))
    assert [text for kind, text, _ in found if kind != "alias"] == [
        "The Eiffel Tower is in the city of Lazio", "Lazio is in the city of Rome",
    ]  # fmt: skip


def test_what_is_edited_is_not_implied():
    edited = [TOWER, kf.Fact("{} is in the country of", "The Eiffel Tower", "Italia", "France")]
    assert [one.relation for one in implied(edited, TABLE)] == [
        "P131",
        "P17",
        "P30",
    ]  # other names, and what follows on
    both = [TOWER, replace(TOWER, subject="La Tour Eiffel")]
    assert [one.kind for one in implied(both, TABLE)] == ["one hop"]


def test_conflicts_are_told_with_both_reasons_and_nothing_is_built_on_them():
    edited = [TOWER, kf.Fact("{} is in the country of", "La Tour Eiffel", "Spain")]
    table = known(("Spain", "P30", "Iberia"))
    with pytest.warns(UserWarning, match="conflict: country of .*: Spain, because .*; but Italy, because"):
        found = implied(edited, table, hops=2)
    assert {one.kind: one.conflict for one in found} == {"alias": True, "one hop": True}
    assert [one.conflict for one in found] == [False, True, True]  # the tower's city is not contested
    assert not [one for one in found if one.relation == "P30"]
    (conflict,) = derive(edited, load_relations(table), 2).conflicts
    assert (conflict.relation, [answer for answer, _ in conflict.answers]) == ("country", ["Spain", "Italy"])
    assert conflict.answers[1][1].endswith("Rome is in the country of Italy")


def test_two_implied_facts_or_two_edits_may_be_in_conflict():
    rules = [{"via": "P17", "then": "P17"}]
    seen = changed("relations", "P27", to={"name": "seen in", "prompt": "{} is seen in", "implies": rules})
    elsewhere = kf.Fact("{} is seen in", "The Eiffel Tower", "Oslo")
    made = derive([TOWER, elsewhere], load_relations(known(("Oslo", "P17", "Norway"), table=seen)))
    assert [answer for answer, _ in made.conflicts[0].answers] == ["Italy", "Norway"]
    assert [one.conflict for one in made.found] == [False, False, True, True]
    capitals = [kf.Fact("The capital of {} is", name, "Rome") for name in ("Chile", "Spain")]
    made = derive(capitals, load_relations(TABLE), 2)  # of which the country of Rome would be a second one
    assert [(one.relation, len(one.answers)) for one in made.conflicts] == [("capital of", 2)]
    other = replace(TOWER, prompt="You see {} in", target_new="Oslo", provenance={"relation_id": "P131"})
    made = derive([TOWER, other], load_relations(TABLE))
    assert [one.relation for one in made.conflicts] == ["city"]
    assert {one.kind for one in made.found} == {"alias"} and all(one.conflict for one in made.found)


def test_several_objects_are_no_conflict_where_the_relation_takes_them():
    edited = [kf.Fact("A twin town of {} is", "Oslo", city) for city in ("Rome", "Paris")]
    made = derive(edited, load_relations(TABLE))
    assert made.conflicts == [] and len(made.found) == 2


def test_facts_that_nothing_follows_from_are_told():
    facts = [kf.Fact("{} eats", "Big Ben", "cheese"), kf.Fact("A town", None, "Rome"), replace(TOWER, target_new=None)]
    with pytest.warns(UserWarning) as said:
        assert implied(facts, TABLE) == []
    assert [str(one.message).split(",")[0] for one in said] == [
        "2 facts without a subject or a new answer", "1 fact of no relation of the table",
    ]  # fmt: skip


def test_what_is_not_known_is_asked_of_the_model_only_on_demand():
    """One that was taught where Rome and Paris are, by weights, so that it knows it without an edit."""
    model = tiny_model("llama")
    lessons = [
        kf.Fact("{} is in the country of", "Rome", "Italy."),
        kf.Fact("{} is in the country of", "Paris", "Spain."),
    ]
    kf.Ft(layers=(1,), lr=5e-3, num_steps=80).edit(open_tiny(model), lessons).apply(model)
    lm = open_tiny(model)
    empty = TABLE | {"known": []}
    assert [one.kind for one in implied(TOWER, empty)] == ["alias"]
    (alias, hop) = implied(TOWER, empty, lm=lm)
    (answer,), _ = read_probes(lm, [probe(lm, "Rome is in the country of", ["Italy"])])
    p = answer.p[0]
    assert (hop.fact.target_new, hop.fact.target_true) == ("Italy", "Spain") and alias.asked is None
    assert hop.asked == pytest.approx(p, rel=1e-4) and p > 0.5
    assert hop.because == (
        f"The Eiffel Tower is in the city of Rome, and Rome is in the country of Italy (asked of the model, p {p:.2f})",
    )
    assert implied(TOWER, TABLE, lm=lm)[1].asked is None  # what is known is not asked
    moved = kf.Ft(layers=(1,), lr=5e-3, num_steps=20).edit(lm, replace(lessons[0], target_new="Seattle."))
    assert implied(TOWER, empty, lm=lm.with_edit(moved)) == [alias, hop]  # what it said before
    wordy = tiny_lm("gpt2")  # goes on and on: no answer
    assert [one.kind for one in implied(TOWER, empty, lm=wordy)] in (["alias"], ["alias", "one hop"])


def test_bad_input_is_refused(no_sweep):
    refused("facts is empty", implied, [], TABLE)
    refused("table = 3: expected a table of relations", implied, TOWER, 3)
    refused("hops = 4: expected a whole number from 1 to 3", implied, TOWER, TABLE, hops=4)
    refused("lm = 'smollm2': expected what open_model returns", implied, TOWER, TABLE, lm="smollm2")
