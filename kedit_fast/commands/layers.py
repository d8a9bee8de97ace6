"""``kedit-fast layers``: edit success by layer, beside the causal trace of the same facts."""

import math

from kedit_fast.commands.inputs import corpus_of, known, read_facts, statistics, told_lm
from kedit_fast.commands.outputs import check_outputs, fresh_log, number, say, say_table, say_written, write_reports
from kedit_fast.commands.unfinished import kept, run_of
from kedit_fast.editors import EDITORS
from kedit_fast.editors.located import Located
from kedit_fast.experiments.by_layer import LayerStudy, check_study, edit_by_layer
from kedit_fast.facts.fact import check_facts
from kedit_fast.pictures.labels import LOCALIZATION_WARNING
from kedit_fast.tracing.results import read_log

_SHOWN = {"efficacy": "efficacy", "p_new": "P(new)", "paraphrase": "paraphrase", "neighborhood": "neighborhood"}
FEW = 5  # layers; the rank correlation of fewer is mostly chance


def run(args) -> None:
    """Edits at each layer and traces; says a table and the rank correlations, writes the figures and the picture."""
    method = known("--method", args.method, EDITORS)
    if not issubclass(method, Located):
        solved = ", ".join(name for name, editor in EDITORS.items() if issubclass(editor, Located))
        raise ValueError(f"--method {args.method} has no layer to be solved for; expected one of {solved}")
    facts = check_facts(read_facts(args), need_new=True, need_subject=True, together=False, skip_bad=args.skip_bad)
    output, picture, log = check_outputs(args, "output", "plot", "log")
    run = run_of(args, output, picture, log)
    corpus = corpus_of(args)
    traces = _traces_of(args.traces, facts) if args.traces else None
    given = method.from_file(args.hparams) if args.hparams else None
    lm = told_lm(args)
    editor = given or method.for_model(lm)
    editor, layers, facts, _ = check_study(lm, facts, editor, args.layers, trace=traces)
    moments = statistics(args, lm, [editor], layers, corpus)
    with kept(run) as checkpoint:
        with fresh_log(log):
            found = edit_by_layer(
                lm, facts, editor, layers, moments=moments, trace=traces, samples=args.samples, seed=args.seed, log=log,
                checkpoint=checkpoint,
            )  # fmt: skip
        written = write_reports((output, found.save), (picture, found.plot))
    say_layers(found)
    say_written(written)


def _traces_of(path: str, facts):
    """The traces of exactly these facts, out of a log."""
    asked = {(fact.prompt, fact.subject) for fact in facts}
    traces = [result for result in read_log(path) if (result.fact.prompt, result.fact.subject) in asked]
    missing = asked - {(result.fact.prompt, result.fact.subject) for result in traces}
    if missing:
        prompt, subject = sorted(missing)[0]
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(asked)} facts, for instance {prompt.replace('{}', subject)!r}; give "
            "the traces of the same facts, or leave --traces out"
        )
    return traces


def say_layers(found: LayerStudy) -> None:
    """A row a layer, and how far trace and edits rank together."""
    kinds = list(found.traces)
    rows = [
        (layer, *(number(found.edited[layer][metric].mean) for metric in _SHOWN), *effects)
        for layer, effects in zip(found.layers, _effects(found, kinds), strict=True)
    ]
    rows.append(("no edit", *(number(found.base[metric].mean) for metric in _SHOWN), *("" for _ in kinds)))
    say_table(("layer", *_SHOWN.values(), *(f"AIE {kind}" for kind in kinds)), rows)
    say("AIE: average indirect effect at the subject's last token, of the causal trace")
    for metric, of_metric in found.correlations().items():
        same = {kind: " (the same at all layers)" * math.isnan(rho) for kind, rho in of_metric.items()}
        shown = ", ".join(f"{kind} {number(rho, '+.2f')}{same[kind]}" for kind, rho in of_metric.items())
        few = " (too few to tell)" * (len(found.layers) < FEW)
        say(f"rank correlation with the trace over {len(found.layers)} layers{few}, {metric}: {shown}")
    say(f"note: {LOCALIZATION_WARNING}")


def _effects(found: LayerStudy, kinds: list[str]) -> list[tuple[str, ...]]:
    """For each layer, the effect of each kind."""
    columns = [[number(float(value)) for value in found.effect(kind)] for kind in kinds]
    return list(zip(*columns, strict=True)) if columns else [() for _ in found.layers]
