"""CounterFact+: what must stay, asked with the edited fact right before it (Hoelscher-Obermaier et al. 2023,
arXiv:2305.17553).

An edit that looks specific on bare neighborhood prompts often is not once the edited fact stands in the context, as it
does in any text that speaks of it: "The Eiffel Tower is in Rome. The Louvre is in the city of" goes on with " Rome".
Each neighbor is asked without and with the fact before it, by both models: a model that only follows its context does
so without the edit too. Beside them the same subject's other relations, as a score of their own.

P, "new" and "true" as in ``counterfact``.
"""

from collections.abc import Sequence

from kedit_fast.basics.intervals import COUNT, DIFFERENCE, PROBABILITY, SHARE
from kedit_fast.evaluation.benchmark import Benchmark, Case
from kedit_fast.evaluation.probes import Answer, Probe
from kedit_fast.evaluation.readings import mean
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.subjects import folded
from kedit_fast.facts.tokens import follows_directly

SAME_SUBJECT, NEIGHBORHOOD, DISTRACTOR = "same_subject", "neighborhood", "distractor"
LEFT_OUT = "neighborhood, left out"  # of these nothing is asked: they are counted

METRICS = {
    "same_subject_same_top": (SHARE, "the subject's other prompts whose likeliest token is the base model's"),
    "same_subject_p_top": (PROBABILITY, "probability of the base model's likeliest token there"),
    "neighborhood": (SHARE, "neighborhood prompts with P(true) > P(new) (NS)"),
    "neighborhood_magnitude": (DIFFERENCE, "P(true) - P(new) on neighborhood prompts (NM)"),
    "distractor": (SHARE, "P(true) > P(new) on neighborhood prompts behind the edited fact (NS+)"),
    "distractor_magnitude": (DIFFERENCE, "P(true) - P(new) there (NM+)"),
    "neighborhood_left_out": (COUNT, "neighborhood prompts left out: they name an edited subject"),
}


def as_sentence(fact: Fact) -> str:
    """The edited fact as a sentence: its prompt, target_new and a full stop."""
    new = (fact.target_new or "").strip()
    space = "" if follows_directly(fact.text, new, fact.attached) else " "
    return f"{fact.text}{space}{new.removesuffix('.')}."


def probes(lm, case: Case) -> list[Probe]:
    """Of each fact the same subject's other prompts, and its neighbors without and with the fact before them.

    Left out are neighbors that name an edited subject, those without an answer, and those that the new one is right
    for.
    """
    made = []
    for fact in case.facts:
        new = fact.target_new
        for question in fact.questions(SAME_SUBJECT):
            made.append(case.probe(lm, fact, question.prompt, kind=SAME_SUBJECT, likeliest=True))
        for prompt, own, *_ in fact.questions(NEIGHBORHOOD):
            if case.names_edited(prompt):
                made.append(case.probe(lm, fact, prompt, kind=LEFT_OUT))
            elif new and own and folded(new) != folded(own):
                texts = ((NEIGHBORHOOD, prompt), (DISTRACTOR, f"{as_sentence(fact)} {prompt}"))
                made += [case.probe(lm, fact, text, (new, own), kind) for kind, text in texts]
    return made


def columns(case: Case, probes: Sequence[Probe], answers: Sequence[Answer], base: Sequence[Answer]) -> dict[str, float]:
    """{metric: value} of one case: means over its prompts, NaN where it has none."""
    each = list(zip(probes, answers, base, strict=True))
    tops = [(a, b) for one, a, b in each if one.kind == SAME_SUBJECT]
    found = {
        "same_subject_same_top": mean(float(a.top is not None and a.top == b.top) for a, b in tops),
        "same_subject_p_top": mean(a.p_top for a, _ in tops),
        "neighborhood_left_out": float(sum(one.kind == LEFT_OUT for one in probes)),
    }
    for kind in (NEIGHBORHOOD, DISTRACTOR):
        pairs = [a.p for one, a, _ in each if one.kind == kind]
        found[kind] = mean(float(true > new) for new, true in pairs)
        found[f"{kind}_magnitude"] = mean(true - new for new, true in pairs)
    return found


DISTRACTORS = Benchmark("counterfact+", METRICS, probes, columns)
