"""The result of a gate: checks with their verdicts, everything that was asked behind them, and files of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kedit_fast.basics.checks import AnyPath
from kedit_fast.basics.files import write_text
from kedit_fast.basics.printing import columns, escaped
from kedit_fast.basics.words import counted
from kedit_fast.evaluation.canary import Song
from kedit_fast.evaluation.logit_lens import LogitLens
from kedit_fast.evaluation.report import finite
from kedit_fast.facts.tokens import spoken
from kedit_fast.gating.policy import Advice
from kedit_fast.gating.questions import KINDS, SOURCES, Kept
from kedit_fast.gating.thresholds import FAIL, PASS, Check
from kedit_fast.pictures.page import Cell, Details, Picture, Section, Table, fragment, render_report

FORMAT, VERSION = "kedit_fast.gate", 1
POLICY = "policy, largest share of a limit spent"
MOST = 50  # rows that a page's table shows before it says how many more there are
_HEADERS = ("check", "form of the edit", "value", "95 % interval", "limit", "n", "verdict")
_TONE = {PASS: "good", FAIL: "bad"}
_ANSWERED = {True: Cell("yes", "good"), False: Cell("no", "bad"), None: Cell("not known", "neutral")}


@dataclass(frozen=True)
class Answered:
    """One wording of an edited fact and what the edited model says.

    text: what it writes on; generated, exact, success: whether that counts as answered, by each measure (success: None
    without a target_true); p_new, p_true: of the answers, P as in ``evaluation.benchmarks.counterfact``
    """

    form: str
    fact: str
    kind: str
    prompt: str
    text: str
    generated: bool
    exact: bool
    success: bool | None
    p_new: float
    p_true: float | None

    def by(self, measure: str) -> bool | None:
        """Whether it counts as answered by a measure of ``thresholds.MEASURES``."""
        return getattr(self, measure)


@dataclass(frozen=True)
class Lost:
    """A specificity prompt in one form, and whether its answer is gone.

    before, after: the likeliest token behind it of the base model and of the edited one, as text; "" for one that gives
    NaN
    """

    form: str
    asked: Kept
    is_lost: bool
    before: str
    after: str


@dataclass(frozen=True, eq=False, repr=False)
class GateReport:
    """What the gate measured of an edit, and its verdict.

    checks: in the order they are shown; advice: whether to go on editing; answers: each wording of the facts, in each
    form; songs: (form, canary); lost: the specificity prompts; lens: old and new answers by layer, in the first form
    (None: no old answer is known); meta: model, edits, thresholds, versions, sizes as they were really asked, and notes
    where that is less than was wanted
    """

    checks: tuple[Check, ...]
    advice: Advice
    answers: tuple[Answered, ...]
    songs: tuple[tuple[str, Song], ...]
    lost: tuple[Lost, ...]
    lens: LogitLens | None
    meta: dict

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.failed)

    @property
    def notes(self) -> tuple[str, ...]:
        """Where less was asked than was wanted, a sentence each."""
        return tuple(f"Note: {note}." for note in self.meta.get("notes", ()))

    def check(self, name: str, form: str | None = None) -> Check:
        """The check of a name, in the form given or the first. Raises KeyError where there is none."""
        for check in self.checks:
            if check.name == name and form in (None, check.form):
                return check
        raise KeyError(f"no check {name!r}; there are {'; '.join(dict.fromkeys(c.name for c in self.checks))}")

    def save(self, path: AnyPath) -> None:
        """Writes the whole report as one JSON file, whole or not at all; NaN and infinity are null.

        A file of that name is replaced, folders are made.
        """
        write_text(path, json.dumps(self.to_record(), allow_nan=False, indent=1, ensure_ascii=False) + "\n")

    def to_record(self) -> dict:
        """Plain values, for JSON; NaN and infinity are None."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "passed": self.passed,
            "checks": [asdict(check) | {"verdict": check.verdict, "reason": check.reason} for check in self.checks],
            "advice": asdict(self.advice),
            "answers": list(map(asdict, self.answers)),
            "canaries": [{"form": form, **song.to_record()} for form, song in self.songs],
            "specificity": [_stayed(x) for x in self.lost],
            "lens": self.lens and self.lens.summary(),
            "meta": self.meta,
        }
        return finite(record)

    def to_html(self, path: AnyPath | None = None) -> str:
        """The report as one page without scripts or outside files; with ``path`` also a file, whole or not at all."""
        title = f"Gate: {'passed' if self.passed else 'refused'}"
        sections = [self._verdict(), self._wordings(), self._canaries(), *self._layers(), self._specificity()]
        page = render_report(title, self._first_line(), [*sections, _method(self.meta)])
        if path is not None:
            write_text(path, page)
        return page

    def _repr_html_(self) -> str:
        """The verdict alone; ``to_html`` has the rest."""
        return fragment(self._verdict().blocks)

    def __str__(self) -> str:
        rows = [_HEADERS, *((*_row(c), _verdict(c)) for c in self.checks)]
        return escaped("\n".join([columns(rows), self.advice.sentence, *self.notes, self._sentence()]))

    def __repr__(self) -> str:
        return f"GateReport({counted(self.meta.get('facts', 0), 'fact')}, {self._sentence()})"

    def _sentence(self) -> str:
        names = "; ".join(dict.fromkeys(check.name for check in self.failed))  # some names hold a comma
        return f"refused: {names}" if names else "passed"

    def _first_line(self) -> str:
        methods = " + ".join(dict.fromkeys(e["method"] for e in self.meta["edits"]))
        facts = counted(self.meta["facts"], "fact")
        return f"{self.meta['model']}, {facts} edited by {methods}. {self.meta['note']}".strip()

    # ---- sections of the page

    def _verdict(self) -> Section:
        rows = [(*_row(c), Cell(_verdict(c), _TONE.get(c.verdict, "neutral"))) for c in self.checks]
        notes = [f"{c.name}, {c.form}: {c.note}." for c in self.checks if c.note and c.name != POLICY]
        line = f"The edit is {self._sentence()}."
        return Section("Verdict", [line, Table(_HEADERS, rows), self.advice.sentence, *self.notes, *notes])

    def _wordings(self) -> Section:
        measure = self.meta["thresholds"]["measure"]
        headers = ("prompt", "what is asked", "form", "the edited model writes", "p(new)", "p(old)", measure)
        missed = [a for a in self.answers if a.by(measure) is False]
        rows = [
            (a.prompt, a.kind, a.form, a.text, a.p_new, a.p_true, _ANSWERED[a.by(measure)])
            for a in (*missed, *(a for a in self.answers if a.by(measure) is not False))
        ]
        line = f"{len(missed)} of {len(self.answers)} wordings are not answered as the edit says."
        return Section("The edited facts", [line, Details("What the model writes", _tables(headers, rows))])

    def _canaries(self) -> Section:
        blocks: list = ["The old answer, looked for in what the model writes, word for word."]
        forms = dict.fromkeys(form for form, _ in self.songs)
        counts = [
            (kind, form, len(found), sum(s.leaked_before for s in found), sum(s.leaked for s in found))
            for form in forms
            for kind in KINDS
            if (found := [s for f, s in self.songs if f == form and s.canary.kind == kind])
        ]
        blocks.append(Table(("asked", "form", "texts", "old answer before", "after"), counts))
        leaked = [
            (s.canary.kind, form, _end(spoken(s.canary.prompt)), s.canary.old, s.before, Cell(s.after, "bad"))
            for form, s in self.songs
            if s.leaked
        ]
        headers = ("asked", "form", "prompt", "old answer", "written before", "written after")
        blocks += _tables(headers, leaked) if leaked else ["No text says the old answer after the edit."]
        return Section("Canary", blocks)

    def _layers(self) -> list[Section]:
        if self.lens is None:
            return []
        rows = [(fact.text, self.lens.where(i)) for i, fact in enumerate(self.lens.facts)]
        line = (
            "Is the old answer gone, or only outvoted? Each layer's output, put through the model's head, says which "
            "answers stand there already."
        )
        picture = Picture(self.lens.plot(model=self.meta["model"]))
        each = Details("Fact by fact", _tables(("prompt", "the old answer, after the edit"), rows))
        return [Section("Layer by layer", [line, picture, each])]

    def _specificity(self) -> Section:
        counts = [
            (source, form, len(found), sum(x.is_lost for x in found))
            for form in dict.fromkeys(x.form for x in self.lost)
            for source in SOURCES
            if (found := [x for x in self.lost if x.form == form and x.asked.source == source])
        ]
        lost = [
            (x.asked.prompt, x.asked.source, x.form, x.asked.answer, x.before, Cell(x.after, "bad"))
            for x in self.lost
            if x.is_lost
        ]
        blocks: list = [Table(("prompts of", "form", "asked", "lost"), counts)]
        if lost:
            headers = ("prompt", "of", "form", "answer", "likeliest before", "after")
            blocks.append(Details("Prompts that lost their answer", _tables(headers, lost)))
        return Section("What should have stayed", blocks)


