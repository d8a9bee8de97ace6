"""``kedit-fast summary``: everything that is measured of an edit, in one table and on one page."""

from kedit_fast.commands.gate import REFUSED
from kedit_fast.commands.inputs import fact_file, read_chain, told_lm
from kedit_fast.commands.outputs import check_outputs, say, say_written, write_reports
from kedit_fast.experiments.edit_summary import evaluate_edit
from kedit_fast.facts.fact import BUILTIN
from kedit_fast.facts.knowledge import load_relations
from kedit_fast.gating import load_suite


def run(args) -> int:
    """Measures the edits and prints what they come to; 0, or 1 where the gate refuses them."""
    output, page = check_outputs(args, "output", "html")
    edits = read_chain(args.edits)
    facts = None if args.facts is None else fact_file(args)
    suite = load_suite(*args.suite, skip_bad=args.skip_bad) if args.suite else None
    table = load_relations(*(args.relations or [BUILTIN]))
    lm = told_lm(args)
    how = {"suite": suite, "relations": table, "tasks": args.tasks, "generate": args.generate, "seed": args.seed}
    found = evaluate_edit(lm, edits, facts, **how)
    written = write_reports((output, found.save), (page, found.to_html))
    say(str(found))
    say_written(written)
    return 0 if found.gate.passed else REFUSED
