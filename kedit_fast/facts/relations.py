"""What a set of facts says of its relations: in which words each is asked for, and which a subject has together.

Files such as CounterFact name each fact's relation (``provenance["relation_id"]``). So what one fact lacks, another
wording or another question about its subject, can be taken from the others.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kedit_fast.basics import checks
from kedit_fast.facts.fact import Fact, fact_list
from kedit_fast.facts.subjects import folded


def related(
    facts: Fact | Iterable[Fact], among: Iterable[Fact] | None = None, *, phrasings: int = 3, same_subject: int = 3
) -> list[Fact]:
    """The facts with what they lack: phrasings, and same_subject prompts, in the words of other facts.

    phrasings: so many of the commonest other prompts of the fact's relation, none that its paraphrases or same_subject
        prompts end with, which are to stay apart; same_subject: prompts of so many relations that are most often found
        together with its own, none whose answer may be the fact's new one. What a fact has of either stays
    among: the facts whose relations are known, default: these; a fact without a relation_id stays as it is

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
        of_subject: dict[str | None, set[str]] = {}
        self._answers: dict[str, set[str | None]] = {}
        self._prompts: dict[str, Counter[str]] = {}
        for fact in facts:
            if relation := _relation(fact):
                of_subject.setdefault(fact.subject, set()).add(relation)
                self._answers.setdefault(relation, set()).add(fact.target_true)
                self._prompts.setdefault(relation, Counter())[fact.prompt] += 1
        pairs = ((a, b) for both in of_subject.values() for a in both for b in both if a != b)
        self._together = Counter(pairs)

    def others(self, fact: Fact, n: int) -> tuple[str, ...]:
        """Prompts of the n relations most often found together with the fact's own, each in its commonest wording. One
        that has the fact's new answer among its own is left out (mother tongue and language spoken): it may rightly
        move."""
        own, subject = _relation(fact), fact.subject
        if subject is None:
            return ()
        found = sorted((-count, b) for (a, b), count in self._together.items() if a == own)
        fitting = [b for _, b in found if fact.target_new not in self._answers[b]]
        return tuple(self._commonest(b)[0].replace("{}", subject) for b in fitting[:n])

    def wordings(self, fact: Fact, n: int) -> tuple[str, ...]:
        """The n commonest other prompts of the fact's relation that nothing which it is tested by ends with: neither a
        paraphrase, nor another relation that is asked for in the same words."""
        if fact.subject is None:
            return ()
        others = (question.prompt for question in fact.questions("same_subject"))
        tested = [folded(asked) for asked in (*fact.paraphrases, *others)]
        found = []
        for prompt in self._commonest(_relation(fact)):
            text = folded(prompt.replace("{}", fact.subject))
            if prompt != fact.prompt and not any(asked.endswith(text) for asked in tested):
                found.append(prompt)
        return tuple(found[:n])

    def _commonest(self, relation: str | None) -> list[str]:
        counts = self._prompts.get(relation or "", Counter())
        return sorted(counts, key=lambda prompt: (-counts[prompt], prompt))


def _relation(fact: Fact) -> str | None:
    found = fact.provenance.get("relation_id")
    return str(found) if found else None
