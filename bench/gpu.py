"""Everything that needs a GPU, in one run that leaves one folder: ``python -m bench gpu --out DIR``.

Parts, in order of worth: the tests of the Triton kernels on the device, values and traces on the shapes of large
models, every op's timings, and 10,000 edits in the time that is left. Each part is a process of its own, with a share
of the time budget: what fails, hangs or crashes is recorded, and the next part runs. The folder holds

    summary.md   the machine, how each part ended, and all figures as tables
    <gpu>.csv    the figures, with what they depend on; rows as in bench/results
    log.txt      what the parts printed

Nothing has to be installed: the package is used from the tree, the compiled extension may be absent. Without a GPU
nothing is run (exit status 2), except with ``--device cpu --quick``, which goes through all the steps on tiny shapes.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import kernels, report
from bench.common import ROOT, Measured, append_rows, device_of, environment, now, results_file
from bench.kernel_cases import OPS

NO_GPU = "no GPU here: nothing was run"
BUDGET = 540.0  # seconds
GRACE = 10.0  # seconds that a part gets to write what it has, after the time that it was told
SUMMARY, LOG = "summary.md", "log.txt"
TESTS = ("tests/kernels/triton", "tests/kernels/test_cuda_*.py")  # what takes a device
WORKERS = 8  # of pytest-xdist, where it is there: a kernel's first launch compiles on the CPU


@dataclass(frozen=True)
class Part:
    """name: its kind and what of it; least: seconds below which it is not begun; most: seconds that it may take."""

    name: str
    least: float
    most: float


@dataclass(frozen=True)
class Ended:
    """How a part ended: "done" (of tests with counts), or what went wrong or was left out; seconds it took."""

    part: Part
    how: str
    seconds: float = 0.0


# The least is what compiling and the first case of a part were estimated to take; no GPU has timed it yet.
PARTS = (
    Part("tests", 30, 180),
    Part("mass values", 60, 150),
    Part("trace llama-3-8b", 40, 110),
    Part("trace gpt2-xl", 30, 70),
    *(Part(f"kernels {name}", 12, 60) for name in OPS),
    Part("mass edits", 120, 570),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results; may exist")
    made.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all parts (default {BUDGET:g})")
    made.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="cpu: only with --quick")
    made.add_argument("--quick", action="store_true", help="tiny shapes and a few tests: a dry run")
    made.add_argument("--parts", nargs="+", metavar="PART", help='such as "tests" or "kernels solve" (default: all)')
    made.add_argument("--part", help=argparse.SUPPRESS)  # in the process of one part
    made.add_argument("--seconds", type=float, default=BUDGET, help=argparse.SUPPRESS)  # that this part has
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; 2 where there is no GPU, 1 where a part went wrong or was left out."""
    parse = parser()
    options = parse.parse_args(arguments)
    names = [part.name for part in PARTS]
    if unknown := set(options.parts or ()) - set(names):
        parse.error(f"no part {', '.join(sorted(unknown))}; expected some of {', '.join(names)}")
    if options.device == "cpu" and not options.quick:
        parse.error("--device cpu is a dry run: add --quick")
    if options.device != "cpu" and not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        return _run_here(options)
    print(f"{options.out}: {SUMMARY} is written after each part", flush=True)
    ended: list[Ended] = []
    wanted = [part for part in PARTS if not options.parts or part.name in options.parts]
    for one in run_parts(wanted, options):
        ended.append(one)
        print(f"{one.part.name:24} {one.seconds:5.0f} s  {one.how}", flush=True)
        (options.out / SUMMARY).write_text(summary(ended, options), encoding="utf-8")
    return int(not all(one.how.startswith("done") for one in ended))


def run_parts(parts: list[Part], options, run: Callable | None = None) -> Iterator[Ended]:
    """Each part in its turn, while the budget lasts. run: (part, seconds, options) -> how it ended."""
    run = run or _in_a_process
    end = time.monotonic() + options.budget
    for part in parts:
        left = end - time.monotonic() - GRACE
        if left < part.least:
            yield Ended(part, f"skipped: {max(left, 0):.0f} s of the budget left, {part.least:g} needed")
            continue
        began = time.monotonic()
        try:
            how = run(part, min(left, part.most), options)
        except Exception as error:
            how = f"failed: {type(error).__name__}: {error}"
        yield Ended(part, how, time.monotonic() - began)


# ---- one part


