"""Every editor in one table: CounterFact's scores and what an edit costs, one fact at a time and many at once.

Facts as in ``bench.edit``: known to the model, drawn with ``random.Random(0)``, without conflicts, with prompts on the
subjects' other relations; the first facts of the draw are in every row. A row's figures are over ``JUDGED`` facts at
most: all of its small batches pooled, or the first ones of a large batch. Editors that place a value optimize it once
for all rows, which is exact to rounding.

Every editor goes through the same doors: ``for_model``, ``edit``, ``lm.with_edit``, ``evaluate``. What it refuses (a
trained editor without its network) is said, and its row left out. A row is kept as soon as it is done; one that stands
in the results with this commit and these settings is not run again.
"""

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import Figure, Measured, environment, peak_matmul, read_rows, results_file, timed
from kedit_fast.basics.intervals import SHARE, Interval, harmonic_mean, interval
from kedit_fast.editors import rome, spread
from kedit_fast.editors.contexts import memit_contexts
from kedit_fast.editors.written import counted_elsewhere
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT, METRICS
from kedit_fast.facts.fact import ANSWERED, Fact
from kedit_fast.jobs.values import Values

JUDGED = 100  # facts
SIZES = {1: 10, 10: 3, 100: 1}  # {facts a batch: batches}
MASS, MASSED = 500, ("memit", "alphaedit", "memit-blue", "rect")  # a batch, and which editors take it
DRIFTS = 3  # edits of one fact whose perplexity is taken, and then of SHORT_TEXT tokens: they hardly move it
SHORT_TEXT = 1_280
RESAMPLES, SEED = 1_000, 0  # of facts, for the interval of S
WRITTEN, REPEATS = 24, 3  # tokens behind each of four prompts, and how often, for the time of one
TEXTS = 50  # facts behind whose prompts so many tokens are written, for the entropy of what is
COLUMNS = {  # of a report: how the table calls them
    "efficacy": "ES",
    "paraphrase": "PS",
    "neighborhood": "NS",
    "p_new": "P(new)",
    "paraphrase_p_new": "P(new), paraphrases",
    "same_subject_same_top": "other relations, top token kept",
}
LABELS = {  # of editors whose name is not all capitals
    "alphaedit": "AlphaEdit", "alphaedit-blue": "AlphaEdit-BLUE", "betaedit": "BetaEdit", "locft-bf": "LocFT-BF",
    "ultraedit": "UltraEdit", "crispedit": "CrispEdit", "unlearn": "unlearning",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line: an editor by its name in EDITORS, facts a batch, batches. options: fields that are not its own; route:
    that its independent edits stand behind (``kf.routed``)"""

    label: str
    editor: str
    n: int
    batches: int = 1
    options: dict = field(default_factory=dict)
    route: str = ""

    @property
    def name(self) -> str:
        return f"{self.label}, n = {self.n}"


class Made(NamedTuple):
    """An edit, its facts, and the CPU seconds that making it took."""

    edit: kf.Edit
    facts: list[Fact]
    seconds: float


def every_row() -> list[Row]:
    """Of each editor in EDITORS; large batches first, for those after them take over their values."""
    made = [Row("R-ROME", "rome", 1, JUDGED, {"key": "averaged"})]
    for label, editor in (("MEMIT", "memit"), ("MEND", "mend")):
        for route, how in (("names", "by name"), ("scope", "in scope")):
            made += [Row(f"{label} {how}", editor, n, route=route) for n in (MASS, JUDGED)]
    for name, editor in kf.EDITORS.items():
        sizes = ({MASS: 1} if name in MASSED else {}) | dict(sorted(SIZES.items(), reverse=True))
        sizes[1] = JUDGED if _takes_independent(editor) else sizes[1]
        made += [Row(LABELS.get(name, name.upper()), name, n, batches) for n, batches in sizes.items()]
    return made


def run(options) -> Iterator[Measured]:
    """The rows that the command line asks for. Raises Skipped without the data sets, ValueError for an unknown row."""
    edit_bench.check_data()
    rows = chosen(options)
    lm = kf.open_model(options.model)
    known = edit_bench.known_to(lm, max(row.n * row.batches for row in rows))
    ground = Ground(
        lm=lm,
        facts=known,
        moments={},
        contexts=memit_contexts(lm),
        text=edit_bench.perplexity_text(edit_bench.N_CHARACTERS // (20 if options.quick else 1)),
        steps=4 if options.quick else None,
        whose=edit_bench.whose(lm),
        done=frozenset() if options.quick else done(options.results),
    )
    return measure(ground, rows)


def chosen(options) -> list[Row]:
    """The rows that ``--rows`` and ``--methods`` name, with the networks that ``--network`` gives. Raises ValueError
    for one that is not there."""
    rows, networks = every_row(), networks_of(options)
    for asked, known, what in (
        (options.rows, {row.name for row in rows}, "--rows"),
        (options.methods, set(kf.EDITORS), "--methods"),
        (networks, set(kf.EDITORS), "--network"),
    ):
        if unknown := set(asked) - known:
            raise ValueError(f"{what} {sorted(unknown)}: expected some of {sorted(known)}")
    rows = [row for row in rows if row.name in (options.rows or [row.name])]
    rows = [row for row in rows if row.editor in (options.methods or [row.editor])]
    rows = [
        dataclasses.replace(row, options={"network": networks[row.editor]}) if row.editor in networks else row
        for row in rows
    ]
    if options.quick:
        rows = [dataclasses.replace(row, n=min(row.n, 4), batches=min(row.batches, 2)) for row in rows]
    return list({(row.name, row.editor): row for row in rows}.values())


def networks_of(options) -> dict[str, str]:
    """{method: file} of ``--network``."""
    return dict(pair.split("=", 1) for pair in options.network)


def done(folder: Path, bench: str = "editors") -> frozenset[tuple[str, str]]:
    """(case, settings) of the rows that this commit has in a folder of results; none where files are changed."""
    env = environment()
    path = results_file(folder, env)
    if "dirty" in str(env["commit"]) or not path.exists():
        return frozenset()
    rows = [row for row, _ in read_rows(path) if row["bench"] == bench and row["commit"] == env["commit"]]
    return frozenset((row["case"], row["notes"]) for row in rows)


@dataclass(frozen=True)
class Ground:
    """What all rows share. moments: those measured so far; text: for perplexity; steps: of every editor, None for its
    own; whose: before each case; done: (case, settings) of rows that are not run again"""

    lm: object
    facts: list[Fact]
    moments: dict[int, kf.SecondMoment]
    contexts: list[list[str]]
    text: str
    steps: int | None = None
    whose: str = ""
    done: frozenset[tuple[str, str]] = frozenset()

    def editor(self, row: Row):
        """The row's editor for this model."""
        kind = kf.EDITORS[row.editor]
        made = kind(**row.options) if "network" in row.options else kind.for_model(self.lm)
        steps = {name: self.steps for name in ("v_num_grad_steps", "num_steps") if self.steps and hasattr(made, name)}
        return dataclasses.replace(made, **steps, **{k: v for k, v in row.options.items() if k != "network"})

    def edit(self, row: Row, facts: list[Fact], **options) -> kf.Edit:
        editor = self.editor(row)
        reads = {} if "contexts" in editor.UNREAD else {"contexts": self.contexts}
        if editor.mom2_adjustment:
            missing = set(editor.layers) - set(self.moments)
            self.moments.update(edit_bench.statistics_of(self.lm, missing) if missing else {})
            reads["moments"] = self.moments
        if not row.route:
            return editor.edit(self.lm, facts, **reads, **options)
        with counted_elsewhere():
            alone = editor.edit(self.lm, facts, independent=True, **reads, **options)
        return kf.routed(self.lm, alone, row.route)


def measure(ground: Ground, rows: Sequence[Row], unedited: bool = True) -> Iterator[Measured]:
    """A Measured a row, and first, where ``unedited``, the model without an edit. What cannot be done is said and left
    out."""
    name, about = f"{ground.whose}no edit", _about(ground)
    if unedited and (name, about) not in ground.done:
        base = kf.evaluate(ground.lm, ground.facts[:JUDGED], both_forms=False)
        figures = [*table(name, [base], side="base"), entropy_figure(name, ground.lm, ground.facts)]
        yield Measured(figures, peak_matmul(), [about])
    with shared_values():
        for row in rows:
            try:
                setting = "" if _lacking(ground, row) else _setting(row, ground.editor(row))
                if (ground.whose + row.name, setting) in ground.done:
                    print(f"{row.name}: there already", flush=True)
                    continue
                if reason := _lacking(ground, row):
                    raise ValueError(reason)
                began = time.process_time()
                some = edits(ground, row)
                reports, drifts = judged(ground, row, some)
                case = ground.whose + row.name
                figures = table(case, reports, drifts) + costs(ground, row, some)
                if len(some) == 1 and not some[0].edit.independent:
                    figures.append(entropy_figure(case, ground.lm.with_edit(some[0].edit), some[0].facts))
            except (ValueError, ImportError) as reason:
                print(f"{row.name}: left out: {reason}", flush=True)
                continue
            print(f"{row.name}: {(time.process_time() - began) / 60:.1f} CPU minutes", flush=True)
            yield Measured(figures, peak_matmul(), [setting])


def _lacking(ground: Ground, row: Row) -> str:
    """Why the row cannot be measured; "" where it can."""
    if row.editor not in kf.EDITORS:
        return f"no editor {row.editor!r}; there are {', '.join(kf.EDITORS)}"
    needed = row.n * row.batches
    return f"{needed} facts needed, {len(ground.facts)} at hand" if needed > len(ground.facts) else ""


def edits(ground: Ground, row: Row) -> list[Made]:
    """The row's edits; those of one fact each as one independent edit of all, where the editor makes such."""
    facts = ground.facts[: row.n * row.batches]
    if row.n == 1 and _takes_independent(ground.editor(row)):
        made = timed(ground.edit, row, facts, independent=True)
        return [Made(made.result, facts, made.cpu)]
    some = []
    for batch in edit_bench.cut(facts, row.n, row.batches):
        made = timed(ground.edit, row, batch)
        some.append(Made(made.result, batch, made.cpu))
    return some


def judged(ground: Ground, row: Row, some: Sequence[Made] | None = None) -> tuple[list[kf.EvalReport], list[float]]:
    """Reports of a row's edits, and changes of perplexity (a share of the base model's) of some of them."""
    some = edits(ground, row) if some is None else some
    if some[0].edit.independent:
        edit, facts, _ = some[0]
        alone = [(edit.only(i), facts[i : i + 1]) for i in range(min(DRIFTS, len(facts)))]
        reports = [kf.evaluate(ground.lm, facts, edit, both_forms=False)]
        return reports, [_drift(ground, one, its, SHORT_TEXT) for one, its in alone]
    reports, drifts = [], []
    for number, (edit, batch, _) in enumerate(some):
        with_text = {"text": ground.text} if row.batches == 1 else {}
        reports.append(kf.evaluate(ground.lm, batch[:JUDGED], edit, both_forms=False, **with_text))
        if row.batches == 1:
            drifts.append(reports[-1].drift)
        elif number < DRIFTS:
            drifts.append(_drift(ground, edit, batch[:1], SHORT_TEXT))
    return reports, drifts


def _takes_independent(editor) -> bool:
    return "independent" not in editor.UNREAD


def _drift(ground: Ground, edit: kf.Edit, facts: list[Fact], tokens: int) -> float:
    return kf.evaluate(ground.lm, facts, edit, text=ground.text, max_tokens=tokens, both_forms=False).drift


def entropy_figure(case: str, lm, facts: Sequence[Fact]) -> Figure:
    """The mean entropy of the text that a model writes behind its facts' prompts: near nothing where it says one word
    over and over, which no other figure of a line sees."""
    texts = lm.generate([fact.text for fact in facts[:TEXTS]], WRITTEN)
    return Figure(case, "entropy of text", statistics.fmean(map(entropy, texts)), "bits", n=len(texts))


def entropy(text: str) -> float:
    """(2/3 H_2 + 4/3 H_3) / 2 bits, as ROME has it: H_n = -sum f log2 f over the shares f of a text's word n-grams."""
    words, weighted = text.split(), 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        shares = [count / counts.total() for count in counts.values()]
        weighted += weight * -sum(f * math.log2(f) for f in shares)
    return weighted / 2


def costs(ground: Ground, row: Row, some: Sequence[Made]) -> list[Figure]:
    """CPU time to edit and bytes of the changes, a fact; what a generated token takes longer with the edit in view."""
    n = sum(len(made.facts) for made in some)
    edit, facts, _ = some[0]
    edit = edit.only(0) if edit.independent else edit
    before, after = (_token_time(lm, facts) for lm in (ground.lm, ground.lm.with_edit(edit)))
    stored = sum(change.nbytes for made in some for change in made.edit.changes)
    case = ground.whose + row.name
    return [
        Figure(case, "time to edit, a fact", sum(made.seconds for made in some) / n, "s", n=n),
        Figure(case, "stored, a fact", 1e-3 * stored / n, "kB", n=n),
        Figure(case, "added time a token", 1e3 * (after - before), "ms", n=REPEATS),
    ]


def _token_time(lm, facts: Sequence[Fact]) -> float:
    """CPU seconds of a token that is written behind the facts' prompts, four side by side; the best of ``REPEATS``."""
    prompts = [fact.text for fact in facts[:4]]
    best = min(timed(lm.generate, prompts, WRITTEN).cpu for _ in range(REPEATS))
    return best / (WRITTEN * len(prompts))


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
        f"Brackets: 95 % intervals over facts ({JUDGED} at most; of S by bootstrap). S: harmonic mean of ES, PS, NS. "
        f"Other relations: {edit_bench.N_OTHER} prompts on the fact's subject. Known neighbors: base P(true) of 0.1 at "
        f"least. Perplexity: its change by the edit, or on {SHORT_TEXT} tokens in the mean over {DRIFTS} edits of "
        "several. Time to edit: CPU time; values that another row had optimized take none. Stored: the changes alone. "
        "Added time: with the edit as a view; weights that are written into the model take none. Entropy: of "
        f"{WRITTEN} tokens that are written behind each prompt, over their words' 2- and 3-grams. Left out: "
        "neighborhood prompts that name an edited subject. CounterFact's first paraphrase and first neighbor are "
        f"original, the other neighbors rebuilt. {sum(map(len, ground.contexts))} contexts for all."
    )


def _setting(row: Row, editor) -> str:
    """The row's settings, those that are not the same for every editor of its class."""
    changed = [
        f"{f.name} {value}"
        for f in dataclasses.fields(editor)
        if f.name not in ("source", "fact_token", "network") and (value := getattr(editor, f.name)) != f.default
    ]
    changed += [f"route {row.route}"] * bool(row.route)
    if (network := getattr(editor, "network", None)) is not None:
        made = network.provenance
        keeps = ", ".join(network.settings.get("keeps", ANSWERED))  # older files have none
        changed += [f"network {network.digest} of {made['facts']} facts, keeps {keeps}"]
    return f"{row.label}, {row.batches} x {row.n}: {', '.join(changed) or 'as it is'}."
