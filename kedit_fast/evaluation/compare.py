"""Several edits or methods on the same facts: their means side by side, and how each differs from one of them.

Two intervals side by side say too little: the facts are the same, and most of the spread is theirs. So each fact's
difference is taken, and the interval is that of the mean difference.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.checks import AnyPath
from kedit_fast.basics.files import check_format, read_object, reading, write_text
from kedit_fast.basics.intervals import COUNT, SCORE, SHARE, Interval, Metrics, paired, paired_scores, summarize
from kedit_fast.basics.printing import columns, escaped
from kedit_fast.basics.words import counted
from kedit_fast.evaluation.aligned import aligned
from kedit_fast.evaluation.benchmark import check_metrics
from kedit_fast.evaluation.easyedit import Columns
from kedit_fast.evaluation.report import MODE, EvalReport, shown
from kedit_fast.evaluation.stored import columns_of, listed
from kedit_fast.facts.fact import Fact
from kedit_fast.pictures.comparison import plot_comparison
from kedit_fast.pictures.page import Cell, Details, Picture, Section, Table, fragment, write_report

FORMAT, VERSION = "kedit_fast.comparison", 1
BASE = "base"  # the unedited model beside the others
# Metrics, kinds of question and modes of which less is better: of the old answer, and of what an answer competes with.
FEWER = {"p_true", "old", "deducible", "p_other"}
LIKE = "reports of the same facts, {'memit': kf.evaluate(...), 'rome': kf.EvalReport.load(...)}"


def compare(reports: Mapping[str, EvalReport | Columns], *, against: str | None = None) -> "Comparison":
    """Reports of the same cases in one table, with the paired difference of each to one of them.

    reports: {name: EvalReport, or what another tool measured (``load_easyedit``)}, in the order in which they are
        shown. Of a report without an edit the model as it is stands for itself: two models can be compared
    against: whose difference is taken; "base": the unedited model's; None: the first's

    Of another tool's columns metrics and prompts that agree with the reports' are compared; what is left out is said in
    ``notes``. Raises ValueError, naming the first difference, for reports of other facts, in another order or by
    another benchmark; for fewer than two, and a name that is not there.
    """
    checks.instance("reports", reports, Mapping, LIKE)
    for name, one in reports.items():
        checks.text("reports", name, like="memit")
        checks.instance(f"reports[{name!r}]", one, EvalReport | Columns, "an EvalReport, or what load_easyedit gives")
    if len(reports) < 2 or BASE in reports:
        wrong = f"{counted(len(reports), 'report')}; expected two or more" if len(reports) < 2 else f"{BASE!r} is taken"
        raise ValueError(f"reports: {wrong}: {LIKE}; what 'base' names is the unedited model of these")
    found = aligned(reports)
    known = [*reports, *[BASE] * (found.base is not None)]
    against = next(iter(reports)) if against is None else checks.choice("against", against, known)
    return Comparison(against=against, meta={name: _about(one) for name, one in reports.items()}, **found._asdict())


def _about(report: EvalReport | Columns) -> dict:
    if not isinstance(report, EvalReport):
        return {"source": "EasyEdit"}
    names = ("model", "method", "fingerprint", "benchmark", "independent", "layers", "version")
    return {name: report.meta[name] for name in names if name in report.meta}


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What ``compare`` gives.

    base: {metric: fp32 [n_cases]} of the unedited model, None where no report has an edit; sides: {name: the same of
        each report}; NaN where a case has no such probe
    facts, cases, metrics, score_of: as in ``EvalReport``; against: the side that the others are compared with
    notes: what a reader must know: sentences; meta: {name: model, method, benchmark ...}
    """

    facts: tuple[Fact, ...]
    cases: tuple[int, ...]
    metrics: Metrics
    score_of: tuple[str, ...]
    base: dict[str, Tensor] | None
    sides: dict[str, dict[str, Tensor]]
    notes: Sequence[str]
    against: str
    meta: dict[str, dict]

    @cached_property
    def _all(self) -> dict[str, dict[str, Tensor]]:
        return ({} if self.base is None else {BASE: self.base}) | self.sides

    @cached_property
    def summary(self) -> dict[str, dict[str, Interval]]:
        """{metric: {"base" and each side: its mean with its 95 % interval}}, as in ``EvalReport.summary``."""
        found = {name: summarize(side, self.metrics, self.score_of) for name, side in self._all.items()}
        return {metric: {name: found[name][metric] for name in found} for metric in next(iter(found.values()))}

    @cached_property
    def differences(self) -> dict[str, dict[str, Interval]]:
        """{metric: {each side but ``against``: mean of its difference to that, with its 95 % interval; n: pairs}}, over
        the cases where both have a value. Which interval: ``intervals.paired``, ``paired_scores``."""
        theirs = self._all[self.against]
        others = {name: side for name, side in self.sides.items() if name != self.against}
        found: dict[str, dict[str, Interval]] = {}
        if self.score_of:
            found[SCORE] = {name: paired_scores(theirs, side, self.score_of) for name, side in others.items()}
        for metric, (kind, _) in self.metrics.items():
            found[metric] = {name: paired(theirs[metric], side[metric], kind) for name, side in others.items()}
        return found

    def verdict(self, metric: str, name: str) -> str:
        """ "better" or "worse" than ``against``, where the interval of the difference leaves 0 out; else ""."""
        found = self.differences[metric][name]
        if not (found.low > 0 or found.high < 0):
            return ""
        return "better" if (found.low > 0) != bool({metric, *metric.split(MODE)} & FEWER) else "worse"

    def modes(self) -> tuple[str, ...]:
        """Of questions that are read in several modes, those that are shown unless told otherwise: the score's."""
        return tuple(dict.fromkeys(name.partition(MODE)[2] for name in self.score_of if MODE in name) or self._every())

    def shown(self, modes: Sequence[str] | None = None) -> list[str]:
        """Metrics that some side has, in these modes. Raises BadArgument for a mode that no metric has."""
        modes = self.modes() if modes is None else checks.choices("modes", modes, self._every())
        told = [name for name in self.summary if name == SCORE or self.metrics[name][0] != COUNT]
        told = [name for name in told if MODE not in name or name.partition(MODE)[2] in modes]
        return [name for name in told if any(one.mean == one.mean for one in self.summary[name].values())]

    # ---- what is shown

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return f"Comparison({self._title()})"

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_text(self, modes: Sequence[str] | None = None) -> str:
        """The tables of means and of differences. modes: as in ``shown``"""
        names = self.shown(modes)
        tables = [columns([[str(cell) for cell in row] for row in table]) for table in self._tables(names)]
        return escaped("\n".join([self._title(), tables[0], "", tables[1], *self._lines(), *self._folded(names)]))

    def to_html(self, path: AnyPath | None = None, modes: Sequence[str] | None = None) -> str:
        """The tables and the picture as an HTML fragment without scripts or outside files; with ``path`` also a page,
        whole or not at all. The other modes stand there behind a line that opens them."""
        names = self.shown(modes)
        rest = [name for name in self.shown(list(self._every())) if name not in names] if self._every() else []
        means, differs = self._blocks(names)
        drawn = [name for name in names if name == SCORE or self.metrics[name][0] == SHARE]
        picture = [Picture(plot_comparison(self, names=drawn))] * bool(drawn)
        more = [Details("in the other modes", self._blocks(rest))] if rest else []
        blocks = [means, *picture, differs, *self._lines(), *more]
        if path is not None:
            write_report(path, "Comparison", self._title(), [Section("The same facts, edited in each way", blocks)])
        return fragment(blocks)

    def _every(self) -> dict[str, None]:
        return dict.fromkeys(name.partition(MODE)[2] for name in self.metrics if MODE in name)

    def _blocks(self, names: Sequence[str]) -> list[Table]:
        titles = "Means, with 95 % intervals", f"Paired differences to {self.against}"
        made = []
        for (headers, *rows), title in zip(self._tables(names), titles, strict=True):
            cells = [
                [Cell(row[0], hint=self._says(name)), *map(_toned, row[1:])]
                for name, row in zip(names, rows, strict=True)
            ]
            made.append(Table(headers, cells, title))
        return made

    def _tables(self, names: Sequence[str]) -> Iterator[list[list[str]]]:
        """Rows of text under their header: of means, and of differences."""
        unit = "cases" if self.cases else "facts"
        rows = [
            [name, *(shown(one) for one in sides.values()), _counts(sides.values())]
            for name, sides in ((name, self.summary[name]) for name in names)
        ]
        yield [["mean", *self._all, unit], *rows]
        others = [name for name in self.sides if name != self.against]
        rows = [
            [name, *(_differing(one, self.verdict(name, side)) for side, one in found.items()), _counts(found.values())]
            for name, found in ((name, self.differences[name]) for name in names)
        ]
        yield [[f"difference to {self.against}", *others, "pairs"], *rows]

    def _lines(self) -> list[str]:
        told = "better, worse: the 95 % interval of the paired difference leaves 0 out, each by itself; where nothing "
        return [told + "differs, one in twenty does", *self.notes]

    def _folded(self, names: Sequence[str]) -> list[str]:
        rest = [mode for mode in self._every() if all(name.partition(MODE)[2] != mode for name in names)]
        return [f"modes not shown: {', '.join(rest)}"] * bool(rest)

    def _title(self) -> str:
        n, models = len(self.facts), dict.fromkeys(str(one["model"]) for one in self.meta.values() if "model" in one)
        cases = f"{counted(len(self.cases), 'case')} of " * bool(self.cases)
        return f"{', '.join(models) or 'models'}: {', '.join(self.sides)} on {cases}{counted(n, 'fact')}"

    def _says(self, name: str) -> str:
        return f"harmonic mean of {', '.join(self.score_of)}" if name == SCORE else self.metrics[name][1]

    # ---- files

    def save(self, path: AnyPath) -> None:
        """Writes one JSON file, whole or not at all; a file of that name is replaced, folders are made."""
        record = {
            "format": FORMAT, "version": VERSION, "against": self.against, "meta": self.meta, "notes": list(self.notes),
            "metrics": self.metrics, "score_of": self.score_of, "facts": [fact.to_record() for fact in self.facts],
            "cases": self.cases, "base": listed(self.base),
            "sides": {name: listed(side) for name, side in self.sides.items()},
        }  # fmt: skip
        write_text(path, json.dumps(record, allow_nan=False))

    @classmethod
    def load(cls, path: AnyPath) -> "Comparison":
        """The comparison that ``save`` wrote, columns bit for bit. Raises ValueError for any other file."""
        record = read_object(path, "a saved comparison")
        way_out = f"expected {FORMAT}, version {VERSION}, as Comparison.save writes it"
        with reading(path, way_out, "is not a saved comparison"):
            check_format(record, FORMAT, version=VERSION)
            metrics = {name: tuple(one) for name, one in record["metrics"].items()}
            score_of, cases = tuple(record["score_of"]), tuple(record["cases"])
            check_metrics("metrics", metrics, score_of)
            facts = tuple(Fact.from_record(fact) for fact in record["facts"])
            if cases and sum(cases) != len(facts):
                raise ValueError(f"it has {len(facts)} facts in cases of {sum(cases)}")
            n = len(cases or facts)
            base = None if record["base"] is None else _side(BASE, record["base"], metrics, n)
            sides = {name: _side(name, side, metrics, n) for name, side in record["sides"].items()}
            against = checks.choice("against", record["against"], [*sides, *[BASE] * (base is not None)])
            notes = [checks.text("notes", note, blank=True) for note in checks.items("notes", record["notes"], "texts")]
            meta = checks.instance("meta", record["meta"], dict, "an object")
            for one in meta.values():
                checks.instance("meta", one, dict, "objects")
            return cls(facts, cases, metrics, score_of, base, sides, notes, against, meta)


def _side(name: str, listed: dict, metrics: Metrics, n: int) -> dict[str, Tensor]:
    """Columns as they were saved. Raises ValueError for other metrics, or another number of cases."""
    side = columns_of(listed, metrics, n)
    if set(side) != set(metrics) or any(column.shape != (n,) for column in side.values()):
        raise ValueError(f"{name} has not {counted(n, 'value')} of each metric")
    return side


def _differing(one: Interval, verdict: str) -> str:
    if one.mean != one.mean:
        return "–"
    bounds = "" if one.low != one.low else f" [{one.low:+.3f}, {one.high:+.3f}]"
    return f"{one.mean:+.3f}{bounds}{f' {verdict}' if verdict else ''}"


def _toned(text: str) -> Cell | str:
    return Cell(text, "good" if text.endswith("better") else "bad") if text.endswith(("better", "worse")) else text


def _counts(found) -> str:
    """Cases behind a row, where they are not the same behind each cell "90, 100"."""
    return ", ".join(f"{n:,}" for n in dict.fromkeys(one.n for one in found))
