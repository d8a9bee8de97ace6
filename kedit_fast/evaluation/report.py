"""The result of an evaluation: columns with a value a fact, their means with intervals, and files of them."""

import json
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kedit_fast.basics.files import read_object, write_text
from kedit_fast.basics.printing import escaped, html_text
from kedit_fast.basics.words import reason
from kedit_fast.evaluation.metrics import COUNT, METRICS, SCORE, Interval, summarize
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import other_form

FORMAT, VERSION = "kedit_fast.report", 1
_CELL = "padding:2px 12px 2px 0;text-align:left"


@dataclass(frozen=True, eq=False, repr=False)
class EvalReport:
    """What a model says of facts, before and after an edit. Metrics and their definitions: ``metrics.METRICS``.

    base, edited: {metric: fp32 [n_facts]}, NaN where a fact has no such probe; edited is None without an edit
    facts: in the columns' order
    meta: model, fingerprint, dtype, device, backend {op: which implementation ran}, note, method (None without an
        edit), layers, independent, n, text (what the perplexity was taken of), version
    perplexity: (base, edited or None), or None where no text was given
    generations: (prompt, continuation before, after or None) a fact, where they were asked for
    other: the same facts asked in the other form (plain prompts in a chat, questions in a chat plainly), where the
        model has a chat template
    """

    base: dict[str, Tensor]
    edited: dict[str, Tensor] | None
    facts: tuple[Fact, ...]
    meta: dict
    perplexity: tuple[float, float | None] | None = None
    generations: tuple[tuple[str, str, str | None], ...] = ()
    other: "EvalReport | None" = None

    @property
    def drift(self) -> float | None:
        """Edited perplexity / base perplexity - 1; None where either is missing."""
        if self.perplexity is None or self.perplexity[1] is None:
            return None
        return self.perplexity[1] / self.perplexity[0] - 1

    def summary(self) -> dict[str, dict[str, Interval | None]]:
        """{metric: {"base": (mean, low, high, n), "edited": the same or None}}, with 95 % intervals over facts.

        Facts without such a probe are left out and not counted in n. "score" is S, the harmonic mean of the means of
        efficacy, paraphrase and neighborhood. Which interval is used: ``metrics.interval``.
        """
        base = summarize(self.base)
        edited = None if self.edited is None else summarize(self.edited)
        return {name: {"base": base[name], "edited": edited and edited[name]} for name in base}

    def to_records(self) -> list[dict]:
        """One record a fact, ready for JSON: fact, base and edited {metric: value or None}, generation, and the same
        metrics asked in the other form."""
        return [
            fact_record(
                fact,
                *self._values(i),
                self.generations[i] if self.generations else None,
                None if self.other is None else self.other._values(i),
            )
            for i, fact in enumerate(self.facts)
        ]

    def _values(self, i: int) -> tuple[dict[str, float], dict[str, float] | None]:
        """(base, edited) {metric: value} of fact i."""
        sides = (self.base, self.edited)
        return tuple(side and {name: float(column[i]) for name, column in side.items()} for side in sides)

    def save(self, path) -> None:
        """Writes one JSON file, whole or not at all; NaN and infinity are null in it, and NaN once loaded."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "meta": self.meta,
            "facts": [fact.to_record() for fact in self.facts],
            "base": _listed(self.base),
            "edited": None if self.edited is None else _listed(self.edited),
            "perplexity": None if self.perplexity is None else [finite(p) for p in self.perplexity],
            "generations": self.generations,
            "other": self.other and {"base": _listed(self.other.base), "edited": _listed(self.other.edited)},
        }
        write_text(path, json.dumps(record, allow_nan=False))

    @classmethod
    def load(cls, path) -> "EvalReport":
        """The report that ``save`` wrote, columns bit for bit. Raises ValueError for any other file."""
        record = read_object(path, "a saved report")
        try:
            if (record["format"], record["version"]) != (FORMAT, VERSION):
                raise ValueError(f"it is {record['format']} of version {record['version']}")
            perplexity, other = record["perplexity"], record.get("other")  # a report of before had no other form
            facts = tuple(Fact.from_record(fact) for fact in record["facts"])
            found = cls(
                **_both(record, len(facts)),
                facts=facts,
                meta=record["meta"],
                perplexity=None if perplexity is None else _pair(perplexity, record["edited"] is not None),
                generations=tuple(tuple(generation) for generation in record["generations"]),
            )
            turned = tuple(map(other_form, facts))
            return replace(
                found, other=other and cls(**_both(other, len(facts)), facts=turned, meta=found.meta | {"note": ""})
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a saved report ({reason(error)}); expected {FORMAT}, version {VERSION}, "
                "as EvalReport.save writes it"
            ) from error

    def to_html(self, path=None) -> str:
        """The table as an HTML fragment without scripts or outside files; with ``path`` also a page, whole or not."""
        sides = ["base", "edited"][: 1 + (self.edited is not None)]
        rows = [
            f'<tr><td style="{_CELL}" title="{html_text(_says(name))}">{html_text(name)}</td>'
            + "".join(f'<td style="{_CELL}">{_shown(both[side])}</td>' for side in sides)
            + f'<td style="{_CELL}">{html_text(_counted(both))}</td></tr>'
            for name, both in self._rows()
        ]
        head = "".join(f'<th style="{_CELL}">{name}</th>' for name in ["metric", *sides, "facts"])
        lines = "".join(f"<p>{html_text(line)}</p>" for line in self._lines())
        fragment = (
            f"<div><p><b>{html_text(self._title())}</b></p><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>{lines}{self._generations_html()}"
            f"{'' if self.other is None else self.other.to_html()}</div>"
        )
        if path is not None:
            page = f'<!doctype html>\n<meta charset="utf-8">\n<title>{html_text(self._title())}</title>\n{fragment}\n'
            write_text(path, page)
        return fragment

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        table = [["metric", "base", "facts"]] if self.edited is None else [["metric", "base", "edited", "facts"]]
        for name, both in self._rows():
            sides = [_shown(both[side]) for side in table[0][1:-1]]
            table.append([name, *sides, _counted(both)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        other = [] if self.other is None else ["", str(self.other)]
        return escaped("\n".join([self._title(), *lines, *self._lines(), *other]))

    def __repr__(self) -> str:
        return f"EvalReport({self._title()})"

    def _rows(self):
        """(metric, {"base", "edited"}) of the metrics that some fact has; counts stand below the table."""
        for name, both in self.summary().items():
            measured = any(side is not None and not math.isnan(side.mean) for side in both.values())
            if measured and (name == SCORE or METRICS[name][0] != COUNT):
                yield name, both

    def _title(self) -> str:
        n, method = len(self.facts), self.meta.get("method")
        what = f"{n} fact{'s' * (n != 1)}" + ", asked in a chat" * (n > 0 and all(fact.chat for fact in self.facts))
        return f"{self.meta.get('model', 'model')}: {what}, {f'edited by {method}' if method else 'no edit'}"

    def _lines(self) -> list[str]:
        """What stands below the table."""
        lines = self._verdict()
        if self.perplexity is not None:
            base, edited = self.perplexity
            change = "" if edited is None else f" -> {edited:.2f} ({self.drift:+.1%})"
            lines.append(
                f"perplexity {base:.2f}{change} over {self.meta.get('text', {}).get('n_predicted', '?')} tokens"
            )
        left_out = int(self.base["neighborhood_left_out"].nansum())
        if left_out:
            n = sum(len(fact.neighborhood) for fact in self.facts)
            lines.append(f"{left_out} of {n} neighborhood prompts left out: they name an edited subject")
        return lines + ([self.meta["note"]] if self.meta.get("note") else [])

    def _verdict(self) -> list[str]:
        """What an edit did, in a sentence or two: that P(new) > P(true) does not say that the new answer is given."""
        if self.edited is None:
            return []
        said = [side["efficacy_exact"] for side in (self.base, self.edited)]
        (before, after), n = (int(column.nansum()) for column in said), int((~said[1].isnan()).sum())
        when = f"for {before} before the edit, for {after} after it"
        lines = [f"the new answer is what the model says: of {n} facts {when}"]
        same = self.edited["same_subject_same_top"]
        if not same.isnan().all():
            lines.append(f"other prompts on the subject that go on differently: {1 - float(same.nanmean()):.0%}")
        return lines

    def _generations_html(self) -> str:
        if not self.generations:
            return ""
        rows = "".join(
            "<tr>" + "".join(f'<td style="{_CELL}">{html_text(text or "")}</td>' for text in row) + "</tr>"
            for row in self.generations
        )
        head = "".join(f'<th style="{_CELL}">{name}</th>' for name in ("prompt", "before", "after"))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def fact_record(
    fact: Fact, base: dict[str, float], edited: dict[str, float] | None, generation=None, other=None
) -> dict:
    """One fact's values as JSON has them; NaN is None. other: (base, edited) of the other form."""
    record = {"fact": fact.to_record(), **_sides_record(base, edited)}
    if generation:
        record["generation"] = list(generation)
    if other:
        record["asked plainly" if fact.chat else "asked in a chat"] = _sides_record(*other)
    return record


