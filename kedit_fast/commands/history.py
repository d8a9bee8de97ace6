"""``kedit-fast history add | log | rollback``: folders of versions of edits."""

import os

from kedit_fast.basics.words import counted
from kedit_fast.commands.inputs import note_failures, open_history, read_chain
from kedit_fast.commands.outputs import say, say_table
from kedit_fast.shipping.history import EditHistory


def log(args) -> None:
    """Says the versions of a folder, and what is in force."""
    history = open_history(args.folder)
    versions = history.versions
    rows = [(v.number, len(v.edits), v.when or "-", v.who or "-", v.message or "-") for v in versions]
    say_table(("version", "edits", "when", "who", "message"), rows)
    say(f"in force: version {versions[-1].number}")
    for edit in history.current:
        say(f"  {edit!r}")


def add(args) -> None:
    """Makes a version of each edit."""
    edits = read_chain(args.edits)
    note_failures(edits)
    history = EditHistory(os.path.expanduser(args.folder))
    for edit in edits:
        new = history.add(edit, args.message, args.who, check_chain=not args.force)
        say(f"{history.folder}: version {new.number}, {counted(len(new.edits), 'edit')} in force")


def rollback(args) -> None:
    """Makes a version of what was in force at an earlier one."""
    history = open_history(args.folder)
    new = history.rollback(args.number, args.message, args.who)
    in_force = counted(len(new.edits), "edit") if new.edits else "no edit"
    say(f"{history.folder}: version {new.number}, the same as version {args.number}: {in_force} in force")
