"""What follows from a fact: a table of relations, their inverses and rules, other names, and triples that are known.

A table is a JSON object of our own format (``load_relations``); one of this package, "builtin", has some of Wikidata's
relations under the ids that CounterFact gives them, and a few hundred triples on countries, cities and companies.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from kedit_fast.basics import checks
from kedit_fast.basics.files import read_object
from kedit_fast.basics.words import brief, json_kind
from kedit_fast.facts.fact import BUILTIN, Fact
from kedit_fast.facts.subjects import folded

FORMAT = "kedit_fast.relations"
OWN_RELATIONS = Path(__file__).parent / "own_relations.json"
PARTS = ("relations", "aliases", "known")
FIELDS = ("name", "prompt", "inverse", "functional", "implies")

Pair = tuple[str, str]  # (a name, folded; a relation)


class Rule(NamedTuple):
    """Of a relation r: s r o and o ``via`` x make s ``then`` x; without ``via``, s r o makes s ``then`` o."""

    then: str
    via: str | None = None


class Triple(NamedTuple):
    """Subject, relation (its id) and object, as they are spelled."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Relation:
    """prompt: template with one "{}", which the object follows; inverse: the relation that leads from object to
    subject; functional: whether a subject has one object; implies: rules that begin with it"""

    name: str
    prompt: str
    inverse: str | None = None
    functional: bool = False
    implies: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class RelationTable:
    """Relations by id, other names by name, and what is known; ``load_relations`` makes and checks one."""

    relations: Mapping[str, Relation] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    known: tuple[Triple, ...] = ()

    def __repr__(self) -> str:
        parts = (f"{len(value)} {name}" for name, value in vars(self).items() if name in PARTS)
        return f"RelationTable({', '.join(parts)})"

    def same(self, name: str) -> str:
        """A name for comparing: folded, and the one that stands for all names of a thing."""
        return self._canonical.get(folded(name), folded(name))

    def names(self, name: str) -> tuple[str, ...]:
        """The other names of what a name stands for, in the table's order."""
        of_all = self._names.get(self.same(name), ())
        return tuple(each for each in of_all if folded(each) != folded(name))

    def relation_of(self, fact: Fact) -> str | None:
        """The relation that a fact names (``provenance["relation_id"]``), or in whose prompt it is asked; None where it
        is none of the table's."""
        named = str(fact.provenance.get("relation_id"))
        return named if named in self.relations else self._by_prompt.get(folded(fact.prompt))

    def sentence(self, triple: Triple) -> str:
        """The triple as its relation's prompt says it."""
        return f"{self.relations[triple.relation].prompt.replace('{}', triple.subject)} {triple.object}"

    def known_of(self, subject: str, relation: str) -> list[Triple]:
        """What is known of a subject."""
        return self._of_subject.get((self.same(subject), relation), [])

    def known_to(self, relation: str, answer: str) -> list[Triple]:
        """What is known to have this object."""
        return self._of_object.get((self.same(answer), relation), [])

    @cached_property
    def _canonical(self) -> dict[str, str]:
        return {folded(other): folded(name) for name, others in self.aliases.items() for other in others}

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        return {folded(name): (name, *others) for name, others in self.aliases.items()}

    @cached_property
    def _by_prompt(self) -> dict[str, str]:
        return {folded(one.prompt): relation for relation, one in reversed(self.relations.items())}

    @cached_property
    def _of_subject(self) -> dict[Pair, list[Triple]]:
        return self._indexed(0)

    @cached_property
    def _of_object(self) -> dict[Pair, list[Triple]]:
        return self._indexed(2)

    def _indexed(self, at: int) -> dict[Pair, list[Triple]]:
        made: dict[Pair, list[Triple]] = {}
        for triple in self.known:
            made.setdefault((self.same(triple[at]), triple.relation), []).append(triple)
        return made


