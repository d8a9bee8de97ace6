"""The report page: self-contained, escaped, accessible, whole or not written; damage stands beside success."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from kedit_fast.pictures import page as report_page
from kedit_fast.pictures.figure import figure_png
from kedit_fast.pictures.page import Cell, Change, Details, Picture, Section, Table, before_after_table, known_neighbors
from tests.compare import refused

FIRST = "This model is SmolLM2-135M-Instruct de-quantised from a 4-bit file"
VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """Every start tag with its attributes, every text with the tags around it; fails on unbalanced tags."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((tuple(self.open), data))

    def all(self, tag) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]

    def inside(self, tag) -> list[str]:
        return [text for around, text in self.texts if tag in around]


def page_of(tmp_path, *blocks, title="A title", first_line=FIRST) -> Page:
    report_page.write_report(tmp_path / "report.html", title, first_line, [Section("Heading", blocks)])
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def figure() -> Figure:
    made = Figure(figsize=(2, 1), dpi=100)
    made.subplots().set_title("Loss")
    return made


def test_the_first_line_of_the_body_stands_above_the_title(tmp_path):
    page = page_of(tmp_path, "words")
    assert page.inside("body")[:4] == [FIRST, "A title", "Heading", "words"]
    assert page.inside("title") == ["A title"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]


