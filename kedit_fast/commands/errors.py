"""What goes wrong in a command, as lines on stderr; free of torch."""

import os
import re
import sys
from contextlib import suppress

from kedit_fast.basics.printing import escaped


def is_the_users(error: Exception) -> bool:
    """Whether an error is of what was asked for or of the machine, and no fault of this package."""
    if isinstance(error, (ValueError, OSError, MemoryError, ImportError)):
        return True
    # torch has no type of its own for memory that the CPU lacks
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)
    return isinstance(error, RuntimeError) and out_of_memory


def open_stderr() -> None:
    """Where stderr is closed, lines to it go nowhere: else the next file opened would be in its place."""
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")


def stop_printing() -> None:
    """Has what is still to be printed go nowhere: the flush at exit must not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def told(error: Exception, args=None) -> str:
    """An error in words; the system's own as "file: what is wrong with it". An argument of ``args`` that it begins with
    is named as the option that it is, or as its place in the usage."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip() or type(error).__name__
    name = re.match(r"(\w+)( = | is empty)", text)
    if name is None or name[1] not in (vars(args) if args else ()):
        return text
    place = getattr(args, "places", {}).get(name[1])
    called = f"argument {place}:" if place else f"--{name[1].replace('_', '-')}"
    return f"{called} {text[len(name[0]) :] if name[2] == ' = ' else text[len(name[1]) + 1 :]}"


def say_error(text: str, status: int) -> int:
    """Says a line on stderr; the exit status."""
    with suppress(OSError):  # nobody reads it
        print(f"kedit-fast: {escaped(text)}", file=sys.stderr)
    return status


def warning_line(message, category, filename, lineno, file=None, line=None):
    """A warning as a line on stderr, for ``warnings.showwarning``."""
    # The libraries' own notices to developers are not this user's.
    if not issubclass(category, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
        say_error(f"warning: {message}", 0)
