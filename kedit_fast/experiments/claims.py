"""Claims of subjects, and the steps from edited ones to those that follow, by a table of relations.

What an edit says stands above what was known: of a functional relation alone, else beside it. A claim whose subject and
functional relation have another one too is contested, and nothing is built on either.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from kedit_fast.evaluation.probes import probe, read_probes
from kedit_fast.evaluation.written import write_probes
from kedit_fast.facts.knowledge import Pair, RelationTable, Rule, Triple
from kedit_fast.facts.tokens import answer_tokens
from kedit_fast.model.lm import LM

INVERSE, HOPS = "inverse", ("one hop", "two hops", "three hops")
ASKED_TOKENS = 12  # that an answer may have; a model that goes on has not answered
ASKED_UNTIL = (".", ",", ";", ":", "(", "\n", " and ", " which ")  # what an answer ends before


class Claim(NamedTuple):
    """Something said of a subject: a triple, and where it comes from.

    old: its object before the edits, where it is another; why: sentences, one for each way to it; facts: numbers of the
    edited facts that it follows from; asked: the probability of the least likely premise that a model was asked for;
    kind: of INVERSE and HOPS, "" of what is known or edited
    """

    subject: str
    relation: str
    object: str
    why: tuple[str, ...]
    old: str | None = None
    facts: tuple[int, ...] = ()
    asked: float | None = None
    kind: str = ""

    def or_by(self, other: "Claim") -> "Claim":
        """The claim with another way to it; asked where both are."""
        asked = None if self.asked is None or other.asked is None else max(self.asked, other.asked)
        why, facts = dict.fromkeys((*self.why, *other.why)), dict.fromkeys((*self.facts, *other.facts))
        return self._replace(why=tuple(why), facts=tuple(facts), asked=asked, old=self.old or other.old)


Key = tuple[str, str, str]  # of a claim: subject and object for comparing, the relation between them


class Steps:
    """What edited claims lead to, a step at a time; ``found`` holds it, ``edited`` what it began with.

    lm: who is asked for what the rules need and nobody has said; None: nobody
    """

    def __init__(self, table: RelationTable, edited: Iterable[Claim], lm: LM | None = None):
        self.table, self._lm = table, lm
        self.edited: dict[Key, Claim] = {}
        self.found: dict[Key, Claim] = {}
        self._asked: dict[Pair, list[Claim]] = {}
        self._closed: set[Pair] = set()
        for claim in edited:
            key = self._key(claim)
            self.edited[key] = self.edited[key].or_by(claim) if key in self.edited else claim

    def go(self, n: int) -> None:
        """Finds what follows in n steps; again without what was built on claims that turned out to be contested."""
        while True:
            self.found.clear()
            self._settle(self.edited)
            for number in range(n):
                self._step(number)
            contested = self.conflicts().keys()
            if contested <= self._closed:
                return
            self._closed |= contested

    def _step(self, number: int) -> None:
        """Adds what follows from the last step's claims."""
        if self._lm is not None:
            self._ask(self._lm, [need for claim in self._last for need in self._lacking(claim)])
        made: dict[Key, Claim] = {}
        for claim in self._last:
            ways = [one._replace(kind=HOPS[number] if number else INVERSE) for one in self._inverse(claim)]
            ways += [one._replace(kind=HOPS[number]) for one in (*self._from(claim), *self._into(claim))]
            for one in ways:
                key = self._key(one)
                if key[0] != key[2] and key not in self.edited and key not in self.found:
                    made[key] = made[key].or_by(one) if key in made else one
        self.found |= made
        self._settle(made)

    def conflicts(self) -> dict[Pair, list[Claim]]:
        """{(subject, functional relation): its claims, where their objects are several}."""
        about: dict[Pair, dict[str, Claim]] = {}
        for (subject, relation, answer), claim in (*self.edited.items(), *self.found.items()):
            if self.table.relations[relation].functional:
                about.setdefault((subject, relation), {}).setdefault(answer, claim)
        return {at: list(some.values()) for at, some in about.items() if len(some) > 1}

    def _settle(self, made: Mapping[Key, Claim]) -> None:
        """Sees what is contested, what holds by edits and steps, and which of ``made`` go on."""
        self._contested = self._closed | self.conflicts().keys()
        self._of_subject: dict[Pair, list[Claim]] = {}
        self._of_object: dict[Pair, list[Claim]] = {}
        for key, claim in (*self.edited.items(), *self.found.items()):
            if key[:2] not in self._contested:
                self._of_subject.setdefault(key[:2], []).append(claim)
                self._of_object.setdefault((key[2], key[1]), []).append(claim)
        self._last = [claim for key, claim in made.items() if key[:2] not in self._contested]

    def _key(self, claim: Claim) -> Key:
        return self.table.same(claim.subject), claim.relation, self.table.same(claim.object)

    # ---- what holds now, and what held before

    def _objects(self, subject: str, relation: str) -> list[Claim]:
        """What holds of a subject."""
        at = self.table.same(subject), relation
        said = self._of_subject.get(at, [])
        functional = self.table.relations[relation].functional
        if functional and (said or at in self._contested):
            return said
        gone = {self.table.same(one) for claim in said for one in (claim.object, claim.old) if one}
        known = [one for one in self.table.known_of(subject, relation) if self.table.same(one.object) not in gone]
        return said + list(map(self._known, known)) + self._asked.get(at, [])

    def _subjects(self, relation: str, answer: str) -> list[Claim]:
        """What holds with this object."""
        wanted = self.table.same(answer)
        said = self._of_object.get((wanted, relation), [])
        taken = {self.table.same(claim.subject) for claim in said}
        known = {self.table.same(one.subject): one for one in self.table.known_to(relation, answer)}
        for name, one in known.items():
            if name not in taken:
                now = self._objects(one.subject, relation)
                said = said + [claim for claim in now if self.table.same(claim.object) == wanted]
        return said

    def _known(self, triple: Triple) -> Claim:
        return Claim(*triple, (self.table.sentence(triple),))

    def _before(self, subject: str, relation: str) -> str | None:
        """The one object of before the edits; None where it is not known, or one of several."""
        at = self.table.same(subject), relation
        known = [one.object for one in self.table.known_of(subject, relation)]
        objects = {self.table.same(one): one for one in known or [one.object for one in self._asked.get(at, [])]}
        return next(iter(objects.values())) if len(objects) == 1 else None

    # ---- the ways

    def _inverse(self, claim: Claim) -> Iterator[Claim]:
        inverse = self.table.relations[claim.relation].inverse
        if inverse is not None:
            functional = self.table.relations[inverse].functional
            old = self._other(self._before(claim.object, inverse) if functional else None, claim.subject)
            yield claim._replace(subject=claim.object, relation=inverse, object=claim.subject, old=old)

    def _from(self, claim: Claim) -> Iterator[Claim]:
        """By rules that begin with the claim."""
        for rule in self.table.relations[claim.relation].implies:
            for second in [None] if rule.via is None else self._objects(claim.object, rule.via):
                yield self._made(rule, claim, second)

    def _into(self, claim: Claim) -> Iterator[Claim]:
        """By rules that go on with the claim."""
        for relation, one in self.table.relations.items():
            for rule in one.implies:
                for first in self._subjects(relation, claim.subject) if rule.via == claim.relation else ():
                    yield self._made(rule, first, claim)

    def _made(self, rule: Rule, first: Claim, second: Claim | None) -> Claim:
        both = [one for one in (first, second) if one is not None]
        old = self._before(first.subject, rule.then) if self.table.relations[rule.then].functional else None
        old = self._other(old or self._end_before(rule, first, second), both[-1].object)
        why = first.why if second is None else tuple(f"{a}, and {b}" for a in first.why for b in second.why)
        facts = tuple(dict.fromkeys(i for one in both for i in one.facts))
        asked = min((one.asked for one in both if one.asked is not None), default=None)
        return Claim(first.subject, rule.then, both[-1].object, why, old, facts, asked)

    def _end_before(self, rule: Rule, first: Claim, second: Claim | None) -> str | None:
        """Where the rule led before the edits."""
        if second is None or rule.via is None:
            return first.old
        return second.old if first.old is None else self._before(first.old, rule.via)

    def _other(self, old: str | None, new: str) -> str | None:
        return None if old is None or self.table.same(old) == self.table.same(new) else old

    # ---- asking a model

    def _lacking(self, claim: Claim) -> Iterator[Pair]:
        """(subject, relation) of what the rules need, now and for the old answer, and nobody has said."""
        for rule in self.table.relations[claim.relation].implies:
            for name in filter(None, (claim.object, claim.old) if rule.via else ()):
                at = self.table.same(name), str(rule.via)
                if at not in self._asked and not self._objects(name, at[1]):
                    yield name, at[1]

    def _ask(self, lm: LM, lacking: Sequence[Pair]) -> None:
        """Has the model, without edits, answer what is lacking; what ends in no answer stays unknown."""
        needs = list({(self.table.same(name), relation): (name, relation) for name, relation in lacking}.values())
        self._asked |= {(self.table.same(name), relation): [] for name, relation in needs}
        prompts = [self.table.relations[relation].prompt.replace("{}", name) for name, relation in needs]
        bare = replace(lm, edits=())
        asking = [probe(bare, prompt, n_written=ASKED_TOKENS, until=ASKED_UNTIL) for prompt in prompts]
        texts = [(text or "").strip() for text in write_probes(bare, asking, "asking for what is not known")]
        said = [(*need, prompt, text) for need, prompt, text in zip(needs, prompts, texts, strict=True)
                if text and len(answer_tokens(bare.tokenizer, prompt, text)) < ASKED_TOKENS]  # fmt: skip
        read, _ = read_probes(bare, [probe(bare, prompt, [text]) for _, _, prompt, text in said])
        for (name, relation, prompt, text), answer in zip(said, read, strict=True):
            why = f"{prompt} {text} (asked of the model, p {answer.p[0]:.2f})"
            claim = Claim(name, relation, text, (why,), asked=answer.p[0])
            self._asked[self.table.same(name), relation].append(claim)
