"""What the benchmarks share: figures with their marks, clocks, the core's peak, and the rows kept in bench/results."""

import csv
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
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
    low, high: 95 % interval over n, or of n repeats the 20th and the 80th percentile, where there is one;
    mark: what it has to reach, such as ">= 5"
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
    """A benchmark's figures, the machine's peak in the same run in GFLOP/s, and what a reader must know of them.

    device: the type of device that was measured
    """

    figures: list[Figure]
    peak: float
    notes: list[str] = field(default_factory=list)
    device: str = "cpu"


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


# ---- devices


def device_of(name: str) -> torch.device:
    """The device that ``--device`` names; "auto" is a GPU where there is one."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if name == "auto" else name)


class Times(NamedTuple):
    """Seconds of one call: the 20th, 50th and 80th percentile of n calls."""

    low: float
    middle: float
    high: float
    n: int


class Stopwatch:
    """Times of some work on one device, of calls that find their inputs in memory and not in a cache.

    On a GPU: between two events around each call, after a buffer larger than the L2 cache was written; what the host
    does inside the call counts where the GPU waits for it. On the CPU: process time, caches as they are.
    """

    def __init__(self, device: torch.device, seconds: float = 0.3, least: int = 5, most: int = 100):
        """seconds: to spend on one work, within ``least`` to ``most`` calls."""
        self.device, self._seconds, self._least, self._most = device, seconds, least, most
        self._flushed = None
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
            self._flushed = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def __call__(self, work: Callable) -> Times:
        work()  # compiles, allocates
        once = self._runs(work, 1)[0]
        taken = sorted(self._runs(work, min(max(int(self._seconds / max(once, 1e-7)), self._least), self._most)))
        low, high = (taken[round(share * (len(taken) - 1))] for share in (0.2, 0.8))
        return Times(low, statistics.median(taken), high, len(taken))

    def once(self, work: Callable) -> Timing:
        """One call, as ``timed`` has it, to its end on the device."""
        return timed(self._to_its_end, work)

    def _to_its_end(self, work: Callable):
        result = work()
        self._wait()
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _runs(self, work: Callable, n: int) -> list[float]:
        if self._flushed is None:
            return [timed(work).seconds for _ in range(n)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for begin, end in events:
            self._flushed.zero_()
            begin.record()
            work()
            end.record()
        self._wait()
        return [1e-3 * begin.elapsed_time(end) for begin, end in events]


def reset_peak_memory(device: torch.device) -> None:
    """What ``peak_memory`` counts from."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> list[tuple[str, float, str]]:
    """The height of a GPU's memory, as a (metric, value, unit) row; none on the CPU."""
    if device.type != "cuda":
        return []
    return [("peak GPU memory", 1e-9 * torch.cuda.max_memory_allocated(device), "GB")]


class Peaks(NamedTuple):
    """What the machine does at best: FLOP/s of a plain product by dtype, and bytes/s of a plain copy (read + write)."""

    products: dict[torch.dtype, float]
    copy: float

    @classmethod
    def measure(cls, watch: Stopwatch, dtypes, quick: bool = False) -> "Peaks":
        """Square products and a copy large enough for the device; a few milliseconds' worth where ``quick``."""
        gpu = watch.device.type == "cuda"
        size = 128 if quick else 8192 if gpu else PEAK_SIZE
        count = 1 << (18 if quick else 30 if gpu else 27)
        products = {}
        for dtype in dtypes:
            side = min(size, 4096) if dtype == torch.float64 else size
            a, b = (torch.randn(side, side, device=watch.device).to(dtype) for _ in range(2))
            products[dtype] = 2 * side**3 / watch(lambda a=a, b=b: torch.matmul(a, b)).low
        source, target = (torch.zeros(count, dtype=torch.int8, device=watch.device) for _ in range(2))
        return cls(products, 2 * count / watch(lambda: target.copy_(source)).low)


# ---- rows


def cpu_name() -> str:
    """The processor's own name, such as "AMD EPYC"."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def environment(device: str = "cpu") -> dict[str, str | int]:
    """What a figure depends on besides the code's own options; of a GPU also its name, driver, CUDA and Triton."""
    import kedit_fast

    found = {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": installed("transformers"),
        "kedit_fast": kedit_fast.__version__,
        "commit": _commit(),
    }
    return found | (_gpu() if device == "cuda" else {})


def installed(package: str) -> str:
    """The version of a package that may be absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> dict[str, str]:
    found = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "triton": installed("triton")}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return found | {"driver": _said(asked).split("\n")[0]}


def now() -> str:
    """The date and time of a run, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _commit() -> str:
    """The commit, "-dirty" where a file is changed; figures that were just kept make nothing dirty."""
    git, kept = ["git", "-C", str(ROOT)], (":!bench/results", ":!bench/RESULTS.md")
    changed = _said([*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *kept])
    return _said([*git, "describe", "--always", "--exclude=*"]) + "-dirty" * bool(changed)


def _said(command: list[str]) -> str:
    """What a program prints; "unknown" where it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def results_file(folder: Path, env: dict) -> Path:
    """The machine's file: named by its GPU, or its processor and number of cores, not by whose it is."""
    machine = env.get("gpu") or f"{env['cpu']} {env['cores']} cores"
    return folder / (re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + ".csv")


def append_rows(
    folder: Path, bench: str, command: str, measured: Measured, date: str | None = None, env: dict | None = None
) -> Path:
    """Adds one row a figure to the machine's file, which is only ever added to; gives its path.

    date: of the run, where it is kept part by part: rows of one command and date are one table
    env: of ``environment``, where it was asked for before
    """
    env = environment(measured.device) if env is None else env
    shared = {"date": date or now(), "bench": bench}
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
