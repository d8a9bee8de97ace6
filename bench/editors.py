"""Every editor on SmolLM2, one fact at a time and many at once: CounterFact's scores, with intervals.

Facts as in ``bench.edit``: known to the model, drawn with ``random.Random(0)``, without conflicts; the first facts of
the draw are in every row. A row's figures are over ``JUDGED`` facts at most: all of its small batches pooled, or the
first ones of a large batch. Editors that place a value optimize it once for all rows, which is exact to rounding.
Without the prompts of ``bench.edit`` on the subjects' other relations. A row is kept as soon as it is done.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import Figure, Measured, peak_matmul
from bench.values import asked
from kedit_fast.basics.intervals import SHARE, Interval, harmonic_mean, interval
from kedit_fast.editors import rome, spread
from kedit_fast.editors.contexts import memit_contexts
from kedit_fast.evaluation.counterfact import COUNTERFACT, METRICS
from kedit_fast.facts.fact import Fact
from kedit_fast.jobs.values import Values

JUDGED = 100  # facts
DRIFTS = 3  # edits of one fact whose perplexity is taken, and then of SHORT_TEXT tokens: they hardly move it
SHORT_TEXT = 1_280
RESAMPLES, SEED = 1_000, 0  # of facts, for the interval of S
COLUMNS = {  # of a report: how the table calls them
    "efficacy": "ES",
    "paraphrase": "PS",
    "neighborhood": "NS",
    "efficacy_magnitude": "EM",
    "paraphrase_magnitude": "PM",
    "neighborhood_magnitude": "NM",
}


@dataclass(frozen=True)
class Row:
    """One line: an editor by its name in EDITORS, facts a batch, batches. options: fields that are not its own."""

    label: str
    editor: str
    n: int
    batches: int = 1
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.label}, n = {self.n}"


ROWS = (
    Row("ROME", "rome", 1, JUDGED),
    Row("R-ROME", "rome", 1, JUDGED, {"key": "averaged"}),
    Row("MEMIT", "memit", 1, JUDGED),
    Row("FT", "ft", 1, 10),
    Row("FT-L", "ft-l", 1, 10),
    Row("MEMIT", "memit", 10, JUDGED // 10),
    Row("MEMIT", "memit", 100),
    Row("AlphaEdit", "alphaedit", 100),
    Row("FT", "ft", 100),
    Row("FT-L", "ft-l", 100),
    Row("MEMIT", "memit", 500),
    Row("AlphaEdit", "alphaedit", 500),
)
QUICK = tuple(dataclasses.replace(row, n=min(row.n, 4), batches=min(row.batches, 2)) for row in ROWS)


def run(options) -> Iterator[Measured]:
    """The rows that the command line asks for. Raises Skipped without the data sets, ValueError for an unknown row."""
    edit_bench.check_data()
    rows = list({row.name: row for row in (QUICK if options.quick else ROWS)}.values())
    if unknown := set(options.rows) - {row.name for row in rows}:
        raise ValueError(f"--rows {sorted(unknown)}: expected some of {[row.name for row in rows]}")
    lm = kf.open_model("smollm2")
    layers = {layer for name in ("rome", "memit") for layer in kf.EDITORS[name].for_model(lm).layers}
    ground = Ground(
        lm=lm,
        facts=[asked(fact) for fact in edit_bench.draw()],
        moments=edit_bench.statistics_of(lm, layers),
        contexts=memit_contexts(lm),
        text=edit_bench.perplexity_text(edit_bench.N_CHARACTERS // (20 if options.quick else 1)),
        steps=4 if options.quick else None,
    )
    return measure(ground, [row for row in rows if row.name in (options.rows or [row.name])])


@dataclass(frozen=True)
class Ground:
    """What all rows share. text: for perplexity; steps: of every editor, None for its own"""

    lm: object
    facts: list[Fact]
    moments: dict[int, kf.SecondMoment]
    contexts: list[list[str]]
    text: str
    steps: int | None = None

    def editor(self, row: Row):
        """The row's editor for this model."""
        made = kf.EDITORS[row.editor].for_model(self.lm)
        steps = {name: self.steps for name in ("v_num_grad_steps", "num_steps") if self.steps and hasattr(made, name)}
        return dataclasses.replace(made, **steps, **row.options)

    def edit(self, row: Row, facts: list[Fact], **options) -> kf.Edit:
        editor = self.editor(row)
        reads = {"contexts": self.contexts, "moments": self.moments} if editor.mom2_adjustment else {}
        return editor.edit(self.lm, facts, **reads, **options)


