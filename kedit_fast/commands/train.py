"""``kedit-fast train``: facts to the network of a trained editor."""

from collections.abc import Sequence
from dataclasses import replace

from kedit_fast.basics.catalog import TRAINED, loaded
from kedit_fast.basics.words import counted
from kedit_fast.commands.inputs import fact_file, in_chat, told_lm
from kedit_fast.commands.outputs import check_outputs, number, say, say_table
from kedit_fast.commands.unfinished import kept, run_of
from kedit_fast.editors.training import train_editor
from kedit_fast.facts.fact import Fact, check_facts, load_facts
from kedit_fast.facts.relations import related

SHOWN = 20  # looks listed one by one


def run(args) -> None:
    """Trains the network and writes its file; says how well it does on what was held out."""
    if args.facts is None:
        raise ValueError("which facts? give --facts FILE, with paraphrases, and neighbors that must not change")
    facts = fact_file(args)
    if args.related:
        facts = related(facts, in_chat(args, load_facts(args.facts, skip_bad=args.skip_bad)))
        say_related(facts)
    facts = check_facts(facts, need_new=True, together=False, skip_bad=args.skip_bad)
    (path,) = check_outputs(args, "output")
    run = run_of(args, path)
    of_method = loaded(TRAINED)[args.method]
    settings = of_method.from_file(args.hparams) if args.hparams else None
    lm = told_lm(args)
    settings = of_method.for_model(lm) if settings is None else settings
    asked = {"layers": args.layers, "max_iters": args.steps}
    settings = replace(settings, **{name: value for name, value in asked.items() if value})
    source = f"read from {args.hparams}" if args.hparams else settings.source
    say(f"{args.method}, settings {source}; layers {', '.join(map(str, settings.layers))}")
    with kept(run):
        how = {"held_out": args.held_out, "routed": args.routed, "checkpoint": run, "seed": args.seed}
        network = train_editor(lm, facts, args.method, settings=settings, **how)
        network.save(path)
    made = network.provenance
    say(f"trained on {made['facts']:,} facts; {made['held_out']:,} of other subjects held out:")
    every = made["looks"]
    looks = [look for i, look in enumerate(every) if (len(every) - 1 - i) % (1 + len(every) // SHOWN) == 0]
    rows = [
        (look["step"], number(look["loss"]), number(look["nll"]), f"{look['success']:.0%}", number(look["kl"], ".4f"))
        for look in looks
    ]
    say_table(("step", "loss", "-log p of the answer", "written", "KL of what must not change"), rows)
    say("asked in another wording, where a fact has one; nats")
    say(f"{path}: {network!r}, of step {made['best_step']:,}")


def say_related(facts: Sequence[Fact]) -> None:
    """What --related came to."""
    phrased, asked = (sum(bool(getattr(fact, name)) for fact in facts) for name in ("phrasings", "same_subject"))
    say(f"of {counted(len(facts), 'fact')} {phrased:,} have phrasings, {asked:,} prompts on other relations")
