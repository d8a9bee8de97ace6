"""``kedit-fast forgotten``: whether an old answer is gone, or only not said."""

from kedit_fast.commands.inputs import fact_file, in_chat, read_chain, told_lm
from kedit_fast.commands.outputs import check_outputs, say, say_written, write_reports
from kedit_fast.edits.chain import facts_in_force
from kedit_fast.experiments.forgotten import verify_forgotten
from kedit_fast.facts.fact import load_facts
from kedit_fast.facts.forgetting import is_forgotten


def run(args) -> None:
    """Asks for the old answers with and without the edits; prints the table and writes the file asked for."""
    (report,) = check_outputs(args, "output")
    edits = read_chain(args.edits)
    own = in_chat(args, facts_in_force(edits))
    gone = [fact for fact in own if is_forgotten(fact)][: args.n] if args.facts is None else fact_file(args)
    keep = [fact for fact in own if not is_forgotten(fact)]
    if args.keep is not None:
        keep = in_chat(args, load_facts(args.keep, skip_bad=args.skip_bad))
    lm = told_lm(args)
    found = verify_forgotten(
        lm, edits, gone or None, keep=keep,  # None: it says that there is none
        budget=args.budget, bits=map(int, args.bits), relearning_steps=args.steps,
    )  # fmt: skip
    written = write_reports((report, found.save))
    say(str(found))
    say_written(written)