def measure(ground: Ground, rows: Sequence[Row]) -> Iterator[Measured]:
    """A Measured a row, and first the model without an edit. What cannot be done is said and left out."""
    unedited = True
    with shared_values():
        for row in rows:
            if reason := _lacking(ground, row):
                print(f"{row.name}: left out: {reason}", flush=True)
                continue
            began = time.process_time()
            reports, drifts = judged(ground, row)
            print(f"{row.name}: {(time.process_time() - began) / 60:.1f} CPU minutes", flush=True)
            if unedited:
                yield Measured(table("no edit", reports, side="base"), peak_matmul(), [_about(ground)])
                unedited = False
            yield Measured(table(row.name, reports, drifts), peak_matmul(), [_setting(row, ground.editor(row))])


def _lacking(ground: Ground, row: Row) -> str:
    """Why the row cannot be measured; "" where it can."""
    if row.editor not in kf.EDITORS:
        return f"no editor {row.editor!r}; there are {', '.join(kf.EDITORS)}"
    needed = row.n * row.batches
    return f"{needed} facts needed, {len(ground.facts)} at hand" if needed > len(ground.facts) else ""


def judged(ground: Ground, row: Row) -> tuple[list[kf.EvalReport], list[float]]:
    """Reports of a row's facts, and changes of perplexity (a share of the base model's) of some of its edits."""
    facts = ground.facts[: row.n * row.batches]
    if row.n == 1 and _takes_independent(ground.editor(row)):
        edit = ground.edit(row, facts, independent=True)
        alone = [(edit.only(i), facts[i : i + 1]) for i in range(min(DRIFTS, len(facts)))]
        return [kf.evaluate(ground.lm, facts, edit, both_forms=False)], [
            _drift(ground, one, its, SHORT_TEXT) for one, its in alone
        ]
    reports, drifts = [], []
    for number, batch in enumerate(edit_bench.cut(facts, row.n, row.batches)):
        edit = ground.edit(row, batch)
        with_text = {"text": ground.text} if row.batches == 1 else {}
        reports.append(kf.evaluate(ground.lm, batch[:JUDGED], edit, both_forms=False, **with_text))
        if row.batches == 1:
            drifts.append(reports[-1].drift)
        elif number < DRIFTS:
            drifts.append(_drift(ground, edit, batch[:1], SHORT_TEXT))
    return reports, drifts


def _takes_independent(editor) -> bool:
    """Those that place values do; a fine-tuned delta belongs to no single fact."""
    return hasattr(editor, "v_num_grad_steps")


def _drift(ground: Ground, edit: kf.Edit, facts: list[Fact], tokens: int) -> float:
    return kf.evaluate(ground.lm, facts, edit, text=ground.text, max_tokens=tokens, both_forms=False).drift


# ---- values, once for all rows


@contextmanager
def shared_values() -> Iterator[None]:
    """While open, editors find the values that another row optimized under the same settings, on the same model."""
    known: dict[tuple, tuple] = {}
    right = spread.optimize_values

    def optimize(lm, tasks, settings, *rest) -> Values:
        if lm.edits:
            return right(lm, tasks, settings, *rest)
        keys = [(lm.fingerprint, settings, repr(dataclasses.replace(task, owner=0))) for task in tasks]
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            made = right(lm, [tasks[i] for i in new], settings)
            columns = zip(*(getattr(made, f.name) for f in dataclasses.fields(Values)), strict=True)
            known.update(zip([keys[i] for i in new], columns, strict=True))
        return Values(*(torch.stack(column) for column in zip(*(known[key] for key in keys), strict=True)))

    with ExitStack() as stack:
        for module in (spread, rome):
            stack.enter_context(patch.object(module, "optimize_values", optimize))
        yield


