"""What ``kedit-fast rounds`` and ``kedit-fast layers`` share: editors and pictures."""

from pathlib import Path

from ..editors import EDITORS
from ..files import replace_file
from ..plots import figure_png
from .inputs import check_output, make_folder_of


def check_method(name: str) -> None:
    """Raises ValueError for a method that no editor has."""
    if name not in EDITORS:
        raise ValueError(f"method {name!r}: expected some of {', '.join(EDITORS)}")


def check_picture(name: str | None, force: bool) -> Path | None:
    """Where a picture may be written; ValueError for a name that does not end in .png."""
    if name is None:
        return None
    path = check_output(name, force)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot {name}: pictures are written as .png; name a file that ends so")
    return path


def write_picture(figure, path: Path) -> None:
    """The figure as PNG, whole or not at all."""
    make_folder_of(path)
    with replace_file(path) as unfinished:
        unfinished.write_bytes(figure_png(figure))
