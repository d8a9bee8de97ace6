"""``kedit-fast compare``: methods, edit files and reports on the same facts, and how it fails."""

import json

import pytest
import torch

import kedit_fast as kf
from kedit_fast.commands import compare as command
from kedit_fast.commands.compare import read_report
from kedit_fast.evaluation.compare import Comparison
from tests.commands.cases import FACTS, run
from tests.make import killed_at, make_edit, watched

QUICK = dict(v_num_grad_steps=2, context_template_length_params=((4, 2),), mom2_adjustment=False, layers=(1,))
ASKED = [
    fact | {"rephrase_prompt": f"It is so: {fact['prompt'].format(fact['subject'])}",
            "portability": {"one_hop": {"prompt": f"{fact['subject']} is in the country of", "ground_truth": "Spain"}}}
    for fact in FACTS
]  # fmt: skip
COMPARE = ("compare", "--facts", "../facts.json", "--benchmark", "knowedit", "--generate", 2, "--quiet")


@pytest.fixture
def work(work, tmp_path, monkeypatch):
    """With facts of more fields, and quick settings of some methods."""
    (tmp_path / "facts.json").write_text(json.dumps(ASKED))
    for name in ("rome", "memit"):
        made = kf.EDITORS[name](**QUICK)
        monkeypatch.setattr(kf.EDITORS[name], "for_model", lambda lm, made=made: made)
    return work


def easyedit(path, post):
    request = [
        {"prompt": fact["prompt"].format(fact["subject"]), "subject": fact["subject"], "target_new": fact["target_new"],
         "rephrase_prompt": fact["rephrase_prompt"], "portability": fact["portability"], "locality": {}}
        for fact in ASKED
    ]  # fmt: skip
    records = [{"case_id": i, "requested_rewrite": one, "pre": {"rewrite_acc": [0.0]}, "post": post}
               for i, one in enumerate(request)]  # fmt: skip
    path.write_text(json.dumps(records))


def test_methods_an_edit_and_reports(model, work, said, monkeypatch):
    lm = kf.open_model(model)
    by_hand = make_edit(lm.model, facts=kf.load_facts("../facts.json"))
    by_hand.save("by-hand.safetensors")
    evaluated = kf.BENCHMARKS["knowedit"].load("../facts.json")
    kf.evaluate(lm, evaluated, by_hand, benchmark=kf.BENCHMARKS["knowedit"], generate=2).save("report.json")
    asked = watched(monkeypatch, command, "evaluate")
    given = ("by-hand.safetensors", "report.json", "--methods", "rome,memit,ike-plain", "--against", "memit")
    shown = said(*COMPARE, *given, "--model", model, "-o", "c.json", "--html", "c.html", "--modes", "token,p")
    found = Comparison.load("c.json")
    assert list(found.sides) == ["rome", "memit", "ike-plain", "by-hand", "report"] and found.against == "memit"
    assert len(asked) == 4 and all(name in shown for name in found.sides) and "reasoning.token" in shown
    assert "rewrite.p" in shown and "rewrite.match" not in shown and not found.notes
    for metric in found.metrics:  # the same edit, made known in two ways
        assert torch.allclose(found.sides["by-hand"][metric], found.sides["report"][metric], 1e-4, 1e-7, True)
    memit = kf.Memit(**QUICK).edit(lm, kf.load_facts("../facts.json"))
    want = kf.evaluate(lm, evaluated, memit, benchmark=kf.BENCHMARKS["knowedit"], generate=2)
    assert torch.allclose(found.sides["memit"]["rewrite.p"], want.edited["rewrite.p"], 1e-4)
    assert torch.allclose(found.base["rewrite.p"], want.base["rewrite.p"], 1e-4)
    page = (work / "c.html").read_text()
    assert "Paired differences to memit" in page and "in the other modes" in page


def test_reports_alone_need_no_model(work, said, complaint, model):
    easyedit(work / "theirs.json", {"rewrite_acc": [1.0], "rephrase_acc": [0.5]})
    lm = kf.open_model(model)
    made = kf.evaluate(lm, kf.load_facts("../facts.json"), kf.Rome(**QUICK).edit(lm, kf.load_facts("../facts.json")),
                       benchmark=kf.BENCHMARKS["knowedit"])  # fmt: skip
    made.save("ours.json")
    shown = said("compare", "ours.json", "theirs.json", "-o", "both.json", "--model", "none-is-read")
    assert "rewrite.token" in shown and "left out, of ours alone: rewrite.success" in shown
    assert list(Comparison.load("both.json").metrics) == ["rewrite.token", "paraphrase.token"]
    assert "theirs.json would replace a file that is compared" in complaint(
        "compare", "ours.json", "theirs.json", "-o", "theirs.json", "--force"
    )
    assert "expected some of token" in complaint("compare", "ours.json", "theirs.json", "--modes", "match")


