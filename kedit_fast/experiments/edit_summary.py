"""Is the edit real? Everything that is measured of an edit in one summary, and on a page that is read in a minute.

    efficacy        the new answer stands in what the model writes behind the edited prompt
    generalisation  the same behind paraphrases
    specificity     at prompts on other subjects the likeliest tokens of their answers are the base model's
    consistency     facts that follow from the edited ones are what the model says
    capability      accuracy on general tasks, as a share of the base model's; at most 1

Their harmonic mean is 0 where one of them is. Published efficacy is teacher-forced; it stands beside in the tables.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from kedit_fast.basics import checks
from kedit_fast.basics.checks import AnyPath
from kedit_fast.basics.files import write_text
from kedit_fast.basics.intervals import Interval, harmonic_mean
from kedit_fast.basics.printing import columns, escaped
from kedit_fast.basics.progress import Bar, progress
from kedit_fast.basics.words import brief
from kedit_fast.edits.chain import facts_in_force, with_edits
from kedit_fast.edits.edit import Edit, edit_list
from kedit_fast.evaluation.benchmark import Case
from kedit_fast.evaluation.benchmarks.knowedit import QUESTIONS
from kedit_fast.evaluation.evaluate import evaluate
from kedit_fast.evaluation.harness import capability
from kedit_fast.evaluation.moved import what_moved
from kedit_fast.evaluation.moved_questions import checked_texts
from kedit_fast.evaluation.moved_report import Moved
from kedit_fast.evaluation.questions import N_WRITTEN
from kedit_fast.evaluation.report import EvalReport
from kedit_fast.evaluation.scores import Capability
from kedit_fast.evaluation.stored import finite
from kedit_fast.experiments.consistency import Consistency, consistency
from kedit_fast.experiments.implied import Tables, read_table
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.knowledge import BUILTIN
from kedit_fast.gating import GateReport, Suite, Thresholds, gate
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.pictures.page import Picture, Section, Table, fragment, write_report
from kedit_fast.pictures.summary import plot_scores

_Found = TypeVar("_Found")

READ_FROM = {  # score: the metric of the report that it is
    "efficacy": "rewrite.contains",
    "generalisation": "paraphrase.contains",
    "specificity": "locality.same",
}
PROBABILITIES = {
    "new answer": "rewrite.p", "old answer": "rewrite.p_other",
    "new, paraphrases": "paraphrase.p", "old, paraphrases": "paraphrase.p_other",
}  # fmt: skip
WORST = 8  # facts told in full
FORMAT, VERSION = "kedit_fast.summary", 1
NOTHING = Interval(math.nan, math.nan, math.nan, 0)


class Score(NamedTuple):
    """A share without and with the edit; n = 0 and NaN where it was not measured."""

    base: Interval
    edited: Interval


@dataclass(frozen=True, eq=False, repr=False)
class EditSummary:
    """What ``evaluate_edit`` gives: its parts, each with its own tables, pages and files, and what they come to.

    report: the edited facts in all modes; moved: what else changed; gate: may it ship
    consistency, capability: None where they were not asked for, or could not be measured
    not_measured: what, and why: sentences
    """

    report: EvalReport
    moved: Moved
    gate: GateReport
    consistency: Consistency | None
    capability: Capability | None
    not_measured: tuple[str, ...]

    @cached_property
    def scores(self) -> dict[str, Score]:
        """The five scores."""
        summary = self.report.summary()
        found = {name: Score(*_both(summary[metric])) for name, metric in READ_FROM.items()}
        return found | {"consistency": self._consistent(), "capability": self._capable()}

    @cached_property
    def probabilities(self) -> dict[str, Score]:
        """P of the new and of the old answer, behind the edited prompts and behind paraphrases."""
        summary = self.report.summary()
        return {name: Score(*_both(summary[metric])) for name, metric in PROBABILITIES.items()}

    @property
    def harmonic_mean(self) -> float:
        """Of the scores that were measured, after the edit; 0 where one of them is 0."""
        return harmonic_mean(score.edited.mean for score in self.scores.values() if score.edited.n)

    def _consistent(self) -> Score:
        if self.consistency is None or not self.consistency.implied:
            return Score(NOTHING, NOTHING)
        return Score(*_both(self.consistency.summary()["implied"][self.consistency.by]))

    def _capable(self) -> Score:
        """The mean over tasks of each one's first metric."""
        firsts = [
            next(iter(one.values())) for one in ({} if self.capability is None else self.capability.scores).values()
        ]
        known = [one for one in firsts if one.edited is not None and one.base > 0]
        if not known:
            return Score(NOTHING, NOTHING)
        n = sum(one.n for one in known)
        kept = min(1.0, fmean(one.edited or 0.0 for one in known) / fmean(one.base for one in known))
        return Score(Interval(1.0, math.nan, math.nan, n), Interval(kept, math.nan, math.nan, n))

    # ---- what is shown

    @property
    def verdict(self) -> str:
        """The gate's, in a sentence, and the harmonic mean."""
        told = (
            "may ship" if self.gate.passed else f"is held back: {', '.join(one.name for one in self.gate.failed[:3])}"
        )
        of = [name for name, score in self.scores.items() if score.edited.n]
        return f"the edit {told}; harmonic mean of {', '.join(of)}: {self.harmonic_mean:.2f}"

    def worst(self) -> list[tuple[str, str, str, str]]:
        """(prompt, new answer, written before, written after) of facts whose new answer is not in what is written."""
        missed = (self.report.edited or {})["rewrite.contains"].tolist()
        each = zip(self.report.facts, missed, self.report.generations, strict=False)
        return [
            (prompt, fact.target_new or "", brief(before), brief(after or ""))
            for fact, holds, (prompt, before, after) in each
            if holds == 0
        ]

    def __str__(self) -> str:
        tables = [columns([[name, "base", "edited", "of"], *_rows(found)]) for name, found in self._tables()]
        told = [f"not written: {prompt!r} -> {new!r}, but {after!r}" for prompt, new, _, after in self.worst()[:WORST]]
        return escaped("\n".join([self.verdict, *tables, *told, *self._missing()]))

    def __repr__(self) -> str:
        return f"EditSummary({self.verdict})"

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self, path: AnyPath | None = None) -> str:
        """The summary as an HTML fragment without scripts or outside files; with ``path`` also a page, whole or not."""
        verdict = self.verdict[0].upper() + self.verdict[1:] + "."
        tables = [Table([name, "base", "edited", "of"], _rows(found)) for name, found in self._tables()]
        first = [verdict, Picture(plot_scores(self)), *tables]
        sections = [Section("In short", first), Section("Worst cases", self._told()), *self._paths()]
        sections.append(Section("What else moved", self.moved.blocks()))
        sections.append(Section("The facts in every reading", self.report.blocks()))
        sections += [
            Section(heading, part.blocks())
            for heading, part in (("What follows from the facts", self.consistency), ("General tasks", self.capability))
            if part is not None
        ]
        sections.append(Section("What was not measured", self._missing() or ["Everything was."]))
        if path is not None:
            write_report(path, "Is the edit real?", str(self.report.meta["model"]), sections)
        return fragment([block for section in sections for block in section.blocks])

    def _told(self) -> list:
        worst = self.worst()[:WORST]
        if not worst:
            return ["The new answer of every fact stands in what the model writes."]
        return [Table(["prompt", "new answer", "written before", "written after"], worst)]

    def _paths(self) -> list[Section]:
        return (
            []
            if self.gate.lens is None
            else [Section("The old answer, layer by layer", [Picture(self.gate.lens.plot())])]
        )

    def _tables(self) -> list[tuple[str, dict[str, Score]]]:
        return [("score", self.scores), ("P of", self.probabilities)]

    def _missing(self) -> list[str]:
        return [f"not measured: {each}" for each in self.not_measured]

    def to_record(self) -> dict[str, Any]:
        """Scores and verdict, ready for JSON; NaN is None. The parts have files of their own (``report.save`` ...)."""
        scores, p = ({n: one._asdict() for n, one in found.items()} for _, found in self._tables())
        told = {"verdict": self.verdict, "passed": self.gate.passed, "harmonic_mean": self.harmonic_mean}
        told |= {
            "scores": scores,
            "probabilities": p,
            "worst": self.worst(),
            "not_measured": self.not_measured,
            "meta": self.report.meta,
        }
        return finite({"format": FORMAT, "version": VERSION, **told})

    def save(self, path: AnyPath) -> None:
        """Writes the record as one JSON file, whole or not at all; a file of that name is replaced."""
        write_text(path, json.dumps(self.to_record(), indent=1, allow_nan=False) + "\n")


