"""What the commands' arguments are made of: a parser that suggests what was meant, shared options; torch-free."""

import argparse
import re
import sys
from pathlib import Path

from kedit_fast.commands.argument_types import did_you_mean, dtype, path, positive, size, text_such_as, words
from kedit_fast.commands.argument_types import seed as a_seed

FACT_FILES = (
    "CounterFact, known_1000, zsRE, EasyEdit or own .json/.jsonl (.gz), or 'builtin' (77 facts of this package); "
    "help(kedit_fast.fact_files) has the fields"
)
EDIT = "an edit file, or a folder of versions (its edits in force)"
EDITS = f"{EDIT}; several: a chain, in the order they were made"


class Parser(argparse.ArgumentParser):
    """A command's parser: what it does not know is an error with a suggestion, the beginning of an option too.

    What it makes of arguments has ``places`` too: {name: as its help writes it} of those without an option.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"allow_abbrev": False})

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        if not hasattr(found, "places"):  # else the command's own are there
            found.places = {action.dest: action.metavar for action in self._get_positional_actions()}
        return found, unknown

    def _meant(self, unknown: list[str]) -> str:
        options = [text.partition("=")[0] for text in unknown if text.startswith("-")]
        return next(filter(None, (did_you_mean(option, self._option_string_actions) for option in options)), "")

    def error(self, message):
        wrong = re.search(r"invalid choice: (.+?) \(choose from (.*)\)", message)
        if wrong:
            message += did_you_mean(wrong[1].strip("'"), [name.strip(" '") for name in wrong[2].split(",")])
        super().error(message)


class Commands(Parser):
    """The parser of all commands, some of two words (``history add``)."""

    def add_commands(self, adders, **options) -> None:
        """Declares the commands: each adder gets what ``add_subparsers`` gives."""
        self.commands = self.add_subparsers(parser_class=Parser, **options)
        for add in adders:
            add(self.commands)

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._one_word(args), namespace)

    def _one_word(self, args: list[str]) -> list[str]:
        """The arguments with a command of two words as one; an error for a second word that is nearly one."""
        known = [name for name in self.commands.choices if " " in name]
        if len(args) < 2 or args[0] not in {name.split()[0] for name in known}:
            return args
        if f"{args[0]} {args[1]}" in known:
            return [f"{args[0]} {args[1]}", *args[2:]]
        own = [name for name in known if name.startswith(f"{args[0]} ")]
        meant = did_you_mean(args[1], own) or did_you_mean(args[1], known)
        if meant and not args[1].startswith("-") and not Path(args[1]).exists():
            self.error(f"no command {args[0]} {args[1]}{meant}")
        return args


def command(commands, name: str, line: str, text: str, example: str, also: str = "", takes: str = "") -> Parser:
    """A command's parser.

    line: its help in the list of commands; takes: what stands before the options in its usage; also: a last line
    """
    parser = commands.add_parser(
        name,
        help=line,
        usage=f"kedit-fast {name} {takes}{' ' * bool(takes)}[options]",
        description=text,
        epilog=f"example:\n  {example}" + f"\n\n{also}" * bool(also),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.line = line
    return parser


def group(commands, name: str, line: str) -> None:
    """The first word of commands of two words that are declared already; alone it shows them."""
    actions = {long: parser.line for long, parser in commands.choices.items() if long.startswith(f"{name} ")}
    width = max(map(len, actions))
    listed = "\n".join(f"  kedit-fast {action:{width}}  {text}" for action, text in actions.items())
    parser = commands.add_parser(
        name,
        usage=f"kedit-fast {name} {'|'.join(action.split()[1] for action in actions)} ...",
        description=f"{line}\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(group=parser)


# ---- arguments that several commands have


def edits_argument(parser, nargs: str = "+", more: str = "") -> None:
    """Edits, which every command names in one way: by their files, without an option."""
    parser.add_argument("edits", nargs=nargs, type=path, metavar="EDIT", help=EDITS + more)


def fact_options(parser, targets: bool) -> None:
    which = parser.add_argument_group("which facts: a file, or one fact")
    which.add_argument("--facts", type=path, metavar="FILE", help=FACT_FILES)
    add_skip_bad(which)
    which.add_argument("-n", type=positive, metavar="N", help="the first N facts of the file")
    which.add_argument(
        "--prompt",
        type=text_such_as("{} is in the city of"),
        metavar="TEXT",
        help='a prompt with {} for the subject: "{} is in the city of"',
    )
    which.add_argument(
        "--subject",
        type=text_such_as("The Eiffel Tower"),
        metavar="TEXT",
        help='what the fact is about: "The Eiffel Tower"',
    )
    if targets:
        which.add_argument("--target", type=text_such_as("Rome"), metavar="TEXT", help="the new answer: Rome")
    chat_options(which)


def add_skip_bad(parser) -> None:
    parser.add_argument(
        "--skip-bad", action="store_true", help="pass over records of the file that cannot be used, and count them"
    )


def chat_options(parser) -> None:
    """How facts are asked: plainly, or in a chat."""
    parser.add_argument(
        "--chat", action="store_true", help="ask them as questions in a chat, in the model's own chat template"
    )
    parser.add_argument(
        "--system",
        type=text_such_as("You are a helpful assistant."),
        metavar="TEXT",
        help="with --chat: the system message (default: the template's own)",
    )


def output(parser, metavar: str, text: str, default: str | None, force: bool = True) -> None:
    parser.add_argument("-o", "--output", type=path, default=default, metavar=metavar, help=text)
    if force:
        parser.add_argument("--force", action="store_true", help="replace files that are there already")


def machine_options(parser, seed: int | None = 0, model: str | None = "smollm2") -> None:
    shared = parser.add_argument_group("model and machine")
    default = "the demo model, SmolLM2-135M-Instruct" if model else "none"
    shared.add_argument(
        "--model", type=path, default=model, help=f"a folder, a Hugging Face hub id, or 'smollm2' (default: {default})"
    )
    shared.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="bytes to use, for instance 8GB; a model that does not fit is read from disk layer by layer",
    )
    shared.add_argument("--device", type=text_such_as("cpu"), help="where to compute (default: cpu)")
    shared.add_argument(
        "--dtype",
        type=dtype,
        metavar="DTYPE",
        help="float32, bfloat16, float16 or float64 (default: as the model was saved)",
    )
    shared.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: as many as cores)")
    if seed is not None:
        shared.add_argument(
            "--seed", type=a_seed, metavar="N", default=seed, help=f"of all random choices (default: {seed})"
        )
    shared.add_argument("--quiet", action="store_true", help="no progress bars")
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")


def signed(parser) -> None:
    """Who does something, and why."""
    parser.add_argument("-m", "--message", type=words, default="", metavar="TEXT", help="why, for the record")
    parser.add_argument("--who", type=words, default="", metavar="NAME", help="who does it, for the record")


def ending(parser) -> None:
    """What every command has last."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
