"""A benchmark of one's own, about 30 lines, from a name on the command line to a report with intervals."""

import dataclasses
import json
import math
from itertools import groupby
from statistics import mean

import pytest

import kedit_fast as kf
from kedit_fast.basics.intervals import PROBABILITY, SHARE, wilson
from kedit_fast.commands import cli
from kedit_fast.evaluation import Benchmark, EvalReport
from tests.conftest import refused, save_tiny
from tests.evaluation.test_evaluate import ask, make_edit, make_lm, make_owned
from tests.tiny import tiny_model

# --- the benchmark: yes or no of each fact of a case, and one question that follows from all of them ------------------


def cases(facts):
    return [tuple(some) for _, some in groupby(facts, lambda fact: fact.provenance["case"])]


def probes(lm, case):
    made = [
        case.probe(lm, fact, f"{fact.text} {answer}. Is that so?", ("Yes", "No"), kind)
        for fact in case.facts
        for kind, answer in (("new", fact.target_new), ("old", fact.target_true))
    ]
    last = case.facts[-1]
    hop = last.provenance["follows"]
    return [*made, case.probe(lm, last, hop["prompt"], (hop["answer"],), "hop", likeliest=True, n_written=4)]


def columns(case, probes, answers, base):
    asked = zip(probes, answers, strict=True)
    right = [(a.p[0] > a.p[1]) == (one.kind == "new") for one, a in asked if one.kind in ("new", "old")]
    hop, before = answers[-1], base[-1]
    written = case.facts[-1].provenance["follows"]["answer"] in hop.text
    return {"judged": mean(right), "hop": hop.p[0], "hop_written": written, "moved": hop.top != before.top}


YES_NO = Benchmark(
    "yes-no",
    {
        "judged": (SHARE, "statements of the case judged rightly"),
        "hop": (PROBABILITY, "P of the answer that follows from all facts"),
        "hop_written": (SHARE, "that answer is in what the model writes"),
        "moved": (SHARE, "the likeliest token there is another"),
        "unasked": (SHARE, "of which this benchmark says nothing"),
    },
    probes,
    columns,
    cases,
    score_of=("judged", "hop"),
)

# --- its proof --------------------------------------------------------------------------------------------------------


def fact(case, subject, new, true, **follows):
    return kf.Fact("{} is in", subject, new, true, provenance={"case": case, **follows})


def hop(prompt, answer):
    return {"follows": {"prompt": prompt, "answer": answer}}


FACTS = (
    fact("tower", "Big Ben", "Rome", "London"),
    fact("tower", "The Louvre", "Spain", "Paris", **hop("Big Ben and The Louvre are in Rome and", "Spain")),
    fact("camera", "Vimeo", "Madrid", "Seattle", **hop("The capital that Vimeo is in is", "Madrid")),
)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(kf.BENCHMARKS, "yes-no", YES_NO)
    save_tiny(tmp_path / "model", tiny_model("llama"))
    return tmp_path


def by_hand(lm, facts):
    """(judged, hop) of a case, one forward a prompt and target."""
    right = []
    for one in facts:
        for answer, so in ((one.target_new, True), (one.target_true, False)):
            prompt = f"{one.text} {answer}. Is that so?"
            right.append((ask(lm, prompt, "Yes")[0] > ask(lm, prompt, "No")[0]) == so)
    follows = facts[-1].provenance["follows"]
    return mean(right), ask(lm, follows["prompt"], follows["answer"])[0], lm.generate(follows["prompt"], 4)


def test_a_benchmark_of_ones_own_on_the_command_line(work, capsys):
    lm = kf.open_model("model")
    edit = make_edit(lm, FACTS)
    edit.save("edit.safetensors")
    files = ["-o", "report.json", "--html", "report.html", "--log", "log.jsonl", "--generate", "2"]
    assert cli.main(["eval", "edit.safetensors", "--benchmark", "yes-no", "--model", "model", *files]) == 0
    shown = capsys.readouterr().out
    report = EvalReport.load("report.json")
    assert "2 cases of 3 facts, edited by by hand" in shown and str(report) in shown
    assert report.meta["benchmark"] == "yes-no" and report.cases == (2, 1) and report.facts == FACTS
    grouped = [FACTS[:2], FACTS[2:]]
    sides = [[by_hand(lm, facts) for facts in grouped]]
    with edit.apply(lm.model):
        sides.append([by_hand(lm, facts) for facts in grouped])
    for columns, want in zip((report.base, report.edited), sides, strict=True):
        assert columns["judged"].tolist() == [judged for judged, _, _ in want]
        assert columns["hop"].tolist() == pytest.approx([p for _, p, _ in want], rel=1e-4)
        answers = [facts[-1].provenance["follows"]["answer"] for facts in grouped]
        written = [answer in text for answer, (_, _, text) in zip(answers, want, strict=True)]
        assert columns["hop_written"].tolist() == written
    assert report.edited["moved"].tolist() == [1, 1] and report.base["moved"].tolist() == [0, 0]
    moved = report.summary()["moved"]["edited"]
    assert moved == pytest.approx((1.0, *wilson(2, 2), 2)) and "1.000 [0.342, 1.000]" in shown
    assert list(report.summary()) == ["score", *YES_NO.metrics] and "unasked" not in shown
    records = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    sides = ("base", "edited")
    for record, other in zip(records, report.to_records(), strict=True):
        for side in sides:
            want, said = ({n: v for n, v in r.pop(side).items() if v is not None} for r in (other, record))
            assert said == pytest.approx(want, rel=1e-6)
        assert record == other
    assert [len(records[0]["facts"]), len(records[0]["generations"])] == [2, 2] and "fact" in records[1]
    page = (work / "report.html").read_text()
    assert "statements of the case judged rightly" in page and "harmonic mean of judged and hop" in page