def _sides_record(base, edited) -> dict:
    sides = {"base": base, "edited": edited}
    return {name: side and {metric: finite(value) for metric, value in side.items()} for name, side in sides.items()}


def finite(value: float | None) -> float | None:
    """The value, or None for NaN and infinity, which JSON has not."""
    return value if value is not None and math.isfinite(value) else None


def summary_record(summary: dict[str, Interval]) -> dict[str, list]:
    """A summary as plain values, for JSON; NaN and infinity are None."""
    return {name: [finite(value) for value in one] for name, one in summary.items()}


def summary_of_record(record: dict[str, list]) -> dict[str, Interval]:
    """The summary that ``summary_record`` gave; infinity has become NaN."""
    return {name: Interval(*map(as_float, one)) for name, one in record.items()}


def as_float(value: float | None) -> float:
    """What ``finite`` gave, with NaN for None."""
    return math.nan if value is None else value


def _listed(columns: dict[str, Tensor] | None) -> dict[str, list] | None:
    return columns and {name: [finite(value) for value in column.tolist()] for name, column in columns.items()}


def _both(record: dict, n_facts: int) -> dict[str, dict[str, Tensor] | None]:
    return {side: record[side] and _columns(record[side], n_facts) for side in ("base", "edited")}


def _columns(listed: dict[str, list], n_facts: int) -> dict[str, Tensor]:
    """Columns as they were saved; of a metric that a report does not have, NaN."""
    listed = {name: [None] * n_facts for name in METRICS} | listed
    return {
        name: torch.tensor([as_float(value) for value in values], dtype=torch.float32)
        for name, values in listed.items()
    }


def _pair(perplexity, has_edited) -> tuple[float, float | None]:
    base, edited = (math.nan if value is None else value for value in perplexity)
    return base, edited if has_edited else None


def _says(name: str) -> str:
    return "harmonic mean of efficacy, paraphrase and neighborhood (S)" if name == SCORE else METRICS[name][1]


def _counted(both: dict[str, Interval | None]) -> str:
    """Facts behind a row; "6 -> 5" where fewer or more of them have a value after the edit."""
    base, edited = both["base"].n, both["base" if both["edited"] is None else "edited"].n
    return str(base) if edited == base else f"{base} -> {edited}"


def _shown(value: Interval) -> str:
    if math.isnan(value.mean):
        return "–"
    bounds = "" if math.isnan(value.low) else f" [{value.low:.3f}, {value.high:.3f}]"
    return f"{value.mean:.3f}{bounds}"
