"""The result of a capability run: what general tasks are worth to a model before and after an edit."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kedit_fast.basics import checks
from kedit_fast.basics.checks import AnyPath
from kedit_fast.basics.files import check_format, read_object, reading, write_text
from kedit_fast.basics.intervals import Interval
from kedit_fast.basics.printing import columns, escaped
from kedit_fast.evaluation.stored import as_float, finite
from kedit_fast.pictures.page import Section, Table, fragment, write_report

FORMAT, VERSION = "kedit_fast.capability", 1
CAPTION = "± standard error"
CHANGE = "; difference: edited minus base, with its 95 % interval over the same documents"


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    base, edited: the harness's value for the model without and with the edits; edited is None without an edit
    base_stderr, edited_stderr: the harness's standard errors, NaN where it gives none
    difference: edited - base, paired by document: its mean, 95 % interval and the documents. NaN bounds and n = 0 where
        the harness's value is no mean over documents (a perplexity, a group of tasks); None without an edit
    n: documents
    higher_is_better: None where the harness does not say
    """

    base: float
    base_stderr: float
    edited: float | None
    edited_stderr: float | None
    difference: Interval | None
    n: int
    higher_is_better: bool | None = None

    def to_record(self) -> dict[str, Any]:
        """Ready for JSON; NaN is None."""
        return finite(dict(vars(self)))

    @classmethod
    def from_record(cls, record: dict, is_edited: bool) -> "Score":
        """What ``to_record`` gave. Raises ValueError, KeyError or TypeError for anything else."""
        base, base_stderr = (as_float(record[name]) for name in ("base", "base_stderr"))
        n, higher = checks.whole("n", record["n"]), record["higher_is_better"]
        higher = checks.optional(checks.flag, "higher_is_better", higher)
        if not is_edited:
            return cls(base, base_stderr, None, None, None, n, higher)
        edited, edited_stderr = (as_float(record[name]) for name in ("edited", "edited_stderr"))
        *bounds, paired = record["difference"]
        mean, low, high = map(as_float, bounds)
        difference = Interval(mean, low, high, checks.whole("difference", paired))
        return cls(base, base_stderr, edited, edited_stderr, difference, n, higher)


@dataclass(frozen=True, eq=False, repr=False)
class Capability:
    """What lm-evaluation-harness says of a model, and of the same model with its edits.

    scores: {task or group: {metric: Score}}; a metric is named as the harness names it, with its filter behind a comma
        where that is not "none"
    meta: model, fingerprint, dtype, device, backend {op: which implementation ran}, note, method (None without an
        edit), layers, tasks {name: its version}, n_shot {task: examples}, limit, chat, seed, harness (its version),
        version
    """

    scores: dict[str, dict[str, Score]]
    meta: dict

    @property
    def is_edited(self) -> bool:
        """Whether it tells of an edit."""
        return self.meta.get("method") is not None

    def save(self, path: AnyPath) -> None:
        """Writes one JSON file, whole or not at all; a file of that name is replaced, folders are made."""
        write_text(path, json.dumps(self.to_record(), allow_nan=False))

    def to_record(self) -> dict[str, Any]:
        """Ready for JSON."""
        scores = [{"task": task, "metric": metric} | score.to_record() for task, metric, score in self._each()]
        return {"format": FORMAT, "version": VERSION, "meta": self.meta, "scores": scores}

    @classmethod
    def load(cls, path: AnyPath) -> "Capability":
        """What ``save`` wrote. Raises ValueError for any other file."""
        record = read_object(path, "a saved capability")
        with reading(path, f"expected {FORMAT}, version {VERSION}, as Capability.save writes it", "is not one"):
            return cls.from_record(record)

    @classmethod
    def from_record(cls, record: dict) -> "Capability":
        """What ``to_record`` gave. Raises ValueError, KeyError or TypeError for anything else."""
        check_format(record, FORMAT, version=VERSION)
        meta = checks.instance("meta", record["meta"], dict, "an object")
        for name in ("model", "method", "note", "harness"):
            checks.optional(checks.text, name, meta.get(name), blank=True)
        found = cls({}, meta)
        for one in record["scores"]:
            task, metric = (checks.text(name, one[name]) for name in ("task", "metric"))
            found.scores.setdefault(task, {})[metric] = Score.from_record(one, found.is_edited)
        return found

    def to_html(self, path: AnyPath | None = None) -> str:
        """The table as an HTML fragment without scripts or outside files; with ``path`` also a page, whole or not."""
        blocks = self.blocks()
        if path is not None:
            heading = "What general tasks are worth" + ", before and after the edit" * self.is_edited
            write_report(path, "General capability", self._title(), [Section(heading, blocks)])
        return fragment(blocks)

    def blocks(self) -> list:
        """What a page shows of it."""
        headers, *rows = self._table()
        return [Table(headers, rows, self._caption), *self._notes()]

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        return escaped("\n".join([self._title(), columns(self._table(), right=True), self._caption, *self._notes()]))

    def __repr__(self) -> str:
        return f"Capability({self._title()})"

    def _each(self) -> Iterator[tuple[str, str, Score]]:
        return ((task, metric, one) for task, some in self.scores.items() for metric, one in some.items())

    def _table(self) -> list[list[str]]:
        """Headers and rows."""
        after = ["edited", "difference"] if self.is_edited else []
        rows = [["task", "metric", "base", *after, "documents"]]
        for task, metric, one in self._each():
            sides = [_shown(one.base, one.base_stderr)]
            if one.edited is not None and one.edited_stderr is not None and one.difference is not None:
                sides += [_shown(one.edited, one.edited_stderr), _change(one.difference)]
            rows.append([task, metric, *sides, str(one.n)])
        return rows

    def _title(self) -> str:
        edited = f"edited by {self.meta['method']}" if self.is_edited else "no edit"
        return f"{self.meta.get('model', 'model')}: lm-evaluation-harness {self.meta.get('harness', '')}, {edited}"

    @property
    def _caption(self) -> str:
        return CAPTION + CHANGE * self.is_edited

    def _notes(self) -> list[str]:
        return [self.meta["note"]] if self.meta.get("note") else []


def _shown(value: float, stderr: float) -> str:
    return ("–" if math.isnan(value) else f"{value:.3f}") + ("" if math.isnan(stderr) else f" ± {stderr:.3f}")


def _change(difference: Interval) -> str:
    if math.isnan(difference.mean):
        return "–"
    bounds = "" if math.isnan(difference.low) else f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    return f"{difference.mean:+.3f}{bounds}"
