"""``kedit-fast gate``: may this edit ship?"""

from dataclasses import replace

import torch

from ..gating import Suite, Thresholds, gate, load_suite
from ..gating.judge import MODEL_DTYPE
from ..gating.questions import Sizes
from .inputs import open_lm, read_chain, read_text
from .outputs import EDITS, check_distinct, check_output, say, say_written, write_reports

_WRITTEN = {"model": MODEL_DTYPE, "none": None} | {
    name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")
}
REFUSED = 1  # exit status of an edit that fails a check; errors have another
# Options that stand in for a field of Thresholds, by the name of their argument.
OPTIONS = {
    "measure": "measure", "confident": "confident", "min_answered": "min_answered", "min_probes": "min_probes",
    "min_generalization": "min_generalization", "min_paraphrases": "min_paraphrases",
    "max_drop": "max_specificity_drop", "min_specificity": "min_specificity_prompts",
    "max_drift": "max_perplexity_drift",
}  # fmt: skip


def run(args) -> int:
    """Judges the edits of ``args``, prints the table, writes the reports; 0, or 1 where the edit is refused."""
    check_distinct(args, ["output", "html"], [EDITS, "suite", "text", "thresholds", "model"])
    report, page = (check_output(path, args.force) for path in (args.output, args.html))
    edits = read_chain(args.edits)
    suite = load_suite(*args.suite) if args.suite else Suite()
    if args.text is not None:
        suite = replace(suite, text=(read_text(args.text),))
    limits = _thresholds(args)
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
    )
    written = write_reports((report, found.to_json), (page, found.to_html))
    say(str(found))
    say_written(written)
    return 0 if found.passed else REFUSED


def _thresholds(args) -> Thresholds:
    """Of the file, with the options that are given in their place."""
    limits = Thresholds.from_json(args.thresholds) if args.thresholds else Thresholds()
    given = {field: getattr(args, option) for option, field in OPTIONS.items()}
    return replace(limits, **{field: value for field, value in given.items() if value is not None})
