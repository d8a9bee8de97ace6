"""Reports of the same cases, laid beside each other: what they measured alike, and what each of them says of it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics.intervals import COUNT, Metrics
from kedit_fast.basics.words import brief, counted, first_few
from kedit_fast.evaluation.benchmarks.knowedit import KEPT, portability_of
from kedit_fast.evaluation.easyedit import Columns
from kedit_fast.evaluation.questions import LOCALITY, PARAPHRASE, REWRITE, SAME_SUBJECT
from kedit_fast.evaluation.report import MODE, EvalReport
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.subjects import Names, folded

OTHER_BASE = 0.005  # from which difference of a mean on a reader is told that reports have other unedited models
NAMED = 8  # metrics that a note names

Report = EvalReport | Columns
Values = dict[str, Tensor]  # {metric: fp32 [n_cases]}


class Aligned(NamedTuple):
    """Reports of the same cases. base: of the unedited model, None where no report has an edit; sides: {name: what the
    report says of its edited model, or of the model where it has no edit}; notes: sentences"""

    facts: tuple[Fact, ...]
    cases: tuple[int, ...]
    metrics: Metrics
    score_of: tuple[str, ...]
    base: Values | None
    sides: dict[str, Values]
    notes: list[str]


def aligned(reports: Mapping[str, Report]) -> Aligned:
    """The reports beside each other; of another tool's columns what was asked with the same prompts.

    Raises ValueError, naming the first difference, for reports of other cases or metrics, and where nothing is left.
    """
    first = next((name for name, one in reports.items() if isinstance(one, EvalReport)), next(iter(reports)))
    whole, notes = reports[first], [note for one in reports.values() if isinstance(one, Columns) for note in one.notes]
    read = {name: _beside(reports, first, name, notes) for name in reports}
    metrics = {name: says for name, says in whole.metrics.items() if all(name in sides[-1] for sides in read.values())}
    if not metrics:
        raise ValueError(_nothing(reports, first))
    notes += _left_out(reports, metrics)
    edited = [name for name, one in reports.items() if one.edited is not None]
    base = read[edited[0]][0] if edited else None
    for name in edited[1:]:
        if _differ(read[edited[0]][0], read[name][0], metrics):
            notes.append(f"the unedited model of {name} is not that of {edited[0]}, which is shown")
    notes += [*_measured_otherwise(reports), *_perplexities(reports)]
    score_of = tuple(getattr(whole, "score_of", ()))
    return Aligned(
        whole.facts, getattr(whole, "cases", ()), metrics, score_of if set(score_of) <= set(metrics) else (),
        None if base is None else {name: base[name] for name in metrics},
        {name: {metric: sides[-1][metric] for metric in metrics} for name, sides in read.items()}, notes,
    )  # fmt: skip


def _beside(reports: Mapping[str, Report], first: str, name: str, notes: list[str]) -> tuple[Values, Values]:
    """(base, edited) of a report, checked against the first; base twice where it has no edit."""
    one, whole = reports[name], reports[first]
    if isinstance(one, EvalReport) and isinstance(whole, EvalReport):
        _check_same(one, whole, name, first)
        return one.base, one.base if one.edited is None else one.edited
    if isinstance(one, EvalReport) or one is whole:
        return one.base, one.base if one.edited is None else one.edited
    _check_places(one, whole, name, first)
    return _agreeing(one, whole, name, notes)


# ---- the same cases


def _check_same(one: EvalReport, whole: EvalReport, name: str, first: str) -> None:
    """Raises ValueError for two reports of other facts, cases or metrics."""
    _check_places(one, whole, name, first)
    if one.cases != whole.cases:
        raise ValueError(f"reports {first!r} and {name!r}: the same facts stand in other cases; evaluate them alike")
    for i, (mine, theirs) in enumerate(zip(one.facts, whole.facts, strict=True)):
        a, b = _asked(mine), _asked(theirs)
        for field in a:
            if a[field] != b[field]:
                raise ValueError(
                    f"reports {first!r} and {name!r} ask fact {i}, {mine.text!r}, otherwise: {field} is "
                    f"{brief(repr(b[field]))} and {brief(repr(a[field]))}"
                )
    for metric in {**whole.metrics, **one.metrics}:
        if metric not in one.metrics or metric not in whole.metrics:
            of = [report.meta.get("benchmark", "?") for report in (whole, one)]
            raise ValueError(
                f"reports {first!r} (benchmark {of[0]}) and {name!r} ({of[1]}) measure other things: {metric!r} is in "
                f"{first if metric in whole.metrics else name!r} alone; evaluate both by one benchmark"
            )


def _check_places(one: Report, whole: Report, name: str, first: str) -> None:
    """Raises ValueError for other prompts or new answers, or another number or order of them."""
    for i, (mine, theirs) in enumerate(zip(one.facts, whole.facts, strict=False)):
        a, b = ((folded(fact.text), folded(fact.target_new or "")) for fact in (mine, theirs))
        if a != b:
            raise ValueError(
                f"reports {first!r} and {name!r} are of other facts: fact {i} is {_said(theirs)} and {_said(mine)}; "
                "expected the same in the same order"
            )
    if len(one.facts) != len(whole.facts):
        raise ValueError(
            f"reports {first!r} and {name!r} are of {counted(len(whole.facts), 'fact')} and of {len(one.facts):,}, the "
            "first of them the same; evaluate as many (-n)"
        )
    if not isinstance(one, EvalReport) and getattr(whole, "cases", ()):
        raise ValueError(f"{first!r} has cases of several facts; {name!r} was measured for each fact by itself")


def _said(fact: Fact) -> str:
    return f"{fact.text!r} -> {fact.target_new!r}"


def _asked(fact: Fact) -> dict[str, Any]:
    """What a report's figures depend on of a fact."""
    fields = ("target_true", "paraphrases", "neighborhood", "same_subject", "chat", "attached")
    return {name: getattr(fact, name) for name in fields} | {"portability": fact.provenance.get("portability")}


