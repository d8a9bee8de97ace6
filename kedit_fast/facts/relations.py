"""What a set of facts says of its relations: in which words each is asked for, and which a subject has together.

Files such as CounterFact name each fact's relation (``provenance["relation_id"]``). So what one fact lacks, another
wording or another question about its subject, can be taken from the others.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice

from kedit_fast.basics import checks
from kedit_fast.facts.fact import Fact, fact_list
from kedit_fast.facts.subjects import folded


def related(
    facts: Fact | Iterable[Fact], among: Iterable[Fact] | None = None, *, phrasings: int = 3, same_subject: int = 3
) -> list[Fact]:
    """The facts with what they lack: phrasings, and same_subject prompts, in the words of other facts.

    phrasings: so many of the commonest other prompts of the fact's relation; same_subject: prompts of so many relations
        that are most often found together with its own, none whose answer may be the fact's new one. None is the
        fact's own prompt, or stands in one of its paraphrases or same_subject prompts, which are to stay apart. What a
        fact has of either stays; a chat's questions and statements are not mixed
    among: the facts whose relations are known, default: these; a fact without subject or relation_id stays as it is

    ``kf.train_editor`` reads both: on SmolLM2 they made a network whose single edits, behind a route, say other
    wordings and leave the subject's other answers (``python -m bench trained``).
    """
    facts = fact_list(facts)
    n, m = (checks.whole(*each, like=3) for each in (("phrasings", phrasings), ("same_subject", same_subject)))
    relations, made = Relations(facts if among is None else fact_list(among, "among")), []
    for fact in facts:
        fact = fact if fact.same_subject else replace(fact, same_subject=relations.others(fact, m))
        made.append(fact if fact.phrasings else replace(fact, phrasings=relations.wordings(fact, n)))
    return made


class Relations:
    """Of a set of facts: the prompts of each relation, and which relations some subject has together."""

    def __init__(self, facts: Sequence[Fact]):
        of_subject: dict[str, set[str]] = {}
        self._answers: dict[str, set[str]] = {}
        self._prompts: dict[tuple[str, bool], Counter[str]] = {}
        for fact in facts:
            relation = _relation(fact)
            if relation is not None:
                of_subject.setdefault(str(fact.subject), set()).add(relation)
                self._answers.setdefault(relation, set()).update(map(folded, filter(None, [fact.target_true])))
                self._prompts.setdefault((relation, bool(fact.chat)), Counter())[fact.prompt] += 1
        together = Counter((a, b) for both in of_subject.values() for a in both for b in both if a != b)
        self._beside: dict[str, list[str]] = {}
        for (a, b), _ in sorted(together.items(), key=lambda pair: (-pair[1], pair[0])):
            self._beside.setdefault(a, []).append(b)
        self._commonest = cache(self._commonest_first)

    def others(self, fact: Fact, n: int) -> tuple[str, ...]:
        """Prompts of the n relations most often found together with the fact's own, each in its commonest wording. One
        that has the fact's new answer among its own is left out (mother tongue and language spoken): it may rightly
        move."""
        new, found = folded(fact.target_new or ""), []
        fitting = (each for each in self._beside.get(_relation(fact) or "", ()) if new not in self._answers[each])
        for relation in fitting:
            if len(found) == n:
                break
            for prompt in islice(self._apart(relation, fact, found), 1):
                found.append(prompt.replace("{}", str(fact.subject)))
        return tuple(found)

    def wordings(self, fact: Fact, n: int) -> tuple[str, ...]:
        """The n commonest other prompts of the fact's relation that stand in nothing which it is tested by."""
        relation = _relation(fact)
        return () if relation is None else tuple(islice(self._apart(relation, fact), n))

    def _apart(self, relation: str, fact: Fact, taken: Sequence[str] = ()) -> Iterator[str]:
        """A relation's prompts, commonest first, that stand with the fact's subject in nothing which it is tested by,
        and are neither its own, nor ``taken``, nor there before."""
        others = (question.prompt for question in fact.questions("same_subject"))
        tested = [folded(text) for text in (*fact.paraphrases, *others)]
        same = {folded(text) for text in (fact.text, *(one.text for one in fact.phrased()), *taken)}
        for prompt in self._commonest(relation, bool(fact.chat)):
            text = folded(prompt.replace("{}", str(fact.subject)))
            if text not in same and not any(text in asked for asked in tested):
                same.add(text)
                yield prompt

    def _commonest_first(self, relation: str, chat: bool) -> list[str]:
        counts = self._prompts.get((relation, chat), Counter())
        return sorted(counts, key=lambda prompt: (-counts[prompt], prompt))


def _relation(fact: Fact) -> str | None:
    """The fact's relation; None where it names none, or no subject that others could be asked of."""
    found = fact.provenance.get("relation_id")
    return str(found) if found and fact.subject is not None else None
