"""``kedit-fast history add | log | rollback``: folders of versions of edits."""

import os

from kedit_fast.basics.files import existing_folder
from kedit_fast.basics.words import counted
from kedit_fast.commands.inputs import read_chain
from kedit_fast.commands.outputs import say, say_table
from kedit_fast.shipping.history import EditHistory


def log(args) -> None:
    """Says the versions of a folder, and what is in force."""
    folder = os.path.expanduser(args.folder)
    way_out = f"as `kedit-fast history add {folder} EDIT` makes it"
    history = EditHistory(existing_folder(folder, "a folder of versions", way_out))
    versions = history.versions
    rows = [(v.number, len(v.edits), v.when or "-", v.who or "-", v.message or "-") for v in versions]
    say_table(("version", "edits", "when", "who", "message"), rows)
    say(f"in force: version {versions[-1].number}")
    for edit in history.current:
        say(f"  {edit!r}")


def add(args) -> None:
    """Makes a version of each edit."""
    edits = read_chain(args.edits)
    history = EditHistory(os.path.expanduser(args.folder))
    for edit in edits:
        new = history.add(edit, args.message, args.who, check_chain=not args.force)
        say(f"{history.folder}: version {new.number}, {counted(len(new.edits), 'edit')} in force")


def rollback(args) -> None:
    """Makes a version of what was in force at an earlier one."""
    history = EditHistory(os.path.expanduser(args.folder))
    new = history.rollback(args.number, args.message, args.who)
    in_force = counted(len(new.edits), "edit") if new.edits else "no edit"
    say(f"{history.folder}: version {new.number}, the same as version {args.number}: {in_force} in force")
