"""``kedit-fast merge undo``: a merged edit out of a model's folder again."""

import os

from kedit_fast.basics.files import existing_folder
from kedit_fast.basics.words import counted
from kedit_fast.commands.outputs import say
from kedit_fast.shipping.unmerge import read_manifest, unmerge


def run(args) -> None:
    """Restores the folder and says what was taken out."""
    folder = existing_folder(os.path.expanduser(args.folder), "a folder that `kedit-fast merge` wrote")
    record = read_manifest(folder)
    restored = unmerge(folder, args.output if args.output is None else os.path.expanduser(args.output))
    facts = sum(len(edit["facts"]) for edit in record["edits"])
    tensors = counted(len(record["tensors"]), "tensor")
    say(f"{restored}: {tensors} restored bit for bit, {counted(facts, 'fact')} taken out")
    say(f"this is model {record['base']['fingerprint']} again")