def test_files_are_told_apart(work):
    easyedit(work / "results.json", {"rewrite_acc": [1.0]})
    assert read_report("results.json").edited["rewrite.token"].tolist() == [1, 1]
    (work / "lines.jsonl").write_text("\n".join(map(json.dumps, json.loads((work / "results.json").read_text()))))
    assert len(read_report("lines.jsonl").facts) == 2
    (work / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is not a saved report"):
        read_report("other.json")


def test_a_method_that_breaks_down_is_left_out(model, work, said, complaint, monkeypatch):
    def broken(*args, **options):
        raise ValueError("the loss of fact 1 is NaN")

    monkeypatch.setattr(kf.Rome, "edit", broken)
    given = (*COMPARE, "--model", model, "-o", "c.json", "--against", "rome")
    shown = said(*given, "--methods", "rome,memit,ike-plain")
    assert "rome is left out: the loss of fact 1 is NaN" in shown and "difference to memit" in shown
    assert "rome: the loss of fact 1 is NaN" in complaint(*given, "--methods", "rome,memit", "--force")


def test_a_killed_run_goes_on_to_the_same_bits(model, work, said):
    given = (*COMPARE, "--methods", "rome,memit", "--model", model)
    assert run(*given, "-o", "whole.json") == 0
    for n in (2, 5, 8):
        with killed_at(n):
            run(*given, "-o", f"c{n}.json")
        assert (work / f"c{n}.json.run").is_dir() and run(*given, "-o", f"c{n}.json") == 0
        assert json.loads((work / f"c{n}.json").read_text()) == json.loads((work / "whole.json").read_text())
        assert not (work / f"c{n}.json.run").exists()


@pytest.mark.parametrize(
    "args, says",
    [
        ((), "compare what? name two or more of: methods"),
        (("--methods", "rome"), "compare what?"),
        (("--methods", "rome,nobody"), "--methods 'nobody': expected one of rome, memit"),
        (
            ("--methods", "rome,mend"),
            "--methods mend: a trained network edits; make the edit by `kedit-fast edit --method",
        ),
        (("--methods", "rome,memit", "--benchmark", "none"), "--benchmark 'none': expected one of counterfact"),
        (("--methods", "rome,memit"), "compare on which facts? give --facts FILE"),
        (
            ("--methods", "rome,memit", "--facts", "../facts.json", "--against", "ft"),
            "--against 'ft': expected one of rome",
        ),
        (
            ("--methods", "rome,memit", "--facts", "../facts.json", "--modes", "p"),
            "--modes p: benchmark counterfact has none",
        ),
        (
            ("--methods", "rome,memit", "a/rome.safetensors", "--facts", "../facts.json"),
            "another one is shown as 'rome'",
        ),
        (("--methods", "rome,memit", "--facts", "none.json"), "none.json"),
        (("none.json", "nothing.json"), "none.json: no such file; expected a report"),
        (("none.safetensors", "nothing.json", "--facts", "../facts.json"), "none.safetensors"),
        (("--methods", "rome,memit", "--facts", "../facts.json", "--html", "../facts.json"), "what --facts reads"),
        (("--methods", "rome,memit", "--facts", "../facts.json", "--stats", "s", "--tokens", 3), "are both given"),
    ],
)
def test_errors_leave_nothing_behind(args, says, model, work, complaint):
    assert says in complaint("compare", *args, "--model", model)
    assert not list(work.iterdir())


def test_cases_that_cannot_be_written_are_passed_over(model, work, said, capsys):
    (work.parent / "facts.json").write_text(json.dumps([*ASKED, {"prompt": "Paris is in", "target_true": "France"}]))
    given = (*COMPARE, "--methods", "rome,memit", "--model", model, "-o", "c.json")
    assert run(*given) == 2 and "has no subject" in capsys.readouterr().err
    assert run(*given, "--skip-bad") == 0 and "1 of 3 cases are passed over" in capsys.readouterr().err
    assert len(Comparison.load("c.json").facts) == 2
