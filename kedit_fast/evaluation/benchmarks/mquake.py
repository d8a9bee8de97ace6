"""MQuAKE (Zhong et al. 2023, arXiv:2305.14795): questions over several facts, one or more of which are edited.

    rewrite      edit-wise: each edited fact, by its cloze prompt
    hop          each link of the new chain: the edited ones by their cloze, the others as questions behind examples
    instance     instance-wise: 1 where every link of the chain is answered
    multi_hop    the three wordings of the question over all links, behind examples
    any_of_three 1 where one of the three is answered; this is the published number
    old          the same of the answer from before the edit

Published answers are equal to the new one or an alias: mode "match". ``mquake`` puts question and answer examples
before a question, ``mquake-cot`` examples that think first, whose answer stands behind "Answer:": it is read there and
not teacher-forced in a thought's place, so these questions have no modes "token" and "exact". All facts of a case are
edited together.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files

from kedit_fast.basics.checks import shown
from kedit_fast.basics.intervals import SHARE
from kedit_fast.evaluation.benchmark import Benchmark, Case
from kedit_fast.evaluation.probes import Answer, Probe
from kedit_fast.evaluation.questions import of_fact, of_question, of_questions
from kedit_fast.evaluation.readings import Kind, read, readings
from kedit_fast.facts.fact import Fact, record_facts
from kedit_fast.facts.files import Notes
from kedit_fast.facts.formats import Question, text_of, texts_of
from kedit_fast.facts.subjects import folded

HOP, CLOZE, MULTI, OLD = "hop", "hop, edited", "multi_hop", "old"
MODES = ("exact", "match", "contains")
KINDS = {
    HOP: Kind("the links that were not edited", ("token", *MODES)),
    MULTI: Kind("the question over all links", ("token", *MODES)),
}
MORE = {
    **{f"instance.{mode}": (SHARE, "all links of a case: every one is answered") for mode in MODES},
    **{f"any_of_three.{mode}": (SHARE, "one of the three questions is answered") for mode in MODES},
    **{f"old.{mode}": (SHARE, "one of the three is answered as before the edit") for mode in MODES},
}
SHOTS, THOUGHTS = "mquake_shots.txt", "mquake_thoughts.txt"
THOUGHT_TOKENS = 96
ANSWER = "Answer:"
READS = {
    "questions", "answer", "answer_alias", "new_answer", "new_answer_alias", "single_hops", "new_single_hops"
}  # fmt: skip
SCORE = ("rewrite.exact", "instance.exact", "any_of_three.match")


# ---- records


def read_record(record, index: int, notes: Notes) -> Case:
    """The case of a record: its facts, its links and the questions over them."""
    facts = [replace(fact, provenance=_about(fact)) for fact in record_facts(record, index, notes)]
    edited = {folded(fact.text) for fact in facts}
    new, old = (text_of(record, name) for name in ("new_answer", "answer"))
    asked = [link for hop in _hops(record) if (link := _link(hop, edited))]
    for text in texts_of(record, "questions"):
        for kind, answer, name in ((MULTI, new, "new_answer_alias"), (OLD, old, "answer_alias")):
            if answer:
                asked.append(Question(text, answer, kind=kind, aliases=texts_of(record, name)))
    return Case(tuple(facts), tuple(asked))


def _hops(record: dict) -> list[dict]:
    hops = record.get("new_single_hops") or []
    if not isinstance(hops, list) or not all(isinstance(hop, dict) for hop in hops):
        raise ValueError(f"new_single_hops: expected a list of objects, found {shown(hops)}")
    return hops


def _link(hop: dict, edited: set[str]) -> Question | None:
    """A link by its cloze where that is edited, else by its question."""
    cloze, question = text_of(hop, "cloze"), text_of(hop, "question")
    kind, prompt = (CLOZE, cloze) if cloze and folded(cloze) in edited else (HOP, question)
    return (
        Question(prompt, text_of(hop, "answer"), kind=kind, aliases=texts_of(hop, "answer_alias")) if prompt else None
    )


def _about(fact: Fact) -> dict:
    """What a fact keeps of its record: the questions over all facts are the case's here."""
    return {name: value for name, value in fact.provenance.items() if name != "portability"}


# ---- what is asked, and what the answers are worth


def probes(lm, case: Case, before: str, thinks: bool) -> list[Probe]:
    """Everything that is asked of a case. before: the examples that stand before a question"""
    made = [one for fact in case.facts for one in of_fact(lm, case, fact)]
    for question in case.questions:
        shown_by = "" if question.kind == CLOZE else before
        text = f"{shown_by}Question: {question.prompt}\n" if shown_by else question.prompt
        ends = {}
        if shown_by:
            text += "Thoughts:" if thinks and question.kind != HOP else ANSWER
        if shown_by and thinks and question.kind != HOP:
            ends = {"n_written": THOUGHT_TOKENS * (case.writing.n_tokens > 0), "until": ("\n\n",)}
        one = of_question(lm, case, question._replace(prompt=text), **ends)
        made.append(one._replace(answers=()) if ends else one)
    return made


def columns(case: Case, probes, answers: list[Answer], base: list[Answer]) -> Mapping[str, float]:
    """The values of ``MORE``, and of the questions whose answer stands behind thoughts."""
    answers = list(map(_answered, answers))
    asked = [each for each in zip(probes, answers, base, strict=True)]
    found = readings({MULTI: KINDS[MULTI]}, probes, answers, base)
    for name, kinds, of_all in (("instance", (HOP, CLOZE), all), ("any_of_three", (MULTI,), any), ("old", (OLD,), any)):
        mine = [each for each in asked if each[0].kind in kinds]
        for mode in MODES if mine else ():
            values = [read(mode, *each) for each in mine]
            found[f"{name}.{mode}"] = math.nan if any(map(math.isnan, values)) else float(of_all(values))
    return found


def _answered(answer: Answer) -> Answer:
    """What is written after thinking: as far as the first line's end behind "Answer:"."""
    if answer.text is None or ANSWER not in answer.text:
        return answer
    return answer._replace(text=answer.text.split(ANSWER)[-1].strip().split("\n")[0])


def _examples(name: str) -> str:
    return (files("kedit_fast.evaluation.benchmarks") / name).read_text(encoding="utf-8")


def _benchmark(name: str, examples: str, thinks: bool) -> Benchmark:
    def asked(lm, case: Case) -> list[Probe]:
        return probes(lm, case, _examples(examples), thinks)

    how = {"more": MORE, "columns": columns, "probes": asked, "read": read_record, "reads": frozenset(READS)}
    return of_questions(name, KINDS, score_of=SCORE, **how)


MQUAKE = _benchmark("mquake", SHOTS, thinks=False)
MQUAKE_COT = _benchmark("mquake-cot", THOUGHTS, thinks=True)
