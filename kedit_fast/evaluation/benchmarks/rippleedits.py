"""RippleEdits (Cohen et al. 2024, arXiv:2307.12976): what else changes when a fact does, by six criteria.

    LG  logical generalization     CI  two hops from the subject      CII  another subject that leads to the edited one
    SA  aliases of the subject     PV  what must be preserved         RS   other relations of the subject

A test has queries, all or (OR) one of which must be answered, and conditions, all of which the model without the edit
must answer; else it is not executed. It counts where the edited fact itself is said. A query is answered where of every
answer that it asks for some spelling stands in what is written (20 tokens), upper and lower case told apart.

Differs: the published code writes as many tokens as a prompt has characters, and 30, and looks for an answer in the
prompt as well; the paper says 20. A record names no subject: it is read off the fact's sentence, which has one of a few
forms (``FORMS``); where it replaces an old fact (not in RECENT) the answer begins where the two are still alike.
"""

import math
import re
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

from kedit_fast.basics import checks
from kedit_fast.basics.checks import shown
from kedit_fast.basics.intervals import COUNT, SHARE
from kedit_fast.evaluation.benchmark import Case
from kedit_fast.evaluation.probes import Answer, Probe
from kedit_fast.evaluation.questions import REWRITE, of_questions
from kedit_fast.facts.fact import record_facts
from kedit_fast.facts.files import Notes
from kedit_fast.facts.formats import Question, text_of, texts_of

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
OF = "country of citizenship|field of work|head of \\w+|(?:place|date) of \\w+|[^,]+?"  # else as far as the first "of"
FORMS = [  # of a fact's sentence, as far as its answer
    re.compile(f"{before}(?P<subject>.+){after} ")
    for before, after in (
        ("The name of the [^,]+? which ", " (?:is (?:associated with|the capital of|a member of|part of)|plays in) is"),
        ("The name of the position held by ", " is"),
        ("The name of the currency in ", " is"),
        ("The name of the award ", " won is"),
        ("The number of children ", " has is"),
        (f"The (?:names? of the )?(?:{OF}) of ", " (?:is|are|was)"),
    )
]
FOLLOWS = [re.compile(f"(?P<subject>.+){after} ") for after in (" is followed by", " follows")]


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
        raise ValueError("edit: expected an object with the prompt of the fact, and its original_fact where it has one")
    fact = fact_of(edit) | {"relation_id": text_of(edit, "relation")}
    return Case(tuple(record_facts(fact, index, notes)), tuple(_tests(record)))


def fact_of(edit: dict) -> dict[str, str | None]:
    """The fields of an edit's fact: prompt with "{}" for the subject, subject, target_new, and target_true (None: not
    known), from its sentence, "The mother of X is Y.", and that of the old fact.
    """
    sentence, old = text_of(edit, "prompt") or "", None
    if edit.get("original_fact") is not None:
        old = text_of(checks.instance("edit: original_fact", edit["original_fact"], dict, "an object"), "prompt")
    both = zip(sentence, sentence if old is None else old, strict=False)
    alike = next((i for i, (a, b) in enumerate(both) if a != b), min(len(sentence), len(old or sentence)))
    forms = [*FOLLOWS, *FORMS] if (text_of(edit, "relation") or "").startswith("FOLLOW") else [*FORMS, *FOLLOWS]
    found = next(filter(None, (form.match(sentence[:alike]) for form in forms)), None)
    new, true = (found and text and text[found.end() :].strip().removesuffix(".") for text in (sentence, old))
    if not found or not new:
        raise ValueError(f"edit: prompt: expected 'The ... of SUBJECT is ANSWER.', found {shown(sentence)}")
    begin, end = found.span("subject")
    prompt = sentence[:begin] + "{}" + sentence[end : found.end() - 1]
    return {"prompt": prompt, "subject": found["subject"], "target_new": new, "target_true": true or None}


def _tests(record: dict) -> Iterator[Question]:
    for criterion, keys in CRITERIA.items():
        tests = next((_objects(record, key) for key in keys if record.get(key)), [])
        for number, test in enumerate(tests):
            any_of = test.get("test_condition") == "OR"
            for name, condition in (("test_queries", False), ("condition_queries", True)):
                for at, query in enumerate(_objects(test, name)):
                    yield from _query(query, Place(criterion, number, any_of, at, condition))


def _query(query: dict, place: Place) -> Iterator[Question]:
    """A question for each answer that a query asks for. Spellings of a single letter say nothing; what has no other is
    not said, whatever is written."""
    for answer in _objects(query, "answers"):
        spelled = [text_of(answer, "value") or "", *texts_of(answer, "aliases")]
        spelled = [one for one in spelled if len(one) > 1 or one.isdigit()]
        if prompt := text_of(query, "prompt"):
            yield Question(prompt, spelled[0] if spelled else None, kind=str(place), aliases=tuple(spelled[1:]))


def _objects(record: dict, key: str) -> list[dict]:
    given = record.get(key) or []
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise ValueError(f"{key}: expected a list of objects, found {shown(given)}")
    return given


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
