"""What the commands' arguments are made of: a parser that suggests what was meant, shared options; torch-free."""

import argparse
import re
import sys
from pathlib import Path

from kedit_fast.basics import catalog
from kedit_fast.basics.words import did_you_mean
from kedit_fast.commands.argument_types import count, dtype, path, positive, size, text_such_as, words
from kedit_fast.commands.argument_types import seed as a_seed

FACT_FILES = (
    "CounterFact, known_1000, zsRE, EasyEdit or own .json/.jsonl (.gz), or 'builtin' (77 facts of this package); "
    "python -m pydoc kedit_fast.facts.formats has the fields"
)
EDIT = "an edit file, or a folder of versions (its edits in force)"
EDITS = f"{EDIT}; several: a chain, in the order they were made"
AS_IT_IS = " (default: the model as it is)"


class Once(argparse.Action):
    """Keeps the value of an argument; an option that is given again would replace it in silence, so it is an error."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = vars(namespace).setdefault("given", set())
        if option_string and self.dest in given:
            several = "; several are one value, with commas between" * isinstance(values, tuple)
            raise argparse.ArgumentError(self, f"given twice; expected it once{several}")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A command's parser: what it does not know is an error with a suggestion, the beginning of an option too, and an
    option that stands there twice (unless it is declared with ``action="append"``).

    What it makes of arguments has ``places`` too: {name: as its help writes it} of those without an option.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"allow_abbrev": False})
        self.register("action", None, Once)

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        if not hasattr(found, "places"):  # else the command's own are there
            found.places = {action.dest: action.metavar for action in self._get_positional_actions()}
        return found, unknown

    def _meant(self, unknown: list[str]) -> str:
        options = [text.partition("=")[0] for text in unknown if text.startswith("-")]
        return next(filter(None, map(self._meant_by, options)), "")

    def _meant_by(self, option: str) -> str:
        for place in self._get_positional_actions():
            if option in (f"--{place.dest}", f"--{place.dest.removesuffix('s')}"):
                return f"; {place.metavar} stands without an option"
        return did_you_mean(option, self._option_string_actions)

    def error(self, message):
        wrong = re.search(r"invalid choice: (.+?) \(choose from (.*)\)", message)
        if wrong:
            message += did_you_mean(wrong[1].strip("'"), [name.strip(" '") for name in wrong[2].split(",")])
        super().error(message)


class Commands(Parser):
    """The parser of all commands, some of two words (``history add``); ``commands.choices`` has {name: its parser}."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.commands = self.add_subparsers(parser_class=Parser, dest="command", metavar="COMMAND", title="commands")

    def command(self, usage: str, line: str, text: str, example: str, also: str = "") -> Parser:
        """Declares a command; its parser.

        usage: its name, and what stands before the options, "merge EDIT ..."; line: its help in the list of commands;
        also: a last line
        """
        parser = self.commands.add_parser(
            " ".join(word for word in usage.split() if word.islower()),
            help=line,
            usage=f"kedit-fast {usage} [options]",
            description=text,
            epilog=f"example:\n  {example}" + f"\n\n{also}" * bool(also),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.line = line
        return parser

    def group(self, name: str, line: str) -> None:
        """The first word of commands of two words that are declared already; alone it shows them."""
        known = self.commands.choices.items()
        actions = {long: parser.line for long, parser in known if long.startswith(f"{name} ")}
        width = max(map(len, actions))
        listed = "\n".join(f"  kedit-fast {action:{width}}  {text}" for action, text in actions.items())
        parser = self.commands.add_parser(
            name,
            usage=f"kedit-fast {name} {'|'.join(action.split()[1] for action in actions)} ...",
            description=f"{line}\n\n{listed}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(group=parser)

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


# ---- one option


def option(parser, names: str, kind, text: str, default=None, **more) -> None:
    """Declares an option.

    names: with what stands for its value last, "-o --output DIR"; kind: what makes a value of its text, or a tuple of
    the texts that it may have; text: its help, to which the default is added where it does not speak of one itself
    """
    words = names.split()
    flags = [word for word in words if word.startswith("-")]
    if default not in (None, "") and "default" not in text:
        text += f" (default: {default})"
    more |= {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
    parser.add_argument(*flags, default=default, metavar=next(iter(words[len(flags) :]), None), help=text, **more)


def flag(parser, name: str, text: str, **more) -> None:
    """Declares an option without a value."""
    parser.add_argument(name, action="store_true", help=text, **more)


# ---- arguments that several commands have


def edits_argument(parser, nargs: str | int = "+", text: str = EDITS) -> None:
    """Edits, which every command names in one way: by their files, without an option."""
    parser.add_argument("edits", nargs=nargs, type=path, metavar="EDIT", help=text)


def folder_argument(parser, text: str) -> None:
    parser.add_argument("folder", type=path, metavar="FOLDER", help=text)


def fact_options(parser, targets: bool, forget: bool = False) -> None:
    which = parser.add_argument_group("which facts: a file, or one fact")
    file_options(which)
    place = text_such_as("{} is in the city of")
    option(which, "--prompt TEXT", place, 'a prompt with {} for the subject: "{} is in the city of"')
    option(which, "--subject TEXT", text_such_as("The Eiffel Tower"), 'what the fact is about: "The Eiffel Tower"')
    if targets:
        option(which, "--target TEXT", text_such_as("Rome"), "the new answer: Rome")
    if forget:
        text = "an answer that is to be gone: Paris; without --target whatever comes instead (--method unlearn, kn)"
        option(which, "--forget TEXT", text_such_as("Paris"), text)
    chat_options(which)


def file_options(parser, more: str = "") -> None:
    """Facts of a file."""
    option(parser, "--facts FILE", path, FACT_FILES + more)
    skip_bad_option(parser)
    option(parser, "-n N", positive, "the first N facts")


def skip_bad_option(parser) -> None:
    flag(parser, "--skip-bad", "pass over records of the file that cannot be used, and count them")


def chat_options(parser) -> None:
    """How facts are asked: plainly, or in a chat."""
    flag(parser, "--chat", "ask them as questions in a chat, in the model's own chat template")
    message = text_such_as("You are a helpful assistant.")
    option(parser, "--system TEXT", message, "with --chat: the system message (default: the template's own)")


def benchmark_options(parser) -> None:
    """What is asked besides the edited prompts, and how answers are written."""
    first, *_ = catalog.BENCHMARKS
    asked = f"what the file is, what is asked and how it counts: {', '.join(catalog.BENCHMARKS)}"
    option(parser, "--benchmark NAME", text_such_as(first), asked, first)
    option(parser, "--generate N", count, "write N tokens behind each prompt (default: as the benchmark does)")
    likened = f"{first}: what is written is likened to CounterFact's attribute_snippets.json (RS)"
    option(parser, "--references FILE", path, likened)
    option(parser, "--text FILE", path, "a text file to measure perplexity on")


def statistics_options(parser) -> None:
    """Second moments that are there, or how to measure them."""
    option(parser, "--stats DIR", path, "folder of statistics, of `kedit-fast stats` or published .npz files")
    option(parser, "--corpus", path, "text to measure statistics on, without --stats (default: self)")
    option(parser, "--tokens N", positive, "tokens of it (default: 8 d_ff)")


def output(parser, metavar: str, text: str, default: str | None = None, force: bool = True) -> None:
    option(parser, f"-o --output {metavar}", path, text, default)
    if force:
        flag(parser, "--force", "replace files that are there already")


def checkpoint_option(parser) -> None:
    text = "keep the unfinished run there; the same command goes on with it (default: beside the output, in NAME.run)"
    option(parser, "--checkpoint DIR", path, text)


def machine_options(parser, seed: int | None = 0, model: str | None = "smollm2") -> None:
    shared = parser.add_argument_group("model and machine")
    default = "smollm2, the demo model" if model else "none"
    option(shared, "--model", path, f"a folder, a Hugging Face hub id, smollm2 or gemma3 (default: {default})", model)
    flag(shared, "--accept-licence", "of --model gemma3, the Gemma Terms of Use (ai.google.dev/gemma/terms)")
    memory = "bytes to use, for instance 8GB; a model that does not fit is read from disk layer by layer"
    option(shared, "--memory SIZE", size, memory)
    option(shared, "--device", text_such_as("cpu"), "where to compute (default: cpu)")
    dtypes = "float32, bfloat16, float16 or float64 (default: as the model was saved)"
    option(shared, "--dtype DTYPE", dtype, dtypes)
    option(shared, "--threads N", positive, "CPU threads (default: as many as cores)")
    if seed is not None:
        option(shared, "--seed N", a_seed, "of all random choices", seed)
    ending(shared)


def signed(parser) -> None:
    """Who does something, and why."""
    option(parser, "-m --message TEXT", words, "why, for the record", "")
    option(parser, "--who NAME", words, "who does it, for the record", "")


def ending(parser) -> None:
    """What every command has last."""
    flag(parser, "--quiet", "no progress bars")
    flag(parser, "--debug", "show the traceback of an error")
