"""The process that runs parts: it is asked for one after the other and answers how each ended."""

import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from bench.common import device_of
from bench.gpu.book import Book

# kind of a part: the module and the function that it is; those that need no models load none
PARTS = {
    "machine": ("bench.gpu.machine", "machine"),
    "smoke": ("bench.gpu.smoke", "smoke"),
    "trace": ("bench.gpu.traces", "trace"),
    "values": ("bench.gpu.edits", "values"),
    "memit": ("bench.gpu.edits", "memit"),
    "larger": ("bench.gpu.larger", "larger"),
    "kernels": ("bench.gpu.machine", "kernels_of_models"),
}
WHERE = signal.SIGUSR1  # makes a process print where it stands


@dataclass
class Session:
    """What a part is given. dry: tiny shapes; call_rows: sizes of calls to try; until: time.monotonic() to be kept.

    left_out: what there was no time for; failed: what went wrong without ending the part
    """

    device: torch.device
    dry: bool
    call_rows: tuple[int, ...]
    book: Book
    until: float = float("inf")
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.book.folder

    @property
    def left(self) -> float:
        """Seconds of the part."""
        return self.until - time.monotonic()

    def has(self, seconds: float, what: str) -> bool:
        """Whether there are so many seconds for something; it is noted as left out where there are not."""
        if self.left < seconds:
            self.left_out.append(what)
        return self.left >= seconds

    def trying(self, what: str, work: Callable[[], None]) -> None:
        """Does it; what goes wrong is noted, unless the device is lost with it."""
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.failed.append(f"{what}: {said(error)}")
            if not answers(self.device):
                raise


class Answer(NamedTuple):
    """How a part ended, and whether the process can go on."""

    how: str
    usable: bool


def run_part(session: Session, name: str, until: float) -> Answer:
    """One part in this process. until: time.monotonic() that it has to keep."""
    session.until = until
    session.left_out, session.failed = [], []
    session.book.begin(name)
    kind, _, what = name.partition("-")
    try:
        module, function = PARTS[kind]
        getattr(import_module(module), function)(session, *([what] if what else []))
    except Exception as error:
        traceback.print_exc()
        session.failed.append(said(error))
    how = "done" if not session.failed else f"failed: {'; '.join(session.failed)}"
    if session.left_out:
        how += f"; no time for {', '.join(session.left_out)}"
    return Answer(how, answers(session.device))


def said(error: BaseException) -> str:
    """The error's kind and first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def answers(device: torch.device) -> bool:
    """Whether the device still computes; what a part left is freed first. A fault on a GPU spoils all later calls."""
    gc.collect()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        return float(torch.ones(3, device=device).sum()) == 3
    except RuntimeError as error:
        print(f"the device does not answer any more: {said(error)}", flush=True)
        return False


def serve(options, asked, answering) -> int:
    """Answers each line {part, until} of ``asked`` with a line {how, usable}; ends with the first unusable one."""
    faulthandler.enable()
    faulthandler.register(WHERE, all_threads=True)
    device = device_of("cpu" if options.dry_run else "cuda")
    torch.set_num_threads(1 if options.dry_run else os.cpu_count() or 1)
    book = Book(options.out, device.type, options.commit, options.command)
    session = Session(device, options.dry_run, tuple(options.call_rows), book)
    for line in asked:
        question = json.loads(line)
        print(f"\n==== {question['part']}", flush=True)
        answer = run_part(session, question["part"], question["until"])
        answering.write(json.dumps(answer._asdict()) + "\n")
        answering.flush()
        if not answer.usable:
            sys.stdout.flush()
            os._exit(3)  # an ordinary end waits for a device that is lost
    return 0
