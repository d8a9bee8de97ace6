"""Editing SmolLM2 with MEMIT or ROME: what an edit of known CounterFact facts changes, and what it leaves alone.

Facts: those of CounterFact that the model ranks first, without those whose answers stand in the subject, in the order
of one draw with ``random.Random(0)``; a batch holds no two facts of one subject and relation. SmolLM2's lie with the
data. Another model is asked, what it knows is kept in the cache folder, and the first of them are left out: Gemma's
settings were chosen on those. CounterFact's first paraphrase and first neighborhood prompt of each fact are original,
the other neighborhood prompts rebuilt.
"""

import dataclasses
import gzip
import json
import random
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

import kedit_fast as kf
from bench.common import DATA, Figure, Measured, Skipped, peak_matmul, timed
from kedit_fast.basics.intervals import DIFFERENCE, SHARE, Interval, interval
from kedit_fast.basics.settings import cache_dir
from kedit_fast.evaluation.benchmarks.counterfact import METRICS
from kedit_fast.facts.fact import Fact, check_facts

KNOWN = "smollm2_known.json.gz"
COUNTERFACT = "counterfact/counterfact.json.gz"
STATISTICS_TEXT, N_TOKENS = "corpus/wikitext2_raw_valid.txt.gz", 40_960
PERPLEXITY_TEXT, N_CHARACTERS = "corpus/wikitext2_raw_test.txt.gz", 60_000  # more than the 5,120 tokens it is taken of
SINGLES = 10  # edits of one fact each, pooled, that stand for n = 1
CHOSEN_ON = 30  # the first facts that Gemma knows: its derived settings were chosen on them, so tables leave them out
ASKED = 500  # facts that a model is asked at once whether it knows
N_OTHER = 3  # prompts of the same subject's other relations
MARKS = {
    "efficacy": ">= 95",
    "P(new)": ">= 0.85",
    "paraphrase": ">= 80",
    "neighborhood, change": ">= -8",
    "known neighbors, P(true) kept": ">= 70",
    "perplexity, worst edit": "<= 3",
}


class Outcome(NamedTuple):
    """One edit evaluated, and the CPU seconds that making it and evaluating it took."""

    report: kf.EvalReport
    edit_s: float
    evaluate_s: float


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped where the public data sets are not at hand."""
    check_data()
    sizes, sets, singles, n_characters = options.n, options.sets, SINGLES, N_CHARACTERS
    if options.quick:
        sizes, sets, singles, n_characters = [1, 4], 1, 2, N_CHARACTERS // 20
    facts = draw()
    batches = {n: cut(facts, n, singles if n == 1 else sets) for n in sizes}
    lm = kf.open_model("smollm2")
    editor = kf.EDITORS[options.method].for_model(lm)
    moments, text = statistics_of(lm, editor.layers), perplexity_text(n_characters)
    return measure(lm, editor, moments, batches, text, marked=options.method == "memit")


def check_data() -> None:
    """Raises Skipped, with what is missing, where the public data sets are not at hand."""
    missing = [name for name in (KNOWN, COUNTERFACT, STATISTICS_TEXT, PERPLEXITY_TEXT) if not (DATA / name).exists()]
    if missing:
        raise Skipped(f"{DATA} lacks {', '.join(missing)}")


def whose(lm) -> str:
    """What stands before the cases of another model than SmolLM2, whose rows need no name."""
    return "" if lm.name == "smollm2" else f"{lm.name}: "


def statistics_of(lm, layers: Iterable[int]) -> dict[int, kf.SecondMoment]:
    """Second moments over WikiText-2, kept from one run to the next."""
    return kf.second_moments(lm, layers, DATA / STATISTICS_TEXT, n_tokens=N_TOKENS, cache_dir=cache_dir() / "bench")


def perplexity_text(n_characters: int = N_CHARACTERS) -> str:
    """The beginning of WikiText-2's test split."""
    with gzip.open(DATA / PERPLEXITY_TEXT, "rt", encoding="utf-8") as file:
        return file.read(n_characters)


