"""Every benchmark of the field on SmolLM2: the model as it is, and edited by each method, on the same cases.

One ``kedit-fast compare`` a benchmark; its file and page are kept in the cache folder, and what is there is not made
again, so a run that was stopped goes on. The figures are the rewrite prompts' teacher-forced and written shares: how
far apart they lie is what this table is for. Cases are the first of each file; CounterFact's are known facts.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import CheckFailed, Figure, Measured, peak_matmul
from kedit_fast.basics.settings import cache_dir
from kedit_fast.commands import cli

FOLDER = cache_dir() / "bench" / "benchmarks"  # what is in it quotes the data sets, which stay where they are
METHODS = ("rome", "memit", "alphaedit", "locft-bf", "ike", "wise")
CASES, QUICK = 30, 2
KNOWN = "known.json"
FILES = {
    "counterfact": KNOWN,
    "zsre": "zsre/zsre.json.gz",
    "mquake": "mquake/mquake_cf_subset.json.gz",
    "mquake, hard": "mquake/mquake_hard.json.gz",
    "halluedit": "halluedit/halluedit_llama2.json.gz",
    "knowgic": "knowgic/knowgic_chains.json.gz",
    "qaedit": "qaedit/qaedit_1k.json.gz",
    "wikibigedit": "wikibigedit/wikibigedit_3k.json.gz",
}
FORCED, WRITTEN = ("efficacy_exact", "rewrite.exact"), ("efficacy_contains", "rewrite.contains")


def run(options) -> Iterator[Measured]:
    """The benchmark as the command line asks for it. Raises Skipped without the data sets."""
    edit_bench.check_data()
    n = QUICK if options.quick else options.facts or CASES
    for name in options.rows or FILES:
        yield Measured(_figures(name, n, options.methods or METHODS), peak_matmul(), [f"the first {n} cases"])


def _figures(name: str, n: int, methods) -> list[Figure]:
    folder = FOLDER / f"{name.replace(', ', '-')}-{n}"
    made = folder.with_suffix(".json")
    if not made.exists():
        benchmark = name.partition(",")[0]
        line = ["compare", "--methods", ",".join(methods), "--benchmark", benchmark, "--facts", str(_file(name, n))]
        line += ["-n", str(n), "--skip-bad", "-o", str(made), "--html", str(folder.with_suffix(".html"))]
        line += ["--generate", "16"] if benchmark == "counterfact" else []
        if cli.main(line):
            raise CheckFailed(f"{name}: kedit-fast {' '.join(line)} failed")
    found = kf.Comparison.load(made)
    figures = []
    for what, metrics in (("teacher-forced", FORCED), ("written", WRITTEN)):
        (metric,) = (one for one in metrics if one in found.metrics)
        for side, value in found.summary[metric].items():
            figures.append(Figure(f"{name}, {side}", f"new answer, {what}", 100 * value.mean, "%", n=value.n))
    return figures


def _file(name: str, n: int) -> Path:
    """The benchmark's file; of CounterFact one of so many facts that the model knows, made here."""
    if FILES[name] != KNOWN:
        return edit_bench.DATA / FILES[name]
    path = FOLDER / KNOWN
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([fact.to_record() for fact in edit_bench.draw()[:n]]), encoding="utf-8")
    return path
