"""What EasyEdit measured, under this package's names, so that its runs stand beside ours.

EasyEdit (Zhang et al. 2024, arXiv:2401.01286) writes a list with a record for each fact: the request with its prompts,
and what was measured of it before and after the edit, a value for each prompt or one alone:

    requested_rewrite      prompt, target_new, subject, ground_truth, rephrase_prompt;
                           locality and portability: {name: {prompt, ground_truth}}, each a text or a list
    pre, post              rewrite_acc, rephrase_acc; locality, portability: {name_acc}; fluency: {ngram_entropy}
    metric_meta            in pre and post of newer versions: {"rewrite": {"protocol"}, ...}

Its accuracies are read as "rewrite.token", "paraphrase.token", "locality.same" (of prompts that name the subject
"same_subject.same") and, of portability, "logical.token", "reasoning.token", "alias.token" and "portability.token",
which is all of them together. Where a record names another protocol the mode is that one's: judge, match, same_text,
or, of GRACE, which is asked to write as many tokens as the answer has, the protocol's own name. A model agrees with
itself, so that "same" is 1 before the edit.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.intervals import AMOUNT, HIGHEST, SHARE, Metrics
from kedit_fast.basics.words import brief, counted, json_kind
from kedit_fast.evaluation.benchmarks.knowedit import KEPT, KEPT_SAYS, KINDS, NAMES
from kedit_fast.evaluation.questions import LOCALITY, OF_FACT, PARAPHRASE, REWRITE, SAME_SUBJECT
from kedit_fast.evaluation.readings import MODES, mean
from kedit_fast.facts.fact import Fact, record_facts
from kedit_fast.facts.files import Notes, read_records
from kedit_fast.facts.formats import Question, questions_of
from kedit_fast.facts.subjects import folded, is_named

ACC = "_acc"
PORTABILITY = "portability"
FLUENCY = "fluency.ngram_entropy"
PROTOCOLS = {  # the mode of each; of any other, its own name
    "decoder_only_teacher_forcing": "token", "seq2seq_teacher_forcing": "token",
    "icl_decoder_only_teacher_forcing": "token", "icl_seq2seq_teacher_forcing": "token",
    "free_generation_judge": "judge", "free_generation_exact_match_fallback": "match",
    "pre_post_argmax_token_match": "same", "icl_pre_post_argmax_token_match": "same",
    "pre_post_free_generation_output_match": "same_text",
}  # fmt: skip
REQUEST = ("prompt", "target_new", "subject", "ground_truth", "rephrase_prompt", "locality", PORTABILITY)
UNKNOWN = "<|endoftext|>"  # what older versions wrote for no ground_truth
EXPECTED = "expected a list of records with requested_rewrite, pre and post, as EasyEdit's editor.edit returns it"


@dataclass(frozen=True, eq=False, repr=False)
class Columns:
    """What another tool measured of facts, in this package's names: some of a benchmark's metrics.

    base, edited: {metric: fp32 [n_facts]}, NaN where it is not measured
    prompts: {kind: for each fact, the prompts behind its values}; kind: what stands before "." in a metric's name
    notes: what a reader must know: sentences
    """

    base: dict[str, Tensor]
    edited: dict[str, Tensor]
    facts: tuple[Fact, ...]
    metrics: Metrics
    prompts: Mapping[str, Sequence[tuple[str, ...]]]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Columns({len(self.facts)} facts, {', '.join(self.metrics)})"


def load_easyedit(path: checks.AnyPath) -> Columns:
    """The columns of EasyEdit's result file, .json or .jsonl (.gz).

    Raises ValueError, with the record and the field, for anything that is not as above; parts that are missing are NaN.
    OSError where the file cannot be opened.
    """
    read = []
    for index, (place, record) in enumerate(read_records(path)):
        try:
            read.append(_Record(record, index))
        except ValueError as error:
            raise ValueError(f"{place}: {brief(str(error))}") from error
    names = dict.fromkeys(name for one in read for name in one.edited)
    if not names:
        raise ValueError(f"{path}: nothing is measured in post; {EXPECTED}")
    order = [*OF_FACT, *KINDS, KEPT, "fluency"]
    metrics = {name: _says(name) for name in sorted(names, key=lambda name: order.index(name.partition(".")[0]))}
    sides = (
        {name: torch.tensor([side.get(name, math.nan) for side in every], dtype=torch.float32) for name in metrics}
        for every in ([one.base for one in read], [one.edited for one in read])
    )
    kinds = dict.fromkeys(name.partition(".")[0] for name in metrics)
    prompts = {kind: [tuple(one.prompts.get(kind, ())) for one in read] for kind in kinds if kind != "fluency"}
    unread = Counter(name for one in read for name in one.unread)
    left = ", ".join(f"{name} ({counted(n, 'time')})" for name, n in unread.items())
    notes = [f"not read of {path}: {left}"] * bool(unread)
    return Columns(*sides, tuple(one.fact for one in read), metrics, prompts, tuple(notes))


class _Record:
    """One of them. fact; base, edited: {metric: value}; prompts: {kind: prompts}; unread: fields."""

    def __init__(self, record, index: int):
        if not isinstance(record, dict):
            raise record if isinstance(record, ValueError) else ValueError(f"found {json_kind(record)}; {EXPECTED}")
        request = record.get("requested_rewrite")
        if not isinstance(request, dict):
            found = f"is {json_kind(request)}" if "requested_rewrite" in record else "is not there"
            raise ValueError(f"requested_rewrite {found}; {EXPECTED}")
        self.fact = _fact(request, index)
        self.unread: list[str] = []
        self.asked = {
            (part, name): questions_of(given, f"requested_rewrite.{part}.{name}")
            for part in ("locality", PORTABILITY)
            for name, given in _object(request, part, "requested_rewrite").items()
        }
        self.prompts: dict[str, list[str]] = {REWRITE: [self.fact.text], PARAPHRASE: list(self.fact.paraphrases)}
        for (part, name), questions in self.asked.items():
            for one in questions:
                for kind in self._kinds(part, name, one):
                    self.prompts.setdefault(kind, []).append(one.prompt)
        self.base, self.edited = (self._side(side, _object(record, side)) for side in ("pre", "post"))
        self.base |= {name: 1.0 for name in self.edited if name.partition(".")[2] in ("same", "same_text")}

    def _kinds(self, part: str, name: str, question: Question) -> tuple[str, ...]:
        """What a question is to us."""
        if part == PORTABILITY:
            kind = NAMES.get(folded(name).replace(" ", "_"))
            return (kind, PORTABILITY) if kind else (PORTABILITY,)
        subject = self.fact.subject
        return (SAME_SUBJECT if subject is not None and is_named(question.prompt, subject) else LOCALITY, KEPT)

    def _side(self, side: str, given: dict) -> dict[str, float]:
        """{metric: mean of its values} of "pre" or "post"."""
        found: dict[str, list[float]] = {}
        meta = _object(given, "metric_meta", side)
        written = "rewrite_gen_content" in given
        for name, kind in (("rewrite", REWRITE), ("rephrase", PARAPHRASE)):
            mode = _mode(meta, name, "judge" if written else "token")
            if given.get(name + ACC) is not None:
                found[f"{kind}.{mode}"] = _values(given[name + ACC], f"{side}.{name}{ACC}")
        for part in ("locality", PORTABILITY):
            for field, value in _object(given, part, side).items():
                if field.endswith(ACC) and value is not None:
                    name = field.removesuffix(ACC)
                    usual = ("same_text" if written else "same") if part == "locality" else ""
                    usual = usual or _mode(meta, "rewrite", "judge" if written else "token")
                    mode = _mode(meta, f"{part}.{name}", usual)
                    values = _values(value, where := f"{side}.{part}.{field}")
                    for kind, some in self._by_kind(part, name, values, where):
                        found.setdefault(f"{kind}.{mode}", []).extend(some)
        entropy = _object(given, "fluency", side).get("ngram_entropy")
        if entropy is not None:
            found[FLUENCY] = _values(entropy, f"{side}.fluency.ngram_entropy", HIGHEST[AMOUNT])
        self.unread += [f"{side}.{name}" for name in given if name.endswith(("_ppl", "_F1")) or name == "ood_acc"]
        return {name: mean(values) for name, values in found.items()}

    def _by_kind(self, part: str, name: str, values: list[float], where: str) -> Iterator[tuple[str, list[float]]]:
        """(kind, values of its questions). Where EasyEdit left some out, what is left is of the kind that all are."""
        questions = self.asked.get((part, name), [])
        kinds = [self._kinds(part, name, one) for one in questions]
        if len(values) != len(questions) and len(set(kinds)) != 1:
            raise ValueError(
                f"{where} has {len(values)} values for {len(questions)} prompts of requested_rewrite.{part}.{name}; "
                "expected one for each"
            )
        for kind in dict.fromkeys(kind for some in kinds for kind in some):
            whole = len(set(kinds)) == 1
            yield kind, values if whole else [x for x, some in zip(values, kinds, strict=True) if kind in some]


def _fact(request: dict, index: int) -> Fact:
    given = {name: request[name] for name in REQUEST if request.get(name) is not None}
    if given.get("ground_truth") == UNKNOWN:
        del given["ground_truth"]
    try:
        (fact,) = record_facts(given | {"id": str(index)}, index, Notes())
    except ValueError as error:
        raise ValueError(f"requested_rewrite: {error}") from error
    return fact


def _object(record: dict, name: str, inside: str = "") -> dict:
    """A field that is an object, or not there."""
    value = record.get(name)
    if value is not None and not isinstance(value, dict):
        place = ".".join(filter(None, (inside, name)))
        raise ValueError(f"{place}: expected an object, found {json_kind(value)}")
    return value or {}


def _mode(meta: dict, section: str, usual: str) -> str:
    protocol = _object(meta, section, "metric_meta").get("protocol")
    return usual if not isinstance(protocol, str) else PROTOCOLS.get(protocol, protocol)


def _values(value, where: str, most: float = 1.0) -> list[float]:
    """The numbers of a value, of lists in lists too; NaN and null are NaN."""
    if isinstance(value, list):
        return [x for one in value for x in _values(one, where, most)]
    if value is None or value != value:
        return [math.nan]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        wanted = "shares from 0 to 1" if most == 1 else "numbers from 0 on"
        raise ValueError(f"{where}: expected {wanted}, found {checks.shown(value)}")
    return [float(value)]


def _says(name: str) -> tuple[str, str]:
    kind, _, mode = name.partition(".")
    if name == FLUENCY:
        return AMOUNT, "entropy of the 2- and 3-grams of what is written behind the prompt"
    more = {PORTABILITY: "the answer to all portability questions", KEPT: KEPT_SAYS}
    says = more[kind] if kind in more else (OF_FACT | KINDS)[kind].says
    return SHARE, f"{says}: {MODES.get(mode, f'by EasyEdit, {mode}')}"
