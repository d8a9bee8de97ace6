"""``kedit-fast gate``: may this edit ship?"""

import json
from dataclasses import fields, replace

import torch

from kedit_fast.basics import checks
from kedit_fast.basics.files import write_text
from kedit_fast.basics.words import counted
from kedit_fast.commands.inputs import chat_of, open_lm, read_chain, read_text
from kedit_fast.commands.outputs import check_outputs, say, say_written, write_reports
from kedit_fast.gating import Suite, Thresholds, draft_suite, gate, load_suite
from kedit_fast.gating.judge import MODEL_DTYPE
from kedit_fast.gating.questions import Sizes, missing

_WRITTEN = {"model": MODEL_DTYPE, "none": None} | {name: getattr(torch, name) for name in checks.DTYPES.values()}
_FEWER = {  # a check with too few probes: the option that asks for fewer
    "wordings answered": "--min-probes", "generalization": "--min-paraphrases", "specificity drop": "--min-specificity",
}  # fmt: skip
REFUSED = 1  # exit status of an edit that fails a check; errors have another


def run(args) -> int:
    """Judges the edits of ``args``, prints the table, writes the reports; 0, or 1 where the edit is refused."""
    report, page, draft = check_outputs(args, "output", "html", "init")
    edits = read_chain(args.edits)
    if draft:
        return _init(args, edits, draft)
    suite = load_suite(*args.suite, skip_bad=args.skip_bad) if args.suite else Suite()
    if args.text is not None:
        suite = replace(suite, text=(read_text(args.text),))
    limits, chat = _thresholds(args), chat_of(args) or None
    lm = open_lm(args)
    found = gate(
        lm,
        edits,
        suite,
        thresholds=limits,
        written=_WRITTEN[args.written],
        requantize=args.requantize,
        group=args.group,
        builtin=not args.no_builtin,
        sizes=Sizes(max_new_tokens=args.generate, context_tokens=args.context),
        chat=chat,
    )
    written = write_reports((report, found.save), (page, found.to_html))
    say(str(found))
    say_written(written)
    if lacking := [_FEWER[check.name] for check in found.failed if check.n < check.required and check.name in _FEWER]:
        drafted = f"`kedit-fast gate {' '.join(args.edits)} --init suite.json` writes a suite to complete for --suite"
        add = f"complete {' or '.join(args.suite)}" if args.suite else drafted
        say(f"to add probes: {add}; to do with fewer: {', '.join(dict.fromkeys(lacking))}")
    return 0 if found.passed else REFUSED


def _init(args, edits, path) -> int:
    """Writes a suite to complete and says what is missing from it."""
    for option in ("suite", "output", "html"):
        if getattr(args, option):
            raise ValueError(f"--init judges nothing, so --{option} has no place beside it; give one of them")
    limits, suite = _thresholds(args), draft_suite(edits)
    text = json.dumps(suite, indent=1, ensure_ascii=False) + "\n"
    say_written(write_reports((path, lambda to: write_text(to, text))))
    n_facts = counted(len(suite["facts"]), "fact")
    say(f"{n_facts}; complete the lists (python -m pydoc kedit_fast.load_suite says what they mean)")
    for sentence in missing(edits, limits, builtin=not args.no_builtin):
        say(sentence)
    if not args.no_builtin:
        say("prompts that must keep their answer are filled up with this package's own facts, but for --no-builtin")
    return 0


def _thresholds(args) -> Thresholds:
    """Of the file, with the options that are given in their place."""
    limits = Thresholds.from_json(args.thresholds) if args.thresholds else Thresholds()
    given = {each.name: getattr(args, each.name, None) for each in fields(Thresholds)}
    return replace(limits, **{name: value for name, value in given.items() if value is not None})
