"""CounterFact: what is asked of a fact, and the metrics that are read from the answers.

For a prompt x and a target y of n tokens, a(x, y) = -1/n Σ log p(y_t | x, y_<t) and P(y) = exp(-a). "new" and "true"
are the fact's target_new (o*) and target_true (o^c). Meng et al. 2022 (ROME), section 3.3; Meng et al. 2023 (MEMIT),
section 5.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics.intervals import COUNT, DIFFERENCE, PROBABILITY, SHARE
from kedit_fast.basics.words import counted
from kedit_fast.evaluation.benchmark import Benchmark, Case, one_by_one
from kedit_fast.evaluation.probes import Answer, Probe
from kedit_fast.evaluation.readings import Kind, readings
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.formats import Question
from kedit_fast.facts.subjects import folded

KNOWN = 0.1  # base P(true) from which on a neighbor counts as known to the model

# Kinds of probes. Of the last nothing is asked: they are counted.
REWRITE, PARAPHRASE, NEIGHBORHOOD, SAME_SUBJECT = "rewrite", "paraphrase", "neighborhood", "same_subject"
LEFT_OUT = "neighborhood, left out"

# Columns in the order reports show them: {name: (kind, what it says of a fact)}. A fact's value is the mean over its
# prompts of the kind; neighborhood prompts that name an edited subject are left out. P(true) of a neighbor with an
# answer of its own is that answer's.
METRICS = {
    "efficacy": (SHARE, "P(new) > P(true) on the rewrite prompt (ES)"),
    "efficacy_magnitude": (DIFFERENCE, "P(new) - P(true) on the rewrite prompt (EM)"),
    "efficacy_exact": (SHARE, "all tokens of target_new are the likeliest, rewrite prompt"),
    "efficacy_match": (SHARE, "what the model writes is target_new, rewrite prompt"),
    "efficacy_contains": (SHARE, "target_new stands in what the model writes, rewrite prompt"),
    "p_new": (PROBABILITY, "P(new) on the rewrite prompt"),
    "p_true": (PROBABILITY, "P(true) on the rewrite prompt"),
    "paraphrase": (SHARE, "paraphrases with P(new) > P(true) (PS)"),
    "paraphrase_magnitude": (DIFFERENCE, "P(new) - P(true) on paraphrases (PM)"),
    "paraphrase_exact": (SHARE, "all tokens of target_new are the likeliest, paraphrases"),
    "paraphrase_match": (SHARE, "what the model writes is target_new, paraphrases"),
    "paraphrase_contains": (SHARE, "target_new stands in what the model writes, paraphrases"),
    "paraphrase_p_new": (PROBABILITY, "P(new) on paraphrases"),
    "neighborhood": (SHARE, "neighborhood prompts with P(true) > P(new) (NS)"),
    "neighborhood_magnitude": (DIFFERENCE, "P(true) - P(new) on neighborhood prompts (NM)"),
    "neighborhood_exact": (SHARE, "all tokens of target_true are the likeliest, neighborhood prompts"),
    "neighborhood_p_true": (PROBABILITY, "P(true) on neighborhood prompts"),
    "known_neighbors_p_true": (PROBABILITY, "the same where the base model's P(true) >= 0.1"),
    "same_subject_same_top": (SHARE, "the subject's other prompts whose likeliest token is the base model's"),
    "same_subject_p_top": (PROBABILITY, "probability of the base model's likeliest token there"),
    "same_subject_exact": (SHARE, "all tokens of the answer are the likeliest, the subject's other prompts with one"),
    "same_subject_p_true": (PROBABILITY, "P(answer) there"),
    "neighborhood_left_out": (COUNT, "neighborhood prompts left out: they name an edited subject"),
}
WRITTEN = Kind("the new answer", ("match", "contains"))
_WRITTEN = {f"{kind}.{mode}": f"{name}_{mode}" for kind, name in ((REWRITE, "efficacy"), (PARAPHRASE, "paraphrase"))
            for mode in WRITTEN.modes}  # fmt: skip


class Answers(NamedTuple):
    """One model's answers to the m probes of one kind whose answers are known: [m] fp64 each, NaN for the answer that
    is not. P of the target; exact: 1 where all its tokens are the likeliest, else 0."""

    p_new: Tensor
    p_true: Tensor
    exact_new: Tensor
    exact_true: Tensor


def cases(facts: Sequence[Fact]) -> list[tuple[Fact, ...]]:
    """Each fact by itself. Raises ValueError for one without target_new, target_true, same_subject prompts or neighbors
    with answers of their own."""
    for fact in facts:
        with_answers = any(question.answer for question in fact.questions(NEIGHBORHOOD))
        if not (fact.target_new or fact.target_true or fact.same_subject or with_answers):
            raise ValueError(
                f"fact {fact.label} has neither target_new nor target_true nor same_subject prompts: nothing to compare"
            )
    return one_by_one(facts)


def probes(lm, case: Case) -> list[Probe]:
    """The fact's prompts, each with the answers (new, true) that are compared behind it.

    Neighbors that name a subject edited together with the fact are left out; to one whose own answer is the new one
    nothing stands against it. Of the subject's other prompts the likeliest token is read too.
    """
    (fact,) = case.facts
    new, true = fact.target_new, fact.target_true
    asked = [(REWRITE, fact.text), *((PARAPHRASE, prompt) for prompt in fact.paraphrases)]
    made = [case.question(lm, fact, Question(prompt, new, against=(true,)), kind) for kind, prompt in asked]
    for prompt, own, *_ in fact.questions(NEIGHBORHOOD):
        left_out = case.names_edited(prompt)
        new = None if own and folded(fact.target_new or "") == folded(own) else fact.target_new
        made.append(
            case.probe(lm, fact, prompt, () if left_out else (new, own), LEFT_OUT if left_out else NEIGHBORHOOD)
        )
    for prompt, own, *_ in fact.questions(SAME_SUBJECT):
        made.append(case.probe(lm, fact, prompt, (None, own), SAME_SUBJECT, likeliest=True))
    return made


def columns(case: Case, probes: list[Probe], answers: list[Answer], base: list[Answer]) -> dict[str, float]:
    """{metric: value} of one fact; NaN where it has no such probe or target."""
    kinds = (REWRITE, PARAPHRASE, NEIGHBORHOOD, SAME_SUBJECT)
    rewrite, paraphrases, neighbors, others = (_of_kind(kind, probes, answers) for kind in kinds)
    known = _of_kind(NEIGHBORHOOD, probes, base).p_true >= KNOWN
    tops = [(a.top == b.top, a.p_top) for one, a, b in zip(probes, answers, base, strict=True) if one.likeliest]
    same_top, p_top = torch.tensor(tops, dtype=torch.float64).view(-1, 2).unbind(1)
    values = {
        "efficacy": _greater(rewrite.p_new, rewrite.p_true),
        "efficacy_magnitude": rewrite.p_new - rewrite.p_true,
        "efficacy_exact": rewrite.exact_new,
        "p_new": rewrite.p_new,
        "p_true": rewrite.p_true,
        "paraphrase": _greater(paraphrases.p_new, paraphrases.p_true),
        "paraphrase_magnitude": paraphrases.p_new - paraphrases.p_true,
        "paraphrase_exact": paraphrases.exact_new,
        "paraphrase_p_new": paraphrases.p_new,
        "neighborhood": _greater(neighbors.p_true, neighbors.p_new),
        "neighborhood_magnitude": neighbors.p_true - neighbors.p_new,
        "neighborhood_exact": neighbors.exact_true,
        "neighborhood_p_true": neighbors.p_true,
        "known_neighbors_p_true": neighbors.p_true[known],
        "same_subject_same_top": same_top,
        "same_subject_p_top": p_top,
        "same_subject_exact": others.exact_true,
        "same_subject_p_true": others.p_true,
    }
    said = readings({REWRITE: WRITTEN, PARAPHRASE: WRITTEN}, probes, answers, base)
    # Over the prompts that have a value: some neighbors may have an answer, others none. The mean of nothing is NaN.
    found = {name: float(value.nanmean()) for name, value in values.items()}
    found |= {_WRITTEN[name]: value for name, value in said.items()}
    return found | {"neighborhood_left_out": sum(one.kind == LEFT_OUT for one in probes)}


def sentences(facts: Sequence[Fact], base: dict[str, Tensor], edited) -> tuple[list[str], list[str]]:
    """(that P(new) > P(true) does not say that the new answer is given; how many neighbors were left out)."""
    did, know = [], []
    if edited is not None:
        (before, after) = (int(side["efficacy_exact"].nansum()) for side in (base, edited))
        if n := int((~edited["efficacy_exact"].isnan()).sum()):
            when = f"for {before} before the edit, for {after} after it"
            did.append(f"the new answer is what the model says: of {counted(n, 'fact')} {when}")
        same = edited["same_subject_same_top"]
        if not same.isnan().all():
            did.append(f"other prompts on the subject that go on differently: {1 - float(same.nanmean()):.0%}")
    if edited is not None and any(f.target_new for f in facts) and not any(f.neighborhood for f in facts):
        know.append("other subjects: not measured, no fact has neighborhood prompts")
    left_out = int(base["neighborhood_left_out"].nansum())
    if left_out:
        n = sum(len(fact.neighborhood) for fact in facts)
        know.append(f"{left_out} of {n} neighborhood prompts left out: they name an edited subject")
    return did, know


def _of_kind(kind: str, probes: list[Probe], answers: list[Answer]) -> Answers:
    both = zip(probes, answers, strict=True)
    rows = [(*a.p, *a.exact) for one, a in both if one.kind == kind and any(ids is not None for ids in one.answers)]
    return Answers(*torch.tensor(rows, dtype=torch.float64).view(-1, 4).unbind(1))


def _greater(a: Tensor, b: Tensor) -> Tensor:
    """1 where a > b, 0 where not, NaN where either is."""
    return torch.where((a - b).isnan(), torch.nan, (a > b).to(a.dtype))


COUNTERFACT = Benchmark(
    "counterfact", METRICS, probes, columns, cases, ("efficacy", "paraphrase", "neighborhood"), sentences
)