def _in_a_process(part: Part, seconds: float, options) -> str:
    """The part in a process of its own, so that a fault on the device ends it alone."""
    command = [sys.executable, "-m", "bench.gpu", "--out", str(options.out), "--part", part.name]
    command += ["--seconds", f"{seconds:g}", "--device", options.device, *(["--quick"] if options.quick else [])]
    if part.name == "tests":
        command = tests_command(options.quick)
    return logged(part, command, _environment(options.device), seconds + GRACE, options.out / LOG)


def logged(part: Part, command: list[str], env: dict[str, str], seconds: float, log: Path) -> str:
    """Runs a command, its output added to the log; how it ended."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"\n==== {part.name}: {' '.join(command)}\n")
        file.flush()
        before = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the workers that it started
            process.wait()
            return f"stopped after {seconds:.0f} s; see the log"
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(before)
        lines = [line.strip() for line in file if line.strip()] or ["it printed nothing"]
    if status == 0:
        return "done" if part.name != "tests" else _tests_ended(lines)
    return f"failed (status {status}): {lines[-1]}"


def _tests_ended(lines: list[str]) -> str:
    """With the counts; a run whose tests were all skipped has shown nothing."""
    return f"done: {lines[-1]}" if "passed" in lines[-1] else f"failed: no test passed: {lines[-1]}"


def tests_command(quick: bool) -> list[str]:
    """pytest on the tests that take their device from TRITON_INTERPRET; the compile tests need no device."""
    files = [str(path.relative_to(ROOT)) for pattern in TESTS for path in sorted(ROOT.glob(pattern))]
    command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider", "--color=no", "-rfE", "--tb=short"]
    command += ["--ignore", f"{TESTS[0]}/test_compile.py"]
    if quick:
        return [*command, "-k", "test_rows and nothing_to_do"]
    return [*command, *(["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else [])]


def _environment(device: str) -> dict[str, str]:
    """Of a part's process: the tree is where the package is, and Triton compiles unless this is a dry run."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    interpret = "1" if device == "cpu" else "0"
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": interpret}


def _run_here(options) -> int:
    """The part that this process is for; its figures go into the folder."""
    torch.set_num_threads(1 if options.device == "cpu" else os.cpu_count() or 1)
    measured = measured_part(options.part, device_of(options.device), options.quick, time.monotonic() + options.seconds)
    print(report.as_text(measured.figures) if measured.figures else "no figures", *measured.notes, sep="\n")
    if measured.figures:
        command = f"python -m bench gpu --parts '{options.part}'" + " --quick" * options.quick
        append_rows(options.out, options.part, command, measured)
    return _complaint(measured)


def _complaint(measured: Measured) -> int:
    """1, and a last line that says so, where a case failed or there was no time for it."""
    bad = [note for note in measured.notes if note.startswith(("FAILED", "NOT RUN"))]
    if bad:
        print(f"{len(measured.figures)} figures kept, but: {' '.join(bad)}")
    return int(bool(bad))


def measured_part(name: str, device: torch.device, quick: bool, until: float) -> Measured:
    """The figures of a part other than the tests."""
    kind, _, what = name.partition(" ")
    if kind == "kernels":
        return kernels.measure(kernels.Plan.of(device, quick, ops=(what,), until=until, lenient=True))
    from bench import flows, mass  # not for the parts that need no models: transformers takes seconds to import

    if kind == "mass":
        return mass.CASES[what](mass.dry(device) if quick else mass.Plan(device, until=until))
    plan = flows.dry(what, device) if quick else flows.Plan(what, device, until=until)
    return flows.measure(plan)


# ---- summary


def summary(ended: list[Ended], options) -> str:
    """The folder's summary as Markdown."""
    device = device_of(options.device)
    env = environment(device.type)
    machine = ", ".join(f"{name} {value}" for name, value in env.items())
    lines = [
        "# Benchmarks on a GPU" if device.type == "cuda" else "# Dry run on the CPU: no figure here means anything"
    ]
    lines += ["", f"{now()}; {machine}.", "", "| part | ended | seconds |", "| --- | --- | --- |"]
    lines += [f"| {one.part.name} | {one.how.replace('|', '/')} | {one.seconds:.0f} |" for one in ended]
    path = results_file(options.out, env)
    if path.exists():
        for rows in report.newest(path):
            lines += [
                "",
                f"## {rows[0][0]['bench']}",
                "",
                report.as_markdown([figure for _, figure in rows]),
                "",
                rows[0][0]["notes"],
            ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
