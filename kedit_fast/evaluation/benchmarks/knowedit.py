"""KnowEdit (Zhang et al. 2024, arXiv:2401.01286) and EasyEdit's records: edit success, portability and locality.

EasyEdit's numbers are edit success and rephrase in mode "token", portability in mode "token" (the mean of its kinds:
logical generalization, reasoning, subject aliasing) and locality in mode "same": the tokens of the answer at which the
edited model agrees with the base model. "kept" is all of a record's locality: KnowEdit's asks other relations of the
subject (here "same_subject"), other files ask about others ("locality").
"""

from kedit_fast.basics.intervals import SHARE
from kedit_fast.evaluation.benchmark import Case
from kedit_fast.evaluation.questions import LOCALITY, SAME_SUBJECT, of_questions
from kedit_fast.evaluation.readings import MODES, Kind, mean, read
from kedit_fast.facts.fact import record_facts
from kedit_fast.facts.files import Notes
from kedit_fast.facts.formats import ASKED, Question, questions_of
from kedit_fast.facts.subjects import folded

KINDS = {
    "logical": Kind("the answer to questions that follow logically"),
    "reasoning": Kind("the answer to questions one step further"),
    "alias": Kind("the new answer under another name of the subject"),
    "portability": Kind("the answer to other questions that follow from the edit"),
}
KEPT = "kept"
KEPT_SAYS = "the answer to all prompts whose answers must stay"
NAMES = {  # of EasyEdit's kinds
    "logical_generalization": "logical", "reasoning": "reasoning", "one_hop": "reasoning",
    "subject_aliasing": "alias", "subject_replace": "alias",
}  # fmt: skip


def portability_of(record) -> list[Question]:
    """A record's portability questions, each with its kind."""
    given = record.get("portability")
    if not isinstance(given, dict) or any(name in given for name in ASKED):
        return [one._replace(kind="portability") for one in questions_of(given, "portability")]
    found = []
    for name, value in given.items():
        kind = NAMES.get(folded(name).replace(" ", "_"))
        asked = questions_of(value if kind else {name: value}, "portability")
        found += [one._replace(kind=kind or "portability") for one in asked]
    return found


def read_record(record, index: int, notes: Notes) -> Case:
    """The case of a record: its fact, and what is asked besides."""
    facts = record_facts(record, index, notes)
    return Case(tuple(facts), tuple(portability_of(record)))


def kept(case: Case, probes, answers, base) -> dict[str, float]:
    """ "kept.same" of a case."""
    each = zip(probes, answers, base, strict=True)
    return {f"{KEPT}.same": mean(read("same", *one) for one in each if one[0].kind in (LOCALITY, SAME_SUBJECT))}


# Facts of any file, in every reading of every question that they carry.
QUESTIONS = of_questions("questions", KINDS, read=read_record, score_of=("rewrite.contains", "paraphrase.contains"))
KNOWEDIT = of_questions(
    "knowedit", KINDS, more={f"{KEPT}.same": (SHARE, f"{KEPT_SAYS}: {MODES['same']}")}, columns=kept, read=read_record,
    score_of=("rewrite.token", "paraphrase.token", f"{KEPT}.same"),
)  # fmt: skip
