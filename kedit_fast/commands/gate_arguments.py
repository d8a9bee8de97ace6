"""The arguments of ``kedit-fast gate``; torch-free."""

from kedit_fast.commands.argument_types import path, positive, share
from kedit_fast.commands.parser import add_skip_bad, edits_argument

# Written out, as the class of thresholds loads torch; a test holds the two together.
_THRESHOLDS = (
    "a .json object with limits: measure, confident, min_answered, min_probes, min_generalization, min_paraphrases, "
    "max_specificity_drop, min_specificity_prompts, max_perplexity_drift, min_text_tokens, min_other_form, "
    "min_portability, max_leak, max_leak_doubt, max_leak_context, max_leak_language, min_retention, policy (what each "
    "means: python -m pydoc kedit_fast.Thresholds); options below come before it"
)
DTYPES = ("model", "float32", "bfloat16", "float16", "float64", "none")


def add_gate_arguments(parser) -> None:
    """Declares what ``gate`` has of its own."""
    edits_argument(parser, more=", of which the last is new")
    parser.add_argument(
        "--suite",
        type=path,
        action="append",
        metavar="FILE",
        help="what to ask: a suite (its format: python -m pydoc kedit_fast.load_suite), or a fact file such as "
        "CounterFact; again for more (default: what the edits' facts carry)",
    )
    parser.add_argument(
        "--text",
        type=path,
        metavar="FILE",
        help='a text file to measure perplexity on (default: the suite\'s "text", which replaces the built-in one)',
    )
    parser.add_argument(
        "--no-builtin", action="store_true", help="do not fill up the specificity prompts with this package's facts"
    )
    parser.add_argument(
        "--init",
        type=path,
        metavar="FILE",
        help="judge nothing: write a suite with the edits' facts and probes, to be completed, and say what is missing",
    )
    add_skip_bad(parser)
    parser.add_argument("--html", type=path, metavar="FILE", help="the report as a page")
    _form_options(parser.add_argument_group("the form that is judged"))
    _limit_options(parser.add_argument_group("limits (shares: 0.9, not 90)"))


def _form_options(group) -> None:
    group.add_argument(
        "--written",
        choices=DTYPES,
        default="model",
        metavar="DTYPE",
        help="the dtype that the edit is written in (default: the model's); none: it stays an adapter",
    )
    group.add_argument(
        "--requantize", choices=("int8", "int4"), help="judge it again with the edited layers quantized after the edit"
    )
    group.add_argument("--group", type=positive, default=128, metavar="N", help="weights that share a scale (128)")
    group.add_argument("--generate", type=positive, default=16, metavar="N", help="tokens to write a prompt (16)")
    group.add_argument(
        "--context",
        type=positive,
        default=1_000,
        metavar="N",
        help="tokens of the long context (1000); fewer, with a note, where the model does not read so many",
    )


def _limit_options(group) -> None:
    group.add_argument("--thresholds", type=path, metavar="FILE", help=_THRESHOLDS)
    group.add_argument(
        "--measure",
        choices=("generated", "exact", "success"),
        help="when a wording counts as answered: the text written on says the new answer and not the old one; every "
        "token of it is the likeliest; or it is likelier than the old one (default: generated)",
    )
    group.add_argument(
        "--confident", action="store_true", default=None, help="the 95 %% interval's worse end must meet the limit"
    )
    for option, kind, metavar, text in (
        ("--min-answered", share, "SHARE", "of all wordings of the facts (0.9)"),
        ("--min-probes", positive, "N", "wordings there must be (50)"),
        ("--min-generalization", share, "SHARE", "of the paraphrases (0.85)"),
        ("--min-paraphrases", positive, "N", "paraphrases there must be (30)"),
        ("--max-drop", share, "SHARE", "of other prompts that lose their answer (0.02)"),
        ("--min-specificity", positive, "N", "other prompts there must be (500)"),
        ("--max-drift", share, "SHARE", "by which perplexity may rise (0.005)"),
    ):
        group.add_argument(option, type=kind, metavar=metavar, help=text)
