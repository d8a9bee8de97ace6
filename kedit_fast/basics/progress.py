"""How far a piece of work is: bars on a terminal, plain lines elsewhere; silent unless a caller turned them on.

    with stages("sampling contexts", "optimizing values", "solving layers"):   # a flow names its stages once
        with progress("optimizing values (steps)", 2_400) as bar:              # "stage 2 of 3: optimizing values ..."
            bar.advance(24, "loss 0.31")

On a terminal a stage is a bar; in a notebook too. Elsewhere (a file, a pipe, Slurm, CI) it is a line of the logger
"kedit_fast" at its beginning, every ``EVERY`` seconds and at its end, never a carriage return or a control code.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

logger = logging.getLogger("kedit_fast")
logger.addHandler(logging.NullHandler())  # silent, unless show_progress or whoever uses the package asks

_shown = ContextVar("kedit_fast_progress", default=False)
_stages: ContextVar[tuple[str, ...]] = ContextVar("kedit_fast_stages", default=())
_around: ContextVar[str] = ContextVar("kedit_fast_around", default="")
DELAY = 2.0  # seconds before a stage is shown: shorter work draws nothing
EVERY = 15.0  # seconds between two lines of one stage


class _ToStderr(logging.Handler):
    """Writes to what ``sys.stderr`` is when a line comes: a bar that is drawn may have put itself before it."""

    def emit(self, record):
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except (AttributeError, OSError, ValueError):  # nobody reads on
            self.handleError(record)


@contextmanager
def show_progress(on: bool = True) -> Iterator[None]:
    """Inside this context bars are drawn, or lines written to stderr (the command line sets it; a notebook may).

    The package's logger writes its lines of level INFO to stderr meanwhile, unless it has a handler of the caller's.
    """
    token, level = _shown.set(on), logger.level
    handler = _ToStderr()
    ours = on and all(isinstance(known, logging.NullHandler) for known in logger.handlers)
    if ours:
        logger.addHandler(handler)
        logger.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        if ours:
            logger.removeHandler(handler)
            logger.setLevel(level)
        _shown.reset(token)


@contextmanager
def stages(*names: str) -> Iterator[None]:
    """Names the stages of a piece of work, in order; a ``progress`` whose label begins with one says which it is, of
    how many. Inside another such context that one's names hold."""
    token = _stages.set(_stages.get() or names)
    try:
        yield
    finally:
        _stages.reset(token)


class Bar:
    """One stage. ``advance(n, note)`` moves it; it is shown only once ``DELAY`` seconds have passed."""

    def __init__(self, label: str, total: float | None):
        self.label, self.total, self.done, self.note = label, total, 0.0, ""
        self._skipped, self._began, self._told = 0.0, time.monotonic(), 0.0
        self._display: Any = None  # rich's, which is loaded when a bar is drawn
        self._task: Any = None

    def advance(self, n: float = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        now = time.monotonic()
        if not _shown.get() or now - self._began <= DELAY:
            return
        if self._display is None and not self._told and _on_a_terminal():
            self._open()
        if self._display is not None:
            self._display.update(self._task, completed=self.done, description=self._head(), rest=self._rest())
        elif not self._told or now - self._told >= EVERY:
            self._told = now
            logger.info("%s", self._line())

    def resume(self, n: float) -> None:
        """What an earlier run has done: it counts as done, and not as how fast this one is."""
        self._skipped += n
        self.done += n

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Stages shown inside say that they belong to this unit of the bar, which stands back meanwhile."""
        self._hide()
        token = _around.set(f"{_around.get()}{name}{self._of_total()}, ")
        inner = _stages.set(())  # the names of what is around are not those of what is inside
        try:
            yield
        finally:
            _stages.reset(inner)
            _around.reset(token)

    def close(self, ended: bool = True) -> None:
        """Takes the bar away; of a stage that ``ended``, and was told of, a line says so."""
        self._hide()
        if ended and self._told and _shown.get():
            logger.info("%s: done in %s", self._head(), duration(time.monotonic() - self._began))

    # ---- what is said

    def _head(self) -> str:
        names = _stages.get()
        number = next((i for i, name in enumerate(names, 1) if self.label.startswith(name)), None)
        which = f"stage {number} of {len(names)}: " if number and len(names) > 1 else ""
        return f"{_around.get()}{which}{self.label}"

    def _of_total(self) -> str:
        if not self.total:
            return ""
        left = self._left()
        return f" ({self.done:.0f} of {self.total:.0f} done{', ' + left if left else ''})"

    def _left(self) -> str:
        """Time left, by what this run has done; nothing before it has done anything."""
        done = self.done - self._skipped
        if not self.total or done <= 0:
            return ""
        elapsed = time.monotonic() - self._began
        return f"{duration(elapsed / done * max(0.0, self.total - self.done))} left"

    def _rest(self) -> str:
        return "; ".join(part for part in (self._left(), self.note) if part)

    def _line(self) -> str:
        at = f" {100 * self.done / self.total:.0f} %" if self.total else ""
        at += f", {self.done:,.0f} of {self.total:,.0f}" if at and self.total != 1 else ""
        rest = self._rest()
        return f"{self._head()}:{at}{'; ' + rest if rest else ''}"

    # ---- on a terminal

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._display = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rest]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._display.add_task(self._head(), total=self.total, completed=self.done, rest=self._rest())
        self._display.start()

    def _hide(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None


def scaled(advance: Callable[[float], None] | None, share: float) -> Callable[[float], None] | None:
    """What tells of a whole, for a part of it that tells which share of itself is done."""
    return advance and (lambda part: advance(share * part))


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _on_a_terminal() -> bool:
    """Whether a bar can be drawn on stderr: a terminal that moves its cursor, or a notebook."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.is_jupyter or (sys.stderr.isatty() and not console.is_dumb_terminal)


@contextmanager
def progress(label: str, total: float | None = None) -> Iterator[Bar]:
    """``with progress("tracing", n_facts) as bar: ... bar.advance()``; a stage that an error ends is not told done."""
    bar = Bar(label, total)
    try:
        yield bar
    except BaseException:
        bar.close(ended=False)
        raise
    bar.close()