def measure(
    lm, editor, moments, batches: dict[int, list[list[Fact]]], text: str, *, marked: bool = True, whose: str = "",
    also: Callable[[list[Fact], kf.Edit], dict[str, float]] | None = None,
) -> Measured:  # fmt: skip
    """A column a batch size: every batch is edited and evaluated by itself, and the facts of one size are pooled.

    whose: before each case; also: gives {line: percent} of one edit, of which the mean over the size's edits is told
    """
    peak, contexts, figures = peak_matmul(), None, []
    for n, of_size in batches.items():
        outcomes, more = [], []
        for facts in of_size:
            made = timed(editor.edit, lm, facts, moments=moments, contexts=contexts)
            contexts = made.result.contexts  # sampled once
            judged = timed(kf.evaluate, lm, facts, made.result, text=text)
            outcomes.append(Outcome(judged.result, made.cpu, judged.cpu))
            more.append(also(facts, made.result) if also else {})
            print(f"n = {n}, {len(outcomes)} of {len(of_size)}: {made.cpu:.0f} s + {judged.cpu:.0f} s", flush=True)
        name = f"{whose}n = {n}, {len(of_size)} edit{'s' * (len(of_size) > 1)}"
        figures += [f if marked else dataclasses.replace(f, mark="") for f in table(name, outcomes)]
        figures += [Figure(name, x, statistics.fmean(one[x] for one in more), "%", n=len(more)) for x in more[0]]
    settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(editor).items())
    return Measured(figures, peak, [f"{type(editor).__name__}: {settings}. Brackets: 95 % intervals over facts."])


# ---- facts


def known_to(lm, n: int) -> list[Fact]:
    """Facts that a model knows, in the order of the draw; at least n, where there are so many."""
    return draw() if lm.name == "smollm2" else _asked(lm, CHOSEN_ON + n)[CHOSEN_ON:]


def draw() -> list[Fact]:
    """CounterFact facts that SmolLM2 knows in the order of the draw, with prompts of other relations, none in another's
    way."""
    everything = kf.load_facts(DATA / COUNTERFACT)
    by_id = {fact.id: fact for fact in everything}
    with gzip.open(DATA / KNOWN, "rt", encoding="utf-8") as file:
        known = [by_id[str(record["id"])] for record in json.load(file) if record["source"] == "counterfact"]
    candidates = [fact for fact in known if not gives_away(fact)]
    drawn = without_conflicts(random.Random(0).sample(candidates, len(candidates)))
    return kf.related(check_facts(drawn), everything, phrasings=0, same_subject=N_OTHER)


def _asked(lm, n: int) -> list[Fact]:
    """The first facts of one draw of which a model finds each token of the answer the likeliest, n or somewhat more,
    for it is asked ``ASKED`` at a time; what it said is kept."""
    path = cache_dir() / "bench" / "known" / f"{lm.fingerprint}.json"
    everything = kf.load_facts(DATA / COUNTERFACT)
    drawn = without_conflicts(random.Random(0).sample(everything, len(everything)))
    told = json.loads(path.read_text()) if path.exists() else {}
    known: list[Fact] = []
    for first in range(0, len(drawn), ASKED):
        some = [fact for fact in drawn[first : first + ASKED] if not gives_away(fact)]
        if any(fact.label not in told for fact in some):
            told |= _right(lm, some)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(told))
        known += [fact for fact in some if told[fact.label]]
        if len(known) >= n:
            break
    return kf.related(known, everything, phrasings=0, same_subject=N_OTHER)


def _right(lm, facts: list[Fact]) -> dict[str, bool]:
    """{label: whether each token of the true answer is the likeliest}."""
    alone = {"paraphrases": (), "neighborhood": (), "same_subject": ()}
    asked = [dataclasses.replace(fact, target_new=fact.target_true, **alone) for fact in facts]
    right = kf.evaluate(lm, asked, both_forms=False).base["efficacy_exact"] == 1
    return dict(zip((fact.label for fact in facts), right.tolist(), strict=True))


def gives_away(fact: Fact) -> bool:
    """Whether an answer stands in the subject."""
    return any(target.casefold() in fact.subject.casefold() for target in (fact.target_true, fact.target_new))


