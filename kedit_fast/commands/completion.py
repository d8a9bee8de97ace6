"""``kedit-fast completion``: the script that has a shell complete commands, options and files, by the shtab package.

The script is made once and holds all words, so nothing of this package runs when a key is pressed.
"""

import argparse

from kedit_fast.commands.argument_types import path
from kedit_fast.commands.cli import build_parser
from kedit_fast.commands.outputs import say
from kedit_fast.commands.parser import Commands


def run(args) -> None:
    """Prints the script."""
    try:
        import shtab
    except ImportError:
        raise ImportError("completion needs the package `shtab`: pip install 'kedit-fast[completion]'") from None
    parser = with_second_words(build_parser())
    for command in every_parser(parser):
        command.description = getattr(command, "line", command.description)  # shells show one line of it
        for action in command._actions:
            if action.type is path:
                action.complete = shtab.FILE
    say(shtab.complete(parser, shell=args.shell))


def with_second_words(parser: Commands) -> Commands:
    """The parser with the second words of its commands ("history add") as subcommands of the first, as shells ask."""
    words = parser.commands
    lines = {action.dest: action.help for action in words._get_subactions()}
    for name in [name for name in words.choices if " " in name]:
        first, second = name.split()
        below = next((a for a in words.choices[first]._actions if isinstance(a, argparse._SubParsersAction)), None)
        below = below or words.choices[first].add_subparsers(metavar=f"{first.upper()}_COMMAND")
        below._name_parser_map[second] = words._name_parser_map.pop(name)
        below._choices_actions.append(below._ChoicesPseudoAction(second, (), lines[name]))
    words._choices_actions = [action for action in words._choices_actions if " " not in action.dest]
    for first in words.choices.keys() - {action.dest for action in words._choices_actions}:  # "history" has no line
        words._choices_actions.append(words._ChoicesPseudoAction(first, (), words.choices[first].description))
    return parser


def every_parser(parser: argparse.ArgumentParser):
    """A parser and those of its subcommands, all the way down."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from every_parser(below)