def _stayed(lost: Lost) -> dict:
    told = {"lost": lost.is_lost, "before": lost.before, "after": lost.after}
    return {"form": lost.form, **lost.asked._asdict(), **told}


def _method(meta: dict) -> Section:
    limits = meta["thresholds"]
    growth = [(layer, f"{value:.3%}") for layer, value in meta["growth"].items()]
    return Section(
        "How to read these numbers",
        [
            "Wordings answered: the share of the facts' own prompts and paraphrases that get the new answer; "
            f"generalization: that of the paraphrases alone. A wording counts by the measure {limits['measure']!r}: "
            "generated: the text written on says the new answer and not the old one; exact: every token of the new "
            "answer is the likeliest; success: the new answer is likelier than the old one. A specificity prompt "
            "is lost when the base model gave its answer and the edited one does not; where the base model did "
            "not know it, its likeliest token has to stay. Intervals are Wilson's for shares; for perplexity they are "
            "taken over windows of text.",
            "The edit was judged as a checkpoint would hold it, each weight rounded; a quantized form is compared with "
            "the model whose edited layers are quantized as well. Quantization is plain rounding to the nearest step.",
            Table(("layer", "‖ΔW‖ / ‖W‖"), growth),
            f"kedit_fast {meta['version']}, model {meta['fingerprint']}, {meta['dtype']} on {meta['device']}; "
            f"suite: {meta['suite'] or 'built in'}.",
        ],
    )


def _tables(headers: Sequence[str], rows: Sequence[tuple]) -> list:
    more = f"… and {len(rows) - MOST:,} more; the JSON report has them all."
    return [Table(headers, rows[:MOST]), *([more] if len(rows) > MOST else [])]


def _row(check: Check) -> tuple[str, ...]:
    """The cells of ``_HEADERS`` before the verdict."""
    value = _percent(check.value) if check.n else "–"
    interval = "–" if math.isnan(check.low) else f"{_percent(check.low)} to {_percent(check.high)}"
    limit = "none"
    if check.limit is not None:
        limit = f"{'≥' if check.rises else '≤'} {_percent(check.limit)}"
        limit += f", n ≥ {check.required:,}" * (check.required > 1)
    counted = check.counted.removesuffix("s") if check.n == 1 else check.counted
    return check.name, check.form, value, interval, limit, f"{check.n:,} {counted}".rstrip()


def _percent(share: float) -> str:
    return "not a number" if math.isnan(share) else f"{share:.2%}"


def _verdict(check: Check) -> str:
    return check.verdict + (f": {check.reason}" if check.failed else "")


def _end(prompt: str, limit: int = 160) -> str:
    return prompt if len(prompt) <= limit else "… " + prompt[-limit:]
