"""``kedit-fast eval``: what an edit changed, and what it should not have changed."""

from contextlib import nullcontext

from ..evaluation import evaluate
from ..shipping.compose import compose
from .inputs import fact_file, open_lm, read_edits, read_text
from .outputs import check_distinct, check_output, fresh_log, make_folder_of, say


def run(args) -> None:
    """Evaluates the facts with and without the edit; prints the table and writes the files asked for."""
    if args.edit is None and args.facts is None:
        raise ValueError("evaluate what? give --edit FILE, or --facts FILE to ask the model as it is")
    check_distinct(args, ["output", "html", "log"], ["edit", "facts", "text", "model"])
    report, page, log = (check_output(path, args.force) for path in (args.output, args.html, args.log))
    edits = () if args.edit is None else read_edits(args.edit)
    edit = compose(edits) if len(edits) > 1 else next(iter(edits), None)  # independent edits are not composed
    facts = list(edit.facts)[: args.n] if args.facts is None else fact_file(args.facts, args.n)
    text = None if args.text is None else read_text(args.text)
    lm = open_lm(args)
    with fresh_log(log) if log else nullcontext():
        found = evaluate(lm, facts, edit, text=text, generate=args.generate, log=log)
    say(str(found))
    for prompt, before, after in found.generations:
        say(f"\n{prompt}\n  before: {before!r}" + (f"\n  after:  {after!r}" if after is not None else ""))
    for path, write in ((report, found.save), (page, found.to_html)):
        if path:
            make_folder_of(path)
            write(path)
            say(f"written: {path}")
