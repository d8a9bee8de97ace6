"""Progress bars for anything that may run over two seconds; silent unless a caller turned them on."""

import time
from contextlib import contextmanager
from contextvars import ContextVar

from .printing import escaped

_shown = ContextVar("kedit_fast_progress", default=False)
DELAY = 2.0  # seconds before a bar appears: shorter work draws nothing


@contextmanager
def show_progress(on: bool = True):
    """Bars are drawn inside this context (the command line sets it; a notebook may)."""
    token = _shown.set(on)
    try:
        yield
    finally:
        _shown.reset(token)


class Bar:
    """One line of progress. ``advance(n, note)`` moves it; it is drawn only once ``DELAY`` seconds have passed."""

    def __init__(self, label: str, total: int | None):
        self.label, self.total, self.done, self.note = label, total, 0, ""
        self._began, self._display, self._task = time.monotonic(), None, None

    def advance(self, n: float = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        if not _shown.get():
            return
        if self._display is None and time.monotonic() - self._began > DELAY:
            self._open()
        if self._display is not None:
            self._display.update(self._task, completed=self.done, note=escaped(self.note, one_line=True))

    def _open(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._display = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._display.add_task(self.label, total=self.total, note="")
        self._display.start()

    def close(self) -> None:
        if self._display is not None:
            self._display.stop()


@contextmanager
def progress(label: str, total: int | None = None):
    """``with progress("tracing", n_facts) as bar: ... bar.advance()``."""
    bar = Bar(label, total)
    try:
        yield bar
    finally:
        bar.close()
