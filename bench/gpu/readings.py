"""What a profile says: torch's chrome trace of some work, read into figures.

Events of a trace have a category (``cat``), a begin and a duration in µs (``ts``, ``dur``). What the GPU did are the
categories of ``ON_GPU``; each came from a call of the host with the same ``correlation``, and that call stands, by its
time and thread, inside the operator and the phase that it belongs to.
"""

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
PHASE, OPERATOR = "user_annotation", "cpu_op"
SHAPES = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1}  # product: where its two factors begin
REST = "the rest"  # what is in no phase
NO_TIME = 1e-3  # µs that an interval takes at least, so that it opens before it closes
SHOWN, LONGEST = 15, 90  # lines of a list, letters of a kernel's name

Row = tuple[str, float, str]  # metric, value, unit


class Product(NamedTuple):
    """One matrix product: its shape as text, FLOP, thread and time."""

    shape: str
    flop: float
    thread: object
    begin: float
    end: float


class Profile:
    """The events of one trace, sorted by kind.

    wall: seconds of the same work without the profiler; phases: the names that are phases (torch marks others too)
    """

    def __init__(self, events: list[dict], wall: float, phases: Collection[str]):
        whole = [event for event in events if event.get("ph") == "X"]
        self.wall = wall
        self.on_gpu = [event for event in whole if event.get("cat") in ON_GPU]
        self.calls = [event for event in whole if event.get("cat") in CALLS]
        self.phases = [event for event in whole if event.get("cat") == PHASE and event["name"] in phases]
        self.products = sorted(_products(whole), key=lambda product: product.begin)
        self._call = {event["args"]["correlation"]: event for event in self.calls if _correlation(event) is not None}

    def readings(self) -> dict[str, list[Row]]:
        """{what: rows}: totals, phases, kernels and products."""
        found = {
            "totals": self.totals(),
            "time by phase": self.by_phase(),
            "kernels": self.top_kernels(),
            "products": self.by_shape(),
        }
        return {what: rows for what, rows in found.items() if rows}

    def totals(self) -> list[Row]:
        """Time, launches, waits and bytes of the whole work."""
        busy = self.busy()
        kernels = [event for event in self.on_gpu if event["cat"] == "kernel"]
        waits = [event for event in self.calls if "Synchronize" in event["name"]]
        rows = [
            ("wall time", self.wall, "s"),
            ("GPU busy", busy, "s"),
            ("GPU idle share", 100 * max(0.0, 1 - busy / self.wall), "%"),
            ("launches", len(kernels), "times"),
            ("copies and fills", len(self.on_gpu) - len(kernels), "times"),
            ("host waits for the GPU", len(waits), "times"),
            ("host waiting", 1e-6 * sum(event["dur"] for event in waits), "s"),
        ]
        moved = Counter()
        for event in self.on_gpu:
            if event["cat"] == "gpu_memcpy":
                moved[event["name"]] += event.get("args", {}).get("bytes", 0)
        return rows + [(name, 1e-6 * size, "MB") for name, size in sorted(moved.items())]

    def busy(self) -> float:
        """Seconds in which the GPU did something, on whichever stream."""
        total, reached = 0.0, float("-inf")
        for begin, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in self.on_gpu):
            total += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        return 1e-6 * total

    def by_phase(self) -> list[Row]:
        """Of each phase: host time without the phases inside it, and GPU time of what was launched in it."""
        if not self.phases:
            return []
        at = _Nested([(event["ts"], event["ts"] + event["dur"], event["name"]) for event in self.phases])
        gpu, launches = Counter(), Counter()
        for event in self.on_gpu:
            phase = at(self._launched(event)["ts"])
            gpu[phase] += event["dur"]
            launches[phase] += 1
        rows = []
        for phase, host in sorted(at.seconds.items(), key=lambda pair: -pair[1]):
            rows.append((f"{phase}, host", 1e-6 * host, "s"))
            if self.on_gpu:
                rows += [(f"{phase}, GPU", 1e-6 * gpu[phase], "s"), (f"{phase}, launches", launches[phase], "times")]
        if self.on_gpu:
            rows += [(f"{REST}, GPU", 1e-6 * gpu[REST], "s"), (f"{REST}, launches", launches[REST], "times")]
        return rows

    def top_kernels(self) -> list[Row]:
        """The kernels that took longest, all launches of a name together."""
        spent, times = Counter(), Counter()
        for event in self.on_gpu:
            spent[event["name"]] += event["dur"]
            times[event["name"]] += 1
        return [(f"{short(name)} ({times[name]} times)", 1e-3 * us, "ms") for name, us in spent.most_common(SHOWN)]

    def by_shape(self) -> list[Row]:
        """Rates of the matrix products that took longest, by their shape; by host time where no GPU worked."""
        spent, flop, times = Counter(), Counter(), Counter()
        for product, us in self._timed_products():
            spent[product.shape] += us
            flop[product.shape] += product.flop
            times[product.shape] += 1
        return [
            (f"{shape} ({times[shape]} times, {1e-3 * us:.1f} ms)", 1e-6 * flop[shape] / us, "TFLOP/s")
            for shape, us in spent.most_common(SHOWN)
            if us
        ]

    def _timed_products(self) -> Iterator[tuple[Product, float]]:
        if not self.on_gpu:
            yield from ((product, product.end - product.begin) for product in self.products)
            return
        threads = defaultdict(list)
        for product in self.products:
            threads[product.thread].append(product)
        begins = {thread: [product.begin for product in made] for thread, made in threads.items()}
        spent: dict[Product, float] = Counter()
        for event in self.on_gpu:
            call = self._launched(event)
            thread, ts = (call.get("pid"), call.get("tid")), call["ts"]
            place = bisect_right(begins.get(thread, []), ts) - 1
            if event["cat"] == "kernel" and place >= 0 and ts <= threads[thread][place].end:
                spent[threads[thread][place]] += event["dur"]
        yield from spent.items()

    def _launched(self, event: dict) -> dict:
        """The host's call that an event on the GPU came from; itself where none was recorded."""
        return self._call.get(_correlation(event), event)


