"""``kedit-fast eval``: what an edit changed, and what it should not have changed."""

from kedit_fast.commands.inputs import NO_EDITS, benchmark_of, case_file, in_chat, open_lm, read_chain, read_text
from kedit_fast.commands.outputs import check_outputs, fresh_log, say, say_written, write_reports
from kedit_fast.commands.unfinished import kept, run_of
from kedit_fast.edits.chain import facts_in_force
from kedit_fast.evaluation import evaluate
from kedit_fast.facts.fact import BUILTIN


def run(args) -> None:
    """Evaluates the facts with and without the edits; prints the table and writes the files asked for."""
    if not args.edits and args.facts is None:
        raise ValueError("evaluate what? name an edit file, or give --facts FILE to ask the model as it is")
    benchmark = benchmark_of(args)
    report, page, log = check_outputs(args, "output", "html", "log")
    edits = read_chain(args.edits, NO_EDITS)
    facts = in_chat(args, facts_in_force(edits)[: args.n]) if args.facts is None else case_file(args)
    if not facts:
        raise ValueError(f"the edits hold no facts; give --facts FILE (or --facts {BUILTIN}) with what is to be asked")
    text = None if args.text is None else read_text(args.text)
    run = run_of(args, report, page, log)
    lm = open_lm(args)
    with kept(run) as checkpoint:
        with fresh_log(log):
            found = evaluate(
                lm, facts, edits, benchmark=benchmark, text=text, generate=args.generate, log=log, checkpoint=checkpoint
            )
        written = write_reports((report, found.save), (page, found.to_html))
    say(str(found))
    for prompt, before, after in found.generations:
        say(f"\n{prompt}\n  before: {before!r}" + (f"\n  after:  {after!r}" if after is not None else ""))
    say_written(written)
