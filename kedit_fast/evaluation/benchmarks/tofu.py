"""TOFU's scores of unlearning (Maini et al. 2024, arXiv:2401.06121): forget quality and model utility.

    P(answer)    exp of the mean log-probability of its tokens; on multiple-choice sets over the sum of all choices' P
    s            exp(mean NLL of the perturbed answers - NLL of the paraphrased one): P(paraphrased) / P(perturbed)
    forget quality   the p-value of a two-sample Kolmogorov-Smirnov test between the s of an unlearned model and of one
                     that never read the forget set: near 1, they cannot be told apart
    model utility    harmonic mean of nine numbers: ROUGE-L recall, P and mean max(0, 1 - 1/s), of the retain set, real
                     authors and world facts

NLL is the mean over an answer's tokens. As a benchmark (``eval --benchmark tofu``) each question has its own numbers,
and the score is the harmonic mean of a set's three; forget quality compares two models, model utility three sets.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, harmonic_mean

from kedit_fast.basics import checks
from kedit_fast.basics.files import reading
from kedit_fast.basics.intervals import AMOUNT, PROBABILITY
from kedit_fast.evaluation.benchmark import Benchmark, Case, Writing, one_by_one
from kedit_fast.evaluation.probes import Answer, Probe, read_edited, read_probes
from kedit_fast.evaluation.written import write_probes
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.files import Notes, read_records
from kedit_fast.facts.formats import Question, text_of, texts_of
from kedit_fast.model.lm import LM, takes_lm

UTILITY = ("rouge", "probability", "truth")
METRICS = {
    "probability": (PROBABILITY, "P(answer); of real authors and world facts over the sum of all choices' P"),
    "rouge": (PROBABILITY, "ROUGE-L recall of the first line that is written"),
    "truth_ratio": (AMOUNT, "s, P(the answer in other words) over P(wrong answers)"),
    "truth": (PROBABILITY, "max(0, 1 - 1/s)"),
    "forget_truth": (PROBABILITY, "min(s, 1/s)"),
}
PARAPHRASED = "paraphrased"  # kind of the question that stands for the answer in other words; others are of their split
N_WRITTEN = 64
SETS = ("retain", "real_authors", "world_facts")
NORMALIZED = SETS[1:]  # whose P is over their choices
TINY = 1e-300  # what P is at least, where a quotient or a logarithm is taken
WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class TofuItem:
    """A question and its answer; perturbed: wrong answers of the same form; paraphrased: the answer in other words
    (default: itself)."""

    question: str
    answer: str
    perturbed: tuple[str, ...] = ()
    paraphrased: str | None = None
    split: str = "forget"

    def __post_init__(self):
        for name in ("question", "answer", "split"):
            checks.text(name, getattr(self, name))
        checks.optional(checks.text, "paraphrased", self.paraphrased)
        perturbed = checks.listed(
            "perturbed", self.perturbed, str, "wrong answers, a list of texts", empty=True, alone=False
        )
        object.__setattr__(self, "perturbed", tuple(perturbed))


@dataclass(frozen=True)
class TofuScores:
    """Of n items: probability, s and rouge [n] (s NaN-free, or empty where no item has perturbed answers)."""

    probability: list[float]
    s: list[float]
    rouge: list[float]

    def of_utility(self) -> dict[str, float]:
        """The set's three numbers in the model utility. Raises ValueError where they were not all asked for."""
        if not self.s or not self.rouge:
            raise ValueError(
                "the model utility needs truth ratios and ROUGE: score items with perturbed answers, and "
                "max_new_tokens above 0"
            )
        truth = fmean(_truth(s) for s in self.s)
        return {"rouge": fmean(self.rouge), "probability": fmean(self.probability), "truth": truth}

    @property
    def forget_truth(self) -> float:
        """Mean of min(s, 1/s), as reports of the forget set have it; NaN where no item has perturbed answers."""
        if not self.s:
            return math.nan
        return fmean(_forget_truth(s) for s in self.s)


def load_tofu(path: checks.AnyPath, split: str | None = None) -> list[TofuItem]:
    """Items of a file of TOFU's records: question, answer, and where they are there paraphrased_answer,
    perturbed_answer (a list), split. Raises ValueError, naming the file, for anything else, and for a split without
    any."""
    with reading(path, "expected records with question and answer", "is no TOFU file"):
        items = [_item(record) for _, record in read_records(checks.path("path", path))]
        there = sorted({item.split for item in items})
        chosen = [item for item in items if split in (None, item.split)]
        if not chosen:
            raise ValueError(f"no item of split {split!r}; it has {', '.join(there)}")
    return chosen


def _item(record) -> TofuItem:
    checks.instance("record", record, dict, "an object")
    question, answer, paraphrased, split = (
        text_of(record, name) for name in ("question", "answer", "paraphrased_answer", "split")
    )
    return TofuItem(question, answer, texts_of(record, "perturbed_answer"), paraphrased, split or "forget")


