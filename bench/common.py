"""What the benchmarks share: figures with their marks, clocks, the core's peak, and the rows kept in bench/results."""

import csv
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kedit_fast.kernels.linear import linear

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DATA = ROOT.parent / "shared" / "data"  # public data sets, which the repository does not carry
PEAK_SIZE = 1024  # of the square fp32 product whose best time is taken as what the machine can do


class CheckFailed(Exception):
    """What was to be timed does not give the reference's result; nothing is reported."""


class Skipped(Exception):
    """A benchmark that cannot run here, and why."""


@dataclass(frozen=True)
class Figure:
    """One measured number.

    case: the column it stands in ("state, 1 fact"); metric: its line; unit: one of ``report.FORMATS``
    low, high: 95 % interval over n, where there is one; mark: what it has to reach, such as ">= 5"
    """

    case: str
    metric: str
    value: float
    unit: str
    low: float = math.nan
    high: float = math.nan
    n: int = 1
    mark: str = ""

    @property
    def met(self) -> bool:
        """Whether the mark is reached; True where there is none."""
        if not self.mark:
            return True
        sign, limit = self.mark.split()
        return self.value >= float(limit) if sign == ">=" else self.value <= float(limit)


@dataclass(frozen=True)
class Measured:
    """A benchmark's figures, the machine's peak in the same run in GFLOP/s, and what a reader must know of them."""

    figures: list[Figure]
    peak: float
    notes: list[str] = field(default_factory=list)


class Timing(NamedTuple):
    """What some work gave, and the seconds it took: of all threads together (CPU), and on the wall."""

    result: Any
    cpu: float
    wall: float

    @property
    def seconds(self) -> float:
        """What ratios are of: CPU time of one thread, which a busy machine disturbs least, else wall time."""
        return self.cpu if torch.get_num_threads() == 1 else self.wall


def timed(work: Callable, *args, **options) -> Timing:
    """Runs ``work`` once, with the rest as its arguments."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work(*args, **options)
    return Timing(result, time.process_time() - cpu, time.perf_counter() - wall)


def peak_matmul(repeats: int = 20, size: int = PEAK_SIZE) -> float:
    """GFLOP/s of the best of some square fp32 products, torch's or the package's own, with torch's threads."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    best = min(timed(product, a, a).seconds for _ in range(repeats) for product in (torch.mm, linear))
    return 2e-9 * size**3 / best


# ---- rows


def cpu_name() -> str:
    """The processor's own name, such as "AMD EPYC"."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def environment() -> dict[str, str | int]:
    """What a figure depends on besides the code's own options."""
    import transformers

    import kedit_fast

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kedit_fast": kedit_fast.__version__,
        "commit": _commit(),
    }


def now() -> str:
    """The date and time of a run, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def results_file(folder: Path, env: dict) -> Path:
    """The machine's file: named by its processor and number of cores, not by whose it is."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", f"{env['cpu']} {env['cores']} cores".lower()).strip("-") + ".csv")


def append_rows(folder: Path, bench: str, command: str, measured: Measured) -> Path:
    """Adds one row a figure to the machine's file, which is only ever added to; gives its path."""
    env = environment()
    shared = {"date": now(), "bench": bench}
    tail = env | {"peak_gflops": round(measured.peak, 1), "command": command, "notes": " ".join(measured.notes)}
    rows = [shared | asdict(figure) | tail for figure in measured.figures]
    path = results_file(folder, env)
    folder.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def read_rows(path: Path) -> list[tuple[dict[str, str], Figure]]:
    """(whole row, its figure) of every row of a machine's file."""
    with open(path, encoding="utf-8", newline="") as file:
        return [(row, _figure(row)) for row in csv.DictReader(file)]


def _figure(row: dict[str, str]) -> Figure:
    numbers = {name: float(row[name]) for name in ("value", "low", "high")}
    return Figure(row["case"], row["metric"], unit=row["unit"], n=int(row["n"]), mark=row["mark"], **numbers)
