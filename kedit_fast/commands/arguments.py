"""The arguments of ``kedit-fast merge`` and of what ``kedit-fast edit`` does with edits that are there; torch-free."""

import argparse


def add_merge(commands) -> None:
    """Declares ``merge``."""
    parser = _parser(
        commands,
        "merge",
        "write an edit into a copy of a model, or make an adapter of it",
        "An edit file changes no model by itself. This command writes it into a copy of a model's folder, which any\n"
        "program can then load; the folder keeps what it takes to undo it. The model is never in memory as a whole.\n"
        "With --peft it makes a LoRA adapter instead, a small folder to load beside the unchanged model.",
        "kedit-fast merge --model ./llama --edit edit.safetensors -o ./llama-edited",
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="the model's folder with its safetensors files (save_pretrained writes one), or 'smollm2'; "
        "with --peft only its name is written: a hub id, or the folder's full path",
    )
    parser.add_argument(
        "--edit",
        action="append",
        required=True,
        metavar="FILE",
        help="an edit file, or a folder of versions (its current edits); several, in the order they were made",
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to make, new or empty")
    parser.add_argument("--peft", action="store_true", help="make a LoRA adapter; the model stays as it is")
    parser.add_argument(
        "--max-rank",
        type=_rank,
        default=512,
        metavar="N",
        help="with --peft: the largest rank that your loader accepts, or 'none' (default: 512, vLLM's limit)",
    )
    parser.add_argument(
        "--truncate", action="store_true", help="with --peft: cut larger ranks to it; the error is shown"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="also for another model than the edit was made for, or (not with --peft) edits out of their chain",
    )
    _signed(parser)
    _ending(parser)


def add_edit_actions(parser) -> None:
    """Declares inspect, diff, undo, log, add and rollback under the parser of ``edit``."""
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", title="with edits that are there already", prog="kedit-fast edit"
    )
    for add in (_inspect, _diff, _undo, _log, _add, _rollback):
        action = add(actions)
        action.set_defaults(handler="kedit_fast.commands.edits")
        _ending(action)


def _inspect(actions):
    parser = _parser(
        actions,
        "edit inspect",
        "what an edit file holds",
        "Shows how an edit was made, which facts it writes, and how much it changes in which layers.",
        "kedit-fast edit inspect edit.safetensors",
    )
    parser.add_argument("file", metavar="FILE", help="an edit file")
    parser.add_argument("--model", default=None, metavar="MODEL", help="compare the changes with this model's weights")
    parser.add_argument("--memory", metavar="SIZE", help="bytes to use with --model, for instance 8GB")
    return parser


def _diff(actions):
    parser = _parser(
        actions,
        "edit diff",
        "how two edit files differ",
        "Compares facts, settings and, layer by layer, the changes themselves. Cosine 1: the same direction.",
        "kedit-fast edit diff old.safetensors new.safetensors",
    )
    parser.add_argument("a", metavar="A", help="an edit file")
    parser.add_argument("b", metavar="B", help="another")
    return parser


def _undo(actions):
    parser = _parser(
        actions,
        "edit undo",
        "take a merged edit out of a model's folder",
        "Restores, bit for bit, the folder that `kedit-fast merge` was given. Checks first that nothing else has\n"
        "changed the weights since.",
        "kedit-fast edit undo ./llama-edited",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder that `kedit-fast merge` wrote")
    parser.add_argument(
        "-o", "--output", default=None, metavar="DIR", help="the restored model, a new folder (default: in place)"
    )
    return parser


def _log(actions):
    parser = _parser(
        actions,
        "edit log",
        "the versions of a folder of edits",
        "Lists what was in force when, and who changed it.",
        "kedit-fast edit log ./edits",
    )
    _history(parser)
    return parser


def _add(actions):
    parser = _parser(
        actions,
        "edit add",
        "add an edit to a folder of versions",
        "Makes a new version: the edits in force and this one on top. The folder is made if it is not there.",
        'kedit-fast edit add ./edits edit.safetensors -m "new capital"',
    )
    _history(parser)
    parser.add_argument("file", metavar="FILE", help="an edit file")
    parser.add_argument("--force", action="store_true", help="also an edit that was not made on top of those in force")
    _signed(parser)
    return parser


def _rollback(actions):
    parser = _parser(
        actions,
        "edit rollback",
        "bring an earlier version back",
        "Makes a new version with the edits of an earlier one; 0 is the model without edits. Nothing is lost: the\n"
        "versions between stay, and can be brought back in the same way.",
        "kedit-fast edit rollback ./edits 1",
    )
    _history(parser)
    parser.add_argument("number", type=int, metavar="N", help="the version to bring back")
    _signed(parser)
    return parser


def _parser(commands, name: str, line: str, text: str, example: str):
    return commands.add_parser(
        name.rpartition(" ")[2],
        help=line,
        usage=f"kedit-fast {name} [options]",
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _history(parser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a folder of versions")


def _signed(parser) -> None:
    parser.add_argument("-m", "--message", default="", metavar="TEXT", help="why, for the record")
    parser.add_argument("--who", default="", metavar="NAME", help="who does it, for the record")


def _ending(parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _rank(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1, or none")
    return int(text)