@takes_lm
def evaluate_edit(
    lm: LM,
    edit: Edit | Iterable[Edit],
    cases: Case | Fact | Iterable[Case] | Iterable[Fact] | None = None,
    *,
    suite: Suite | None = None,
    thresholds: Thresholds | None = None,
    relations: Tables | None = BUILTIN,
    tasks: Sequence[str] = ("kedit_common", "kedit_short"),
    texts: Mapping[str, str] | None = None,
    generate: int = N_WRITTEN,
    seed: int = 0,
) -> EditSummary:
    """Everything that is measured of an edit: the facts in all modes, what else moved, what they imply, general tasks,
    and the gate.

    edit: an Edit, or several in the order they were made, none of them independent; lm: without them
    cases: what is asked; None: the edits' own facts with the probes they carry
    suite, thresholds: of ``kf.gate``; relations: of ``kf.consistency``, None: what follows is not asked
    tasks: of ``kf.capability``, which needs lm-evaluation-harness; none: not measured
    texts, seed: of ``kf.what_moved``; generate: tokens written behind each prompt

    Raises what these raise, for what is given here before any work.
    """
    edits, left_out = edit_list(edit, "edit"), []
    checks.optional(checks.instance, "suite", suite, Suite, "a Suite; load_suite reads a file")
    checks.optional(checks.instance, "thresholds", thresholds, Thresholds, "Thresholds")
    table, texts = None if relations is None else read_table(relations), checked_texts(texts)
    tasks = checks.listed("tasks", tasks, str, 'tasks, e.g. "kedit_common"', empty=True)
    generate, seed = checks.whole("generate", generate, least=1, like=N_WRITTEN), checks.seed("seed", seed)
    facts = facts_in_force(with_edits(lm, edits, "edit").edits)
    n_parts = 3 + (table is not None) + bool(tasks)
    with progress("measuring an edit", n_parts) as bar:
        part = partial(_part, bar)
        asked = {"benchmark": QUESTIONS, "generate": generate, "both_forms": False}
        report = part("facts", evaluate, lm, facts if cases is None else cases, edits, **asked)
        moved = part("what else moved", what_moved, lm, edits, texts=texts, seed=seed)
        follows = None if table is None else part("what follows", consistency, lm, edits, table)
        if follows is None or not follows.implied:
            left_out.append(
                "consistency: " + ("no relations were given" if follows is None else "the table implies nothing")
            )
        capable = None
        if tasks:
            try:
                capable = part("general tasks", capability, lm, tasks, edits, seed=seed)
            except ImportError as error:
                left_out.append(f"capability: {error}")
        else:
            left_out.append("capability: no tasks were given")
        judged = part("gate", gate, lm, edits, suite, thresholds=thresholds)
    summary = EditSummary(report, moved, judged, follows, capable, ())
    left_out += [f"{name}: no such prompts" for name in READ_FROM if not summary.scores[name].edited.n]
    return replace(summary, not_measured=tuple(left_out))


def _part(bar: Bar, name: str, measure: Callable[..., _Found], *args: Any, **how: Any) -> _Found:
    """What one part of the work gives, which is told of as one."""
    with bar.inside(name):
        found = measure(*args, **how)
    bar.advance(1, name)
    return found


def _both(sides: Mapping[str, Interval | None]) -> list[Interval]:
    return [sides[name] or NOTHING for name in ("base", "edited")]


def _rows(found: Mapping[str, Score]) -> list[list[str]]:
    return [[name, *map(_shown, one), str(one.edited.n or "–")] for name, one in found.items()]


def _shown(value: Interval) -> str:
    if not value.n:
        return "–"
    bounds = "" if math.isnan(value.low) else f" [{value.low:.2f}, {value.high:.2f}]"
    return f"{value.mean:.2f}{bounds}"
