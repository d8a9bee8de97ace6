"""The result of an evaluation: columns with a value a fact, their means with intervals, and files of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.checks import AnyPath
from kedit_fast.basics.files import check_format, read_object, reading, write_text
from kedit_fast.basics.intervals import COUNT, SCORE, Interval, Metrics, summarize
from kedit_fast.basics.printing import columns, escaped
from kedit_fast.evaluation.benchmark import Benchmark, check_metrics
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT
from kedit_fast.evaluation.stored import as_float, columns_of, finite, listed
from kedit_fast.evaluation.weakest import before_after, weakest
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import other_form
from kedit_fast.pictures.page import Cell, Section, Table, explained, fragment, write_report

MODE = "."  # between the kind of a question and the mode that it is read in, in the name of a metric
FORMAT, VERSION = "kedit_fast.report", 1


@dataclass(frozen=True, eq=False, repr=False)
class EvalReport:
    """What a model says of facts, before and after an edit, by a benchmark.

    base, edited: {metric: fp32 [n_cases]}, NaN where a case has no such probe; edited is None without an edit
    facts: in the columns' order
    meta: benchmark, model, fingerprint, dtype, device, backend {op: which implementation ran}, note, method (None
        without an edit), layers, independent, n (facts), generate (new tokens), judge, text (of perplexity), version
    metrics, score_of: what the columns say, as in ``Benchmark``; verdict: what the edit did; notes: what else a reader
        must know: sentences
    perplexity: (base, edited or None), or None where no text was given
    generations: (prompt, continuation before, after or None) a fact, where they were asked for
    other: the same facts asked in the other form (plain prompts in a chat, questions in a chat plainly), where the
        model has a chat template
    cases: the number of facts in each case; empty where each fact is one
    """

    base: dict[str, Tensor]
    edited: dict[str, Tensor] | None
    facts: tuple[Fact, ...]
    meta: dict
    metrics: Metrics
    score_of: tuple[str, ...] = ()
    verdict: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    perplexity: tuple[float, float | None] | None = None
    generations: tuple[tuple[str, str, str | None], ...] = ()
    other: "EvalReport | None" = None
    cases: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        benchmark: Benchmark,
        base: dict[str, Tensor],
        edited: dict[str, Tensor] | None,
        facts: tuple[Fact, ...],
        meta: dict,
        **rest: Any,
    ) -> "EvalReport":
        """The report of a benchmark's columns. rest: perplexity, generations, other, cases"""
        verdict, notes = map(tuple, benchmark.sentences(facts, base, edited))
        return cls(base, edited, facts, meta, benchmark.metrics, benchmark.score_of, verdict, notes, **rest)

    @property
    def drift(self) -> float | None:
        """Edited perplexity / base perplexity - 1; None where either is missing."""
        if self.perplexity is None or self.perplexity[1] is None:
            return None
        return self.perplexity[1] / self.perplexity[0] - 1

    def summary(self) -> dict[str, dict[str, Interval | None]]:
        """{metric: {"base": (mean, low, high, n), "edited": the same or None}}, with 95 % intervals over cases.

        Cases without such a probe are left out and not counted in n. "score", where the benchmark has one, is the
        harmonic mean of the means of ``score_of``. Which interval is used: ``intervals.interval``.
        """
        base = summarize(self.base, self.metrics, self.score_of)
        edited = None if self.edited is None else summarize(self.edited, self.metrics, self.score_of)
        return {name: {"base": base[name], "edited": None if edited is None else edited[name]} for name in base}

    def to_records(self) -> list[dict]:
        """One record a case, ready for JSON: its fact or facts, base and edited {metric: value or None}, generations,
        and the same metrics asked in the other form."""
        records, end = [], 0
        for i, facts in enumerate(self._cases()):
            mine = slice(end, end := end + len(facts))
            other = self.other and self.other._values(i)
            records.append(case_record(facts, *self._values(i), self.generations[mine], other))
        return records

    def _values(self, i: int) -> tuple[dict[str, float], dict[str, float] | None]:
        """(base, edited) {metric: value} of case i."""
        base = {name: float(column[i]) for name, column in self.base.items()}
        if self.edited is None:
            return base, None
        return base, {name: float(column[i]) for name, column in self.edited.items()}

    def save(self, path: AnyPath) -> None:
        """Writes one JSON file, whole or not at all; NaN and infinity are null in it, and NaN once loaded.

        A file of that name is replaced, folders are made.
        """
        record = {
            "format": FORMAT,
            "version": VERSION,
            "meta": self.meta,
            "metrics": self.metrics,
            "score_of": self.score_of,
            "facts": [fact.to_record() for fact in self.facts],
            "cases": self.cases,
            **self._said(),
            "perplexity": finite(self.perplexity),
            "generations": self.generations,
            "other": self.other and self.other._said(),
        }
        write_text(path, json.dumps(record, allow_nan=False))

    def _said(self) -> dict:
        """What a report and that of the other form have each of their own."""
        sides = {name: listed(getattr(self, name)) for name in ("base", "edited")}
        return sides | {"verdict": self.verdict, "notes": self.notes}

    @classmethod
    def load(cls, path: AnyPath) -> "EvalReport":
        """The report that ``save`` wrote, columns bit for bit. Raises ValueError for any other file."""
        record = read_object(path, "a saved report")
        way_out = f"expected {FORMAT}, version {VERSION}, as EvalReport.save writes it"
        with reading(path, way_out, "is not a saved report"):
            check_format(record, FORMAT, version=VERSION)
            _check_meta(record["meta"])
            facts = tuple(Fact.from_record(fact) for fact in record["facts"])
            perplexity, other = record["perplexity"], record.get("other")  # a report of before had no other form
            found = _loaded(record, record, facts, record["meta"])
            if other is not None:
                other = _loaded(record, other, tuple(map(other_form, facts)), found.meta | {"note": ""})
            return replace(
                found,
                perplexity=None if perplexity is None else _pair(perplexity, record["edited"] is not None),
                generations=tuple(map(_generation, record["generations"])),
                other=other,
            )

    def to_html(self, path: AnyPath | None = None) -> str:
        """The tables as an HTML fragment without scripts or outside files; with ``path`` also a page, with the weakest
        cases, whole or not."""
        blocks = self.blocks()
        if path is not None:
            is_edited = self.edited is not None
            sections = [Section("What the model answers" + ", before and after the edit" * is_edited, blocks)]
            if each := weakest(self._cases(), self.base, self.edited, self.score_of):
                sections.append(Section("Case by case" + ", the weakest first" * is_edited, each))
            write_report(path, "Evaluation", self._title(), sections)
        return fragment(blocks)

    def _cases(self) -> list[tuple[Fact, ...]]:
        ends = [*accumulate(self.cases or [1] * len(self.facts))]
        return [self.facts[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def blocks(self) -> list:
        sides = ["base", "edited"][: 1 + (self.edited is not None)]
        rows = [
            (Cell(name, hint=self._says(name)), *(shown(both[side]) for side in sides), _counted(both))
            for name, both in self._rows()
            if MODE not in name
        ]
        blocks: list = [Table(["metric", *sides, self._unit], rows, self._title())] if rows else []
        header, *readings = self._readings()
        hinted = [(Cell(kind, hint=self._says_kind(kind)), *cells) for kind, *cells in readings]
        if hinted:
            blocks.append(Table(header, hinted, self._title() if not rows else ""))
        blocks += [*self._lines(), *explained([*rows, *hinted])]
        if self.generations:
            blocks.append(Table(("prompt", "before", "after"), self.generations))
        return blocks + ([] if self.other is None else self.other.blocks())

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        table = [["metric", *["base", "edited"][: 1 + (self.edited is not None)], self._unit]]
        for name, both in self._rows():
            if MODE not in name:
                sides = [shown(both[side]) for side in table[0][1:-1]]
                table.append([name, *sides, _counted(both)])
        tables = [columns(rows) for rows in (table, self._readings()) if len(rows) > 1]
        other = [] if self.other is None else ["", str(self.other)]
        return escaped("\n".join([self._title(), *tables, *self._lines(), *other]))

    def __repr__(self) -> str:
        return f"EvalReport({self._title()})"

    def _rows(self):
        """(metric, {"base", "edited"}) of the metrics that some fact has; counts stand below the table."""
        for name, both in self.summary().items():
            measured = any(side is not None and not math.isnan(side.mean) for side in both.values())
            if measured and (name == SCORE or self.metrics[name][0] != COUNT):
                yield name, both

    def _readings(self) -> list[list[str]]:
        """A table of the metrics "kind.mode": a row a kind, a column a mode, means before and after the edit."""
        found = {tuple(name.split(MODE, 1)): both for name, both in self._rows() if MODE in name}
        kinds, modes = ([*dict.fromkeys(each)] for each in zip(*found, strict=True)) if found else ([], [])
        rows = [["asked", *modes, self._unit]]
        for kind in kinds:
            cells = [found.get((kind, mode)) for mode in modes]
            n = dict.fromkeys(str(both["base"].n) for both in cells if both)  # not of all modes the same, "1, 6"
            rows.append([kind, *(_means(both) for both in cells), ", ".join(n)])
        return rows

    def _says_kind(self, kind: str) -> str:
        return next(says for name, (_, says) in self.metrics.items() if name.startswith(kind + MODE)).split(":")[0]

    def _title(self) -> str:
        n, method = len(self.facts), self.meta.get("method")
        what = f"{n} fact{'s' * (n != 1)}" + ", asked in a chat" * (n > 0 and all(fact.chat for fact in self.facts))
        if self.cases:
            what = f"{len(self.cases)} case{'s' * (len(self.cases) != 1)} of {what}"
        return f"{self.meta.get('model', 'model')}: {what}, {f'edited by {method}' if method else 'no edit'}"

    def _lines(self) -> list[str]:
        """What stands below the table."""
        lines = list(self.verdict)
        if self.perplexity is None and self.edited is not None:
            lines.append("perplexity: not measured, no text was given (text=, --text)")
        if self.perplexity is not None:
            base, edited = self.perplexity
            change = "" if edited is None else f" -> {edited:.2f} ({self.drift:+.1%})"
            lines.append(
                f"perplexity {base:.2f}{change} over {self.meta.get('text', {}).get('n_predicted', '?')} tokens"
            )
        return [*lines, *self.notes, *([self.meta["note"]] if self.meta.get("note") else [])]

    def _says(self, name: str) -> str:
        if name != SCORE:
            return self.metrics[name][1]
        return f"harmonic mean of {' and '.join(filter(None, [', '.join(self.score_of[:-1]), self.score_of[-1]]))} (S)"

    @property
    def _unit(self) -> str:
        return "cases" if self.cases else "facts"


def case_record(facts: Sequence[Fact], base, edited, generations: Sequence = (), other=None) -> dict:
    """One case's values as JSON has them; NaN is None. other: (base, edited) of the other form. A fact that is a case
    by itself stands there as "fact", with its "generation"."""
    single = len(facts) == 1
    record: dict[str, Any] = (
        {"fact": facts[0].to_record()} if single else {"facts": [fact.to_record() for fact in facts]}
    )
    record |= {"base": base, "edited": edited}
    if generations:
        record |= {"generation": generations[0]} if single else {"generations": generations}
    if other:
        form = "asked plainly" if facts[0].chat else "asked in a chat"
        record[form] = {"base": other[0], "edited": other[1]}
    return finite(record)


def _loaded(record: dict, said: dict, facts: tuple[Fact, ...], meta: dict) -> EvalReport:
    """The report of a file, or that of its other form (said), without what only the first has."""
    metrics = {name: tuple(one) for name, one in record.get("metrics", COUNTERFACT.metrics).items()}
    score_of = tuple(record.get("score_of", COUNTERFACT.score_of))
    check_metrics("metrics", metrics, score_of)
    cases = tuple(record.get("cases", ()))
    if cases and sum(cases) != len(facts):
        raise ValueError(f"it has {len(facts)} facts in cases of {sum(cases)}")
    checks.instance("base", said["base"], dict, "an object")
    n = len(cases or facts)
    base, after = columns_of(said["base"], metrics, n), said["edited"]
    edited = None if after is None else columns_of(after, metrics, n)
    if "metrics" not in record:  # a report of before is CounterFact's, and its sentences were made when it was shown
        return EvalReport.of(COUNTERFACT, base, edited, facts, meta)
    verdict, notes = (tuple(map(str, said[name])) for name in ("verdict", "notes"))
    return EvalReport(base, edited, facts, meta, metrics, score_of, verdict, notes, cases=cases)


def _check_meta(meta) -> None:
    """Raises BadArgument where what is shown of it is not what it should be; the rest is free."""
    checks.instance("meta", meta, dict, "an object")
    checks.instance("text", meta.get("text", {}), dict, "an object")
    for name in ("model", "method", "note"):
        checks.optional(checks.text, name, meta.get(name), blank=True)


def _generation(said) -> tuple[str, str, str | None]:
    prompt, before, after = said
    for text in (prompt, before):
        checks.text("generations", text, blank=True)
    return prompt, before, checks.optional(checks.text, "generations", after, blank=True)


def _pair(perplexity, has_edited) -> tuple[float, float | None]:
    base, edited = map(as_float, perplexity)
    checks.optional(checks.number, "perplexity", None if math.isnan(base) else base, above=0)
    return base, edited if has_edited else None


def _counted(both: dict[str, Interval | None]) -> str:
    """Facts behind a row; "6 -> 5" where fewer or more of them have a value after the edit."""
    before, *after = [one.n for one in (both["base"], both["edited"]) if one is not None]
    return f"{before} -> {after[0]}" if after and after[0] != before else str(before)


def _means(both: dict[str, Interval | None] | None) -> str:
    return "–" if both is None else before_after(side.mean for side in both.values() if side is not None)


def shown(value: Interval) -> str:
    """ "0.500 [0.095, 0.905]"; a dash for no value."""
    if math.isnan(value.mean):
        return "–"
    bounds = "" if math.isnan(value.low) else f" [{value.low:.3f}, {value.high:.3f}]"
    return f"{value.mean:.3f}{bounds}"
