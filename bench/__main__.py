"""``python -m bench [NAME ...]``: run benchmarks, print their tables, keep their figures in bench/results."""

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch

from bench import pages, report
from bench.common import RESULTS, CheckFailed, Measured, Skipped, append_rows, environment, now

# name: what it measures; each is a module with ``run(options) -> Measured``, or an iterator of several that are kept as
# they come
BENCHES = {
    "second_moment": "C += KᵀK, native against torch, on random keys (3 minutes)",
    "solve": "the solves of MEMIT, native against torch, on random keys (3 minutes)",
    "trace": "causal tracing of SmolLM2 against the published and a batched loop (15 minutes)",
    "attribution": "the estimate of a trace against the exact one, on 20 facts (20 minutes)",
    "strided": "strided traces against the exact ones, and how reliable those are, on 20 facts (20 minutes)",
    "replaced": "estimates of a trace under subject replacement, of one backward pass and more (15 minutes)",
    "gradients": "gradient factors of 100 facts against autograd, fact by fact (10 minutes)",
    "benchmarks": "every benchmark of the field by six methods; goes on where it was stopped (4 hours)",
    "second": "Gemma-3-270M, where it is in the cache, beside SmolLM2: traces, ROME, MEMIT, from disk (60 minutes)",
    "scoring": "CounterFact's probes and 200 texts in shared sweeps against one prompt at a time (10 minutes)",
    "neurons": "knowledge neurons of a fact against a loop over layers and steps; erased and rewritten (10 minutes)",
    "kernels": "every op against its reference and torch, on the shapes of four models (2 minutes on the CPU)",
    "counts": "what trace, z and MEMIT would ask of a GPU, counted and predicted where there is none (10 minutes)",
    "flows": "traces on the shapes of large models with random weights (on a GPU only; 3 minutes)",
    "mass": "10,000 edits on the shape of GPT-J with random weights (on a GPU only; 10 minutes)",
    "values": "z, MEMIT and independent ROME edits of SmolLM2 against the published loop (30 minutes)",
    "editors": "every editor in one table, 1 to 500 known CounterFact facts; goes on where it was killed (3 hours)",
    "trained": "MEND, MALMEN and KE: a network trained on SmolLM2, judged on subjects it never saw (25 minutes)",
    "memory": "scoring GRACE, WISE and MEMOIR against one prompt at a time, 100 facts (20 minutes)",
    "phrasings": "phrasings, keeps and what goes with them: other wordings said, other relations left (4 hours)",
    "ranks": "moments, traces, MEMIT and evaluation by one, two and four processes (15 minutes)",
    "tokens": "MEMIT's scores by the tokens that its statistics are measured over (25 minutes)",
    "streamed": "a model of 3 GB under a hard limit of 1 GB against the same in memory (15 minutes)",
    "forms": "one edit asked plainly, behind a space, behind a line end and in a chat (10 minutes)",
    "edit": "MEMIT (or ROME) on known CounterFact facts: what changed and what did not (25 minutes)",
}
VALUE_PARTS = ["z", "memit", "rome"]
OPTIONS = {
    "second_moment": ["threads"],
    "solve": ["threads"],
    "trace": ["facts", "threads"],
    "attribution": ["threads"],
    "strided": ["threads"],
    "replaced": ["threads"],
    "gradients": ["facts", "threads"],
    "benchmarks": ["model", "facts", "rows", "methods", "threads"],
    "second": ["rows", "threads"],
    "scoring": ["facts", "threads"],
    "neurons": ["threads"],
    "kernels": ["device"],
    "flows": ["device"],
    "mass": ["device"],
    "values": ["parts", "threads"],
    "editors": ["model", "rows", "methods", "network", "threads"],
    "trained": ["rows", "threads"],
    "memory": ["threads"],
    "phrasings": ["rows", "network", "threads"],
    "tokens": ["threads"],
    "streamed": ["threads"],
    "forms": ["threads"],
    "edit": ["method", "n", "sets", "threads"],
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    listed = "\n".join(f"  {name:14} {what}" for name, what in BENCHES.items())
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"{__doc__}\n\n{listed}\n  {'report':14} write the newest figures into bench/RESULTS.md, its pages"
        f"\n  {'gpu':14} everything that needs a GPU into one folder: python -m bench gpu --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; all where none is named")
    made.add_argument("--list", action="store_true", help="print the names and exit")
    made.add_argument("--quick", action="store_true", help="a small run of a minute or two; its figures are not kept")
    made.add_argument("--threads", type=int, default=1, help="threads of torch and of the native ops (default 1)")
    made.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="kernels, flows, mass: where")
    made.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where figures are kept and read")
    made.add_argument(
        "--tables",
        type=Path,
        default=pages.INDEX,
        metavar="FILE",
        help="the index that `report` writes, pages beside it",
    )
    made.add_argument("--facts", type=int, help="trace, gradients, scoring, benchmarks (default 8, 100, 200, 30)")
    made.add_argument("--n", type=int, nargs="+", default=[1, 10, 30], help="edit: facts a batch (default 1 10 30)")
    made.add_argument("--sets", type=int, default=3, help="edit: disjoint batches of each size (default 3)")
    made.add_argument("--method", choices=["memit", "rome"], default="memit", help="edit: the editor (default memit)")
    made.add_argument(
        "--parts", nargs="+", choices=VALUE_PARTS, default=VALUE_PARTS, help="values: which (default all)"
    )
    made.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="ROW",
        help='editors: such as "MEMIT, n = 100"; trained: such as MEND; phrasings (default all)',
    )
    made.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="editors: such as memit (default all)")
    made.add_argument(
        "--network",
        nargs="+",
        default=[],
        metavar="METHOD=FILE",
        help="editors, phrasings: the network of a trained editor",
    )
    made.add_argument(
        "--model", default="smollm2", metavar="PATH", help="editors, benchmarks: another model than SmolLM2"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line names; 1 where a check failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["gpu"]:
        return import_module("bench.gpu.visit").main(arguments[1:])
    parse = parser()
    options = parse.parse_args(arguments)
    unknown = [name for name in options.names if name not in (*BENCHES, "report")]
    if unknown:
        parse.error(f"no benchmark {', '.join(unknown)}; expected {', '.join(BENCHES)} or report")
    if options.list:
        print("\n".join(f"{name:14} {what}" for name, what in BENCHES.items()))
        return 0
    torch.set_num_threads(options.threads)
    results = [_run(name, options, _command(name, options, parse)) for name in options.names or BENCHES]
    return int(not all(results))


def _run(name: str, options, command: str) -> bool:
    """One benchmark, or the report; False where its check failed."""
    if name == "report":
        written = pages.write(options.tables, options.results)
        print(f"{options.tables} and {len(written) - 1} pages and pictures: written from {options.results}")
        return True
    date = now()
    try:
        for measured, seconds in _measured(name, options):
            _show(name, measured, seconds)
            if not options.quick:
                path = append_rows(options.results, name, command, measured, date)
                print(f"{len(measured.figures)} rows added to {path}\n", flush=True)
    except Skipped as reason:
        print(f"{name}: skipped: {reason}\n")
    except CheckFailed as reason:
        print(f"{name}: CHECK FAILED, nothing is reported: {reason}\n")
        return False
    return True


def _measured(name: str, options) -> Iterator[tuple[Measured, float]]:
    """What a benchmark gives, part by part, and the seconds each took."""
    began = time.perf_counter()
    given = import_module(f"bench.{name}").run(options)
    for measured in [given] if isinstance(given, Measured) else given:
        yield measured, time.perf_counter() - began
        began = time.perf_counter()


def _command(name: str, options, parse: argparse.ArgumentParser) -> str:
    """The command that repeats this benchmark alone: the options that it reads, where they are not the defaults; what
    lies below the user's folder is named by ~."""
    given = {option: getattr(options, option) for option in OPTIONS.get(name, ())}
    changed = {option: value for option, value in given.items() if value != parse.get_default(option)}
    words = [
        f"--{option} {shlex.join(map(str, value)) if isinstance(value, list) else value}"
        for option, value in changed.items()
    ]
    return " ".join(["python -m bench", name, *words]).replace(str(Path.home()), "~")


def _show(name: str, measured: Measured, seconds: float) -> None:
    env = environment(measured.device)
    print(
        f"{name} on {env.get('gpu', env['cpu'])}, {env['cores']} cores, {env['threads']} threads, "
        f"peak {measured.peak:.1f} GFLOP/s; torch {env['torch']}, "
        f"transformers {env['transformers']}, kedit_fast {env['kedit_fast']} at {env['commit']}; {seconds:.0f} s"
    )
    print(report.as_text(measured.figures))
    print("\n".join([*measured.notes, ""]))


if __name__ == "__main__":
    sys.exit(main())
