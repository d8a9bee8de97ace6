"""TOFU's scores of unlearning (Maini et al. 2024, arXiv:2401.06121): forget quality and model utility.

    P(answer)    exp of the mean log-probability of its tokens; on multiple-choice sets over the sum of all choices' P
    s            exp(mean NLL of the perturbed answers - NLL of the paraphrased one): P(paraphrased) / P(perturbed)
    forget quality   the p-value of a two-sample Kolmogorov-Smirnov test between the s of an unlearned model and of one
                     that never read the forget set: near 1, they cannot be told apart
    model utility    harmonic mean of nine numbers: ROUGE-L recall, P and mean max(0, 1 - 1/s), of the retain set, real
                     authors and world facts

NLL is the mean over an answer's tokens.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, harmonic_mean

from kedit_fast.basics import checks
from kedit_fast.basics.files import reading
from kedit_fast.evaluation.probes import probe, read_edited, read_probes, write_probes
from kedit_fast.facts.files import read_records
from kedit_fast.facts.tokens import asked
from kedit_fast.model.lm import LM, takes_lm

UTILITY = ("rouge", "probability", "truth")
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
        truth = fmean(max(0.0, 1 - 1 / s) if s else 0.0 for s in self.s)
        return {"rouge": fmean(self.rouge), "probability": fmean(self.probability), "truth": truth}

    @property
    def forget_truth(self) -> float:
        """Mean of min(s, 1/s), as reports of the forget set have it; NaN where no item has perturbed answers."""
        if not self.s:
            return math.nan
        return fmean(min(s, 1 / s) if s else 0.0 for s in self.s)


def load_tofu(path: checks.AnyPath, split: str | None = None) -> list[TofuItem]:
    """Items of a file of TOFU's records: question, answer, and where they are there paraphrased_answer,
    perturbed_answer (a list), split. Raises ValueError, naming the file, for anything else, and for a split without
    any."""
    with reading(path, "expected records with question and answer", "is no TOFU file"):
        items = [
            TofuItem(
                record["question"], record["answer"], record.get("perturbed_answer", ()),
                record.get("paraphrased_answer"), record.get("split", "forget"),
            )
            for _, record in read_records(checks.path("path", path))
        ]  # fmt: skip
        there = sorted({item.split for item in items})
        chosen = [item for item in items if split in (None, item.split)]
        if not chosen:
            raise ValueError(f"no item of split {split!r}; it has {', '.join(there)}")
    return chosen


@takes_lm
def tofu_scores(lm: LM, items: Iterable[TofuItem], *, max_new_tokens: int = 64, chat: bool = False) -> TofuScores:
    """What the model, with the edits that it carries, is worth on items; answers of all of them in shared sweeps.

    chat: questions are asked in the model's own template; else plainly, "Question: ...\\nAnswer:"
    max_new_tokens: of the answer whose ROUGE-L recall is taken, which ends at a line end; 0: no rouge
    Differs: ROUGE-L without a stemmer. Raises ValueError for no items, and where only some have perturbed answers.
    """
    items = checks.listed("items", items, TofuItem, "TofuItems; load_tofu reads a file")
    if len({bool(item.perturbed) for item in items}) > 1:
        raise ValueError("some items have perturbed answers and others none; score them apart")
    questions = [item.question if chat else f"Question: {item.question}\nAnswer:" for item in items]
    texts = [asked(lm.tokenizer, question, chat) for question in questions]
    n = checks.whole("max_new_tokens", max_new_tokens, like=64)
    probes = [
        probe(lm, text, [item.answer, item.paraphrased or item.answer, *item.perturbed], n_written=n)
        for item, text in zip(items, texts, strict=True)
    ]
    read = read_edited(lm, probes) if lm.edits else read_probes(lm, probes)[0]
    said = write_probes(lm, probes) if n else []
    p = [answer.p for answer in read]
    s = [truth_ratio(each[1], each[2:]) for each in p] if items[0].perturbed else []
    over = [item.split in NORMALIZED and bool(item.perturbed) for item in items]
    probability = [
        each[0] / max(each[0] + sum(each[2:]), TINY) if of_choices else each[0]
        for each, of_choices in zip(p, over, strict=True)
    ]
    lines = [(text or "").strip().split("\n")[0] for text in said]
    rouge = [rouge_l_recall(item.answer, line) for item, line in zip(items, lines, strict=bool(n))]
    return TofuScores(probability, s, rouge)


def truth_ratio(paraphrased: float, perturbed: Sequence[float]) -> float:
    """s of the P of an answer in other words and of wrong ones: P(paraphrased) over their geometric mean."""
    return math.exp(math.log(max(paraphrased, TINY)) - fmean(math.log(max(p, TINY)) for p in perturbed))


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