class _Nested:
    """Which of some nested intervals a time is in, the innermost; seconds: [name] of each without those inside it."""

    def __init__(self, intervals: Sequence[tuple[float, float, str]]):
        self._times, self._names, self.seconds = [], [], Counter()
        intervals = [(begin, max(end, begin + NO_TIME), name) for begin, end, name in intervals]
        edges = [(begin, 1, -end, name) for begin, end, name in intervals]
        edges += [(end, 0, -begin, name) for begin, end, name in intervals]
        open_names: list[str] = []
        for time, opens, _, name in sorted(edges):
            if open_names:
                self.seconds[open_names[-1]] += time - self._times[-1]
            if opens:
                open_names.append(name)
            else:
                open_names.pop()
            self._times.append(time)
            self._names.append(open_names[-1] if open_names else REST)

    def __call__(self, time: float) -> str:
        place = bisect_right(self._times, time) - 1
        return self._names[place] if place >= 0 else REST


def _products(events: list[dict]) -> Iterator[Product]:
    for event in events:
        first = SHAPES.get(event["name"]) if event.get("cat") == OPERATOR else None
        sizes = [] if first is None else event.get("args", {}).get("Input Dims", [])[first : first + 2]
        if len(sizes) == 2 and all(len(size) >= 2 for size in sizes):
            (*batch, rows, inner), columns = sizes[0], sizes[1][-1]
            count = batch[0] if batch else 1
            shape = f"{f'{count} x ' if batch else ''}[{rows}, {inner}] [{inner}, {columns}]"
            thread = event.get("pid"), event.get("tid")
            yield Product(shape, 2.0 * count * rows * inner * columns, thread, event["ts"], event["ts"] + event["dur"])


def _correlation(event: dict):
    return event.get("args", {}).get("correlation")


def short(name: str) -> str:
    """A kernel's name without its namespaces and argument list, cut to what a table bears."""
    name = re.sub(r"\(anonymous namespace\)::|\bat::native::|\bvoid ", "", name)
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
