"""The result of ``what_moved``: numbers without and with an edit, with intervals, a table and a file of them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kedit_fast.basics import checks
from kedit_fast.basics.checks import AnyPath
from kedit_fast.basics.files import check_format, read_object, reading, write_text
from kedit_fast.basics.intervals import COUNT, DIFFERENCE, PROBABILITY, SHARE, Interval, Metrics
from kedit_fast.basics.printing import columns, escaped
from kedit_fast.basics.words import counted
from kedit_fast.evaluation.stored import as_float, finite
from kedit_fast.pictures.page import Cell, Section, Table, fragment, write_report

FORMAT, VERSION = "kedit_fast.moved", 1

# {measure: (kind, what it says)}, in the order that tables show them. KL divergences are bound as counts are: by 0.
MEASURES: Metrics = {
    "kl": (COUNT, "unrelated prompts: KL(base || edited) of the next token, nats"),
    "flips": (SHARE, "unrelated prompts whose likeliest token is another"),
    "same_subject_same_top": (SHARE, "same subject, other relations: likeliest token stayed"),
    "same_subject_p_top": (PROBABILITY, "same subject, other relations: P of the base's likeliest"),
    "neighborhood": (SHARE, "neighbors with P(true) > P(new)"),
    "neighborhood_magnitude": (DIFFERENCE, "neighbors: P(true) - P(new)"),
    "distractor": (SHARE, "neighbors behind the edited fact with P(true) > P(new)"),
    "distractor_magnitude": (DIFFERENCE, "neighbors behind the edited fact: P(true) - P(new)"),
    "lens_present": (SHARE, "old answer in the top 10 of a layer from the edit on"),
    "lens_ends": (SHARE, "old answer in the top 10 at the end"),
    "canary_doubt": (SHARE, "old answer written after a doubt"),
    "canary_context": (SHARE, "old answer written behind a long text"),
}
OF = {"kl": "prompt", "flips": "prompt", "canary_doubt": "text", "canary_context": "text"}  # what n counts: else facts
ONE_SIDED = ("kl", "flips", "same_subject_same_top")  # of the base model they say nothing
NOTHING = Interval(math.nan, math.nan, math.nan, 0)


class Both(NamedTuple):
    """A measure without and with the edit; n = 0 and NaN where it was not measured. What compares the two models is 0,
    or a share of 1, without."""

    base: Interval
    edited: Interval


class Drift(NamedTuple):
    """Perplexity of a text without and with the edit; drift: edited / base - 1, with its 95 % interval and the n
    windows that it is drawn from; n_predicted: tokens. A model that gives NaN has infinite perplexity."""

    base: float
    edited: float
    drift: Interval
    n_predicted: int


@dataclass(frozen=True, eq=False, repr=False)
class Moved:
    """What an edit moved besides what it was made for.

    drifts: {text: Drift}; measures: {name of ``MEASURES``: Both}
    growth: {layer: ‖ΔW‖ / ‖W‖ of its matrix that moved furthest}; None where the edit changes no weight of its own
    notes: what was not measured and why, and what else a reader must know: sentences
    meta: model, fingerprint, dtype, device, backend, note, method, layers, n (facts), prompts, texts {name: windows},
        seed, max_tokens, version
    """

    drifts: dict[str, Drift]
    measures: dict[str, Both]
    growth: dict[int, float] | None
    notes: tuple[str, ...]
    meta: dict

    def save(self, path: AnyPath) -> None:
        """Writes one JSON file, whole or not at all; NaN and infinity are null in it, and NaN once loaded.

        A file of that name is replaced, folders are made.
        """
        grown = None if self.growth is None else {str(layer): value for layer, value in self.growth.items()}
        record = {"format": FORMAT, "version": VERSION, "meta": self.meta, "drifts": self.drifts}
        record |= {"measures": self.measures, "growth": grown, "notes": self.notes}
        write_text(path, json.dumps(finite(record), allow_nan=False))

    @classmethod
    def load(cls, path: AnyPath) -> "Moved":
        """What ``save`` wrote. Raises ValueError for any other file."""
        record = read_object(path, "a saved Moved")
        with reading(path, f"expected {FORMAT}, version {VERSION}, as Moved.save writes it", "is not a saved Moved"):
            check_format(record, FORMAT, version=VERSION)
            meta = checks.instance("meta", record["meta"], dict, "an object")
            for name in ("model", "method"):
                checks.optional(checks.text, name, meta.get(name), blank=True)
            checks.whole("n", meta.get("n", 0))
            drifts = {
                name: Drift(as_float(base), as_float(edited), _interval(drift), checks.whole("n_predicted", n))
                for name, (base, edited, drift, n) in record["drifts"].items()
            }
            measures = {name: Both(*map(_interval, record["measures"][name])) for name in MEASURES}
            grown = record["growth"]
            growth = None if grown is None else {int(layer): as_float(value) for layer, value in grown.items()}
            notes = tuple(checks.text("notes", note) for note in record["notes"])
            return cls(drifts, measures, growth, notes, meta)

    def to_html(self, path: AnyPath | None = None) -> str:
        """The tables as an HTML fragment without scripts or outside files; with ``path`` also a page, whole or not."""
        blocks = self.blocks()
        if path is not None:
            write_report(path, "What else moved", self._title(), [Section("Without and with the edit", blocks)])
        return fragment(blocks)

    def blocks(self) -> list:
        """What a page shows of it."""
        header, *rows = self._rows()
        blocks: list = [Table(header, [(Cell(name), *cells) for name, *cells in rows], self._title())]
        if self.growth:
            rows = [(str(layer), value) for layer, value in self.growth.items()]
            blocks.append(Table(("layer", "‖ΔW‖ / ‖W‖"), rows, "How far weights moved"))
        return [*blocks, *self.notes]

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        return escaped("\n".join([self._title(), columns(self._rows()), *self.notes]))

    def __repr__(self) -> str:
        return f"Moved({self._title()})"

    def _title(self) -> str:
        n = self.meta.get("n", 0)
        return f"{self.meta.get('model') or 'model'}: {counted(n, 'fact')}, edited by {self.meta.get('method')}"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """A header, and what was measured: (what, without, with the edit, of how many)."""
        rows = [("what else moved, [95 % interval]", "base", "edited", "of")]
        for name, one in self.drifts.items():
            rise = f"{one.edited:.2f}: {one.drift.mean:+.2%}{_bounds(one.drift, '+.2%')}"
            rows.append((f"perplexity, {name}", f"{one.base:.2f}", rise, counted(one.n_predicted, "token")))
        for name, (_, says) in MEASURES.items():
            base, edited = self.measures[name]
            if edited.n:
                form = ".2g" if name == "kl" else ".3f"
                before = "" if name in ONE_SIDED else _shown(base, form)
                rows.append((says, before, _shown(edited, form), counted(edited.n, OF.get(name, "fact"))))
        if self.growth:
            layer, most = max(self.growth.items(), key=lambda one: math.inf if math.isnan(one[1]) else one[1])
            rows.append(
                (
                    "weights: ‖ΔW‖ / ‖W‖, the largest",
                    "",
                    f"{most:.3f} in layer {layer}",
                    counted(len(self.growth), "layer"),
                )
            )
        return rows


def _shown(value: Interval, form: str) -> str:
    return f"{value.mean:{form}}{_bounds(value, form)}" if value.n else "–"


def _bounds(value: Interval, form: str) -> str:
    return "" if math.isnan(value.low) else f" [{value.low:{form}}, {value.high:{form}}]"


def _interval(value: list) -> Interval:
    mean, low, high, n = value
    return Interval(as_float(mean), as_float(low), as_float(high), checks.whole("n", n))


def complete(found: Mapping[str, Both]) -> dict[str, Both]:
    """All measures in their order; those that are not found are of nothing."""
    return {name: found.get(name, Both(NOTHING, NOTHING)) for name in MEASURES}
