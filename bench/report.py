"""Tables of figures: on the screen after a run, and on the pages (``pages``) from the rows kept in bench/results."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import claims
from bench.common import Figure, read_rows
from kedit_fast.basics.printing import columns

FORMATS = {  # unit: how a value is shown
    "bits": "{:.2f} bits",
    "x": "{:.2f}×",
    "%": "{:.1f} %",
    "% change": "{:+.2f} %",
    "points": "{:+.1f} points",
    "probability": "{:.3f}",
    "difference": "{:.1e}",
    "nats": "{:.3f} nats",
    "s": "{:.2f} s",
    "ms": "{:.1f} ms",
    "µs": "{:.1f} µs",
    "kB": "{:.1f} kB",
    "MB": "{:.1f} MB",
    "GB": "{:.2f} GB",
    "GB/s": "{:.1f} GB/s",
    "GFLOP": "{:.2f} GFLOP",
    "TFLOP": "{:.2f} TFLOP",
    "GFLOP/s": "{:.0f} GFLOP/s",
    "TFLOP/s": "{:.2f} TFLOP/s",
    "facts/s": "{:.2f} facts/s",
    "patches/s": "{:.0f} patches/s",
    "facts": "{:.0f} facts",
    "times": "{:.0f}",
    "mean": "{:.1f}",
    "correlation": "{:.2f}",
    "share": "{:.2f}",
}
WIDEST = 8  # columns
BAR = "\\|"
HUGE = 1e9  # from here on figures are shown by their power of ten
ABSOLUTE = {"s", "ms", "GFLOP/s", "TFLOP"}  # units that the tables leave out where a bench compares: machines differ
TIMED = {"editors", "phrasings"}  # benches whose table has times all the same, one table of all runs of a machine
SHORT = {"kernels": ("llama-3-8b", "kedit_fast (")}  # bench: what the cases that the table shows have in their names
SETTING = re.compile(r"(?P<label>.+), (?P<batches>\d+ x \d+): (?P<settings>.+)\.")  # a note of one row of a TIMED bench
LAYERS = re.compile(r"\((\d+(?:, \d+)+)\)")
_BARE = {unit: form.split()[0] for unit, form in FORMATS.items()}  # inside an interval the unit is not repeated


def pivot(figures: list[Figure]) -> list[list[str]]:
    """Cells of a table, header first. A mark stands behind its figure.

    A line a metric and a column a case; the other way round where there are more than ``WIDEST`` cases.
    """
    cells = {(figure.metric, figure.case): _shown(figure) for figure in figures}
    lines, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    if len(columns) > WIDEST:
        cells = {(case, metric): shown for (metric, case), shown in cells.items()}
        lines, columns = columns, lines
    return [["", *columns], *([line, *(cells.get((line, column), "") for column in columns)] for line in lines)]


def value_text(figure: Figure) -> str:
    """The value alone, with its unit."""
    form = FORMATS[figure.unit]
    if abs(figure.value) >= HUGE:  # the perplexity of a model that an edit has ended
        form = form.replace(".2f", ".0e").replace(".1f", ".0e")
    return form.format(figure.value)


def _shown(figure: Figure) -> str:
    text = value_text(figure)
    if not math.isnan(figure.low):
        low, high = (_BARE[figure.unit].format(bound) for bound in (figure.low, figure.high))
        text += f" [{low}, {high}]"
    if figure.mark:
        mark = figure.mark.replace(">=", "≥").replace("<=", "≤")
        text += f" ({mark})" if figure.met else f" (missed {mark})"
    return text


def as_text(figures: list[Figure]) -> str:
    """The table in aligned columns."""
    return columns(pivot(figures))


def as_markdown(figures: list[Figure]) -> str:
    """The table as Markdown."""
    head, *rows = pivot(figures)
    return _markdown([head, ["---"] * len(head), *rows])


def _markdown(rows: Iterable[Sequence[str]]) -> str:
    """Lines of a Markdown table; a bar within a cell is no end of it."""
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in rows)


def newest(path: Path) -> list[list[tuple[dict, Figure]]]:
    """A machine's runs as far as they are not outdated: of each bench, the rows of cases that no later run has."""
    rows = read_rows(path)
    dates: dict[tuple[str, str], str] = {}
    for row, figure in rows:
        case = row["bench"], figure.case
        dates[case] = max(row["date"], dates.get(case, ""))
    runs: dict[tuple[str, str], list] = {}
    for row, figure in rows:
        if row["date"] == dates[row["bench"], figure.case]:
            runs.setdefault((row["bench"], "" if row["bench"] in TIMED else row["date"]), []).append((row, figure))
    benches = list(dict.fromkeys(bench for bench, _ in runs))
    return sorted(runs.values(), key=lambda run: benches.index(run[0][0]["bench"]))