def without_conflicts(facts: Iterable[Fact]) -> list[Fact]:
    """The facts whose subject and relation no fact before them has."""
    kept: dict[tuple, Fact] = {}
    for fact in facts:
        kept.setdefault((fact.subject.casefold(), fact.provenance.get("relation_id")), fact)
    return list(kept.values())


def cut(facts: list[Fact], n: int, sets: int) -> list[list[Fact]]:
    """The first ``sets`` disjoint slices of n facts. Raises ValueError where there are too few facts."""
    if n < 1 or sets < 1 or n * sets > len(facts):
        raise ValueError(f"{sets} sets of {n} facts: expected at least one fact, and {len(facts)} at most")
    return [facts[i * n : (i + 1) * n] for i in range(sets)]


# ---- figures


def table(case: str, outcomes: list[Outcome]) -> list[Figure]:
    """The figures of one batch size: facts of all its edits pooled, intervals over facts."""
    reports = [outcome.report for outcome in outcomes]
    base, edited = (_pooled(columns) for columns in zip(*((r.base, r.edited) for r in reports), strict=True))
    lines: list[tuple[str, Interval, str]] = []

    def both(metric: str, column: str) -> None:
        kind = METRICS[column][0]
        for name, columns in ((f"{metric}, base", base), (metric, edited)):
            lines.append((name, *in_percent(interval(columns[column], kind), kind)))

    both("efficacy", "efficacy")
    both("P(new)", "p_new")
    both("paraphrase", "paraphrase")
    both("neighborhood", "neighborhood")
    moved = interval(edited["neighborhood"] - base["neighborhood"], DIFFERENCE)
    lines.append(("neighborhood, change", *in_percent(moved, DIFFERENCE)))
    both("known neighbors, P(true)", "known_neighbors_p_true")
    kept = kept_share(base["known_neighbors_p_true"], edited["known_neighbors_p_true"])
    lines.append(("known neighbors, P(true) kept", *in_percent(kept, SHARE)))
    both("other relations, top token kept", "same_subject_same_top")
    both("other relations, P(top)", "same_subject_p_top")
    figures = [
        Figure(case, metric, value.mean, unit, value.low, value.high, value.n, MARKS.get(metric, ""))
        for metric, value, unit in lines
        if value.n and metric != "other relations, top token kept, base"  # 100 % by definition
    ]
    return figures + _per_edit(case, outcomes)


def _per_edit(case: str, outcomes: list[Outcome]) -> list[Figure]:
    """What an edit has one of, not a fact."""
    drifts = [100 * outcome.report.drift for outcome in outcomes]
    n_facts = sum(len(outcome.report.facts) for outcome in outcomes)
    worst = "perplexity, worst edit"
    return [
        Figure(case, "perplexity, mean change", statistics.fmean(drifts), "% change", n=len(drifts)),
        Figure(case, worst, max(drifts), "% change", n=len(drifts), mark=MARKS[worst]),
        Figure(case, "editing, CPU time a fact", sum(o.edit_s for o in outcomes) / n_facts, "s", n=n_facts),
        Figure(case, "evaluation, CPU time a fact", sum(o.evaluate_s for o in outcomes) / n_facts, "s", n=n_facts),
    ]


def kept_share(base: torch.Tensor, edited: torch.Tensor) -> Interval:
    """Σ edited / Σ base over facts [n], NaN left out, with the interval of a ratio of means (by linearization)."""
    there = ~base.isnan()
    base, edited = base[there].double(), edited[there].double()
    ratio, mean = float(edited.sum() / base.sum()), float(base.mean())
    around = interval(edited - ratio * base, DIFFERENCE)
    return Interval(ratio, ratio + around.low / mean, ratio + around.high / mean, len(base))


def _pooled(columns: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    columns = list(columns)
    return {name: torch.cat([of_one[name] for of_one in columns]) for name in METRICS}


def in_percent(value: Interval, kind: str) -> tuple[Interval, str]:
    """The value as it is shown, and its unit: shares in percent, their differences in points."""
    units = {SHARE: "%", DIFFERENCE: "points"}
    if kind not in units:
        return value, "probability"
    return Interval(100 * value.mean, 100 * value.low, 100 * value.high, value.n), units[kind]
