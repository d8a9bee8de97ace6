"""Benchmarks that are questions and answers: what every fact is asked, and each record's own questions, in all modes.

A benchmark of this kind is a reader of its records and a table of kinds (see ``benchmarks/``). What a fact brings by
itself is asked by every one of them:

    rewrite       the prompt that is edited; with the old answer, where it is known, against it
    paraphrase    its paraphrases, likewise
    locality      its neighbors with their answers, which must stay
    same_subject  other prompts on its subject, whose answers must stay
    choice        the prompt with new and old answer as choices A and B, in both orders: an edit of the surface alone,
                  which the model does not know of when it is asked so, loses here what it wins above
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from kedit_fast.basics.intervals import COUNT, Metrics
from kedit_fast.evaluation.benchmark import Benchmark, Case, one_by_one, said_left_out
from kedit_fast.evaluation.probes import Answer, Probe
from kedit_fast.evaluation.readings import ASKED, KEPT, UNTIL, Kind, metrics_of, readings
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.formats import Question
from kedit_fast.facts.subjects import folded

REWRITE, PARAPHRASE, LOCALITY, SAME_SUBJECT, CHOICE = "rewrite", "paraphrase", "locality", "same_subject", "choice"
OF_FACT = {
    REWRITE: Kind("the new answer to the edited prompt", ASKED),
    PARAPHRASE: Kind("the new answer to paraphrases", ASKED),
    LOCALITY: Kind("the answer to prompts on other subjects", KEPT),
    SAME_SUBJECT: Kind("the answer to other prompts on the subject", KEPT),
    CHOICE: Kind("the new answer is chosen of both, in both orders", ("success",)),
}
LEFT_OUT = "locality_left_out"  # a kind of which nothing is asked, and the metric that counts it
CHOICES = "{prompt}\nA. {a}\nB. {b}\nAnswer:"
N_WRITTEN = 32  # tokens; LocFT's


def of_questions(
    name: str,
    kinds: Mapping[str, Kind] | None = None,
    *,
    more: Metrics | None = None,
    columns: Callable[..., Mapping[str, float]] | None = None,
    probes: Callable[[object, Case], list[Probe]] | None = None,
    **fields: Any,
) -> Benchmark:
    """The benchmark of these kinds of questions beside those of every fact.

    more: further metrics; columns(case, probes, answers, base): their values; probes(lm, case): what is asked, default:
    ``probes`` here; fields: the other fields of the Benchmark
    """
    kinds = OF_FACT | dict(kinds or {})
    fields = {"n_written": N_WRITTEN, "until": UNTIL, "sentences": sentences, "cases": checked} | fields
    left_out = {LEFT_OUT: (COUNT, "neighbors left out: they name an edited subject")}
    metrics = metrics_of(kinds, **(more or {})) | left_out
    return Benchmark(name, metrics, probes or of_case, partial(_columns, kinds, columns), **fields)


def _columns(kinds, more, case: Case, probes, answers: list[Answer], base: list[Answer]) -> dict[str, float]:
    found = readings(kinds, probes, answers, base, case.writing.judge)
    found[LEFT_OUT] = float(sum(one.kind == LEFT_OUT for one in probes))
    return found if more is None else found | dict(more(case, probes, answers, base))


def checked(facts: Sequence[Fact]) -> list[tuple[Fact, ...]]:
    """Each fact by itself. Raises ValueError for one of which nothing is asked."""
    for fact in facts:
        if not (fact.target_new or fact.same_subject or any(one.answer for one in fact.questions("neighborhood"))):
            raise ValueError(f"fact {fact.label} has no target_new and no prompts whose answers stay: nothing to ask")
    return one_by_one(facts)


# ---- what is asked


def of_case(lm, case: Case) -> list[Probe]:
    """Every fact's questions, and the case's own in the form of its first fact."""
    made = [one for fact in case.facts for one in of_fact(lm, case, fact)]
    return made + [of_question(lm, case, one) for one in case.questions]


def of_question(lm, case: Case, question: Question, **how) -> Probe:
    """One of the case's own questions; of one without an answer the likeliest token is read."""
    return case.question(lm, case.facts[0], question, likeliest=question.answer is None, attached=None, **how)


def of_fact(lm, case: Case, fact: Fact) -> Iterator[Probe]:
    """What a fact brings by itself. Neighbors that name a subject edited together with it are left out and counted, and
    those without an answer left out; where the new answer is right for a neighbor too, nothing stands against it."""
    new, true = fact.target_new, fact.target_true
    if new:
        against = (true,) if true and folded(true) != folded(new) else ()
        for kind, prompts in ((REWRITE, (fact.text,)), (PARAPHRASE, fact.paraphrases)):
            for prompt in prompts:
                yield case.question(lm, fact, Question(prompt, new, against=against), kind)
        for a, b in ((new, true), (true, new)) if against else ():
            prompt = CHOICES.format(prompt=fact.text, a=a, b=b)
            letters = ("A", "B") if a == new else ("B", "A")
            yield case.probe(lm, fact, prompt, letters, CHOICE, attached=None)
    for question in fact.questions("neighborhood"):
        if question.answer and case.names_edited(question.prompt):
            yield case.probe(lm, fact, question.prompt, kind=LEFT_OUT)
        elif question.answer:
            against = (new,) if new and folded(new) != folded(question.answer) else ()
            yield case.question(lm, fact, question._replace(against=against), LOCALITY)
    for question in fact.questions("same_subject"):
        yield case.question(lm, fact, question, SAME_SUBJECT, likeliest=question.answer is None)


# ---- what is said


def sentences(facts, base, edited) -> tuple[list[str], list[str]]:
    """How far the two readings of the rewrite prompt lie apart; how many neighbors were left out."""
    know = said_left_out(facts, int(base[LEFT_OUT].nansum()))
    side, when = (base, "") if edited is None else (edited, " after the edit")
    forced, match, holds = (_mean(side.get(f"{REWRITE}.{mode}")) for mode in ("exact", "match", "contains"))
    if forced is None or match is None:
        return [], know
    return [
        f"the new answer{when}: {forced:.0%} of the edited prompts when its own tokens are put before each next one "
        f"(teacher-forced), {match:.0%} in free writing as the whole answer, {holds:.0%} somewhere in it"
    ], know


def _mean(column) -> float | None:
    return None if column is None or column.isnan().all() else float(column.nanmean())
