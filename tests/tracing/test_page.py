"""The page of traces: averages first, then facts, a few of many; cells say token, layer, value and reliability."""

import html
import math

import numpy as np
import pytest

import kedit_fast as kf
from kedit_fast.facts.fact import Fact
from kedit_fast.pictures import trace_page as pages
from kedit_fast.tracing.doubts import doubts
from tests.compare import refused
from tests.pictures.test_page import Page
from tests.pictures.test_traces import make

EVIL = "<script>alert('1')</script> & \x1b[2J"


def facts_of(n: int) -> list[Fact]:
    return [Fact("{} is in", f"Tower {i}") for i in range(n)]


def facts(n: int, kinds=("state", "mlp"), **changes) -> list:
    made = ((Fact("{} is in", f"Tower {i}"), 0.2 - 0.01 * (i % 9)) for i in range(n))
    return [make(kind, fact=fact, p_corrupted=p, **changes) for fact, p in made for kind in kinds]


def cells(page: Page, name: str) -> list[str]:
    return [a["aria-label"] for a in page.all("input") if a["name"].startswith(name)]


def test_a_cell_says_its_token_layer_value_and_reliability(tmp_path):
    result = make(reliability=0.94)
    text = result.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    said = cells(Page(text), "fact-0-0")
    assert len(said) == result.p_restored.size
    p = result.p_restored
    assert said[0] == f"“The” (subject), layer 0: p(Paris) {p[0, 0]:.3f}; reliability 0.94"
    assert said[3 * 12 + 7] == f"“ is”, layer 7: p(Paris) {p[3, 7]:.3f}; reliability 0.94"
    unknown = cells(Page(make(reliability=math.nan).to_html()), "fact-0-0")
    assert unknown[0].endswith("; reliability not known")


def test_cells_that_were_not_computed_say_so():
    exact = np.zeros((5, 12), dtype=bool)
    exact[2, 4] = True
    said = cells(Page(make(exact=exact).to_html()), "fact-0-0")
    assert "estimate" not in said[2 * 12 + 4] and sum("(an estimate)" in each for each in said) == 59
    strided = cells(Page(make(exact=exact, stride=5).to_html()), "fact-0-0")
    assert sum("(partly between computed layers)" in each for each in strided) == 59


def test_averages_by_role_come_before_the_facts():
    results = facts(3, reliability=0.9)
    page = Page(kf.trace_page(results, model="/llms/llama-8b"))
    assert page.inside("h2") == ["By the role of the token", "Fact by fact"]
    assert page.inside("body")[0] == "6 traces of 3 facts in llama-8b, noise 0.1 on the subjects' embeddings."
    mean = kf.average(results)["mlp"]
    said = cells(page, "average-mlp")
    assert len(said) == 6 * 12
    assert said[2 * 12 + 4] == (
        f"last subject token, layer 4: mean effect {mean.mean[2, 4]:.3f} ± {mean.stderr[2, 4]:.3f}, 3 tokens; "
        "reliability of a fact's trace 0.90"
    )
    names = [a["name"] for a in page.all("input")]
    assert names.index("average-mlp-0") < names.index("fact-0-0-0")
    one_token = make(tokens=("Rome", " is"), span=(0, 1))
    both = kf.trace_page([one_token, make(tokens=("Oslo", " is"), span=(0, 1), fact=Fact("{} is", "Oslo"))])
    assert cells(Page(both), "average-state-1")[0] == "middle subject tokens, layer 0: no fact has such a token"


def test_a_page_of_many_facts_stays_small_and_says_how_many_are_drawn(monkeypatch):
    many = facts(100, layers=30)
    text = kf.trace_page(many)
    assert "10 of 100 facts are drawn, the first ones." in text and len(text) < 700_000
    assert len({a["name"].split("-")[1] for a in Page(text).all("input") if a["name"].startswith("fact")}) == 10
    assert "All 3 facts are drawn." in kf.trace_page(facts(3))
    assert "0 of 3 facts are drawn" in kf.trace_page(facts(3), most=0)
    monkeypatch.setattr(pages, "MOST_CELLS", 250)
    assert "2 of 3 facts are drawn" in kf.trace_page(facts(3))  # 120 cells each
    monkeypatch.setattr(pages, "MOST_CELLS", 1)
    assert "1 of 3 facts are drawn" in kf.trace_page(facts(3))
    monkeypatch.setattr(pages, "MOST_ROWS", 2)
    assert "The first 2 of 3 facts" in kf.trace_page(facts(3))


def test_what_prompts_hold_is_escaped():
    fact = Fact("{} is in", EVIL)
    results = [make(fact=fact, answer=EVIL, tokens=(EVIL, *make().tokens[1:])), make(fact=Fact("{} is", "Rome"))]
    text = kf.trace_page(results, model=EVIL)
    page = Page(text)
    assert not page.all("script") and "\x1b" not in text and "<script>" not in text
    assert any("<script>" in a["aria-label"] for a in page.all("input"))


def test_a_page_of_nothing_and_of_what_cannot_be_averaged_is_refused(tmp_path):
    refused("is empty; expected TraceResults", kf.trace_page, [])
    refused("expected TraceResults", kf.trace_page, [3], error=TypeError)
    refused("differ in metric", kf.trace_page, [make(), make(metric="logprob")])
    refused("expected a path", kf.trace_page, [make()], 3, error=TypeError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"p_corrupted": 0.7}, {"noise": None}, {"metric": "logprob", "p_clean": -0.3}])
def test_a_trace_of_any_kind_has_a_page(changes):
    page = Page(make(**changes).to_html())
    assert page.inside("h2") == ["Where it is strongest", "The fact"] and len(page.all("input")) == 60


def test_what_must_be_known_of_the_facts_is_said():
    """Once a fact, whatever its kinds."""
    true = [
        Fact("{} is in", "The Eiffel Tower", target_true=answer)
        for answer in ("Paris", "Parisian suburbs", "Rome", None)
    ]
    results = [make(kind, fact=fact) for fact in true for kind in ("state", "mlp")]
    (said,) = doubts(results)
    assert said == "1 of 4 facts: traced is not target_true: 'The Eiffel Tower is in': ' Paris', not 'Rome'"
    assert f"Note: {html.escape(said)}." in kf.trace_page(results)
    lost = [make(fact=fact, p_corrupted=0.7) for fact in facts_of(5)]
    (said,) = doubts(lost)
    assert said.startswith(
        "5 of 5 facts: corruption takes nothing from the answer, so cells say nothing: 'Tower 0 is in'"
    )
    assert said.endswith("' Paris' 0.7, corrupted 0.7; and 2 more")
    assert doubts(facts(2)) == []
