"""Tables of relations: what is read, what of several tables holds, what is refused."""

import copy
import json

import pytest

import kedit_fast as kf
from kedit_fast.facts.knowledge import FORMAT, Rule, Triple, load_relations
from tests.conftest import refused

TABLE = {
    "format": FORMAT,
    "relations": {
        "P131": {
            "name": "city", "prompt": "{} is in the city of", "functional": True,
            "implies": [{"via": "P17", "then": "P17"}],
        },
        "P17": {
            "name": "country", "prompt": "{} is in the country of", "functional": True,
            "implies": [{"via": "P30", "then": "P30"}],
        },
        "P30": {"name": "continent", "prompt": "{} is on the continent of", "functional": True},
        "P36": {"name": "capital", "prompt": "The capital of {} is", "functional": True, "inverse": "P1376"},
        "P1376": {
            "name": "capital of", "prompt": "{} is the capital of", "functional": True, "inverse": "P36",
            "implies": [{"then": "P17"}],
        },
        "P190": {"name": "twin town", "prompt": "A twin town of {} is", "inverse": "P190"},
    },
    "aliases": {"The Eiffel Tower": ["La Tour Eiffel"], "Italy": ["Italia"], "France": ["La France"]},
    "known": [
        {"subject": "Rome", "relation": "P17", "object": "Italy"},
        {"subject": "Paris", "relation": "P17", "object": "France"},
        {"subject": "Italia", "relation": "P30", "object": "Europe"},
        {"subject": "England", "relation": "P36", "object": "London"},
    ],
}  # fmt: skip


def changed(*path, to=None, table=TABLE):
    """The table with another value at a path; None: without it."""
    made = copy.deepcopy(table)
    *way, last = path
    at = made
    for step in way:
        at = at[step]
    if to is None:
        del at[last]
    else:
        at[last] = to
    return made


def test_a_table_is_read_from_a_file_or_as_it_stands(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE), encoding="utf-8")
    for table in (load_relations(TABLE), load_relations(path), load_relations(load_relations(TABLE))):
        assert (
            table.relations["P131"].implies == (Rule("P17", "P17"),) and table.relations["P1376"].implies[0].via is None
        )
        assert table.known_of("rome", "P17") == [Triple("Rome", "P17", "Italy")]
        assert table.known_of("Italy", "P30") == table.known_to("P30", "europe") == [Triple("Italia", "P30", "Europe")]
        assert table.names("la tour  Eiffel") == ("The Eiffel Tower",) and table.names("Rome") == ()
        assert table.same("ITALIA") == table.same("Italy") != table.same("Rome")
    assert repr(load_relations(TABLE)) == "RelationTable(6 relations, 3 aliases, 5 known)"


def test_an_inverse_is_known_too_but_where_something_else_is():
    assert load_relations(TABLE).known_of("London", "P1376") == [Triple("London", "P1376", "England")]
    other = {"subject": "London", "relation": "P1376", "object": "Britain"}
    table = load_relations(changed("known", to=[*TABLE["known"], other]))
    assert [one.object for one in table.known_of("London", "P1376")] == ["Britain"]
    twins = [{"subject": "Rome", "relation": "P190", "object": "Paris"}]
    table = load_relations(changed("known", to=twins))
    assert [one.object for one in table.known_of("Paris", "P190")] == ["Rome"]


def test_the_relation_of_a_fact_is_named_or_that_of_its_prompt():
    table, fact = load_relations(TABLE), kf.Fact("{} is in the  City of", "Big Ben")
    assert table.relation_of(fact) == "P131"
    assert table.relation_of(kf.Fact("{} is where", "Big Ben", provenance={"relation_id": "P17"})) == "P17"
    assert table.relation_of(kf.Fact("{} is where", "Big Ben", provenance={"relation_id": "P99"})) is None


def test_of_several_tables_the_later_word_counts():
    more = {
        "format": FORMAT,
        "relations": {"P30": {"name": "part of the world", "prompt": "{} is a part of", "functional": True}},
        "aliases": {"Italy": ["Italien"]},
        "known": [
            {"subject": "Italien", "relation": "P30", "object": "Asia"},
            {"subject": "Oslo", "relation": "P17", "object": "Norway"},
        ],
    }
    table = load_relations(TABLE, more)
    assert table.relations["P30"].name == "part of the world" and len(table.relations) == 6
    assert [one.object for one in table.known_of("Italia", "P30")] == ["Asia"]
    assert table.names("Italy") == ("Italia", "Italien") and table.known_of("Oslo", "P17")
    assert [one.object for one in table.known_of("Rome", "P17")] == ["Italy"]


