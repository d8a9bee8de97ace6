"""The weakest cases: their order, what is shown of each, and how many."""

import math

import torch

from kedit_fast.evaluation.weakest import N_SHOWN, weakest
from kedit_fast.facts.fact import Fact
from tests.evaluation.test_report import make_report

NAN = math.nan
SCORE_OF = ("efficacy", "paraphrase")
CASES = [(Fact("{} is in", name, "Rome", "Paris"),) for name in ("Zurich", "Kyoto", "Lima")]


def columns(**values):
    return {name: torch.tensor(column) for name, column in values.items()}


BASE = columns(p_new=[0.1, 0.2, NAN], efficacy=[0.0, 0.0, 0.0], paraphrase=[NAN, 0.0, 1.0])
EDITED = columns(p_new=[0.9, 0.8, NAN], efficacy=[1.0, 1.0, 0.0], paraphrase=[NAN, 0.5, 1.0])


def test_the_lowest_mean_of_what_the_score_is_of_comes_first():
    # Means over what a case has: 1, 0.75, 0.5.
    (table,) = weakest(CASES, BASE, EDITED, SCORE_OF)
    assert table.headers == ("prompt", "answer", "p_new", "efficacy", "paraphrase")
    assert table.rows == [
        ("Lima is in", "Rome", "– -> –", "0.00 -> 0.00", "1.00 -> 1.00"),
        ("Kyoto is in", "Rome", "0.20 -> 0.80", "0.00 -> 1.00", "0.00 -> 0.50"),
        ("Zurich is in", "Rome", "0.10 -> 0.90", "0.00 -> 1.00", "– -> –"),
    ]
    assert table.caption == "before -> after"


def test_a_case_with_nothing_that_is_judged_comes_last():
    edited = columns(efficacy=[NAN, 1.0, 0.0], paraphrase=[NAN, 1.0, 0.0])
    (table,) = weakest(CASES, edited, edited, SCORE_OF)
    assert [row[0] for row in table.rows] == ["Lima is in", "Kyoto is in", "Zurich is in"]


def test_without_an_edit_cases_keep_their_order():
    (table,) = weakest(CASES, BASE, None, SCORE_OF)
    assert [row[0] for row in table.rows] == ["Zurich is in", "Kyoto is in", "Lima is in"]
    assert table.rows[1][2:] == ("0.20", "0.00", "0.00") and table.caption == ""


def test_cases_of_several_facts_and_of_answers_to_leave():
    facts = (Fact("{} is in", "Lima", "Peru"), Fact("{} is in", "Oslo", target_true="Norway"))
    (table,) = weakest([facts], columns(efficacy=[0.0]), None, ("efficacy",))
    assert table.rows == [("Lima is in (and 1 more)", "Peru, not Norway", "0.00")]


def test_long_tables_say_what_is_left_out():
    n = N_SHOWN + 2
    cases = [(Fact("{} is in", f"town {i}", "Rome"),) for i in range(n)]
    table, said = weakest(cases, *2 * [columns(efficacy=[i / n for i in range(n)])], ("efficacy",))
    assert len(table.rows) == N_SHOWN and table.rows[0][0] == "town 0 is in"
    assert said == "2 cases more: to_records() and the saved report hold all of them."


def test_without_a_score_there_is_no_order():
    assert weakest(CASES, BASE, EDITED, ()) == [] == weakest([], {}, {}, SCORE_OF)
    assert weakest(CASES, columns(efficacy=[NAN] * 3), None, ("efficacy",)) == []


def test_the_page_of_a_report_holds_them(tmp_path):
    make_report().to_html(tmp_path / "eval.html")
    page = (tmp_path / "eval.html").read_text()
    assert "Case by case, the weakest first" in page and "Miles Davis plays" in page
    make_report(edited=None, perplexity=(40.0, None), generations=()).to_html(tmp_path / "base.html")
    page = (tmp_path / "base.html").read_text()
    assert "Case by case" in page and "the weakest first" not in page
