"""The command line: ``kedit-fast demo | trace | stats | edit | eval | gate | rounds | layers | merge | ...``.

This file reads arguments and turns errors into lines. Each command lives in a module with a ``run(args)`` that is
imported when its command is called, so that ``--help`` and a mistyped option cost no import of torch.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from functools import partial
from importlib import import_module

from kedit_fast import __version__
from kedit_fast.basics.printing import STDOUT, any_encoding, escaped
from kedit_fast.basics.progress import show_progress
from kedit_fast.basics.settings import Launch, launch
from kedit_fast.basics.words import is_out_of_memory
from kedit_fast.commands import arguments, edit_arguments, tool_arguments
from kedit_fast.commands.parser import Commands

# In the order of --help: {command: (what declares its arguments, the module here whose ``run`` does it, or the function
# of a module that has several)}.
COMMANDS: dict[str, tuple[Callable, str]] = {
    "demo": (arguments.add_demo, "demo"),
    "trace": (arguments.add_trace, "trace"),
    "neurons": (arguments.add_neurons, "neurons"),
    "stats": (arguments.add_stats, "stats"),
    "edit": (edit_arguments.add_edit, "edit"),
    "edit inspect": (edit_arguments.add_inspect, "edits.inspect"),
    "edit diff": (edit_arguments.add_diff, "edits.diff"),
    "edit only": (edit_arguments.add_only, "edits.only"),
    "edit without": (edit_arguments.add_without, "edits.without"),
    "train": (edit_arguments.add_train, "train"),
    "eval": (arguments.add_eval, "eval"),
    "summary": (arguments.add_summary, "summary"),
    "compare": (edit_arguments.add_compare, "compare"),
    "capability": (arguments.add_capability, "capability"),
    "forgotten": (edit_arguments.add_forgotten, "forgotten"),
    "implied": (edit_arguments.add_implied, "implied"),
    "generate": (arguments.add_generate, "generate"),
    "gate": (arguments.add_gate, "gate"),
    "rounds": (arguments.add_rounds, "rounds"),
    "layers": (arguments.add_layers, "layers"),
    "merge": (edit_arguments.add_merge, "merge"),
    "merge undo": (edit_arguments.add_undo, "merge.undo"),
    "history add": (edit_arguments.add_version, "history.add"),
    "history log": (edit_arguments.add_log, "history.log"),
    "history rollback": (edit_arguments.add_rollback, "history.rollback"),
    "info": (tool_arguments.add_info, "info"),
    "completion": (tool_arguments.add_completion, "completion"),
}
SHARING = (
    "trace",
    "neurons",
    "stats",
    "edit",
    "eval",
    "compare",
    "capability",
    "generate",
    "gate",
    "rounds",
    "layers",
)  # commands that ranks share
FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # exit statuses; the last two as a shell gives them


def main(argv=None) -> int:
    """Runs one command; its exit status: 0, 1 where a gate refuses an edit or --strict finds facts not written, 2
    after an error (one line on stderr) and where no command is given (help), 130 after Ctrl-C, 141 where nobody reads
    what it prints.

    Of the processes that a launcher started (torchrun) the first one speaks and writes; all have the same status.
    An error that is a fault of this package is raised as it is, and with ``--debug`` every error.
    """
    place = launch()
    with silent() if place is not None and place.rank else nullcontext():
        return _main(argv, place)


def _main(argv, place: Launch | None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command not in COMMANDS:  # no command, or the first word of several
        getattr(args, "group", parser).print_help()
        return FAILED
    open_stderr()
    if sys.stdout is None:
        return say_error("error: standard output is closed; nothing was done", PIPE_CLOSED)
    with warnings.catch_warnings(), show_progress(not args.quiet), any_encoding((sys.stdout, sys.stderr)):
        warnings.showwarning = partial(warning_line, args)
        try:
            status = _run(args) if place is None else _run_together(args, place)
            sys.stdout.flush()
        except KeyboardInterrupt as stopped:
            return say_error(": ".join(["interrupted", *filter(None, [str(stopped)])]), INTERRUPTED)
        except BrokenPipeError:  # `kedit-fast ... | head`: nobody reads on
            stop_printing()
            return PIPE_CLOSED
        except Exception as error:
            if getattr(error, "filename", None) == STDOUT:  # a full disk
                stop_printing()
            if args.debug or not is_the_users(error):
                raise
            # one that lost a companion may have lost the one that speaks
            return say_error(
                f"error: {told(error, args)}", FAILED, sys.__stderr__ if isinstance(error, ConnectionError) else None
            )
    return status or 0


def _run(args) -> int | None:
    module, _, function = COMMANDS[args.command][1].partition(".")
    return getattr(import_module(f"kedit_fast.commands.{module}"), function or "run")(args)


def _run_together(args, place: Launch) -> int | None:
    """Runs a command on all ranks, or, where it shares no work, on the first, for which the others wait."""
    from kedit_fast.basics import ranks

    with ranks.launched(place, getattr(args, "device", None)), ranks.joint():
        if args.command in SHARING and not getattr(args, "init", None):  # gate --init asks no model
            return _run(args)
        with ranks.alone():
            return _run(args) if place.rank == 0 else None


def build_parser() -> Commands:
    """The parser of all commands; ``args.command`` names the one that was called, None where none was."""
    parser = Commands(
        prog="kedit-fast",
        description="Find where a language model keeps a fact, rewrite it there, and see what else changed.",
        epilog="New here? Run `kedit-fast demo`. Each command explains itself: `kedit-fast trace --help`.",
    )
    parser.add_argument("--version", action="version", version=f"kedit-fast {__version__}")
    for add, _ in COMMANDS.values():
        add(parser)
    parser.group("history", "Versions of edits: what was in force when, and back to it.")
    return parser


# ---- what goes wrong


def is_the_users(error: Exception) -> bool:
    """Whether an error is of what was asked for or of the machine, and no fault of this package."""
    return isinstance(error, (ValueError, OSError, ImportError)) or is_out_of_memory(error)


def open_stderr() -> None:
    """Where stderr is closed, lines to it go nowhere: else the next file opened would be in its place."""
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")


@contextmanager
def silent():
    """Inside nothing that is printed is seen."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def stop_printing() -> None:
    """Has what is still to be printed go nowhere: the flush at exit must not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def told(error: Exception, args=None) -> str:
    """An error in words; the system's own as "file: what is wrong with it". See ``in_options``."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return in_options(str(error).strip() or type(error).__name__, args)


