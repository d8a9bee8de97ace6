"""``kedit-fast merge undo``: a merged edit out of a model's folder again."""

from pathlib import Path

from ..shipping.unmerge import read_manifest, unmerge
from .outputs import say


def run(args) -> None:
    """Restores the folder and says what was taken out."""
    folder = Path(args.folder).expanduser()
    record = read_manifest(folder)
    restored = unmerge(folder, args.output and Path(args.output).expanduser())
    facts = sum(len(edit["facts"]) for edit in record["edits"])
    say(f"{restored}: {len(record['tensors'])} tensors restored bit for bit, {facts} facts taken out")
    say(f"this is model {record['base']['fingerprint']} again")
