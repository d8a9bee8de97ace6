"""CounterFact: what is asked of a fact, and the metrics that are read from the answers.

For a prompt x and a target y of n tokens, a(x, y) = -1/n Σ log p(y_t | x, y_<t) and P(y) = exp(-a). "new" and "true"
are the fact's target_new (o*) and target_true (o^c). Meng et al. 2022 (ROME), section 3.3; Meng et al. 2023 (MEMIT),
section 5.2.

Where texts are written (``generate=20``), the new answer is looked for in what stands before the first full stop or
line end (WILD's stop rule). Behind a record's generation prompts they are written on without it (``generate=100``):
told are their n-gram entropy (GE) and, with the published texts on subjects that have the new answer
(``counterfact_with``), their likeness to those (RS). Differs: texts are written greedily, to a number of new tokens;
published ones are drawn of the five likeliest tokens, to 100 tokens with the prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.bits import digest
from kedit_fast.basics.files import reading
from kedit_fast.basics.intervals import AMOUNT, COUNT, DIFFERENCE, PROBABILITY, SHARE
from kedit_fast.basics.words import counted
from kedit_fast.evaluation.benchmark import Benchmark, Case, one_by_one, said_left_out
from kedit_fast.evaluation.probes import Answer, Probe
from kedit_fast.evaluation.readings import UNTIL, Kind, mean, readings
from kedit_fast.evaluation.texts import ngram_entropy
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.files import read_records
from kedit_fast.facts.formats import Question, text_of
from kedit_fast.facts.subjects import folded
from kedit_fast.facts.tfidf import TfIdf

KNOWN = 0.1  # base P(true) from which on a neighbor counts as known to the model

# Kinds of probes. Of the last nothing is asked: they are counted.
REWRITE, PARAPHRASE, NEIGHBORHOOD, SAME_SUBJECT = "rewrite", "paraphrase", "neighborhood", "same_subject"
GENERATION = "generation"
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
    "generation_entropy": (AMOUNT, "entropy of the 2- and 3-grams of texts on the subject, bits (GE / 100)"),
    "neighborhood_left_out": (COUNT, "neighborhood prompts left out: they name an edited subject"),
}
REFERENCE_SCORE = "reference_score"
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
    if n := case.writing.n_tokens:
        prompts = fact.provenance.get("generation_prompts", ())
        made += [case.probe(lm, fact, prompt, kind=GENERATION, n_written=n) for prompt in prompts]
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
    found["generation_entropy"] = mean(map(ngram_entropy, _texts(case, probes, answers)))
    return found | {"neighborhood_left_out": sum(one.kind == LEFT_OUT for one in probes)}


def _texts(case: Case, probes: list[Probe], answers: list[Answer]) -> list[str]:
    """What is written behind the generation prompts, with them as published; in a chat, without."""
    both = [(one, a.text) for one, a in zip(probes, answers, strict=True) if one.kind == GENERATION]
    return [text if case.facts[0].chat else one.text + text for one, text in both if text is not None]


# ---- texts that the written ones are compared with


def counterfact_with(path: checks.AnyPath) -> Benchmark:
    """CounterFact with the reference score (RS): the cosine, by TF-IDF, of what the model writes behind a fact's
    generation prompts with texts on other subjects that have the new answer to the fact's relation.

    path: the published attribute_snippets.json: [{"relation_id", "target_id", "samples": [{"text"}, ...]}, ...]. A fact
        whose relation_id and target_new's id stand there is scored; others are not counted

    Weights of words are of these texts; published ones are of the same kind of texts. Raises ValueError, naming the
    record, for another file.
    """
    found: dict[tuple, list[str]] = {}
    path = checks.path("path", path)
    for place, record in read_records(path):
        with reading(place, "expected relation_id, target_id and samples with a text", "is no record of snippets"):
            texts = [text for sample in record["samples"] if (text := text_of(sample, "text"))]
            found.setdefault((record["relation_id"], record["target_id"]), []).extend(texts)
    weights = TfIdf.fit([text for texts in found.values() for text in texts], linear=True)
    says = PROBABILITY, "likeness of texts on the subject to texts on others with the new answer, TF-IDF cosine (RS)"
    name = f"counterfact, references {digest(sorted(map(list, found)), list(found.values()))[:8]}"
    how = {"metrics": METRICS | {REFERENCE_SCORE: says}, "columns": partial(_with_score, found, weights)}
    return replace(COUNTERFACT, name=name, **how)


def _with_score(references: Mapping[tuple, list[str]], weights: TfIdf, case: Case, probes, answers, base) -> dict:
    about = case.facts[0].provenance
    known = references.get((about.get("relation_id"), about.get("target_id")))
    texts = _texts(case, probes, answers)
    found = columns(case, probes, answers, base)
    if known and texts:
        found[REFERENCE_SCORE] = float(weights.similarity([" ".join(texts)], [" ".join(known)])[0, 0])
    return found


def sentences(facts: Sequence[Fact], base: dict[str, Tensor], edited) -> tuple[list[str], list[str]]:
    """(that P(new) > P(true) does not say that the new answer is given; how many neighbors were left out)."""
    did, know = [], []
    if edited is not None:
        for name, what in (("exact", "tokens are all the likeliest"), ("contains", "words stand in what is written")):
            (before, after) = (int(side[f"efficacy_{name}"].nansum()) for side in (base, edited))
            if n := int((~edited[f"efficacy_{name}"].isnan()).sum()):
                when = f"for {before} before the edit, for {after} after it"
                did.append(f"the new answer's {what}: of {counted(n, 'fact')} {when}")
        same = edited["same_subject_same_top"]
        if not same.isnan().all():
            did.append(f"other prompts on the subject that go on differently: {1 - float(same.nanmean()):.0%}")
    if edited is not None and any(f.target_new for f in facts) and not any(f.neighborhood for f in facts):
        know.append("other subjects: not measured, no fact has neighborhood prompts")
    elif edited is not None and any(f.target_new for f in facts) and edited["neighborhood"].isnan().all():
        know.append(
            "other subjects: not measured, for no neighborhood prompt has an answer (its fact's target_true, or one of "
            "its own)"
        )
    unknown = base["known_neighbors_p_true"].isnan() & ~base["neighborhood_p_true"].isnan()
    if edited is not None and (n := int(unknown.sum())):
        know.append(
            f"the neighborhood of {counted(n, 'fact')} says little: before the edit the model gives none of these "
            f"neighbors its answer (P below {KNOWN}). A neighbor without an answer of its own is asked for its fact's "
            "target_true"
        )
    return did, know + said_left_out(facts, int(base["neighborhood_left_out"].nansum()))


def _of_kind(kind: str, probes: list[Probe], answers: list[Answer]) -> Answers:
    both = zip(probes, answers, strict=True)
    rows = [(*a.p, *a.exact) for one, a in both if one.kind == kind and any(ids is not None for ids in one.answers)]
    return Answers(*torch.tensor(rows, dtype=torch.float64).view(-1, 4).unbind(1))


def _greater(a: Tensor, b: Tensor) -> Tensor:
    """1 where a > b, 0 where not, NaN where either is."""
    return torch.where((a - b).isnan(), torch.nan, (a > b).to(a.dtype))


COUNTERFACT = Benchmark(
    "counterfact", METRICS, probes, columns, cases, ("efficacy", "paraphrase", "neighborhood"), sentences, until=UNTIL
)