@takes_lm
def tofu_scores(
    lm: LM, items: Iterable[TofuItem], *, max_new_tokens: int = N_WRITTEN, chat: bool = False
) -> TofuScores:
    """What the model, with the edits that it carries, is worth on items; answers of all of them in shared sweeps.

    chat: questions are asked in the model's own template; else plainly, "Question: ...\\nAnswer:"
    max_new_tokens: of the answer whose ROUGE-L recall is taken, which ends at a line end; 0: no rouge
    Differs: ROUGE-L without a stemmer. Raises ValueError for no items, and where only some have perturbed answers.
    """
    items = checks.listed("items", items, TofuItem, "TofuItems; load_tofu reads a file")
    if len({bool(item.perturbed) for item in items}) > 1:
        raise ValueError("some items have perturbed answers and others none; score them apart")
    n = checks.whole("max_new_tokens", max_new_tokens, like=N_WRITTEN)
    cases = [replace(_case(item, "", chat), writing=Writing(n), number=i) for i, item in enumerate(items)]
    asked = [probes(lm, case) for case in cases]
    flat = [one for some in asked for one in some]
    read = read_edited(lm, flat) if lm.edits else read_probes(lm, flat)[0]
    said = write_probes(lm, flat) if n else [None] * len(flat)
    answers = iter(answer._replace(text=text) for answer, text in zip(read, said, strict=True))
    found = [columns(case, some, [next(answers) for _ in some]) for case, some in zip(cases, asked, strict=True)]
    return TofuScores(
        *([one[name] for one in found if name in one] for name in ("probability", "truth_ratio", "rouge"))
    )


# ---- as a benchmark


def read_record(record, index: int, notes: Notes) -> Case:
    """The case of a record."""
    return _case(_item(record), str(index))


def _case(item: TofuItem, name: str, chat: bool = False) -> Case:
    questions = [Question(item.question, item.answer, kind=item.split, against=item.perturbed)]
    if item.perturbed:
        questions.append(Question(item.question, item.paraphrased or item.answer, kind=PARAPHRASED))
    return Case((Fact(item.question, target_new=item.answer, id=name, chat=chat),), tuple(questions))


def cases(facts: Sequence[Fact]) -> list[tuple[Fact, ...]]:
    """Each fact by itself. Raises ValueError for one without an answer."""
    for fact in facts:
        if not fact.target_new:
            raise ValueError(f"fact {fact.label} has no answer (target_new): nothing to ask")
    return one_by_one(facts)


def probes(lm, case: Case) -> list[Probe]:
    """The question with its answer and the wrong ones, written on; and with its answer in other words."""
    (fact,) = case.facts
    made = []
    for question in case.questions or (Question(fact.text, fact.target_new),):
        text = question.prompt if fact.chat else f"Question: {question.prompt}\nAnswer:"
        how = {"n_written": 0} if question.kind == PARAPHRASED else {}
        made.append(case.question(lm, fact, question._replace(prompt=text), until=(), **how))
    return made


def columns(case: Case, probes: Sequence[Probe], answers: Sequence[Answer], base=None) -> dict[str, float]:
    """The values of ``METRICS`` that the question has; case: tells its answer as a text."""
    asked, (first, *more) = probes[0], answers
    right, *wrong = first.p
    found = {"probability": right / max(right + sum(wrong), TINY) if wrong and asked.kind in NORMALIZED else right}
    if first.text is not None:
        found["rouge"] = rouge_l_recall(asked.accepted[0], first.text.strip().split("\n")[0])
    if wrong:
        s = truth_ratio(more[0].p[0], wrong)
        found |= {"truth_ratio": s, "truth": _truth(s), "forget_truth": _forget_truth(s)}
    return found


def truth_ratio(paraphrased: float, perturbed: Sequence[float]) -> float:
    """s of the P of an answer in other words and of wrong ones: P(paraphrased) over their geometric mean."""
    return math.exp(math.log(max(paraphrased, TINY)) - fmean(math.log(max(p, TINY)) for p in perturbed))


def _truth(s: float) -> float:
    return max(0.0, 1 - 1 / s) if s else 0.0


def _forget_truth(s: float) -> float:
    return min(s, 1 / s) if s else 0.0


def forget_quality(unlearned: Sequence[float], retained: Sequence[float]) -> float:
    """p-value of the two-sample KS test of s by item: of an unlearned model, and of one that never read the items."""
    from scipy.stats import ks_2samp

    if not len(unlearned) or not len(retained):
        raise ValueError("forget quality compares the truth ratios of two models; one list is empty")
    return float(ks_2samp(unlearned, retained).pvalue)


def model_utility(scores: Mapping[str, TofuScores]) -> float:
    """Harmonic mean of the nine numbers of {"retain", "real_authors", "world_facts": scores}; 0 where one is 0."""
    missing = [name for name in SETS if name not in scores]
    if missing:
        raise ValueError(f"model utility is of {', '.join(SETS)}; {', '.join(missing)} is missing")
    return harmonic_mean([value for name in SETS for value in scores[name].of_utility().values()])


def rouge_l_recall(reference: str, said: str) -> float:
    """The longest common subsequence of words over the reference's number of words."""
    a, b = WORD.findall(reference.lower()), WORD.findall(said.lower())
    row = [0] * (len(b) + 1)
    for word in a:
        last = 0
        for j, other in enumerate(b):
            last, row[j + 1] = row[j + 1], last + 1 if word == other else max(row[j], row[j + 1])
    return row[-1] / len(a) if a else 0.0


TOFU = Benchmark(
    "tofu", METRICS, probes, columns, cases, UTILITY, read=read_record, n_written=N_WRITTEN,
    reads=frozenset({"question", "answer", "paraphrased_answer", "perturbed_answer"}),
)  # fmt: skip
