"""What an answer is worth, in every reading of it, and benchmarks that ask each question in all of them.

A question is read in two ways, which do not agree (Yang et al. 2025, arXiv:2502.11177: 97 % by the first, 38 % by the
second). Teacher-forced, the answer stands behind the prompt and the model is asked for each token after the right ones
before it. Generated, the model writes by itself until a stop rule ends it. Every number carries its mode:

    success    P(answer) > P of each answer that it is compared with         teacher-forced; P = exp(mean log p)
    p          P(answer)                                                     teacher-forced
    p_other    P of the likeliest answer that it is compared with            teacher-forced
    token      share of the answer's tokens that are the likeliest           teacher-forced
    exact      all of them are                                               teacher-forced
    same       share of the answer's tokens whose likeliest is the base model's; without an answer, of the next token
    match      what is written equals an accepted answer (``texts.normalized``)   generated
    contains   an accepted answer stands in it as whole words                generated
    judge      what the user's judge says of it                              generated
    same_text  what is written equals what the base model writes             generated
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from types import CodeType
from typing import NamedTuple

from kedit_fast.basics import checks
from kedit_fast.basics.bits import digest
from kedit_fast.basics.intervals import PROBABILITY, SHARE, Metrics
from kedit_fast.evaluation.probes import Answer, Probe
from kedit_fast.evaluation.texts import contains, matches, normalized
from kedit_fast.facts.tokens import spoken

WRITTEN = ("match", "contains", "judge", "same_text")
MODES = {
    "success": "P(answer) > P of what it is compared with",
    "p": "P(answer)",
    "p_other": "P of what it is compared with",
    "token": "share of its tokens that are the likeliest, each behind the right ones",
    "exact": "all its tokens are the likeliest",
    "same": "share of its tokens whose likeliest is still the base model's",
    "match": "what is written equals it (case, punctuation and articles aside)",
    "contains": "it stands in what is written",
    "judge": "the judge takes what is written for it",
    "same_text": "what is written is what the base model writes",
}
ASKED = ("success", "p", "p_other", "token", "exact", "match", "contains", "judge")  # of a question with a right answer
KEPT = ("p", "token", "exact", "same", "match", "contains", "same_text")  # of one whose answer must stay
PROBABILITIES = ("p", "p_other")
UNTIL = (".", "\n")  # WILD's stop rule

# (prompt, of a chat its question alone; accepted answers; what was written) -> 0 to 1
Judge = Callable[[str, tuple[str, ...], str], float | bool]


class Kind(NamedTuple):
    """What kind of question it is: in words, and the modes that its answers are read in."""

    says: str
    modes: tuple[str, ...] = ASKED


def metrics_of(kinds: Mapping[str, Kind], **more: tuple[str, str]) -> Metrics:
    """{"kind.mode": (kind of metric, what it says)} of every kind in every mode of it; more: further ones, first."""
    each = {
        f"{name}.{mode}": (PROBABILITY if mode in PROBABILITIES else SHARE, f"{kind.says}: {MODES[mode]}")
        for name, kind in kinds.items()
        for mode in kind.modes
    }
    return more | each


def readings(kinds: Mapping[str, Kind], probes, answers, base, judge: Judge | None = None) -> dict[str, float]:
    """{"kind.mode": mean over the probes of the kind that can be read so}; NaN where none can."""
    found: dict[str, list[float]] = {}
    for one, answer, before in zip(probes, answers, base, strict=True):
        for mode in kinds[one.kind].modes if one.kind in kinds else ():
            found.setdefault(f"{one.kind}.{mode}", []).append(read(mode, one, answer, before, judge))
    return {name: mean(values) for name, values in found.items()}


def mean(values: Iterable[float]) -> float:
    """Of those that are not NaN; NaN where none is."""
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def read(mode: str, one: Probe, answer: Answer, base: Answer, judge: Judge | None = None) -> float:
    """A probe in one mode by one model's answer to it, NaN where there is nothing to read; base: the base model's.

    The first of the probe's answers is the right one, the others those that it is compared with.
    """
    if mode in WRITTEN:
        return math.nan if answer.text is None else _of_text(mode, one, answer.text, base.text or "", judge)
    if one.answers and one.answers[0] is not None:
        return _forced(mode, one.answers[0], answer, base)
    if mode == "same" and one.likeliest:
        return float(answer.top is not None and answer.top == base.top)
    return math.nan


def _forced(mode: str, ids: Sequence[int], answer: Answer, base: Answer) -> float:
    """Of an answer's tokens. Of a model that overflows nothing is said, so nothing is right and nothing agrees."""
    match mode:
        case "success" | "p_other":
            other = max((p for p in answer.p[1:] if not math.isnan(p)), default=math.nan)
            return other if mode == "p_other" or math.isnan(other) else float(answer.p[0] > other)
        case "p":
            return answer.p[0]
        case "exact":
            return answer.exact[0]
    said, wanted = answer.said[0], base.said[0] if mode == "same" else ids
    return sum(a == b for a, b in zip(said, wanted, strict=False)) / len(ids)


def _of_text(mode: str, one: Probe, text: str, base: str, judge: Judge | None) -> float:
    if mode == "same_text":
        return float(normalized(text) == normalized(base))
    if not one.accepted or (mode == "judge" and judge is None):
        return math.nan
    if mode == "judge":
        return _verdict(judge(spoken(one.text), one.accepted, text))
    return float((matches if mode == "match" else contains)(text, one.accepted))


# ---- judges


def check_judge(judge, benchmark, n_written: int) -> None:
    """Raises BadArgument for no function, and for one that this benchmark would not ask."""
    if judge is None:
        return
    if not callable(judge):
        checks.refuse("judge", judge, "a function of (prompt, accepted answers, text) that gives 0 to 1")
    if not n_written:
        checks.refuse("judge", judge, "none: nothing is written (generate=0)")
    if not any("judge" in metric for metric in benchmark.metrics):
        checks.refuse("judge", judge, f"none: benchmark {benchmark.name!r} does not read by one; 'questions' does")


def _verdict(given) -> float:
    """What a judge gave. Raises BadArgument for anything but 0 to 1."""
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        checks.refuse("what judge gives", given, "a number from 0 to 1, or True or False")
    return value


def known_as(judge: Judge | None) -> str | None:
    """What tells judges apart: a function's name and a digest of its own code (not of what it calls), of another object
    the name of its class; None for none."""
    if judge is None:
        return None
    code, name = getattr(judge, "__code__", None), getattr(judge, "__qualname__", type(judge).__qualname__)
    name = name.rpartition("<locals>.")[2]
    return f"{name} {digest(_said_by(code))}" if isinstance(code, CodeType) else name


def _said_by(code: CodeType) -> list:
    """What a function does, without the places where it stands."""
    consts = [_said_by(one) if isinstance(one, CodeType) else _constant(one) for one in code.co_consts]
    return [code.co_code.hex(), code.co_names, consts]


def _constant(value: object) -> str:
    # a set's order is another in each process
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
