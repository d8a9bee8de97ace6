"""``kedit-fast neurons``: which neurons of the MLPs give a fact's answer; pictures, and a JSON line a fact."""

from kedit_fast.basics.files import saying
from kedit_fast.basics.log import Log
from kedit_fast.basics.words import counted
from kedit_fast.commands.inputs import read_facts, told_lm
from kedit_fast.commands.outputs import check_output, fresh_log, goes_on, output_folder, say, say_table
from kedit_fast.commands.unfinished import kept, run_of
from kedit_fast.tracing.neurons import NeuronAttribution, knowledge_neurons
from kedit_fast.tracing.results import TraceResult, read_log

LOG = "neurons.jsonl"
SHOWN = 20  # facts in the table
DRAWN = "mlp"  # the kind of trace that neurons of MLPs are drawn below, where there are several


def run(args) -> None:
    """Finds the neurons of the facts, and draws them."""
    facts, folder = read_facts(args), output_folder(args.output)
    log, pictures = folder / LOG, [folder / f"fact-{i}.png" for i in range(min(args.plots, len(facts)))]
    for path in (log, *pictures):
        check_output(path, args.force or goes_on(args, log))
    run = run_of(args, log, *pictures)
    traces = read_log(args.traces) if args.traces else []
    lm = told_lm(args)
    with kept(run) as checkpoint:
        found = knowledge_neurons(
            lm, facts, steps=args.steps, threshold=args.threshold, share=args.share, common=args.common,
            answer=args.answer, paraphrases=not args.held_out, layers=args.layers, checkpoint=checkpoint,
        )  # fmt: skip
        with fresh_log(log) as path:
            Log(path).add((one.to_record() for one in found), again=False)
        with saying(f"the neurons are in {log}"):
            for one, path in zip(found, pictures, strict=False):
                one.plot(path, _trace_of(one, traces))
    say_neurons(found)
    say(f"in {folder}: {LOG}, a line for each fact; pictures (.png)")


def say_neurons(found: list[NeuronAttribution]) -> None:
    """A row a fact: how many neurons, and in which layer most of the answer is given."""
    rows = []
    for one in found:
        mean = one.by_layer.mean(0)
        layer = int(mean.argmax())
        p, given = f"{one.p[0]:.3f}", f"{mean[layer]:.3f}"
        rows.append((one.fact.label, one.answer.strip(), p, len(one.prompts), len(one.neurons), layer, given))
    say_table(("fact", "answer", "P(answer)", "wordings", "neurons", "strongest layer", "it gives"), rows, SHOWN)
    say(f"{counted(sum(len(one.neurons) for one in found), 'neuron')} of {counted(len(found), 'fact')}")


def _trace_of(found: NeuronAttribution, traces: list[TraceResult]) -> TraceResult | None:
    """The trace of the same fact, of the MLPs where there is one."""
    mine = [trace for trace in traces if trace.fact.text == found.fact.text]
    return next((trace for trace in mine if trace.kind == DRAWN), next(iter(mine), None))