def load_relations(*tables: checks.AnyPath | Mapping[str, Any] | RelationTable) -> RelationTable:
    """The table of one or several files, or of objects as they stand in a file; "builtin": this package's own.

        {"format": "kedit_fast.relations",
         "relations": {"P131": {"name": "city", "prompt": "{} is in the city of", "functional": true,
                                "implies": [{"via": "P17", "then": "P17"}]},
                       "P17": {"name": "country", "prompt": "{} is located in the country of", "functional": true},
                       "P36": {"name": "capital", "prompt": "The capital of {} is the city of", "functional": true,
                               "inverse": "P1376"},
                       "P1376": {"name": "capital of", "prompt": "{} is the capital city of the country of",
                                 "functional": true, "inverse": "P36", "implies": [{"then": "P17"}]}},
         "aliases": {"United States": ["USA", "the United States of America"]},
         "known": [{"subject": "Rome", "relation": "P17", "object": "Italy"}]}

    relations: by id; prompt: with one {} for the subject, the object follows; functional: a subject has one object
        (default: false); inverse: the relation from object to subject, where there is one; implies: rules, here s P131
        o and o P17 x make s P17 x; without "via", s P1376 o makes s P17 o
    aliases: other names of a subject or object; known: triples that rules may draw on. One of a relation with an
        inverse is known the other way round too

    Of several tables the later one's relations replace those of the same id, and what it knows of a subject replaces
    what an earlier one did where the relation is functional; a table may speak of the relations of those before it.

    Raises ValueError, naming the file, the entry and the field, for anything else: a relation that is nowhere, two
    objects of a functional relation, one alias of two names; OSError where a file cannot be opened.
    """
    table = RelationTable()
    for one in tables:
        if isinstance(one, RelationTable):
            table = _joined(table, one)
            continue
        where, record = "the table", one
        if not isinstance(one, Mapping):
            path = OWN_RELATIONS if one == BUILTIN else checks.path("tables", one)
            where, record = str(path), read_object(path, "a table of relations")
        try:
            table = _with(table, record)
        except ValueError as error:
            raise ValueError(brief(f"{where}: {error}")) from error
    if not table.relations:
        raise ValueError(f"tables: no relation in them; expected some, or '{BUILTIN}'")
    return table


# ---- reading an object


def _with(table: RelationTable, record) -> RelationTable:
    """The table with another one, an object, on top."""
    if record.get("format") != FORMAT:
        raise ValueError(f'an object without "format": "{FORMAT}"; expected a table of relations')
    _no_others("", record, ("format", *PARTS))
    made = {str(name): _relation(str(name), one) for name, one in _part(record, "relations", Mapping).items()}
    relations = {**table.relations, **made}
    _check_relations(made, relations)
    aliases = {name: _names(name, others) for name, others in _part(record, "aliases", Mapping).items()}
    known = [_triple(i, one, relations) for i, one in enumerate(_part(record, "known", list))]
    return _joined(
        RelationTable(table.relations, table.aliases, table.known), RelationTable(made, aliases, tuple(known))
    )


def _joined(below: RelationTable, above: RelationTable) -> RelationTable:
    """Both; see ``load_relations`` for what replaces what."""
    relations = {**below.relations, **above.relations}
    aliases = {**below.aliases}
    for name, others in above.aliases.items():
        aliases[name] = tuple(dict.fromkeys((*aliases.get(name, ()), *others)))
    _check_aliases(aliases)
    names = RelationTable(relations, aliases)
    own = _both_ways(names, above.known)
    _check_known(names, above.known)
    told = {(names.same(one.subject), one.relation) for one in own if relations[one.relation].functional}
    kept = [one for one in below.known if (names.same(one.subject), one.relation) not in told]
    return RelationTable(relations, aliases, tuple(dict.fromkeys((*kept, *own))))


def _both_ways(table: RelationTable, known: Iterable[Triple]) -> list[Triple]:
    """The triples, and the inverse of each, where nothing is said there of what has one object."""
    made = list(known)
    said = {(table.same(one.subject), one.relation) for one in made}
    for one in tuple(made):
        inverse = table.relations[one.relation].inverse
        if inverse is None or (table.relations[inverse].functional and (table.same(one.object), inverse) in said):
            continue
        made.append(Triple(one.object, inverse, one.subject))
        said.add((table.same(one.object), inverse))
    return made


def _part(record, name: str, kind: type) -> Any:
    found = record.get(name, kind() if kind is list else {})
    if not isinstance(found, kind):
        raise ValueError(f"{name}: expected {'an array' if kind is list else 'an object'}, found {json_kind(found)}")
    return found


def _no_others(where: str, record, known: Iterable[str]) -> None:
    if unknown := sorted(set(map(str, record)) - set(known)):
        raise ValueError(f"{where}unknown field {unknown[0]!r}; expected {', '.join(known)}")


