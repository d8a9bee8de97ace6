"""What a capability run came to: shown, saved, and its page."""

import json
import math

from kedit_fast.basics.intervals import Interval
from kedit_fast.evaluation.scores import Capability, Score
from tests.conftest import refused


def made_up(**meta):
    difference = Interval(-0.1, -0.3, 0.1, 20)
    scores = {
        "talk <b>": {"acc": Score(0.5, 0.1, 0.4, 0.1, difference, 20, True)},
        "text": {"word_perplexity": Score(20.0, math.nan, 21.5, math.nan, difference._replace(n=0), 3, False)},
    }
    return Capability(scores, {"model": "tiny", "method": "rome", "note": "a note", "harness": "0.4", **meta})


def test_it_is_shown_and_saved(tmp_path):
    found = made_up()
    shown = str(found)
    for text in (
        "tiny: lm-evaluation-harness 0.4, edited by rome",
        "0.400 ± 0.100",
        "-0.100 [-0.300, +0.100]",
        "a note",
    ):
        assert text in shown
    found.save(tmp_path / "c.json")
    again = Capability.load(tmp_path / "c.json")
    assert str(again) == shown and again.meta == found.meta and repr(again) == repr(found)
    page = found.to_html(tmp_path / "c.html")
    assert "talk &lt;b&gt;" in page and page in (tmp_path / "c.html").read_text() and found._repr_html_() == page
    bare = Capability.from_record(made_up(method=None).to_record())
    assert bare.scores["text"]["word_perplexity"].edited is None and "edited" not in str(bare)
    (tmp_path / "c.json").write_text(json.dumps(found.to_record() | {"scores": [{"task": "x"}]}))
    refused("is not one .*; expected kedit_fast.capability, version 1", Capability.load, tmp_path / "c.json")