def test_a_report_is_read_where_its_benchmark_is_not_known(work, monkeypatch):
    report = kf.evaluate(make_lm(), FACTS, benchmark=YES_NO)
    report.save("report.json")
    monkeypatch.delitem(kf.BENCHMARKS, "yes-no")
    again = EvalReport.load("report.json")
    assert str(again) == str(report) and dict(again.metrics) == YES_NO.metrics and again.cases == (2, 1)
    assert cli.main(["eval", "--facts", "builtin", "--benchmark", "yes-no", "--model", "model"]) == 2


def test_a_report_of_before_is_counterfacts(tmp_path):
    report = kf.evaluate(make_lm(), kf.Fact("{} is in", "Big Ben", "Rome", "London", neighborhood=("Big Ben was",)))
    report.save(tmp_path / "report.json")
    record = json.loads((tmp_path / "report.json").read_text())
    for name in ("metrics", "score_of", "cases", "verdict", "notes"):
        del record[name]
    (tmp_path / "report.json").write_text(json.dumps(record))
    assert str(EvalReport.load(tmp_path / "report.json")) == str(report)


def test_what_is_refused(tmp_path):
    lm = make_lm()
    says = "cases of several facts with independent edits"
    refused(says, kf.evaluate, lm, FACTS, make_owned(lm, FACTS), benchmark=YES_NO)
    other = dataclasses.replace(YES_NO, columns=lambda *_: {"other": 1.0})
    says = r"'yes-no' gives \['other'\], which its metrics do not name"
    refused(says, kf.evaluate, lm, FACTS, benchmark=other)
    says = "benchmark = 'yes-no': expected a Benchmark"
    refused(says, kf.evaluate, lm, FACTS, benchmark="yes-no", error=TypeError)
    for changes, says in (
        (
            {"metrics": {"a": ("shares", "x")}},
            "expected \\(one of share, probability, difference, count, amount, text\\)",
        ),
        ({"metrics": {"score": (SHARE, "x")}}, "metric 'score'"),
        ({"score_of": ("judged", "efficacy")}, r"a score of \['efficacy'\]"),
    ):
        refused(says, dataclasses.replace, YES_NO, **changes)


def test_a_long_question_is_refused_before_any_sweep():
    long = dataclasses.replace(FACTS[2], provenance={"case": 1, **hop("Vimeo " * 130, "Madrid")})
    with pytest.raises(ValueError, match=r"fact 'Big Ben is in' and 1 more of its case and 4 new tokens: a text of"):
        kf.evaluate(make_lm("gpt2"), [dataclasses.replace(FACTS[0], provenance={"case": 1}), long], benchmark=YES_NO)


def test_what_nothing_is_asked_of_is_nan():
    """A benchmark that asks nothing: no sweep, and no figure."""
    empty = Benchmark("empty", {"a": (SHARE, "x")}, lambda lm, case: [], lambda *_: {})
    report = kf.evaluate(make_lm(), FACTS, benchmark=empty)
    assert math.isnan(report.base["a"][0]) and report.summary()["a"]["base"].n == 0


def test_facts_of_which_nothing_is_asked_are_passed_over(tmp_path):
    path = tmp_path / "facts.json"
    good = {"prompt": "Big Ben is in", "subject": "Big Ben", "target_new": "Rome"}
    bare = {"prompt": "Big Ben is in", "subject": "Big Ben"}
    benchmark = kf.BENCHMARKS["counterfact"]
    path.write_text(json.dumps([bare, good, {"x": 1}, bare]))
    with pytest.warns(UserWarning) as told:
        (case,) = benchmark.load(path, skip_bad=True)
    assert case.facts[0].target_new == "Rome"
    said = [str(one.message) for one in told]
    assert (
        "passed over, 1 record" in said[0] and "passed over, 2 facts: fact 0 ('Big Ben is in') has neither" in said[1]
    )
    path.write_text(json.dumps([bare]))
    for skip_bad in (True, False):
        refused("fact 0 .* has neither target_new nor target_true", benchmark.load, path, skip_bad=skip_bad)