# ---- another tool's columns


def _agreeing(one: Columns, whole: Report, name: str, notes: list[str]) -> tuple[Values, Values]:
    """The columns, NaN where a fact was asked with other prompts than the report's; of a kind that shares none, and of
    metrics that the report has not, nothing is left."""
    theirs = whole.prompts if isinstance(whole, Columns) else prompts_of(whole)
    base, edited = {}, {}
    told: dict[str, int] = {}
    for metric in one.metrics:
        kind = metric.partition(MODE)[0]
        if metric not in whole.metrics or (whole.edited or whole.base)[metric].isnan().all():
            continue
        same = _same_prompts(one, theirs, kind)
        if not bool(same.any()):
            told[kind] = 0
            continue
        values = ~one.edited[metric].isnan()
        if bool((values & ~same).any()):
            told[kind] = int((values & same).sum())
        base[metric], edited[metric] = (side[metric].masked_fill(~same, math.nan) for side in (one.base, one.edited))
    notes += [
        f"{kind}: {name} asked other prompts of {'all' if not n else 'some'} facts; {counted(n, 'fact')} compared"
        for kind, n in told.items()
    ]
    return base, edited


def _same_prompts(one: Columns, theirs: Mapping, kind: str) -> Tensor:
    """Whether the facts were asked a kind of question with the same prompts, bool [n_facts]."""
    mine, n = one.prompts.get(kind), len(one.facts)
    if mine is None:  # of no prompts of their own: what is written behind the edited one
        return torch.ones(n, dtype=torch.bool)
    both = zip(mine, theirs.get(kind, [()] * n), strict=True)
    return torch.tensor([bool(a) and set(map(folded, a)) == set(map(folded, b)) for a, b in both])


def prompts_of(report: EvalReport) -> dict[str, list[tuple[str, ...]]]:
    """{kind of question: the prompts of each fact}, of what facts bring by themselves and of portability."""
    subjects = Names(fact.subject for fact in report.facts)
    found: dict[str, list[tuple[str, ...]]] = {}
    for i, fact in enumerate(report.facts):
        near = [one.prompt for one in fact.questions("neighborhood") if one.answer and not subjects.in_text(one.prompt)]
        asked: dict[str, list[str]] = {REWRITE: [fact.text], PARAPHRASE: list(fact.paraphrases), LOCALITY: near}
        asked[SAME_SUBJECT] = [one.prompt for one in fact.questions("same_subject")]
        asked[KEPT] = near + asked[SAME_SUBJECT]
        for one in portability_of(fact.provenance):
            kind = one.kind if any(name.startswith(one.kind + MODE) for name in report.metrics) else "portability"
            asked.setdefault(kind, []).append(one.prompt)
        for kind, prompts in asked.items():
            found.setdefault(kind, [()] * len(report.facts))[i] = tuple(prompts)
    return found


# ---- what is said of it


def _left_out(reports: Mapping[str, Report], metrics: Iterable[str]) -> list[str]:
    """Which metrics some report has alone."""
    kept = set(metrics)
    said = []
    for name, one in reports.items():
        rest = [metric for metric, (kind, _) in one.metrics.items() if metric not in kept and kind != COUNT]
        measured = [metric for metric in rest if not (one.edited or one.base)[metric].isnan().all()]
        if measured:
            said.append(f"left out, of {name} alone: {first_few(measured, NAMED, ', ')}")
    return said


def _measured_otherwise(reports: Mapping[str, Report]) -> list[str]:
    """Sentences on settings that answers in free writing depend on, where reports have several."""
    said = []
    for setting, what in (("generate", "tokens written behind a prompt"), ("judge", "the judge")):
        found = {
            n: one.meta[setting] for n, one in reports.items() if isinstance(one, EvalReport) and setting in one.meta
        }
        if len(set(map(str, found.values()))) > 1:
            each = ", ".join(f"{name} {value if value is not None else 'none'}" for name, value in found.items())
            said.append(f"{what}: not the same in all, so modes that read free writing differ by that too: {each}")
    return said


def _perplexities(reports: Mapping[str, Report]) -> list[str]:
    """A sentence on how much less likely ordinary text has become, where that was measured."""
    measured = {name: one for name, one in reports.items() if isinstance(one, EvalReport) and one.perplexity}
    told = [
        f"{name} {one.perplexity[0]:.2f}" if one.drift is None else f"{name} {one.perplexity[1]:.2f} ({one.drift:+.1%})"
        for name, one in measured.items()
        if one.perplexity is not None
    ]
    return [f"perplexity (and its change): {', '.join(told)}"] * bool(told)


def _nothing(reports: Mapping[str, Report], first: str) -> str:
    has = "; ".join(f"{name} has {', '.join(list(one.metrics)[:NAMED])}" for name, one in reports.items())
    return (
        f"nothing was measured alike: {has}; what EasyEdit measures stands beside a report of --benchmark knowedit or "
        "zsre on the same prompts"
    )


def _differ(base: Values, other: Values, metrics: Iterable[str]) -> bool:
    """Whether two reports disagree on the unedited model."""
    gaps = (base[metric].double() - other[metric].double() for metric in metrics)
    return any(not gap.isnan().all() and abs(float(gap.nanmean())) > OTHER_BASE for gap in gaps)