def test_the_tables_of_the_package():
    table = load_relations("builtin")
    assert 15 <= len(table.relations) <= 25 and len(table.known) > 200
    for one in table.relations.values():
        assert one.inverse is None or table.relations[one.inverse].inverse
    for fact in kf.load_facts("builtin"):
        relation = table.relation_of(fact)
        known = table.known_of(fact.subject, relation) if relation else []
        # what it knows of the package's facts is what these say
        assert not known or fact.target_true in {one.object for one in known}, fact


RULE = ("relations", "P131", "implies", 0)


@pytest.mark.parametrize(
    "says, table",
    [
        ('without "format": "kedit_fast.relations"', changed("format")),
        ("unknown field 'facts'; expected format, relations, aliases, known", TABLE | {"facts": []}),
        ("relations: expected an object, found an array", TABLE | {"relations": []}),
        ("known: expected an array, found an object", TABLE | {"known": {}}),
        ("no relation in them", {"format": FORMAT}),
        ("relation 'P17': expected an object, found a string", changed("relations", "P17", to="country")),
        ("relation 'P17': unknown field 'template'", changed("relations", "P17", "template", to="x")),
        ("relation 'P17': prompt = None: expected a text", changed("relations", "P17", "prompt")),
        ("relation 'P17': prompt 'in' has 0 places", changed("relations", "P17", "prompt", to="in")),
        ("relation 'P17': name = 3", changed("relations", "P17", "name", to=3)),
        ("relation 'P17': functional = 1: expected True or False", changed("relations", "P17", "functional", to=1)),
        ("relation 'P36': inverse: 'P5' is none of the table's", changed("relations", "P36", "inverse", to="P5")),
        ("relation 'P36': inverse 'P190' has another inverse", changed("relations", "P36", "inverse", to="P190")),
        ("relation 'P131': implies: expected an array", changed("relations", "P131", "implies", to={"then": "P17"})),
        ("relation 'P131': implies, entry 0: expected an object", changed(*RULE, to="P17")),
        ("relation 'P131': implies, entry 0: unknown field 'by'", changed(*RULE, to={"by": "P17", "then": "P17"})),
        ("relation 'P131': implies, entry 0: then = None", changed(*RULE, "then")),
        ("relation 'P131': implies, entry 0: via: 'P5' is none", changed(*RULE, "via", to="P5")),
        ("relation 'P131': implies, entry 0: then: 'P5' is none", changed(*RULE, "then", to="P5")),
        ("aliases of 'Italy': expected an array of names, found a string", changed("aliases", "Italy", to="Italia")),
        ("aliases of 'Italy', entry 1 is empty", changed("aliases", "Italy", to=["Italia", " "])),
        ("aliases of 'France': 'italia' names 'Italy' too", changed("aliases", "France", to=["italia"])),
        ("aliases of 'France': 'Italy' names 'Italy' too", changed("aliases", "France", to=["Italy"])),
        ("aliases of 'Italy': 'italy' has an entry too", changed("aliases", "italy", to=["Italien"])),
        ("known, entry 1: expected an object, found an array", changed("known", 1, to=["Paris", "P17", "France"])),
        ("known, entry 1: unknown field 'since'", changed("known", 1, "since", to=1900)),
        ("known, entry 1: object = None: expected a text", changed("known", 1, "object")),
        ("known, entry 1: relation: 'P5' is none of the table's relations", changed("known", 1, "relation", to="P5")),
        (
            "known, entries 0 and 4: 'rome' has two objects of 'P17' .country., 'Italy' and 'France'",
            changed("known", to=[*TABLE["known"], {"subject": "rome", "relation": "P17", "object": "France"}]),
        ),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused_with_its_entry_and_field(says, table):
    refused(says, load_relations, table)


def test_a_file_is_named(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(changed("known", 1, "object")))
    refused("table.json: known, entry 1: object = None", load_relations, path)
    path.write_text("[]")
    refused("table.json holds an array; expected a table of relations", load_relations, path)
    refused("tables = 3", load_relations, 3)
    with pytest.raises(FileNotFoundError):
        load_relations(tmp_path / "none.json")
    same = changed("known", to=[*TABLE["known"], {"subject": "rome", "relation": "P17", "object": "Italia"}])
    assert len(load_relations(same).known_of("Rome", "P17")) == 2  # another spelling of both is no contradiction
