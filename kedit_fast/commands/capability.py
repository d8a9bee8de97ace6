"""``kedit-fast capability``: what general tasks are worth to the model, without and with edits."""

from kedit_fast.commands.inputs import open_lm, read_chain
from kedit_fast.commands.outputs import check_outputs, say, say_written, write_reports
from kedit_fast.evaluation.harness import capability

SHARED = ("limit", "num_fewshot", "task_folder", "chat", "seed")  # options that are the function's own arguments


def run(args) -> None:
    """Runs the tasks; prints the table and writes the files asked for."""
    report, page = check_outputs(args, "output", "html")
    edits = read_chain(args.edits)
    found = capability(open_lm(args), args.tasks, edits, **{name: getattr(args, name) for name in SHARED})
    written = write_reports((report, found.save), (page, found.to_html))
    say(str(found))
    say_written(written)