def in_options(text: str, args=None) -> str:
    """What a function says of its arguments, in options: one of ``args`` that the text begins with, or that it names as
    ``memory=``, is the option that it is here, or its place in the usage; of ``force=True (--force)`` the option."""
    known = vars(args) if args else {}
    text = re.sub(r"\b\w+=\w* \((--[a-z-]+( \w+)?)\)", r"\1", text)
    text = re.sub(r"\b(\w+)=(?=[\s,;:.)]|$)", lambda name: _option(name[1]) if name[1] in known else name[0], text)
    name = re.match(r"(\w+)( = | is empty)", text)
    if name is None or name[1] not in known:
        return text
    place = getattr(args, "places", {}).get(name[1])
    called = f"argument {place}:" if place else _option(name[1])
    return f"{called} {text[len(name[0]) :] if name[2] == ' = ' else text[len(name[1]) + 1 :]}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def say_error(text: str, status: int, file=None) -> int:
    """Says a line on stderr, unless told where; the exit status."""
    with suppress(OSError):  # nobody reads it
        print(f"kedit-fast: {escaped(text)}", file=file or sys.stderr)
    return status


def warning_line(args, message, category, filename, lineno, file=None, line=None):
    """A warning as a line on stderr, for ``warnings.showwarning``."""
    # The libraries' own notices to developers are not this user's.
    if not issubclass(category, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
        say_error(f"warning: {in_options(str(message), args)}", 0)


if __name__ == "__main__":
    sys.exit(main())
