"""The figures of a visit: each written to the folder when it is made, and all of them as tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import report
from bench.common import Figure, Measured, append_rows, environment, now, read_rows, results_file

SUMMARY, LOG = "summary.md", "log.txt"
BEST = "best bf16 product"  # the metric that ``peak_gflops`` of later rows is taken from


@dataclass
class Book:
    """A machine's file of figures. bench: the part that is writing; notes: what a reader must know of its figures."""

    folder: Path
    device: str
    commit: str = ""
    command: str = "python -m bench gpu"
    bench: str = ""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.env = environment(self.device)
        if self.commit:
            self.env["commit"] = self.commit
        self.path = results_file(self.folder, self.env)
        self.date = now()
        self.peak = max((figure.value for _, figure in self.rows() if figure.metric == BEST), default=0.0)

    def begin(self, part: str) -> None:
        """Figures are this part's from here on."""
        self.bench, self.notes = f"gpu {part}", []

    def add(self, *figures: Figure) -> None:
        """Writes them, and says them."""
        for figure in figures:
            if figure.metric == BEST:
                self.peak = max(self.peak, figure.value)
            measured = Measured([figure], 1e3 * self.peak, self.notes, self.device)
            append_rows(self.folder, self.bench, self.command, measured, self.date, self.env)
            print(f"{figure.case}: {figure.metric}: {report.FORMATS[figure.unit].format(figure.value)}", flush=True)

    def tell(self, case: str, rows: Sequence[tuple], n: int = 1, marks: dict[str, str] | None = None) -> None:
        """Writes (metric, value, unit) rows of one case. marks: {metric: what it has to reach}."""
        marks = marks or {}
        self.add(*(Figure(case, metric, value, unit, n=n, mark=marks.get(metric, "")) for metric, value, unit in rows))

    def rows(self) -> list[tuple[dict, Figure]]:
        """What the file holds."""
        return read_rows(self.path) if self.path.exists() else []


def summary(book: Book, ended: Sequence, dry: bool) -> str:
    """The folder's summary as Markdown. ended: of each part its name, how it ended, and its seconds."""
    machine = ", ".join(f"{name} {value}" for name, value in book.env.items())
    lines = ["# Dry run on the CPU: no figure here means anything" if dry else "# A visit to a GPU", ""]
    lines += [f"{now()}; {machine}.", "", "| part | ended | seconds |", "| --- | --- | --- |"]
    lines += [f"| {name} | {how.replace('|', '/')} | {seconds:.0f} |" for name, how, seconds in ended]
    parts: dict[str, dict[str, list[Figure]]] = {}
    notes: dict[str, dict[str, None]] = {}
    for row, figure in book.rows():
        parts.setdefault(row["bench"], {}).setdefault(figure.case, []).append(figure)
        notes.setdefault(row["bench"], {})[row["notes"]] = None
    for bench, cases in parts.items():
        lines += ["", f"## {bench}", *(f"\n{note}" for note in notes[bench] if note)]
        for figures in _tables(cases):
            lines += ["", report.as_markdown(figures)]
    return "\n".join([*lines, ""])


def _tables(cases: dict[str, list[Figure]]) -> list[list[Figure]]:
    """Cases with the same metrics share a table."""
    tables: dict[tuple[str, ...], list[Figure]] = {}
    for figures in cases.values():
        tables.setdefault(tuple(dict.fromkeys(figure.metric for figure in figures)), []).extend(figures)
    return list(tables.values())
