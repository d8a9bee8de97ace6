"""RESULTS.md, a list of questions, and a page for each in bench/results: answer, picture and tables, all of rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.common import RESULTS, ROOT, Figure
from bench.questions import QUESTIONS, Bars, Question, Shown
from bench.report import FORMATS, newest, run_table, value_text
from kedit_fast.pictures.figure import GRAY, new_figure, style

INDEX = ROOT / "bench" / "RESULTS.md"
HEAD = """# Figures

Written by `python -m bench report` from the rows in `bench/results`: a page for each question, and on it the answer, a
picture, and each table with the command that gives it and the machine. Every benchmark first checks that the results
are the same as its rivals', and reports nothing where they are not.
"""
LEGEND = "Thin lines: intervals, as in the tables. Dotted lines: what a figure has to reach."
BEST = 3  # cases that a sentence names
INKS = ("#6a51a3", "#41ab5d", "#ef6548", "#4292c6")  # of a panel's metrics, in their order
_SVG = {"svg.hashsalt": "kedit_fast", "svg.fonttype": "none"}  # the same rows give the same bytes

Runs = list[list[tuple[dict, Figure]]]


def write(index: Path = INDEX, folder: Path = RESULTS) -> list[Path]:
    """Writes the index, and beside it the pages and pictures of a folder of rows; gives their paths.

    Raises ValueError, and leaves the files, where there are no rows, or rows of a benchmark that no question has.
    """
    written = []
    for name, text in documents(folder).items():
        path = index if name == INDEX.name else index.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    for question, machine, runs in _answered(folder):
        path = index.parent / "results" / _picture(question, machine)
        if panels := _panels(question, _figures(runs)):
            draw(panels, path)
            written.append(path)
    return written


def documents(folder: Path = RESULTS) -> dict[str, str]:
    """{name beside the index: text} of the index and of every page. Raises as ``write``."""
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ValueError(f"no results in {folder}; run `python -m bench` first")
    asked = {bench for question in QUESTIONS for bench in question.benches}
    unasked = {run[0][0]["bench"] for path in files for run in newest(path)} - asked
    if unasked:
        raise ValueError(f"no question has the benchmark {', '.join(sorted(unasked))}; add it to bench/questions.py")
    pages: dict[str, list[str]] = {}
    lines = [HEAD]
    for question, machine, runs in _answered(folder):
        name = f"results/{question.name}.md"
        page = pages.setdefault(name, [f"# {question.asked}"])
        where, said = _machine(runs), answer(question, _figures(runs))
        if len(page) == 1:
            lines.append(f"- [{question.asked}]({name}) {said} ({where})".replace("  ", " "))
        page.append(f"On {where}: {said}")
        if _panels(question, _figures(runs)):
            page += [f"![{question.asked} {where}]({_picture(question, machine)})", LEGEND]
        page += map(run_table, runs)
    return {INDEX.name: "\n".join(lines) + "\n"} | {name: "\n\n".join(page) + "\n" for name, page in pages.items()}


def _answered(folder: Path) -> Iterator[tuple[Question, str, Runs]]:
    """(question, machine's file, its runs) where there are any, questions in their order."""
    machines = {path.stem: newest(path) for path in sorted(folder.glob("*.csv"))}
    for question in QUESTIONS:
        for machine, runs in machines.items():
            mine = [run for run in runs if run[0][0]["bench"] in question.benches]
            mine.sort(key=lambda run: question.benches.index(run[0][0]["bench"]))
            if mine:
                yield question, machine, mine


def _picture(question: Question, machine: str) -> str:
    return f"{question.name}-{machine}.svg"


def _figures(runs: Runs) -> list[tuple[str, Figure]]:
    return [(row["bench"], figure) for run in runs for row, figure in run]


def _machine(runs: Runs) -> str:
    row = runs[0][0][0]
    return row.get("gpu") or f"{row['cpu']}, {row['cores']} cores"


# ---- answers


def answer(question: Question, figures: Sequence[tuple[str, Figure]]) -> str:
    """The sentences whose figures are there; where none is, that the tables have the figures."""
    said = []
    for sentence in question.says:
        found = [(shown, shown.of(figures)) for shown in sentence.shown]
        if all(each for _, each in found):
            said.append(sentence.text.format(*(_said(*pair) for pair in found)))
    return " ".join(said) or "The tables have the figures."


def _said(shown: Shown, found: dict[str, Figure]) -> str:
    """The largest by name, or the range: 6.36 to 7.72×."""
    ordered = sorted(found.items(), key=lambda pair: pair[1].value)
    if shown.best:
        *first, last = [f"{case} ({value_text(figure)})" for case, figure in ordered[::-1][:BEST]]
        return f"{', '.join(first)} and {last}" if first else last
    low, high = (value_text(figure) for _, figure in (ordered[0], ordered[-1]))
    return high if low == high else f"{_bare(low, ordered[0][1])} to {high}"


def _bare(text: str, figure: Figure) -> str:
    return text.removesuffix(FORMATS[figure.unit].partition("}")[2])


# ---- pictures


Panel = tuple[Bars, list[tuple[str, int, Figure]]]


def _panels(question: Question, figures: Sequence[tuple[str, Figure]]) -> list[Panel]:
    """The question's panels that have figures."""
    return [(bars, found) for bars in question.bars if (found := _bars(bars, figures))]


def draw(panels: list[Panel], path: Path) -> None:
    """Panels of bars, one below the other, as an SVG file."""
    from matplotlib import rc_context

    heights = [len(found) + 2.5 + (len(bars.shown) > 1) for bars, found in panels]
    with style(), rc_context(_SVG):
        figure = new_figure(7.2, 0.3 + 0.17 * sum(heights))
        grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
        for axes, (bars, found) in zip(grid[:, 0], panels, strict=True):
            _panel(axes, bars, found)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _bars(bars: Bars, figures) -> list[tuple[str, int, Figure]]:
    """(case, which metric, figure) of each bar, from the top down."""
    by_metric = [shown.of(figures) for shown in bars.shown]
    cases = dict.fromkeys(case for each in by_metric for case in each)
    found = [(case, i, each[case]) for case in cases for i, each in enumerate(by_metric) if case in each]
    return sorted(found, key=lambda bar: -bar[2].value) if bars.ranked else found


def _panel(axes, bars: Bars, found: list[tuple[str, int, Figure]]) -> None:
    """Horizontal bars, each with its value, its interval and a tick where its mark is."""
    several = len(bars.shown) > 1
    named: set[int] = set()
    for y, (_, i, figure) in enumerate(found):
        label = None if i in named else bars.shown[i].label or bars.shown[i].metric
        named.add(i)
        axes.barh(y, figure.value, height=0.72, color=INKS[i], label=label)
        if figure.low == figure.low:  # no NaN
            axes.plot([figure.low, figure.high], [y, y], color="black", linewidth=0.7)
        if figure.mark:
            limit = float(figure.mark.split()[1])
            axes.plot([limit, limit], [y - 0.36, y + 0.36], color="black", linewidth=1.2, linestyle=":")
        end = max(figure.value, figure.high) if figure.high == figure.high else figure.value
        axes.annotate(f" {value_text(figure)}", (end, y), va="center", fontsize=6.5, color=GRAY, parse_math=False)
    names = [case if not y or found[y - 1][0] != case else "" for y, (case, _, _) in enumerate(found)]
    axes.set_yticks(range(len(found)), names, parse_math=False, fontsize=7)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.set_title(bars.title, loc="left", fontsize=8.5, pad=17 if several else 4, parse_math=False)
    if several:  # between the title and the bars
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0, "borderaxespad": 0.4}
        axes.legend(fontsize=6.5, ncols=len(bars.shown), **place)