def run_table(rows: list[tuple[dict, Figure]]) -> str:
    """A run's command, machine, table and notes."""
    row = rows[0][0]
    words = SHORT.get(row["bench"], ())
    shown = [figure for _, figure in rows if all(word in figure.case for word in words)]
    if row["bench"] in TIMED:
        scores = {figure.case: figure.value for figure in shown if figure.metric == "S"}
        shown.sort(key=lambda figure: (*_group(figure.case), -scores.get(figure.case, 0.0)))
    if not words and row["bench"] not in TIMED:
        shown = [figure for figure in shown if figure.unit not in ABSOLUTE]
    command = f"python -m bench {row['bench']}" if row["bench"] in TIMED else row["command"]
    parts = [f"**{row['bench']}**: `{command}`, {_where(*(one for one, _ in rows))}", as_markdown(shown)]
    if row["bench"] in TIMED and (beside := claims.held_against(shown)):
        parts.append(_markdown(beside))
    if words:
        parts.append(f"Shown are {' and '.join(w.strip(' (') for w in words)}; all cases are in `bench/results`.")
    elif len(shown) < len(rows):
        parts.append("Times and rates are in `bench/results`.")
    notes = dict.fromkeys(one["notes"] for one, _ in rows)  # of every part that the run was kept in
    return "\n\n".join([*parts, *_explained(notes)]).rstrip()


def _group(case: str) -> tuple[int, str]:
    """Facts a batch, 0 without an edit, and whose: what stands together in a table that is sorted by S."""
    whose, name = case.rpartition(": ")[::2]
    return (int(name.rpartition("n = ")[2]) if "n = " in name else 0), whose


def _explained(notes: Iterable[str]) -> list[str]:
    """Notes as a paragraph; behind it a table of those that are a row's settings, a line for rows that share them."""
    shared: dict[tuple[str, str], list[str]] = {}
    prose = []
    for note in notes:
        if (found := SETTING.fullmatch(note)) is None:
            prose.append(note)
        else:
            settings = LAYERS.sub(_range, found["settings"])
            shared.setdefault((found["label"], settings), []).append(found["batches"])
    head = [["row", "batches x facts", "settings"], ["---"] * 3]
    rows = [[label, ", ".join(sizes), settings] for (label, settings), sizes in shared.items()]
    return [" ".join(prose), *([_markdown([*head, *rows])] if rows else [])]


def _range(numbers: re.Match) -> str:
    """(3, 4, 5) as 3-5; numbers that do not follow each other as they are."""
    first, *rest = map(int, numbers[1].split(", "))
    follow = rest == list(range(first + 1, first + 1 + len(rest))) and len(rest) > 1
    return f"{first}-{rest[-1]}" if follow else numbers[0]


def _where(row: dict[str, str], *others: dict[str, str]) -> str:
    """When and where a run was; of several runs of a table, all commits."""
    commits = list(dict.fromkeys(one["commit"] for one in (row, *others)))
    row = row | {"commit": ", ".join(commits)}
    if row.get("gpu"):
        return (
            f"{row['date'][:10]}, {row['gpu']} (driver {row['driver']}, CUDA {row['cuda']}, at best "
            f"{1e-3 * float(row['peak_gflops']):.0f} TFLOP/s), torch {row['torch']}, triton {row['triton']}, "
            f"transformers {row['transformers']}, commit {row['commit']}."
        )
    threads = "1 thread" if row["threads"] == "1" else f"{row['threads']} threads"
    return (
        f"{row['date'][:10]}, {row['cpu']} ({row['cores']} cores, {threads}, at best {float(row['peak_gflops']):.0f} "
        f"GFLOP/s), torch {row['torch']}, transformers {row['transformers']}, commit {row['commit']}."
    )