# ---- figures


def table(
    case: str, reports: Sequence[kf.EvalReport], drifts: Sequence[float] = (), side: str = "edited"
) -> list[Figure]:
    """The figures of one line: facts of all reports pooled, 95 % intervals over facts.

    side: "base" for the model without an edit; drifts: as ``judged`` has them
    """
    base, columns = (_pooled(getattr(report, name) for report in reports) for name in ("base", side))
    lines = [("S", score(columns), SHARE)]
    lines += [(short, interval(columns[name], METRICS[name][0]), METRICS[name][0]) for name, short in COLUMNS.items()]
    if side == "edited":
        name = "known_neighbors_p_true"
        lines.append(("known neighbors, P(true) kept", edit_bench.kept_share(base[name], columns[name]), SHARE))
    figures = []
    for metric, value, kind in lines:
        shown, unit = edit_bench.in_percent(value, kind)
        if shown.n:
            figures.append(Figure(case, metric, shown.mean, unit, shown.low, shown.high, shown.n))
    if drifts:
        figures.append(Figure(case, "perplexity", 100 * statistics.fmean(drifts), "% change", n=len(drifts)))
    prompts = sum(len(fact.neighborhood) for report in reports for fact in report.facts)
    if prompts:
        left_out = 100 * float(columns["neighborhood_left_out"].sum()) / prompts
        figures.append(Figure(case, "neighbors left out", left_out, "%", n=prompts))
    return figures


def score(columns: dict[str, Tensor]) -> Interval:
    """S, the harmonic mean of the means of ES, PS and NS, and a bootstrap interval of it: facts drawn with replacement,
    ``RESAMPLES`` times from ``SEED``. n is 0 where the facts lack one of the three."""
    three = torch.stack([columns[name] for name in COUNTERFACT.score_of]).double()
    n = three.shape[1]
    generator = torch.Generator().manual_seed(SEED)
    drawn = three[:, torch.randint(n, (RESAMPLES, n), generator=generator)].nanmean(2)  # [3, resamples]
    means = three.nanmean(1)
    if means.isnan().any():
        return Interval(math.nan, math.nan, math.nan, 0)
    again = torch.tensor([harmonic_mean(column) for column in drawn.T.tolist()], dtype=torch.float64)
    low, high = again.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(harmonic_mean(means.tolist()), low, high, n)


def _pooled(columns) -> dict[str, Tensor]:
    columns = list(columns)
    return {name: torch.cat([of_one[name] for of_one in columns]) for name in METRICS}


def _about(ground: Ground) -> str:
    return (
        f"Brackets: 95 % intervals over facts ({JUDGED} at most; of S by bootstrap). S: harmonic mean of ES, PS, NS; "
        "EM, PM, NM: the differences of probability behind them, in points. Known neighbors: base P(true) of 0.1 at "
        f"least. Perplexity: its change by the edit, or on {SHORT_TEXT} tokens in the mean over {DRIFTS} edits of "
        "several. Left out: neighborhood prompts that name an edited subject. CounterFact's first paraphrase and "
        f"first neighbor are original, the other neighbors rebuilt. {sum(map(len, ground.contexts))} contexts for all."
    )


def _setting(row: Row, editor) -> str:
    """The row's settings, those that are not the same for every editor of its class."""
    changed = [
        f"{f.name} {value}"
        for f in dataclasses.fields(editor)
        if f.name not in ("source", "fact_token") and (value := getattr(editor, f.name)) != f.default
    ]
    return f"{row.label}: {', '.join(changed)}."