def test_nothing_is_fetched_from_elsewhere(tmp_path):
    page = page_of(tmp_path, Picture(figure(), "caption"), Picture(figure_png(figure())), Details("more", ["text"]))
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attrs.get(name, "data:").startswith("data:")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    style = "".join(page.inside("style"))
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert(\"1\")</script> & <b>'x'"
    table = Table([evil, "n"], [[evil, Cell(evil, "bad")]], caption=evil)
    picture = Picture(figure_png(figure()), caption=evil, alt=evil)
    page = page_of(tmp_path, evil, table, picture, Details(evil, [evil]), title=evil, first_line=evil)
    assert not page.all("script") and not page.all("b")
    assert [text for _, text in page.texts].count(evil) == 11
    assert page.all("img")[0]["alt"] == evil
    assert next(a["aria-label"] for a in page.all("div")) == evil
    page_of(tmp_path, "half \ud83d of a pair")  # is written as well


def test_numbers_stand_on_the_right_and_text_on_the_left(tmp_path):
    rows = [["layer 3", 1536, 0.25, "0.1 → 0.9", np.float32(0.0001)], ["layer 4", 12, float("nan"), "–", None]]
    page = page_of(tmp_path, Table(["name", "width", "p", "change", "small"], rows))
    classes = [a.get("class") for tag, a in page.tags if tag in ("th", "td")]
    assert classes == [None, "number", "number", "number", "number"] * 3
    assert page.inside("tbody") == ["layer 3", "1,536", "0.250", "0.1 → 0.9", "<0.001", "layer 4", "12", "–", "–", "–"]
    with_a_word = page_of(tmp_path, Table(["a", "b"], [["x", 1], ["y", "many"]]))
    assert not any(a.get("class") for a in with_a_word.all("td"))


def test_headers_have_a_scope_and_tones_a_class(tmp_path):
    table = Table(["a", "b"], [["x", Cell("kept", "good")], ["y", Cell(0.5, "bad")]], caption="Two rows")
    page = page_of(tmp_path, table)
    assert [a["scope"] for a in page.all("th")] == ["col", "col", "row", "row"]
    assert [a["class"] for a in page.all("td")] == ["good", "bad"]
    assert [a["data-column"] for a in page.all("td")] == ["b", "b"]  # what a narrow screen shows beside the value
    assert page.inside("caption") == ["Two rows"]
    assert page_of(tmp_path, Table(["a", "b"], [])).inside("thead") == ["a", "b"]


def test_pictures_carry_their_data_an_alt_text_and_a_caption(tmp_path):
    png = figure_png(figure())
    page = page_of(tmp_path, Picture(figure(), "By step"), Picture(png, "By step"), Picture(png, alt="Other words"))
    assert [a["alt"] for a in page.all("img")] == ["Loss", "By step", "Other words"]
    assert all(base64.b64decode(a["src"].removeprefix("data:image/png;base64,")) == png for a in page.all("img"))
    assert page.inside("figcaption") == ["By step", "By step"]


def test_details_hold_blocks(tmp_path):
    page = page_of(tmp_path, Details("Settings", ["inside", Table(["a"], [["b"]])]))
    assert page.inside("details") == ["Settings", "inside", "a", "b"]
    assert page.inside("summary") == ["Settings"]


def test_mistakes_are_named_and_leave_the_old_page_whole(tmp_path):
    page_of(tmp_path, "old")
    for block, error in ((3.5, TypeError), (Picture(b"GIF89a"), ValueError), (Details("x", [None]), TypeError)):
        with pytest.raises(error):
            page_of(tmp_path, "new", block)
    given = (tmp_path / "report.html", "t", "f", ["text"])
    refused("expected a Section, got str", report_page.write_report, *given, error=TypeError)
    assert "old" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    refused("has 1 cells under 2 headers", Table, ["a", "b"], [["x"]])
    refused("cell tone 'green'", Cell, 1, "green")


def test_a_failed_write_leaves_no_file_behind(tmp_path, monkeypatch):
    page_of(tmp_path, "old")
    monkeypatch.setattr("kedit_fast.basics.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    refused("disk full", page_of, tmp_path, "new", error=OSError)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "old" in (tmp_path / "report.html").read_text(encoding="utf-8")


# ---- what an edit changed

FACT = Change("The Eiffel Tower is in", "Paris", (0.656, 0.0004), "Rome", (0.001, 0.99))
MISSED = Change("Where is the Eiffel Tower?", "Paris", (0.4, 0.3), "Rome", (0.01, 0.2), "paraphrase")
DAMAGED = Change("The Louvre is in", "Paris", (0.6, 0.1), "Rome", (0.01, 0.3), "neighbor")
WEAKENED = Change("Notre-Dame is in", "Paris", (0.6, 0.29), "Rome", (0.01, 0.02), "neighbor")
KEPT = Change("The Panthéon is in", "Paris", (0.6, 0.31), "Rome", (0.01, 0.02), "neighbor")
UNKNOWN = Change("The Moulin is in", "Paris", (0.01, 0.01), "Rome", (0.02, 0.5), "neighbor")
UNMEASURED = Change("Big Ben is in", "London", (0.6, None), "Rome", (0.02, 0.5), "neighbor")


def test_outcomes():
    outcomes = {
        FACT: ("written", "good"),
        MISSED: ("not written", "bad"),
        DAMAGED: ("damaged", "bad"),
        WEAKENED: ("weakened", "bad"),
        KEPT: ("kept", "good"),
        UNKNOWN: ("not known before", "neutral"),
        UNMEASURED: ("not measured", "neutral"),
    }
    assert {change: (change.outcome.value, change.outcome.tone) for change in outcomes} == outcomes


def test_damage_stands_as_plainly_as_success(tmp_path):
    table = before_after_table([KEPT, DAMAGED, UNMEASURED, FACT, WEAKENED, MISSED, UNKNOWN])
    assert table.caption == (
        "1 of 1 facts written; 0 of 1 paraphrases written; of 3 neighbors known before: 1 damaged, 1 weakened, 1 kept; "
        "mean p(old) over these prompts 0.600 → 0.233."
    )
    assert [row[1] for row in table.rows] == ["edit", "paraphrase"] + ["neighbor"] * 5
    assert table.rows[0][:6] == (FACT.prompt, "edit", "Paris", "0.656 → <0.001", "Rome", "0.001 → 0.990")
    page = page_of(tmp_path, table)
    tones = re.findall(r"good|bad|neutral", " ".join(a.get("class", "") for a in page.all("td")))
    assert tones == ["good", "bad", "good", "bad", "neutral", "bad", "neutral"]


def test_known_neighbors_are_counted_each_prompt_once():
    found = known_neighbors([KEPT, DAMAGED, UNMEASURED, FACT, WEAKENED, MISSED, UNKNOWN])
    assert found[:4] == (3, 1, 1, 1) and found.p_old == pytest.approx((0.6, (0.31 + 0.1 + 0.29) / 3))
    none = known_neighbors([FACT, UNKNOWN])
    assert none[:4] == (0, 0, 0, 0) and all(p != p for p in none.p_old)


def test_missing_neighbors_are_said_to_be_missing():
    assert before_after_table([FACT]).caption == "1 of 1 facts written; no neighbors measured."
    assert before_after_table([FACT, UNKNOWN]).caption.endswith("none of 1 neighbors known before or measured.")
    refused("role 'neighbour'", Change, "x", "a", (0, 0), "b", (0, 0), "neighbour")
