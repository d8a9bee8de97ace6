"""What edited facts imply, by a table of relations: the further edits that a consistent model needs.

A fact s r o implies, by what the table says (``facts/knowledge.py``):

    alias      the same of another name of s
    inverse    o r' s, where r' is declared the inverse of r
    one hop    s r3 x, where a rule leads there: s r o and o r2 x, or s r o alone; also where the fact is the second of
               the two, and y r1 s holds: then y r3 o
    two hops   what those of one hop, and inverses, imply in the same way; and three hops

Whatever an edit says stands above what is known. Two answers of a functional relation are a conflict: it is reported
with the reasons of both, nothing is built on it, and which of them holds is for people to say.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kedit_fast.basics import checks
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import counted
from kedit_fast.experiments.claims import HOPS, INVERSE, Claim, Steps
from kedit_fast.facts.fact import Fact, fact_list, place
from kedit_fast.facts.knowledge import Pair, RelationTable, load_relations
from kedit_fast.facts.subjects import folded
from kedit_fast.model.lm import LM, takes_lm

ALIAS = "alias"
KINDS = (ALIAS, INVERSE, *HOPS)

Tables = checks.AnyPath | Mapping[str, Any] | RelationTable


@dataclass(frozen=True)
class Implied:
    """A fact that follows from edited ones.

    fact: with its prompt and answers: target_new what must be said now, target_true what was said before, where that
        can be derived and is another; ready for an editor
    kind: of ``KINDS``; relation: its id, None of an alias whose fact has none of the table's
    because: why, in words, once for each way that leads to it; follows_from: the edited facts of these ways
    asked: the probability of the least likely premise that was asked of a model; None: none was needed
    conflict: whether something else is implied, or edited, for the same subject and relation
    """

    fact: Fact
    kind: str
    relation: str | None
    because: tuple[str, ...]
    follows_from: tuple[Fact, ...]
    asked: float | None = None
    conflict: bool = False

    def __str__(self) -> str:
        return f"{self.fact.text} {self.fact.target_new} ({self.kind}: because {'; and because '.join(self.because)})"


class Conflict(NamedTuple):
    """Several answers for one subject and functional relation (its name); answers: (answer, why) of each."""

    subject: str
    relation: str
    answers: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        sides = (f"{answer}, because {why}" for answer, why in self.answers)
        return f"{self.relation} of {self.subject}: {'; but '.join(sides)}"


class Derived(NamedTuple):
    """What follows from facts, what of it contradicts itself, and notes on facts that nothing follows from."""

    found: list[Implied]
    conflicts: list[Conflict]
    notes: list[str]


@takes_lm
def implied(facts: Fact | Iterable[Fact], table: Tables, *, hops: int = 1, lm: LM | None = None) -> list[Implied]:
    """What these facts imply once they are written, see this file's head; in the order of ``KINDS``, each once.

    facts: with their new answers; one's relation is its ``provenance["relation_id"]``, or that of whose prompt it has
    table: see ``kf.load_relations``; "builtin": this package's own
    hops: how many rules may follow each other, at most three
    lm: where what a rule needs is not known, this model is asked for it, without edits: its greedy answer, said to be
        so and how likely it is. None: nobody is asked

    Warns of conflicts, and of facts that nothing can follow from (no subject, no new answer, a relation that the table
    does not have). Raises ValueError for no facts, a table that is none, and hops of another number.
    """
    made = derive(fact_list(facts), read_table(table), hops, lm)
    for note in [*made.notes, *(f"conflict: {one}" for one in made.conflicts)]:
        warn(note)
    return made.found


def read_table(table: Tables) -> RelationTable:
    """The table that an argument of this name gives."""
    if not isinstance(table, Mapping | RelationTable):
        wanted = "a table of relations: a file, an object, 'builtin', or what kf.load_relations gives"
        checks.path("table", table, wanted)
    return load_relations(table)


def derive(facts: Sequence[Fact], table: RelationTable, hops: int = 1, lm: LM | None = None) -> Derived:
    """As ``implied``, with the conflicts and what must be said of the facts."""
    hops = checks.whole("hops", hops, least=1, most=len(HOPS))
    fit = [fact for fact in facts if fact.subject is not None and fact.target_new is not None]
    claims = list(_claims(fit, table))
    steps = Steps(table, claims, lm)
    steps.go(hops)
    clashes = steps.conflicts()
    found = [*_aliases(fit, table, clashes), *(_implied(claim, fit, table, clashes) for claim in steps.found.values())]
    conflicts = [
        Conflict(some[0].subject, table.relations[relation].name, tuple((one.object, one.why[0]) for one in some))
        for (_, relation), some in clashes.items()
    ]
    return Derived(sorted(found, key=lambda one: KINDS.index(one.kind)), conflicts, _notes(facts, fit, claims))


def _claims(facts: Sequence[Fact], table: RelationTable) -> Iterator[Claim]:
    """What the facts say, of those whose relation the table has."""
    for i, fact in enumerate(facts):
        relation, new = table.relation_of(fact), (fact.target_new or "").strip()
        old = fact.target_true and fact.target_true.strip()
        if relation is not None:
            old = None if old is None or table.same(old) == table.same(new) else old
            yield Claim(str(fact.subject), relation, new, (f"{fact.text.strip()} {new}",), old, (i,))


def _notes(facts: Sequence[Fact], fit: Sequence[Fact], claims: Sequence[Claim]) -> list[str]:
    found = {
        "without a subject or a new answer, nothing follows": len(facts) - len(fit),
        "of no relation of the table, only the same of other names follows": len(fit) - len(claims),
    }
    return [f"{counted(n, 'fact')} {what}" for what, n in found.items() if n]


def _implied(claim: Claim, facts: Sequence[Fact], table: RelationTable, clashes: Mapping[Pair, list]) -> Implied:
    told = {"relation_id": claim.relation, "implied": claim.kind, "because": list(claim.why)}
    fact = Fact(table.relations[claim.relation].prompt, claim.subject, claim.object, claim.old, provenance=told)
    contested = (table.same(claim.subject), claim.relation) in clashes
    sources = tuple(facts[i] for i in claim.facts)
    return Implied(fact, claim.kind, claim.relation, claim.why, sources, claim.asked, contested)


def _aliases(facts: Sequence[Fact], table: RelationTable, clashes: Mapping[Pair, list]) -> list[Implied]:
    """The same facts of other names, in their own words; none that is edited itself."""
    taken, made = {(*place(fact), fact.chat) for fact in facts}, []
    for fact in facts:
        relation, subject = table.relation_of(fact), str(fact.subject)
        for name in table.names(subject):
            at = (folded(name), folded(fact.prompt), fact.chat)
            if at in taken:
                continue
            taken.add(at)
            why = f"{name} is another name of {subject}, and {fact.text.strip()} {str(fact.target_new).strip()}"
            told = {**fact.provenance, "implied": ALIAS, "because": [why]}
            other = Fact(
                fact.prompt, name, fact.target_new, fact.target_true, provenance=told, chat=fact.chat,
                attached=fact.attached,
            )  # fmt: skip
            contested = relation is not None and (table.same(subject), relation) in clashes
            made.append(Implied(other, ALIAS, relation, (why,), (fact,), None, contested))
    return made
