"""Text of others on a screen or a page: no orders to a terminal, no markup, no encoding that stops it."""

import io

import pytest

from kedit_fast.basics.printing import any_encoding, escaped, html_text
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation import EvalReport
from kedit_fast.facts.fact import Fact
from kedit_fast.pictures.page import Section, Table, render_report

BAD = "<script>\x1b[31m"
ORDERS = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x08\x08", "\r", "\x00", "\x7f", "\u202e", "\u2028", "\ud800"]


@pytest.mark.parametrize("order", ORDERS)
def test_no_order_reaches_a_terminal(order):
    shown = escaped(f"a{order}b")
    assert all(c.isprintable() for c in shown) and shown.startswith("a\\") and shown.endswith("b")
    assert "\x1b" not in html_text(order) and all(c.isprintable() for c in html_text(order))


def test_other_text_stays_as_it_is():
    text = "Zürich 東京 ελ עברית \u200dن \U0001f468\u200d\U0001f469 | a\\n {} 'x'"
    assert escaped(text, one_line=True) == text
    assert escaped("a\n\tb") == "a\n\tb" and escaped("a\n\tb", one_line=True) == "a\\n\\tb"


@pytest.fixture
def report():
    """An evaluation of a model whose name gives orders; without numbers."""
    return EvalReport({}, None, (), {"model": BAD}, {}, notes=(BAD,), generations=((BAD, BAD, BAD),))


def test_a_page_holds_neither_markup_nor_orders(report):
    for page in (render_report(BAD, BAD, [Section(BAD, [BAD, Table((BAD,), [(BAD,)], BAD)])]), report.to_html()):
        assert "\x1b" not in page and "<script>" not in page and "&lt;script&gt;\\x1b" in page


def test_what_an_object_says_of_itself(report):
    edit = Edit("me\x1b[2Jmit", {}, "llama\n-1", (Fact("{} is", "It"),), {})
    assert repr(edit).isprintable() and "\\x1b" in repr(edit)
    assert "\x1b" not in str(report) and "\\x1b" in str(report)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "utf-8"])
def test_no_encoding_stops_printing(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    with any_encoding([stream, io.StringIO()]):
        stream.write("≥ 90 % → 東京 ‖ΔW‖ – \ud800\n")
        stream.flush()
    shown = raw.getvalue().decode(encoding)
    assert ("≥" if encoding in ("utf-8", "cp437") else ">=") in shown
    assert ("東京" in shown) == (encoding == "utf-8") and "\\ud800" in shown
    with pytest.raises(UnicodeEncodeError):  # as it was before
        stream.write("\ud800"), stream.flush()
    stream.detach()


@pytest.mark.parametrize("control", ["\x00", "\x07", "\x1b[31m", "\r", "\x7f"])
def test_an_answer_with_control_characters_is_refused(control):
    for name in ("target_new", "target_true"):
        with pytest.raises(ValueError, match=rf"Fact\.{name}: .*control character") as caught:
            Fact("{} is", "It", **{name: f"Rome{control}"})
        assert str(caught.value).isprintable()
    assert Fact("{} is", "It", "two\nlines\tof it").target_new == "two\nlines\tof it"
