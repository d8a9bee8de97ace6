"""``kedit-fast trace``: which tokens and layers carry a fact; heat maps, averages, a page, and a JSON line a trace."""

import os
from itertools import groupby, islice
from pathlib import Path
from statistics import fmean

from kedit_fast.basics.files import saying
from kedit_fast.basics.words import counted
from kedit_fast.commands.inputs import read_facts, told_lm
from kedit_fast.commands.outputs import (
    check_output,
    check_outputs,
    fresh_log,
    goes_on,
    output_folder,
    say,
    say_written,
    show,
)
from kedit_fast.commands.unfinished import kept, run_of
from kedit_fast.facts.fact import check_facts, check_subject
from kedit_fast.pictures.labels import LOCALIZATION_WARNING, reliable
from kedit_fast.pictures.terminal import TerminalHeatMap
from kedit_fast.pictures.traces import plot_kinds
from kedit_fast.tracing.doubts import doubts
from kedit_fast.tracing.page import trace_page
from kedit_fast.tracing.results import TraceResult, average
from kedit_fast.tracing.trace import BY_RUNS, trace

LOG = "traces.jsonl"
RECOMMENDED = 5  # layers, as many as MEMIT edits


def run(args) -> None:
    """Traces the facts, drawing what was found."""
    facts = read_facts(args)
    if args.skip_bad:
        facts = check_facts(facts, need_subject=True, together=False, skip_bad=True)
    for fact in facts:
        check_subject(fact)
    if args.sever and (args.kinds != ("state",) or args.method not in BY_RUNS):
        raise ValueError(f"--sever {args.sever} is for exact traces of states: add --kinds state --method exact")
    folder = output_folder(args.output)
    if args.facts and os.path.realpath(os.path.expanduser(args.facts)) == os.path.realpath(folder / LOG):
        raise ValueError(f"--facts {args.facts} is the log that these traces would replace; give another --output")
    n_drawn = min(args.plots, len(facts))
    averages = (f"average-{kind}.{suffix}" for kind in args.kinds for suffix in ("png", "npz"))
    names = (LOG, *averages, *map(_picture, range(n_drawn)))
    log = folder / LOG
    for name in names:
        check_output(folder / name, args.force or goes_on(args, log))
    (page,) = check_outputs(args, "html", beside=[folder / name for name in names])
    run = run_of(args, *(folder / name for name in names), page)
    lm = told_lm(args)
    with kept(run) as checkpoint:
        with fresh_log(log):
            results = trace(
                lm, facts, kinds=args.kinds, window=args.window, samples=args.samples, noise=args.noise, seed=args.seed,
                answer=args.answer, corrupt=args.corrupt, metric=args.metric, sever=args.sever, method=args.method,
                top=args.top, stride=args.stride, log=log, checkpoint=checkpoint,
            )  # fmt: skip
        with saying(f"the traces are in {log}, read_log reads them"):
            _draw(results, folder, n_drawn)
            for kind, mean in average(results).items():
                mean.plot(folder / f"average-{kind}.png")
                mean.save(folder / f"average-{kind}.npz")
            if page is not None:
                trace_page(results, page, most=args.plots, model=lm.name)
    for result in results if len(facts) == 1 else ():
        say()
        show(TerminalHeatMap(result))
    if len(facts) > 1:
        say(f"{counted(len(facts), 'fact')}, {counted(len(results), 'trace')}")
    say()
    say_averages(results)
    for sentence in doubts(results):
        say(f"note: {sentence}")
    say(f"in {folder}: {LOG}, a line for each trace; pictures (.png); averages (.npz)")
    say_written([page] if page is not None else [])


def say_averages(results: list[TraceResult]) -> None:
    """Where the effect was, by kind."""
    for kind, mean in average(results).items():
        facts = f"{counted(mean.n_facts, 'fact')}{reliable(mean.reliability)}"
        say(f"{kind}: {mean.where(results, RECOMMENDED)}; total effect {mean.total_effect:.3f}, {facts}")
    if costs := [result.cost for result in results if result.cost is not None]:
        share = f"{fmean(costs):.0%} of an exact trace's rows x layers"
        say(f"strided: each noise draw at one layer in {results[0].stride}, {share}")
    say(f"note: {LOCALIZATION_WARNING}")


def _draw(results: list[TraceResult], folder: Path, n: int) -> None:
    """A picture with all kinds for each of the first n facts."""
    by_fact = groupby(results, key=lambda result: id(result.fact))
    for index, (_, kinds) in enumerate(islice(by_fact, n)):
        plot_kinds(list(kinds), folder / _picture(index))


def _picture(index: int) -> str:
    return f"fact-{index}.png"
