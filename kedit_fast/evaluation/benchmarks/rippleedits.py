"""RippleEdits (Cohen et al. 2024, arXiv:2307.12976): what else changes when a fact does, by six criteria.

    LG  logical generalization     CI  two hops from the subject      CII  another subject that leads to the edited one
    SA  aliases of the subject     PV  what must be preserved         RS   other relations of the subject

A test has queries, all or (OR) one of which must be answered, and conditions, all of which the model without the edit
must answer; else it is not executed. It counts where the edited fact itself is said. A query is answered where of every
answer that it asks for some spelling stands in what is written (20 tokens), upper and lower case told apart.

Differs: the published code writes as many tokens as a prompt has characters, and 30; the paper says 20. A record names
no subject: it is what stands between "of" and "is" in the fact's sentence, and the new answer begins where the sentence
parts from that of the old fact.
"""

import math
import re
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

from kedit_fast.basics.checks import shown
from kedit_fast.basics.intervals import COUNT, SHARE
from kedit_fast.evaluation.benchmark import Case
from kedit_fast.evaluation.probes import Answer, Probe
from kedit_fast.evaluation.questions import REWRITE, of_questions
from kedit_fast.facts.fact import record_facts
from kedit_fast.facts.files import Notes
from kedit_fast.facts.formats import Question, text_of

CRITERIA = {
    "LG": ("Logical_Generalization",),
    "CI": ("Compositionality_I",),
    "CII": ("Compositionality_II",),
    "SA": ("Subject_Aliasing",),
    "PV": ("Forgetfulness",),
    "RS": ("Relation_Specificity", "Relation_Specifity"),
}
N_WRITTEN = 20
MORE = {name: (SHARE, f"tests passed: {keys[0].replace('_', ' ').lower()}") for name, keys in CRITERIA.items()}
MORE |= {f"{name} executed": (COUNT, "tests whose conditions hold and whose edit is said") for name in CRITERIA}
SUBJECT = re.compile(r"^(?P<before>.*\bof )(?P<subject>.+?)(?P<after> (?:is|are|was))$")


class Place(NamedTuple):
    """Where a query stands: the criterion, the number of its test, whether one query is enough, the number of the query
    and whether it is a condition. As text it is a question's kind."""

    criterion: str
    test: int
    any_of: bool
    query: int
    condition: bool

    def __str__(self) -> str:
        return "|".join([self.criterion, *(str(int(each)) for each in self[1:])])

    @classmethod
    def of(cls, kind: str) -> "Place":
        criterion, test, any_of, query, condition = kind.split("|")
        return cls(criterion, int(test), any_of == "1", int(query), condition == "1")


# ---- records


def read_record(record, index: int, notes: Notes) -> Case:
    """The case of a record."""
    edit = record.get("edit") if isinstance(record, dict) else None
    if not isinstance(edit, dict):
        raise ValueError("edit: expected an object with the prompt of the fact and its original_fact")
    prompt, subject, new = fact_of(edit)
    fact = {"prompt": prompt, "subject": subject, "target_new": new, "relation_id": text_of(edit, "relation")}
    return Case(tuple(record_facts(fact, index, notes)), tuple(_tests(record)))


def fact_of(edit: dict) -> tuple[str, str, str]:
    """(prompt with "{}" for the subject, subject, new answer) of an edit's sentence, "The mother of X is Y."."""
    sentence, old = text_of(edit, "prompt") or "", (edit.get("original_fact") or {}).get("prompt")
    if not isinstance(old, str):
        raise ValueError("edit: original_fact: expected the old fact's prompt, from which the new one's answer is told")
    same = next((i for i, pair in enumerate(zip(sentence, old, strict=False)) if pair[0] != pair[1]), len(old))
    stem = sentence[:same].rpartition(" ")[0]
    new, found = sentence[len(stem) :].strip().rstrip("."), SUBJECT.match(stem)
    if not new or found is None:
        raise ValueError(f"edit: prompt: expected 'The ... of SUBJECT is ANSWER.', found {shown(sentence)}")
    return found["before"] + "{}" + found["after"], found["subject"], new


def _tests(record: dict) -> Iterator[Question]:
    for criterion, keys in CRITERIA.items():
        tests = next((record[key] for key in keys if record.get(key)), [])
        for number, test in enumerate(tests):
            any_of = test.get("test_condition") == "OR"
            for name, condition in (("test_queries", False), ("condition_queries", True)):
                for at, query in enumerate(test.get(name) or []):
                    yield from _query(query, Place(criterion, number, any_of, at, condition))


def _query(query: dict, place: Place) -> Iterator[Question]:
    """A question for each answer that a query asks for; spellings of a single letter say nothing."""
    for answer in query.get("answers") or []:
        spelled = [answer["value"], *(answer.get("aliases") or [])]
        spelled = [one for one in spelled if len(one) > 1 or one.isdigit()]
        if spelled and query.get("prompt"):
            yield Question(query["prompt"], spelled[0], kind=str(place), aliases=tuple(spelled[1:]))


# ---- what the answers are worth


def columns(case: Case, probes: list[Probe], answers: list[Answer], base: list[Answer]) -> dict[str, float]:
    """{criterion: share of its executed tests that pass, and how many were executed}; nothing where none was, or where
    nothing was written."""
    said: dict[Place, list[bool]] = {}
    edited = []
    for one, answer, before in zip(probes, answers, base, strict=True):
        if answer.text is None:
            continue
        if one.kind == REWRITE:
            edited.append(_holds(answer, one))
        elif "|" in one.kind:
            place = Place.of(one.kind)
            said.setdefault(place, []).append(_holds(before if place.condition else answer, one))
    found: dict[str, float] = {}
    for name in CRITERIA if any(edited) else ():
        passed = _passed({place: all(each) for place, each in said.items() if place.criterion == name})
        found |= {name: fmean(passed) if passed else math.nan, f"{name} executed": len(passed)}
    return found


def _holds(answer: Answer, one: Probe) -> bool:
    return any(spelled in (answer.text or "") for spelled in one.accepted)


def _passed(said: dict[Place, bool]) -> list[bool]:
    """Of each executed test, whether it passes."""
    passed = []
    for test in sorted({place.test for place in said}):
        mine = {place: right for place, right in said.items() if place.test == test}
        queries = [right for place, right in mine.items() if not place.condition]
        if queries and all(right for place, right in mine.items() if place.condition):
            passed.append(any(queries) if next(iter(mine)).any_of else all(queries))
    return passed


RIPPLEEDITS = of_questions(
    "rippleedits",
    read=read_record,
    reads=frozenset({"edit", "example_type", *(key for keys in CRITERIA.values() for key in keys)}),
    more=MORE,
    columns=columns,
    n_written=N_WRITTEN,
    until=("\n",),
)
