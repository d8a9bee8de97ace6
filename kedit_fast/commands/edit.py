"""``kedit-fast edit``: facts to an edit file."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from kedit_fast.basics.parts import Held
from kedit_fast.basics.progress import stages
from kedit_fast.commands.inputs import check_network, corpus_of, read_chain, read_facts, statistics, told_lm
from kedit_fast.commands.outputs import check_outputs, say, say_table
from kedit_fast.commands.unfinished import kept, run_of
from kedit_fast.editors import EDITORS
from kedit_fast.editors.editor import Editor
from kedit_fast.editors.routed import SCOPE, behind, route_to
from kedit_fast.editors.serac import Serac
from kedit_fast.editors.written import counted_elsewhere, not_written
from kedit_fast.edits.edit import Edit
from kedit_fast.edits.routes import Route
from kedit_fast.facts.fact import Fact, check_facts, load_facts
from kedit_fast.model.lm import LM
from kedit_fast.moments.second_moment import STAGES as MEASURING
from kedit_fast.sweep.kept import fitting

SHOWN = 20  # facts listed one by one
NOT_WRITTEN = 1  # exit status of --strict


def run(args) -> int:
    """Makes the edit and writes its file; says what it was made of. 0, or 1 where --strict finds facts not written."""
    editor_class = EDITORS[args.method]
    facts = check_facts(
        read_facts(args), need_new=editor_class.NEEDS_NEW,
        need_subject=editor_class.NEEDS_SUBJECT or (args.skip_bad and args.route is not None),  # else route_to says it
        together=args.route is not None or not args.independent, skip_bad=args.skip_bad,
    )  # fmt: skip
    check_route(args)
    (path,) = check_outputs(args, "output")
    check_network(args.network, [args.method])
    keeps = args.checkpoint is not None or "checkpoint" not in editor_class.UNREAD
    run = run_of(args, path) if keeps else None
    below = read_chain(args.on_top_of or (), "this edit is the first")
    corpus = corpus_of(args)
    given = editor_class.from_file(args.hparams) if args.hparams else None
    lm = told_lm(args)
    editor = given or editor_class.for_model(lm)
    if args.network:
        editor = replace(editor, network=args.network)
    if args.layers:
        editor.refuse(layers=args.layers)
        editor = replace(editor, layers=args.layers)
    how = {"independent": args.independent or args.route is not None, "checkpoint": run}
    view, facts = editor.check_edit(lm, facts, previous=below, **how)  # before statistics are measured
    route = route_of(args, view, facts)
    source = f"read from {args.hparams}" if args.hparams else editor.source
    layers = ", ".join(map(str, editor.layers)) + " as given" * bool(args.layers)
    say(f"{args.method}, settings {source}" + f"; layers {layers}" * bool(layers))
    with kept(run):
        with stages(*(() if args.stats or not editor.mom2_adjustment else MEASURING), *editor.stages()):
            moments = statistics(args, lm, [editor], editor.layers, corpus)
            edit = edited(editor, view, facts, route, moments=moments, seed=args.seed, **how)
        edit.save(path)
    say_layers(edit, lm.d_ff)
    say_facts(edit)
    say(f"{path}: {edit!r}")
    return NOT_WRITTEN if args.strict and not_written(edit) else 0


def check_route(args) -> None:
    """Raises ValueError, before a model is opened, for a route around what it cannot choose among."""
    if args.examples and args.route != SCOPE:
        raise ValueError(f"--examples {args.examples}: a scope is learned from them; add --route {SCOPE}")
    if args.examples:
        load_facts(args.examples)  # it is read again once the model is there
    if args.route and (why := EDITORS[args.method].UNREAD.get("independent")):
        raise ValueError(
            f"--route {args.route}: {args.method} makes no independent edits to choose from ({why}); leave --route out"
        )


def route_of(args, lm: LM, facts: Sequence[Fact]) -> tuple[Route, dict] | None:
    """What --route asks for, before any value is optimized."""
    if args.route is None:
        return None
    examples = {"examples": args.examples} if args.examples else {}
    how = replace(Serac.for_model(lm), **examples) if args.route == SCOPE else args.route
    return fitting(lm, Held(), lambda lm: route_to(lm, facts, how))


def edited(editor: Editor, lm: LM, facts: Sequence[Fact], route: tuple[Route, dict] | None, **options) -> Edit:
    """The edit, behind its route if there is one; it is then asked through the route, and what it says there counts."""
    if route is None:
        return editor.edit(lm, facts, **options)
    with counted_elsewhere():
        edit = editor.edit(lm, facts, **options)
    return fitting(lm, Held(), lambda lm: behind(lm, edit, *route))


def say_layers(edit: Edit, d_ff: int) -> None:
    """g and fit of each layer: how much of what is asked the layer can give."""
    by_layer = edit.provenance["layers"].values()
    weight = next((notes["against"] for notes in by_layer if notes.get("against")), None)
    rows = [
        (layer, f"{g:,.0f}", f"{g / d_ff:.2f}", f"{notes.get('fit', 1):.2f}", f"{notes['condition']:.2g}")
        for layer, notes in edit.provenance["layers"].items()
        if (g := notes.get("g")) is not None  # with statistics
    ]
    if rows:
        say_table(("layer", "g", "g / d_ff", "fit", "condition of C"), rows)
        why = f"g / (g + {weight:,.0f})" if weight else "1: the value is written exactly"
        what = "k' C^-1 k" if "L2" not in edit.hparams else "k' P k"
        say(f"g: mean of {what} over the facts; fit: share of what is missing that one layer can give, {why}")
    routed = {layer: notes["rerouted"] for layer, notes in edit.provenance["layers"].items() if "rerouted" in notes}
    if routed:
        shares = ", ".join(f"layer {layer}: {share:.0%}" for layer, share in routed.items())
        say(f"facts that go to other experts since the layers below were edited: {shares}")


def say_facts(edit: Edit) -> None:
    """How the value of each fact was found, where one was (steps, and the probability of the new answer with it in
    place), and what the model with the edit says: P(new), its likeliest answer."""
    asked = edit.provenance["written"]
    found = edit.provenance.get("found", {"steps": [], "p_new": []})
    optimized = zip(found["steps"], (f"{p:.3f}" for p in found["p_new"]), strict=True)
    each = zip(edit.facts, asked["p_new"], asked["says"], strict=True)
    rows = [
        (fact.label, fact.target_new or f"not {fact.target_true}", *next(optimized, ()), f"{p_new:.3f}", repr(says))
        for fact, p_new, says in each
    ]
    steps = ("steps", "P(new) at the value") if found["steps"] else ()
    say_table(("fact", "new answer", *steps, "P(new)", "it says"), rows, SHOWN)
    if len(rows) > SHOWN:
        say(f"P(new) of all: mean {mean(asked['p_new']):.3f}, least {min(asked['p_new']):.3f}")
    written = sum(asked["written"])
    say(f"written: {written} of {len(rows)} facts; P(new), it says: of the model with the edit")
