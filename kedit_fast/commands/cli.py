"""The command line: ``kedit-fast demo | trace | stats | edit | eval | gate | rounds | layers | merge | ...``.

This file reads arguments and turns errors into lines. Each command lives in a module with a ``run(args)`` that is
imported when its command is called, so that ``--help`` and a mistyped option cost no import of torch.
"""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module

from kedit_fast import __version__
from kedit_fast.basics.printing import STDOUT, any_encoding
from kedit_fast.basics.progress import show_progress
from kedit_fast.commands import arguments, edit_arguments
from kedit_fast.commands.errors import is_the_users, open_stderr, say_error, stop_printing, told, warning_line
from kedit_fast.commands.parser import Commands

# In the order of --help: what declares its arguments, and {command: the module here whose ``run`` does it}.
COMMANDS: tuple[tuple[Callable, dict[str, str]], ...] = (
    (arguments.add_demo, {"demo": "demo"}),
    (arguments.add_trace, {"trace": "trace"}),
    (arguments.add_stats, {"stats": "stats"}),
    (edit_arguments.add_edit, {"edit": "edit"}),
    (edit_arguments.add_inspect, {"edit inspect": "edits"}),
    (edit_arguments.add_diff, {"edit diff": "edits"}),
    (arguments.add_eval, {"eval": "eval"}),
    (arguments.add_generate, {"generate": "generate"}),
    (arguments.add_gate, {"gate": "gate"}),
    (arguments.add_rounds, {"rounds": "rounds"}),
    (arguments.add_layers, {"layers": "layers"}),
    (edit_arguments.add_merge, {"merge": "merge"}),
    (edit_arguments.add_undo, {"merge undo": "undo"}),
    (edit_arguments.add_history, {"history add": "history", "history log": "history", "history rollback": "history"}),
    (arguments.add_info, {"info": "info"}),
)
HANDLERS = {name: f"kedit_fast.commands.{module}" for _, names in COMMANDS for name, module in names.items()}
FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # exit statuses; the last two as a shell gives them


def main(argv=None) -> int:
    """Runs one command; its exit status: 0, 1 where a gate refuses an edit or --strict finds facts not written, 2
    after an error (one line on stderr) and where no command is given (help), 130 after Ctrl-C, 141 where nobody reads
    what it prints.

    An error that is a fault of this package is raised as it is, and with ``--debug`` every error.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command not in HANDLERS:  # no command, or the first word of several
        getattr(args, "group", parser).print_help()
        return FAILED
    open_stderr()
    if sys.stdout is None:
        return say_error("error: standard output is closed; nothing was done", PIPE_CLOSED)
    with warnings.catch_warnings(), show_progress(not args.quiet), any_encoding((sys.stdout, sys.stderr)):
        warnings.showwarning = warning_line
        try:
            status = import_module(HANDLERS[args.command]).run(args)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return say_error("interrupted", INTERRUPTED)
        except BrokenPipeError:  # `kedit-fast ... | head`: nobody reads on
            stop_printing()
            return PIPE_CLOSED
        except Exception as error:
            if getattr(error, "filename", None) == STDOUT:  # a full disk
                stop_printing()
            if args.debug or not is_the_users(error):
                raise
            return say_error(f"error: {told(error, args)}", FAILED)
    return status or 0


def build_parser() -> Commands:
    """The parser of all commands; ``args.command`` names the one that was called, None where none was."""
    parser = Commands(
        prog="kedit-fast",
        description="Find where a language model keeps a fact, rewrite it there, and see what else changed.",
        epilog="New here? Run `kedit-fast demo`. Each command explains itself: `kedit-fast trace --help`.",
    )
    parser.add_argument("--version", action="version", version=f"kedit-fast {__version__}")
    adders = [add for add, _ in COMMANDS]
    parser.add_commands(adders, dest="command", metavar="COMMAND", title="commands")
    return parser


if __name__ == "__main__":
    sys.exit(main())
