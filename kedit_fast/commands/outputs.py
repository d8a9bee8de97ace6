"""What the commands share of their answers: lines and tables on the screen, and the files that they write.

Free of torch: ``kedit-fast info`` has to speak where torch is broken.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kedit_fast.basics.catalog import SELF
from kedit_fast.basics.files import (
    check_folder,
    check_place,
    folders_around,
    holds_something,
    named,
    written_file,
    written_through,
)
from kedit_fast.basics.printing import STDOUT, columns, escaped
from kedit_fast.basics.unfinished import discards, has_run, run_folder
from kedit_fast.facts.fact import BUILTIN

EDITS = "edits"  # the argument that names edits without an option
READ = (
    EDITS,
    "compared",
    "facts",
    "hparams",
    "network",
    "corpus",
    "stats",
    "model",
    "on_top_of",
    "suite",
    "text",
    "thresholds",
    "traces",
    "keep",
    "examples",
    "relations",
    "task_folder",
)
READ_ALONE = {EDITS: "an edit that is read", "compared": "a file that is compared"}  # by arguments without an option

# ---- the screen


def say(text: str = "") -> None:
    """A line of the command's answer, on stdout."""
    with named(STDOUT):
        print(escaped(text), flush=True)


def show(renderable) -> None:
    """Something that rich draws, on stdout, with color where the terminal has it."""
    from rich.console import Console

    with named(STDOUT):
        Console().print(renderable)


def note(text: str) -> None:
    """A line on what goes on meanwhile, on stderr."""
    print(f"kedit-fast: {escaped(text)}", file=sys.stderr, flush=True)


def say_table(headers: Sequence[str], rows: Sequence[Sequence], most: int | None = None) -> None:
    """Columns of text, the first on the left, the others on the right; a row is one line, whatever its cells hold.

    most: rows that are shown, where there may be many; a line says how many more there are
    """
    say(columns([headers, *([escaped(str(cell), one_line=True) for cell in row] for row in rows[:most])], right=True))
    if most is not None and len(rows) > most:
        say(f"... and {len(rows) - most} more")


def number(value: float, form: str = ".3f") -> str:
    """A number for a cell; NaN is a dash."""
    return "-" if math.isnan(value) else format(value, form)


# ---- files


def check_output(path, force: bool) -> Path | None:
    """The path, where it may be written (as ``check_place`` says); ValueError where a file is there already.

    None, for an option that was not given, stays None.
    """
    if path is None:
        return None
    path = check_place(os.path.expanduser(path))
    if not written_through(path):
        check_folder(written_file(path).parent, path)  # a file is replaced by another of that folder
    if holds_something(path) and not force:
        raise ValueError(f"{path} is there already; --force replaces it, or name another file")
    return path


def output_folder(path) -> Path:
    """The folder, where files may be written to it (as ``check_folder`` says); it is made when they are."""
    return check_folder(os.path.expanduser(path))


def check_outputs(args, *options: str, beside: Sequence[Path] = ()) -> list[Path | None]:
    """The files that these options name, as ``check_output`` takes them; None for one that was not given.

    beside: other files that the same run writes, the first of which tells whether it goes on
    Raises ValueError too where two of them name one file, or one would replace what an argument of ``READ`` names (a
    file, a folder of files, or several), or a picture is not to be a .png.
    """
    written: dict[str, Path] = {}
    for name in options:
        path = next(iter(_paths_of(args, name)), None)
        if path is None:
            continue
        for other, taken in written.items():
            if _same(path, taken):
                raise ValueError(f"--{other} and --{name} both name {path}; expected a file for each")
        for source, read in ((option, path) for option in READ for path in _paths_of(args, option)):
            if _same(path, read) or (path.exists() and _same(path.parent, read)):
                what = READ_ALONE.get(source, f"what --{source.replace('_', '-')} reads")
                raise ValueError(f"--{name} {path} would replace {what}; name another file")
        if any(_same(path, other) for other in beside):
            raise ValueError(f"--{name} {path} is a file that this command writes anyway; name another file")
        written[name] = path
    force = args.force or goes_on(args, *beside[:1], *written.values())
    checked = {name: check_output(getattr(args, name), force) for name in options}
    if (picture := checked.get("plot")) is not None and picture.suffix.lower() != ".png":
        raise ValueError(f"--plot {args.plot}: pictures are written as .png; name a file that ends so")
    return list(checked.values())


def goes_on(args, *paths: Path) -> bool:
    """Whether an unfinished run of these files is there: what it has written of them it may replace."""
    given = getattr(args, "checkpoint", None)
    if given:
        return has_run(Path(given).expanduser())
    folders = [run_folder(written_file(path)) for path in paths]
    for folder in folders:
        with suppress(OSError):  # not there, or not empty: else it is of a run that was killed at its very end
            folder.rmdir()
    return any(map(has_run, folders))


def _paths_of(args, name: str) -> list[Path]:
    given = getattr(args, name, None) or ()
    given = [given] if isinstance(given, str) else given
    return [Path(each).expanduser() for each in given if each not in (BUILTIN, SELF)]


def _same(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b) or (a.exists() and b.exists() and a.samefile(b))


def write_reports(*reports: tuple[Path | None, Callable]) -> list[Path]:
    """Writes (path, what writes it) where there is a path; the paths, for ``say_written``.

    Before anything is said of the result: files are what a long run is for, and a screen can be closed.
    """
    written = [(path, write) for path, write in reports if path is not None]
    for path, write in written:
        write(path)
    return [path for path, _ in written]


def say_written(paths: Sequence[Path]) -> None:
    """A line for each file."""
    for path in paths:
        say(f"written: {path}")


@contextmanager
def fresh_log(path: Path | None):
    """A log's path, to begin empty. If nothing is logged, an older file of that name comes back and no folder stays."""
    if path is None or discards():
        yield path
        return
    if written_through(path):
        with open(path, "ab"):  # a pipe's reader would take the end of a line's write for the end of all
            yield path
        return
    path = written_file(path)
    older = path.with_name(f".{path.name}.older")
    with folders_around(path):
        if path.exists():
            path.replace(older)
        try:
            yield path
        finally:
            if path.exists():
                older.unlink(missing_ok=True)
            elif older.exists():
                older.replace(path)
