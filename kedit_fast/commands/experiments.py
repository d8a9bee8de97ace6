"""What ``kedit-fast rounds`` and ``kedit-fast layers`` share: editors and pictures."""

from pathlib import Path

from kedit_fast.commands.argument_types import did_you_mean
from kedit_fast.commands.outputs import check_output
from kedit_fast.editors import EDITORS


def check_method(name: str) -> None:
    """Raises ValueError for a method that no editor has."""
    if name not in EDITORS:
        raise ValueError(f"method {name!r}: expected some of {', '.join(EDITORS)}{did_you_mean(name, EDITORS)}")


def check_picture(name: str | None, force: bool) -> Path | None:
    """Where a picture may be written; ValueError for a name that does not end in .png."""
    path = check_output(name, force)
    if path is not None and path.suffix.lower() != ".png":
        raise ValueError(f"--plot {name}: pictures are written as .png; name a file that ends so")
    return path
