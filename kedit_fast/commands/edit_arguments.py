"""The arguments of ``kedit-fast edit | merge | history`` and of what they do with edits that are there; torch-free."""

from argparse import ArgumentTypeError

from kedit_fast.basics import catalog
from kedit_fast.commands.argument_types import count, layers, path, positive, size
from kedit_fast.commands.parser import (
    EDIT,
    command,
    edits_argument,
    ending,
    fact_options,
    group,
    machine_options,
    output,
    signed,
)

METHODS = tuple(catalog.EDITORS)


def add_edits(commands) -> None:
    """Declares ``edit``, ``edit inspect`` and ``edit diff``."""
    for add in (_edit, _inspect, _diff):
        add(commands)


def add_merges(commands) -> None:
    """Declares ``merge`` and ``merge undo``."""
    for add in (_merge, _undo):
        add(commands)


def add_history(commands) -> None:
    """Declares ``history add``, ``history log`` and ``history rollback``."""
    for add in (_add, _log, _rollback):
        add(commands)
    group(commands, "history", "Versions of edits: what was in force when, and back to it.")


def _edit(commands) -> None:
    parser = command(
        commands,
        "edit",
        "make an edit file that rewrites facts",
        "Computes how the model's weights must change to say new answers, by ROME (one fact), MEMIT or AlphaEdit\n"
        "(many at once) or fine-tuning (to compare with), and writes that change to a file. The model itself stays\n"
        "as it is.",
        'kedit-fast edit --prompt "{} is in the city of" --subject "The Eiffel Tower" --target Rome',
        also="with edits that are there: kedit-fast edit inspect --help, kedit-fast edit diff --help",
    )
    fact_options(parser, targets=True)
    how = parser.add_argument_group("how to edit")
    how.add_argument("--method", choices=METHODS, default="memit", help=f"{', '.join(METHODS)} (default: memit)")
    how.add_argument("--layers", type=layers, metavar="L", help="for instance 3-7 (default: published or derived)")
    how.add_argument("--hparams", type=path, metavar="FILE", help="a published hyper-parameter file (.json, .yaml)")
    how.add_argument(
        "--stats", type=path, metavar="DIR", help="folder of statistics, of `kedit-fast stats` or published .npz files"
    )
    how.add_argument("--corpus", type=path, help="text to measure statistics on, without --stats (default: self)")
    how.add_argument("--tokens", type=positive, metavar="N", help="tokens of it (default: 8 d_ff)")
    how.add_argument(
        "--on-top-of",
        type=path,
        action="append",
        metavar="EDIT",
        help=f"what this edit is made on top of: {EDIT}; again for more",
    )
    how.add_argument(
        "--independent", action="store_true", help="each fact as an edit of its own that sees no other, all at once"
    )
    how.add_argument(
        "--checkpoint",
        type=path,
        metavar="DIR",
        help="keep finished parts there; the same command goes on after an interruption",
    )
    how.add_argument(
        "--strict", action="store_true", help="exit status 1 where the edited model does not say a fact's new answer"
    )
    output(parser, "FILE", "the edit (default: edit.safetensors)", "edit.safetensors")
    machine_options(parser)


def _merge(commands) -> None:
    parser = command(
        commands,
        "merge",
        "write an edit into a copy of a model, or make an adapter of it",
        "An edit file changes no model by itself. This command writes it into a copy of a model's folder, which any\n"
        "program can then load; the folder keeps what it takes to undo it. The model is never in memory as a whole.\n"
        "With --peft it makes a LoRA adapter instead, a small folder to load beside the unchanged model.",
        "kedit-fast merge edit.safetensors --model ./llama -o ./llama-edited",
        also="to take the edit out again: kedit-fast merge undo --help",
        takes="EDIT ...",
    )
    edits_argument(parser)
    parser.add_argument(
        "--model",
        type=path,
        metavar="FOLDER",
        help="the model's folder with its safetensors files (save_pretrained writes one), or 'smollm2'; "
        "with --peft only its name is written: a hub id, or the folder's full path",
    )
    parser.add_argument(
        "-o", "--output", type=path, required=True, metavar="DIR", help="the folder to make, new or empty"
    )
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
    signed(parser)
    ending(parser)


def _inspect(commands) -> None:
    parser = command(
        commands,
        "edit inspect",
        "what an edit holds",
        "Shows how an edit was made, which facts it writes, and how much it changes in which layers.",
        "kedit-fast edit inspect edit.safetensors",
        takes="EDIT ...",
    )
    edits_argument(parser)
    parser.add_argument(
        "--model", type=path, default=None, metavar="MODEL", help="compare the changes with this model's weights"
    )
    parser.add_argument("--memory", type=size, metavar="SIZE", help="bytes to use with --model, for instance 8GB")
    ending(parser)


def _diff(commands) -> None:
    parser = command(
        commands,
        "edit diff",
        "how two edits differ",
        "Compares facts, settings and, layer by layer, the changes themselves. Cosine 1: the same direction.",
        "kedit-fast edit diff old.safetensors new.safetensors",
        takes="EDIT EDIT",
    )
    parser.add_argument("edits", nargs=2, type=path, metavar="EDIT", help=EDIT)
    ending(parser)


def _undo(commands) -> None:
    parser = command(
        commands,
        "merge undo",
        "take a merged edit out of a model's folder",
        "Restores, bit for bit, the folder that `kedit-fast merge` was given. Checks first that nothing else has\n"
        "changed the weights since.",
        "kedit-fast merge undo ./llama-edited",
        takes="FOLDER",
    )
    parser.add_argument("folder", type=path, metavar="FOLDER", help="a folder that `kedit-fast merge` wrote")
    parser.add_argument(
        "-o",
        "--output",
        type=path,
        default=None,
        metavar="DIR",
        help="the restored model, a new folder (default: in place)",
    )
    ending(parser)


def _log(commands) -> None:
    parser = command(
        commands,
        "history log",
        "the versions of a folder of edits",
        "Lists what was in force when, and who changed it.",
        "kedit-fast history log ./edits",
        takes="FOLDER",
    )
    _history(parser)
    ending(parser)


def _add(commands) -> None:
    parser = command(
        commands,
        "history add",
        "add an edit to a folder of versions",
        "Makes a new version: the edits in force and this one on top. The folder is made if it is not there.\n"
        "Of several edits each is a version.",
        'kedit-fast history add ./edits edit.safetensors -m "new capital"',
        takes="FOLDER EDIT ...",
    )
    _history(parser)
    edits_argument(parser)
    parser.add_argument("--force", action="store_true", help="also an edit that was not made on top of those in force")
    signed(parser)
    ending(parser)


def _rollback(commands) -> None:
    parser = command(
        commands,
        "history rollback",
        "bring an earlier version back",
        "Makes a new version with the edits of an earlier one; 0 is the model without edits. Nothing is lost: the\n"
        "versions between stay, and can be brought back in the same way.",
        "kedit-fast history rollback ./edits 1",
        takes="FOLDER N",
    )
    _history(parser)
    parser.add_argument("number", type=count, metavar="N", help="the version to bring back")
    signed(parser)
    ending(parser)


def _history(parser) -> None:
    parser.add_argument("folder", type=path, metavar="FOLDER", help="a folder of versions")


def _rank(text: str) -> int | None:
    try:
        return None if text == "none" else positive(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}, or none") from None
