"""KnowGIC's chains (Baser et al. 2025, ThinkEval): what of the old fact can still be deduced once it was edited.

A chain leads from the subject over other facts back to the old answer. As long as the model answers each link of it,
the old fact stands between the lines, and the edit has not changed what the model knows: "deducible" is the share of
chains all of whose links are answered. What lies around them (``context``) must stay.
"""

from collections.abc import Iterator

from kedit_fast.basics.checks import shown
from kedit_fast.basics.intervals import SHARE
from kedit_fast.evaluation.benchmark import Case
from kedit_fast.evaluation.questions import of_questions
from kedit_fast.evaluation.readings import KEPT, Kind, read
from kedit_fast.facts.fact import record_facts
from kedit_fast.facts.files import Notes
from kedit_fast.facts.formats import Question

CHAIN, CONTEXT = "chain", "context"
KINDS = {
    CHAIN: Kind("the links of the chain to the old answer", KEPT),
    CONTEXT: Kind("what lies around the chain", KEPT),
}
MODES = ("exact", "contains")
DEDUCIBLE = {
    f"deducible.{mode}": (SHARE, "the old answer by every link of its chain: each is answered") for mode in MODES
}
FIELDS = ("prompts", "subjects", "answers")


def read_record(record, index: int, notes: Notes) -> Case:
    """The case of a record."""
    facts = record_facts(record, index, notes)
    asked = [*_links(record, "chain", CHAIN), *_links(record, "broader_context", CONTEXT)]
    return Case(tuple(facts), tuple(asked))


def _links(record: dict, name: str, kind: str) -> Iterator[Question]:
    given = record.get(name) or {}
    columns = [given.get(field) for field in FIELDS] if isinstance(given, dict) else [None]
    if given and (not all(isinstance(each, list) for each in columns) or len(set(map(len, columns))) != 1):
        raise ValueError(f"{name}: expected {', '.join(FIELDS)} as lists of one length")
    for text in (text for each in columns if given for text in each):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: expected {', '.join(FIELDS)} as texts, found {shown(text)}")
    seen = set()
    for prompt, subject, answer in zip(*columns, strict=True) if given else ():
        text = prompt.replace("{}", subject)
        if text not in seen:  # the same question with several answers: the first is asked
            seen.add(text)
            yield Question(text, answer, kind=kind)


def deducible(case: Case, probes, answers, base) -> dict[str, float]:
    """1 where every link of the chain is answered in a mode, else 0; nothing for a case without a chain."""
    links = [each for each in zip(probes, answers, base, strict=True) if each[0].kind == CHAIN]
    found = {mode: [read(mode, *each) for each in links] for mode in MODES if links}
    return {f"deducible.{mode}": min(values) for mode, values in found.items()}


KNOWGIC = of_questions(
    "knowgic", KINDS, read=read_record, reads=frozenset({"chain", "broader_context"}), more=DEDUCIBLE, columns=deducible
)