def _object(where: str, value) -> Mapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected an object, found {json_kind(value)}")
    return value


def _relation(name: str, record) -> Relation:
    where = f"relation {name!r}"
    _object(where, record)
    _no_others(f"{where}: ", record, FIELDS)
    prompt = checks.text(f"{where}: prompt", record.get("prompt"), like="{} is in the city of")
    if prompt.count("{}") != 1:
        raise ValueError(
            f"{where}: prompt {prompt!r} has {prompt.count('{}')} places for the subject; expected one {{}}"
        )
    rules = record.get("implies", [])
    if not isinstance(rules, list | tuple):
        raise ValueError(f"{where}: implies: expected an array of rules, found {json_kind(rules)}")
    return Relation(
        checks.text(f"{where}: name", record.get("name", name)),
        prompt,
        checks.optional(checks.text, f"{where}: inverse", record.get("inverse"), like="P1376"),
        checks.flag(f"{where}: functional", record.get("functional", False)),
        tuple(_rule(f"{where}: implies, entry {i}", rule) for i, rule in enumerate(rules)),
    )


def _rule(where: str, record) -> Rule:
    _object(where, record)
    _no_others(f"{where}: ", record, ("via", "then"))
    then = checks.text(f"{where}: then", record.get("then"), like="P17")
    return Rule(then, checks.optional(checks.text, f"{where}: via", record.get("via"), like="P131"))


def _check_relations(made: Mapping[str, Relation], relations: Mapping[str, Relation]) -> None:
    for name, one in made.items():
        named = [("inverse", one.inverse)]
        for i, rule in enumerate(one.implies):
            named += [(f"implies, entry {i}: via", rule.via), (f"implies, entry {i}: then", rule.then)]
        for place, other in named:
            if other is not None:
                _check_named(f"relation {name!r}: {place}", other, relations)
        back = relations[one.inverse].inverse if one.inverse is not None else None
        if back not in (None, name):
            raise ValueError(f"relation {name!r}: inverse {one.inverse!r} has another inverse itself, {back!r}")


def _check_named(where: str, name: str, relations: Mapping[str, Relation]) -> None:
    if name not in relations:
        raise ValueError(f"{where}: {name!r} is none of the table's relations ({', '.join(relations)})")


def _names(name, others) -> tuple[str, ...]:
    where = f"aliases of {name!r}"
    checks.text("aliases: a name", name)
    if not isinstance(others, list | tuple):
        raise ValueError(f"{where}: expected an array of names, found {json_kind(others)}")
    return tuple(checks.text(f"{where}, entry {i}", other, like="USA") for i, other in enumerate(others))


def _check_aliases(aliases: Mapping[str, tuple[str, ...]]) -> None:
    taken = {folded(name): name for name in aliases}
    if len(taken) < len(aliases):
        twice = next(name for name in aliases if taken[folded(name)] != name)
        raise ValueError(f"aliases of {twice!r}: {taken[folded(twice)]!r} has an entry too; one name is enough")
    for name, others in aliases.items():
        for other in others:
            if taken.setdefault(folded(other), name) != name:
                whose = f"aliases of {name!r}: {other!r} names {taken[folded(other)]!r} too"
                raise ValueError(f"{whose}; what has two meanings stands for neither, leave it out")


def _triple(i: int, record, relations: Mapping[str, Relation]) -> Triple:
    where = f"known, entry {i}"
    _object(where, record)
    _no_others(f"{where}: ", record, Triple._fields)
    triple = Triple(*(checks.text(f"{where}: {name}", record.get(name), like="P17") for name in Triple._fields))
    _check_named(f"{where}: relation", triple.relation, relations)
    return triple


def _check_known(table: RelationTable, known: Iterable[Triple]) -> None:
    found: dict[Pair, tuple[int, Triple]] = {}
    for i, one in enumerate(known):
        before, other = found.setdefault((table.same(one.subject), one.relation), (i, one))
        if table.relations[one.relation].functional and table.same(other.object) != table.same(one.object):
            name = table.relations[one.relation].name
            raise ValueError(
                f"known, entries {before} and {i}: {one.subject!r} has two objects of {one.relation!r} ({name}), "
                f"{other.object!r} and {one.object!r}, and the relation is functional; keep one of them"
            )
