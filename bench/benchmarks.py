"""Every benchmark of the field on SmolLM2, or ``--model``: as it is, and edited by each method, on the same cases.

A report for each benchmark and method is kept in the cache folder, with their comparison as a file and a page. What is
there is not made again, and work begun is gone on with: a run that was stopped goes on. The figures are what share of
the edited prompts gets the new answer, in every reading of it; how far these lie apart is what the table is for. Cases
are the first of each file; CounterFact's are known facts. "texts": CounterFact with 100 tokens written behind each
generation prompt, for their entropy.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import Figure, Measured, Skipped, peak_matmul
from kedit_fast.basics.intervals import AMOUNT, SCORE
from kedit_fast.basics.settings import cache_dir
from kedit_fast.evaluation import Case
from kedit_fast.evaluation.known import Known

FOLDER = cache_dir() / "bench" / "benchmarks"  # what is in it quotes the data sets, which stay where they are
METHODS = ("memit", "alphaedit", "locft-bf", "wise", "ike", "rome")
CASES, QUICK = 30, 2
KNOWN, TEXTS = "counterfact", "counterfact, texts"  # of facts that the model knows
WRITTEN, LONG = 16, 100  # tokens behind CounterFact's prompts; others say themselves how many
FILES = {
    KNOWN: "",
    "zsre": "zsre/zsre.json.gz",
    "mquake": "mquake/mquake_cf_subset.json.gz",
    "mquake, hard": "mquake/mquake_hard.json.gz",
    "halluedit": "halluedit/halluedit_llama2.json.gz",
    "knowgic": "knowgic/knowgic_chains.json.gz",
    "qaedit": "qaedit/qaedit_1k.json.gz",
    "wikibigedit": "wikibigedit/wikibigedit_3k.json.gz",
    TEXTS: "",
}
READINGS = {  # {line: the metrics that may stand there}
    "likelier than the old answer": ("efficacy", "rewrite.success"),
    "each token the likeliest": ("rewrite.token",),
    "all tokens the likeliest": ("efficacy_exact", "rewrite.exact"),
    "in what is written": ("efficacy_contains", "rewrite.contains"),
    "chosen of A and B": ("choice.success",),
    "paraphrases, all tokens": ("paraphrase_exact", "paraphrase.exact"),
    "paraphrases, written": ("paraphrase_contains", "paraphrase.contains"),
    "several hops, written": ("any_of_three.contains",),
    "score": (SCORE,),
    "entropy of texts": ("generation_entropy",),
}
NOTE = (
    "The new answer to the edited prompt, read in five ways. Teacher-forced: its P is above the old answer's; each of "
    "its tokens is the likeliest behind the right ones before it (the share that zsRE and EasyEdit report); all of "
    "them are. In free writing: it stands in what the model writes. Asked whether A or B: in both orders. All facts of "
    "a row are in the model at once; in brackets how many cases."
)


def run(options) -> Iterator[Measured]:
    """The benchmark as the command line asks for it. Raises Skipped without the data sets."""
    edit_bench.check_data()
    n = QUICK if options.quick else options.facts or CASES
    lm = kf.open_model(options.model)
    for name in options.rows or FILES:
        found = _compared(lm, name, n, options.methods or METHODS)
        yield Measured(_figures(f"{edit_bench.whose(lm)}{name} ({n})", found), peak_matmul(), [NOTE])


def _compared(lm, name: str, n: int, methods) -> kf.Comparison:
    """These methods on the first n cases, and those whose reports are there, with the files of ``FOLDER``. Raises
    Skipped where that is one report."""
    folder = FOLDER / ("" if lm.name == "smollm2" else lm.name) / f"{name.replace(', ', '-')}-{n}"
    benchmark, known = kf.BENCHMARKS[name.partition(",")[0]], Known()
    cases = _cases(lm, benchmark, name, n)
    folder.mkdir(parents=True, exist_ok=True)
    reports = {}
    for method in dict.fromkeys((*METHODS, *methods)):
        path = folder / f"{method}.json"
        if method in methods and not path.exists():
            print(f"{name}: {method}", flush=True)
            _report(lm, benchmark, cases, method, known, folder, LONG if name == TEXTS else WRITTEN).save(path)
        if path.exists():
            reports[method] = kf.EvalReport.load(path)
    if len(reports) < 2:
        raise Skipped(f"{name}: the report of {methods[0]} is kept; the table takes two or more --methods")
    found = kf.compare(reports)
    found.save(folder / "comparison.json")
    found.to_html(folder / "comparison.html")
    return found


def _report(lm, benchmark, cases: list[Case], method: str, known: Known, folder: Path, n_tokens: int) -> kf.EvalReport:
    editor = kf.EDITORS[method].for_model(lm)
    given = {}
    if editor.mom2_adjustment:
        given["moments"] = edit_bench.statistics_of(lm, editor.layers)
    if "checkpoint" not in editor.UNREAD:
        given["checkpoint"] = folder / f"{method}, edit"
    edit = editor.edit(lm, [fact for case in cases for fact in case.facts], **given)
    generate = None if benchmark.n_written else n_tokens
    return kf.evaluate(
        lm, cases, edit, benchmark=benchmark, generate=generate, both_forms=False, known=known,
        checkpoint=folder / f"{method}, evaluation",
    )  # fmt: skip


def _cases(lm, benchmark, name: str, n: int) -> list[Case]:
    """The first n cases of the benchmark's file whose facts can be written; of CounterFact facts that the model
    knows."""
    if FILES[name]:
        cases = benchmark.load(edit_bench.DATA / FILES[name], n, skip_bad=True)
        return [case for case in cases if all(fact.target_new and fact.subject for fact in case.facts)]
    facts = edit_bench.known_to(lm, n)[:n]
    if name != TEXTS:
        facts = [_without_texts(fact) for fact in facts]
    return [Case((fact,)) for fact in facts]


def _without_texts(fact: kf.Fact) -> kf.Fact:
    about = {key: value for key, value in fact.provenance.items() if key != "generation_prompts"}
    return replace(fact, provenance=about)


def _figures(name: str, found: kf.Comparison) -> list[Figure]:
    figures = []
    for line, metrics in READINGS.items():
        for metric in metrics:
            sides = found.summary.get(metric, {})
            for side, one in sides.items():
                if one.n:
                    is_bits = metric in found.metrics and found.metrics[metric][0] == AMOUNT
                    scale, unit = (1, "bits") if is_bits else (100, "%")
                    figures.append(Figure(f"{name}, {side}", line, scale * one.mean, unit, n=one.n))
    return figures
