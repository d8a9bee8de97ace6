"""Wrong values of every command line option, by what the option is made of."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from kedit_fast.commands import argument_types as types
from kedit_fast.commands.cli import build_parser
from tests.hostile.judge import Case, command

DIGITS = "9" * 30
# By what an option's value is made by: texts that are none.
TEXTS = {
    types.positive: ("0", "-1", "1.5", "x", "", DIGITS, "nan", "1e400", "9" * 5_000),
    types.count: ("-1", "1.5", "x", "", DIGITS, "True"),
    types.seed: ("-1", "1.5", "a", "", DIGITS, "4294967296"),
    types.share: ("90", "-0.1", "nan", "x", "", "inf"),
    types.size: ("0", "-5", "8", "much", "1e400", "", "GB", "nan"),
    types.dtype: ("int8", "float8_e4m3fn", "", "x"),
    types.noise: ("t3", "s", "-1", "u-1", "nan", ""),
    types.path: ("", "  ", "a\0b"),
    types.layers: ("", "x", "5-3", "-1", "0-9999999999", "3:0", "1,,2", "1-2-3", "0-" + DIGITS, "10000"),
}
OTHERS = ("", "x\0", "no such thing")  # of choices and of lists of names


def _parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for name, parser in build_parser().commands.choices.items():
        if "group" not in parser._defaults:
            yield name, parser


def _texts_of(action: argparse.Action) -> tuple[str, ...]:
    """What this option must refuse; nothing for a switch, and for words that may be anything."""
    if action.nargs == 0 or action.type is types.words:
        return ()
    if action.type in TEXTS:
        return TEXTS[action.type]
    if action.choices is not None or "list_of" in getattr(action.type, "__qualname__", ""):
        return OTHERS
    name = getattr(action.type, "__qualname__", "")
    if "_rank" in name:
        return "0", "-1", "x", "", "1.5"
    return ("", "   ") if "option" in name else ()


def _rest(parser: argparse.ArgumentParser) -> list[str]:
    """What a command needs besides to be understood."""
    given = []
    for action in parser._actions:
        if not action.option_strings and action.nargs != "*":
            given += ["0" if action.type is types.count else "x"] * (
                action.nargs if isinstance(action.nargs, int) else 1
            )
        elif action.required and action.option_strings:
            given += [action.option_strings[0], "x"]
    return given


def cases(folder: Path) -> list[Case]:
    """Every option of every command with every text that it must refuse, before a model is loaded."""
    made = []
    for name, parser in _parsers():
        for action in parser._actions:
            for text in _texts_of(action) if action.option_strings else ():
                option = max(action.option_strings, key=len)
                argv = [name, *_rest(parser), f"{option}={text}"]
                made.append(Case(f"kedit-fast {name} {option}={text[:40]!r}", command(*argv)))
    return made


def unread(parsers=None) -> list[str]:
    """Options whose text nothing looks at: none of a kind, no choices."""
    return [
        f"{name} {action.option_strings[0]}"
        for name, parser in parsers or _parsers() for action in parser._actions
        if action.option_strings and action.nargs != 0 and action.type is None and action.choices is None
    ]  # fmt: skip
