"""``kedit-fast implied``: what edits imply, what of it the edited model says, and what is still to be edited."""

from kedit_fast.commands.inputs import read_chain, told_lm
from kedit_fast.commands.outputs import check_outputs, say, say_written, write_reports
from kedit_fast.experiments.consistency import consistency
from kedit_fast.facts.fact import BUILTIN
from kedit_fast.facts.knowledge import load_relations


def run(args) -> None:
    """Asks for what the edits imply; prints the tables and writes the files asked for."""
    output, page = check_outputs(args, "output", "html")
    edits, table = read_chain(args.edits), load_relations(*(args.relations or [BUILTIN]))
    lm = told_lm(args)
    found = consistency(lm, edits, table, hops=args.hops, ask=args.ask, by=args.by, generate=args.generate)
    written = write_reports((output, found.save_rest), (page, found.to_html))
    say(str(found))
    say_written(written)
