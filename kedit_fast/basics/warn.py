"""Warnings that name the line of the user's code that they are of."""

import os
import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_WRAPPERS = ("contextlib.py", "dataclasses.py", "<string>")  # of Python and torch; the last: what dataclasses write


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns as the line that called into the package, however deep the caller stands in it.

    Where all is the package, as on the command line, that is the outermost frame.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_ours(path: str) -> bool:
    return path.startswith(_PACKAGE) or path.endswith(_WRAPPERS)
