"""``python -m bench gpu``: asks a process for one part after the other, within the seconds of one command."""

import argparse
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import bench.gpu
from bench.common import ROOT
from bench.gpu.book import LOG, SUMMARY, Book, summary
from bench.gpu.plan import FIRST, PARTS, START, Part, ends
from bench.gpu.session import WHERE, serve

NO_GPU = "no GPU here: nothing was run; --dry-run goes through all of it on the CPU"
CALL_ROWS = (16_384, 2_048, 8_192, 32_768)  # in order of worth
GRACE = 4.0  # seconds that a part may be late before it is killed
TESTS = ("tests/kernels/triton", "tests/kernels/test_cusolver.py")  # what takes a device
WORKERS = 8  # of pytest-xdist, where it is there: a kernel's first launch compiles on the CPU


class Ended(NamedTuple):
    """A part's name, how it ended ("done", or what went wrong or was left out), and its seconds."""

    name: str
    how: str
    seconds: float


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description=bench.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in PARTS]
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results; may exist")
    made.add_argument("--budget", type=float, default=FIRST, help=f"seconds of the whole command (default {FIRST:g})")
    made.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    made.add_argument(
        "--call-rows", nargs="+", type=_rows, default=list(CALL_ROWS), metavar="N",
        help="rows that go through a block in one call, of the traces, in order of worth (default "
        f"{' '.join(map(str, CALL_ROWS))})",
    )  # fmt: skip
    made.add_argument("--commit", default="", help="what to say where the tree is no git clone")
    made.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; its figures mean nothing")
    made.add_argument("--answers", type=int, help=argparse.SUPPRESS)  # in the process that runs parts: where it answers
    return made


def _rows(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of rows from 1 on")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; 2 where there is no GPU, 1 where a part went wrong or was left out."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    options.command = _command(options)
    if not (options.dry_run or torch.cuda.is_available()):
        print(NO_GPU)
        return 2
    if options.answers is not None:
        return serve(options, sys.stdin, os.fdopen(options.answers, "w"))
    options.out.mkdir(parents=True, exist_ok=True)
    book = Book(options.out, "cpu" if options.dry_run else "cuda", options.commit, options.command)
    print(f"{options.out}: {SUMMARY} is written after each part, {book.path.name} with each figure", flush=True)
    parts, ended = [part for part in PARTS if part.name in options.parts], []
    command, log = [sys.executable, "-m", "bench.gpu", *arguments], options.out / LOG
    processes = partial(Process, command, environment(), log)
    for one in visit(parts, options.budget, processes, partial(tests, log, options.dry_run)):
        ended.append(one)
        print(f"{one.name:18} {one.seconds:5.0f} s  {one.how}", flush=True)
        (options.out / SUMMARY).write_text(summary(book, ended, options.dry_run), encoding="utf-8")
    return int(not all(one.how.startswith("done") for one in ended))


def _command(options) -> str:
    """What repeats this, wherever its results went."""
    words = ["--budget", f"{options.budget:g}", *(["--dry-run"] if options.dry_run else [])]
    for name, given, usual in (
        ("--parts", options.parts, [part.name for part in PARTS]),
        ("--call-rows", options.call_rows, list(CALL_ROWS)),
    ):
        words += [name, *map(str, given)] if given != usual else []
    return " ".join(["python -m bench gpu", *words])


def visit(
    parts: Sequence[Part], budget: float, start: Callable[[], "Process"], run_tests: Callable[[float], str]
) -> Iterator[Ended]:
    """Each part in its turn, as its end allows (``plan.ends``); a new process where the last one is no more of use."""
    began, process = time.monotonic(), None
    try:
        for part, end in zip(parts, ends(parts, budget), strict=True):
            begins = time.monotonic()
            left = began + end - begins
            needed = part.least + (0 if process or part.name == "tests" else START)
            if left < needed:
                yield Ended(part.name, f"skipped: {max(left, 0):.0f} s were left, it needs {needed:g}", 0.0)
                continue
            if part.name == "tests":
                if process:
                    process.end()
                process, how = None, run_tests(left)
            else:
                process = process or start()
                how, usable = process.ask(part.name, began + end)
                process = process if usable else None
            yield Ended(part.name, how, time.monotonic() - begins)
    finally:
        if process:
            process.end()


class Process:
    """A process that runs parts (``session.serve``); what it prints is added to a log."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path):
        """command: is given the number of the file to answer into as its last words, ``--answers N``."""
        answers, theirs = os.pipe()
        with open(log, "a", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [*command, "--answers", str(theirs)], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=file,
                stderr=subprocess.STDOUT, pass_fds=(theirs,), start_new_session=True, text=True,
            )  # fmt: skip
        os.close(theirs)
        self._answers = os.fdopen(answers, encoding="utf-8")

    def ask(self, part: str, until: float) -> tuple[str, bool]:
        """(how the part ended, whether the process is still of use). until: time.monotonic(), the same in both."""
        try:
            self._process.stdin.write(json.dumps({"part": part, "until": until}) + "\n")
            self._process.stdin.flush()
            if not select.select([self._answers], [], [], until + GRACE - time.monotonic())[0]:
                self._kill()
                return f"killed {GRACE:g} s after its time; where it stood is in {LOG}", False
            if line := self._answers.readline():
                answer = json.loads(line)
                if not answer["usable"]:
                    self.end()
                return answer["how"], answer["usable"]
        except OSError:  # it is gone
            pass
        self.end()
        return f"crashed with {_status(self._process.returncode)}; see {LOG}", False

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, WHERE)
            time.sleep(0.5)  # to print it
        self.end(wait=0)

    def end(self, wait: float = 5) -> None:
        """Lets it go, and whatever it started."""
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._answers.close()


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def environment() -> dict[str, str]:
    """Of a part's process: the package is the tree's, Triton compiles, nothing is fetched."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | offline | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}


# ---- the kernels' own tests


def tests(log: Path, dry: bool, seconds: float) -> str:
    """How the tests that take a device ended; those that were over in time count."""
    with open(log, "a+", encoding="utf-8") as file:
        file.write("\n==== tests\n")
        file.flush()
        before = file.tell()
        process = subprocess.Popen(
            tests_command(dry), cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the workers that it started
        process.wait()
        file.seek(before)
        return tests_ended(file.read(), process.returncode)


def tests_ended(text: str, status: int) -> str:
    """The counts of a verbose pytest run that ended with this status, or was cut off (a signal)."""
    counts = {word.lower(): text.count(f"{word} ") for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    said = ", ".join(f"{n} {word}" for word, n in counts.items() if n) or "nothing"
    if status < 0:
        return f"stopped: {said}, the others not run"
    return f"done: {said}" if status == 0 and counts["passed"] else f"failed (status {status}): {said}"


def tests_command(dry: bool) -> list[str]:
    """pytest on the tests that take their device from TRITON_INTERPRET; the compile tests need no device."""
    command = [sys.executable, "-m", "pytest", "-vv", "-rN", "-p", "no:cacheprovider", "--color=no", "--tb=short"]
    if dry:
        return [*command, "tests/kernels/test_cusolver.py", "-k", "prototypes or whole_names"]
    command += [str(path.relative_to(ROOT)) for pattern in TESTS for path in sorted(ROOT.glob(pattern))]
    command += ["--ignore", f"{TESTS[0]}/test_compile.py"]
    return [*command, *(["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else [])]
