"""The pages of figures: every question's answer, picture and tables are made of rows, and each table is on one page."""

import dataclasses
import math
import re

import pytest

from bench import common, pages, report
from bench.__main__ import BENCHES, main
from bench.common import RESULTS, Figure, Measured
from bench.questions import QUESTIONS, Bars, Question, Says, Shown

TRACE = ("state, 1 fact", "state, 8 facts", "mlp, 1 fact")


def figures(*values: float, metric: str = "ratio to the published loop") -> list[Figure]:
    return [Figure(case, metric, value, "x") for case, value in zip(TRACE, values, strict=False)]


def kept(folder, *values: float, bench: str = "trace", **changes) -> None:
    measured = dataclasses.replace(Measured(figures(*values), 90.0), **changes)
    common.append_rows(folder, bench, f"python -m bench {bench}", measured)


def test_the_pages_that_are_kept_are_those_of_the_rows():
    made = pages.documents()
    for name, text in made.items():
        path = pages.INDEX if name == pages.INDEX.name else pages.INDEX.parent / name
        assert path.read_text(encoding="utf-8") == text, "run `python -m bench report`"
    pictures = {picture for text in made.values() for picture in re.findall(r"\]\(([\w-]+\.svg)\)", text)}
    there = {path.name for path in RESULTS.iterdir() if path.suffix != ".csv"}
    assert there == pictures | {name.removeprefix("results/") for name in made if name != pages.INDEX.name}
    assert all(1_000 < (RESULTS / picture).stat().st_size < 100_000 for picture in pictures)


def test_every_table_is_on_exactly_one_page_and_every_page_in_the_index():
    index, *others = pages.documents().values()
    for path in RESULTS.glob("*.csv"):
        for run in report.newest(path):
            assert sum(page.count(report.run_table(run)) for page in others) == 1
    for name in [name for name in pages.documents() if name != pages.INDEX.name]:
        assert index.count(f"]({name})") == 1
    for page in others:
        assert page.startswith("# ") and "![" in page and "`python -m bench " in page and "GFLOP/s" in page


def test_every_benchmark_belongs_to_one_question():
    asked = [bench for question in QUESTIONS for bench in question.benches]
    assert sorted(asked) == sorted(BENCHES)
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)


def test_what_answers_and_pictures_show_is_in_the_rows():
    """A benchmark that renames a metric or a case would lose its sentence or its bars without a word."""
    rows = [(row["bench"], figure) for path in RESULTS.glob("*.csv") for row, figure in common.read_rows(path)]
    measured = {bench for bench, _ in rows}
    for question in QUESTIONS:
        shown = [each for part in (*question.says, *question.bars) for each in part.shown]
        assert {each.bench for each in shown} <= set(question.benches)
        missing = [each for each in shown if each.bench in measured and not each.of(rows)]
        assert not missing, question.name
        assert all(sentence.text.count("{}") == len(sentence.shown) for sentence in question.says)


def test_an_answer_says_ranges_and_the_best_of_the_newest_rows():
    both = Says("from {}, best {}.", (Shown("trace", "m", short=", .*"), Shown("trace", "m", best=True)))
    question = Question("q", "?", ("trace",), (both, Says("never {}", (Shown("edit", "m"),))), ())
    found = [("trace", figure) for figure in figures(6.0, 7.5, 6.5, metric="m")]
    assert pages.answer(question, found) == (
        "from 6.50 to 7.50×, best state, 8 facts (7.50×), mlp, 1 fact (6.50×) and state, 1 fact (6.00×)."
    )
    alone = pages.answer(question, found[:1])
    assert alone == "from 6.00×, best state, 1 fact (6.00×)."
    assert pages.answer(question, []) == "The tables have the figures."


def test_the_newest_rows_are_what_a_page_says(tmp_path, monkeypatch):
    for second, value in enumerate((6.0, 7.0)):
        monkeypatch.setattr(common, "now", lambda second=second: f"2030-01-01T00:00:0{second}Z")
        kept(tmp_path, value)
    page = pages.documents(tmp_path)["results/tracing.md"]
    assert "An exact trace is 7.00× as fast" in page and "6.00×" not in page
    assert set(pages.documents(tmp_path)) == {"RESULTS.md", "results/tracing.md"}


def test_machines_answer_one_after_the_other(tmp_path, monkeypatch):
    kept(tmp_path, 6.0)
    monkeypatch.setattr(common, "results_file", lambda folder, env: folder / "other.csv")
    kept(tmp_path, 9.0)
    page = pages.documents(tmp_path)["results/tracing.md"]
    assert page.count("\nOn ") == 2 and "tracing-other.svg" in page and "6.00×" in page and "9.00×" in page
    assert len(pages.write(tmp_path / "RESULTS.md", tmp_path)) == 2 + 2


def test_a_page_without_bars_has_no_picture(tmp_path):
    kept(tmp_path, 6.0, bench="mass")
    text = pages.documents(tmp_path)["results/memory.md"]
    assert "The tables have the figures." in text and "![" not in text and pages.LEGEND not in text
    assert len(pages.write(tmp_path / "RESULTS.md", tmp_path)) == 2


def test_the_same_rows_give_the_same_bytes(tmp_path):
    kept(tmp_path, 6.0, 7.0, figures=[*figures(6.0, 7.0), Figure("mlp, 1 fact", "ratio to the published loop", 3.0, "x",
                                                                 2.0, 4.0, mark=">= 5")])  # fmt: skip
    index = tmp_path / "RESULTS.md"
    written = [{path: path.read_bytes() for path in pages.write(index, tmp_path)} for _ in range(2)]
    assert written[0] == written[1] and len(written[0]) == 3
    (svg,) = (text for path, text in written[0].items() if path.suffix == ".svg")
    assert b"<dc:date>" not in svg and b"mlp, 1 fact" in svg and b"7.00" in svg


def test_a_picture_has_a_bar_for_each_case_and_metric():
    shown = (Shown("trace", "a"), Shown("trace", "b"))
    found = [("trace", f) for metric in "ab" for f in figures(1.0, math.inf, 2.0, metric=metric)[:2]]
    assert [(case, i) for case, i, _ in pages._bars(Bars("t", shown), found)] == [
        ("state, 1 fact", 0), ("state, 1 fact", 1), ("state, 8 facts", 0), ("state, 8 facts", 1)
    ]  # fmt: skip
    ranked = pages._bars(Bars("t", shown[:1], ranked=True), found)
    assert [case for case, _, _ in ranked] == ["state, 8 facts", "state, 1 fact"]


def test_what_no_question_asks_for_is_refused_and_nothing_is_written(tmp_path):
    index = tmp_path / "RESULTS.md"
    index.write_text("kept", encoding="utf-8")
    with pytest.raises(ValueError, match="no results"):
        pages.write(index, tmp_path / "empty")
    kept(tmp_path / "rows", 6.0, bench="unheard")
    with pytest.raises(ValueError, match="no question has the benchmark unheard"):
        pages.write(index, tmp_path / "rows")
    assert index.read_text(encoding="utf-8") == "kept"


def test_the_command_writes_the_index_and_its_pages(tmp_path, capsys):
    kept(tmp_path / "rows", 6.0)
    assert main(["report", "--tables", str(tmp_path / "RESULTS.md"), "--results", str(tmp_path / "rows")]) == 0
    assert "and 2 pages and pictures" in capsys.readouterr().out
    assert "](results/tracing.md)" in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert (tmp_path / "results" / "tracing.md").exists()
