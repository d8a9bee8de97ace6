"""zsRE (Levy et al. 2017, arXiv:1706.04115) as prepared for MEND (Mitchell et al. 2022): questions, in two protocols.

    zsre       MEND's and EasyEdit's: the edit writes ``alt``, a wrong answer; locality is agreement with the base model
    zsre-true  ROME's and MEMIT's: it writes the true answer; locality is the gold answer to a question of Natural
               Questions, of which models of that size say a quarter even unedited

Their numbers cannot be compared. In both, published efficacy and paraphrase scores are mode "token".
"""

from dataclasses import replace
from functools import partial

from kedit_fast.evaluation.benchmark import Case
from kedit_fast.evaluation.benchmarks.knowedit import KINDS, portability_of
from kedit_fast.evaluation.questions import of_questions
from kedit_fast.facts.fact import Fact, record_facts
from kedit_fast.facts.files import Notes

NQ = "nq question: "


def read(record, index: int, notes: Notes, *, true: bool = False) -> Case:
    """The case of a record: what is written is ``alt``, or with ``true`` the first of ``answers``."""
    facts = record_facts(record, index, notes)
    if true:
        if not all(fact.target_true for fact in facts):
            raise ValueError("answers: expected the true answer, which this protocol writes; found none")
        facts = [_true(fact) for fact in facts]
    return Case(tuple(facts), () if true else tuple(portability_of(record)))


def _true(fact: Fact) -> Fact:
    """The fact with its true answer as what is written. A neighbor that has the same one keeps it; to a question of
    Natural Questions, which have none, a question mark is put, as the published code has it."""
    near = [
        one._replace(prompt=f"{one.prompt}?") if one.prompt.startswith(NQ) and not one.prompt.endswith("?") else one
        for one in fact.questions("neighborhood")
    ]
    return replace(fact, target_new=fact.target_true, target_true=None, neighborhood=tuple(near))


ZSRE = of_questions(
    "zsre",
    {"portability": KINDS["portability"]},
    read=read,
    score_of=("rewrite.token", "paraphrase.token", "locality.same"),
)
ZSRE_TRUE = of_questions(
    "zsre-true", read=partial(read, true=True), score_of=("rewrite.token", "paraphrase.token", "locality.token")
)
