"""The arguments of ``kedit-fast rounds`` and ``kedit-fast layers``; torch-free."""

from kedit_fast.basics.checks import whole
from kedit_fast.commands.argument_types import count, layers, names, option, path, positive, text_such_as

ROUNDS = (
    "rounds",
    "edit on and on: how many facts does a model bear?",
    "Edits facts in rounds, each on top of those before, and asks after each: do the new answers hold, and those of\n"
    "earlier rounds? Do similar subjects keep their own? How unlikely has ordinary text become, how far have the\n"
    "weights moved? Sequential ROME is known to collapse; AlphaEdit was made to withstand it. No model is changed.",
    "kedit-fast rounds --facts counterfact.json -n 100 --per-round 10 --method rome,memit --plot rounds.png",
)
LAYERS = (
    "layers",
    "at which layer does editing work, and is it where the trace points?",
    "Edits facts at one layer after the other, each fact as an edit of its own, and shows beside it the causal trace\n"
    "of the same facts. Where a fact is traced does not by itself predict where editing it works (Hase et al. 2023):\n"
    "here one sees how the two go together for one's own facts. No model is changed.",
    "kedit-fast layers --facts builtin -n 10 --layers 0-29:3 --plot layers.png",
)


def add_rounds_arguments(parser) -> None:
    """Declares what ``rounds`` has of its own."""
    parser.add_argument(
        "--method",
        type=names,
        default=("memit",),
        metavar="M,M",
        help="rome, memit, alphaedit, ...; several are shown in one picture (default: memit)",
    )
    parser.add_argument("--per-round", type=positive, default=10, metavar="N", help="facts a round (default: 10)")
    parser.add_argument(
        "--old", type=count, default=100, metavar="N", help="earlier facts asked again after each round (default: 100)"
    )
    parser.add_argument(
        "--text", type=path, metavar="FILE", help="a text file to measure perplexity on (default: built in)"
    )
    parser.add_argument(
        "--text-tokens",
        type=option(whole, least=2, like=5_120),  # the first predicts, the second is predicted
        default=5_120,
        metavar="N",
        help="tokens of it at most (default: 5120)",
    )
    parser.add_argument("--layers", type=layers, metavar="L", help="to edit, for instance 3-7 (default: the method's)")
    parser.add_argument(
        "--hparams", type=path, metavar="FILE", help="a published hyper-parameter file (.json, .yaml) of the one method"
    )
    _statistics(parser)
    parser.add_argument(
        "--log", type=path, metavar="FILE", help="a .jsonl file: a line for each round as soon as it is done"
    )
    parser.add_argument("--plot", type=path, metavar="FILE", help="the picture, as .png")


def add_layers_arguments(parser) -> None:
    """Declares what ``layers`` has of its own."""
    parser.add_argument(
        "--layers", type=layers, metavar="L", help="for instance 0-11, 3,5 or 0-29:3, every third (default: all)"
    )
    parser.add_argument(
        "--method",
        type=text_such_as("rome"),
        default="rome",
        metavar="M",
        help="rome, memit or alphaedit (default: rome)",
    )
    parser.add_argument(
        "--hparams", type=path, metavar="FILE", help="a published hyper-parameter file (.json, .yaml) of the method"
    )
    parser.add_argument(
        "--traces",
        type=path,
        metavar="FILE",
        help="traces.jsonl of these facts, as `kedit-fast trace` writes it (default: trace)",
    )
    parser.add_argument(
        "--samples", type=positive, default=10, metavar="N", help="noise draws of a trace (default: 10)"
    )
    _statistics(parser)
    parser.add_argument(
        "--log", type=path, metavar="FILE", help="a .jsonl file: a line for each layer as soon as it is done"
    )
    parser.add_argument("--plot", type=path, metavar="FILE", help="the picture, as .png")


def _statistics(parser) -> None:
    parser.add_argument("--stats", type=path, metavar="DIR", help="folder of statistics, as for `kedit-fast edit`")
    parser.add_argument("--corpus", type=path, help="text to measure statistics on, without --stats (default: self)")
    parser.add_argument("--tokens", type=positive, metavar="N", help="tokens of it (default: 8 d_ff)")
