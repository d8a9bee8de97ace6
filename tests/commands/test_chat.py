"""--chat on the command line: facts asked as the users of an instruct model ask, from trace to gate."""

import json

import pytest

import kedit_fast as kf
from kedit_fast.basics.printing import escaped
from kedit_fast.commands import cli
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.tokens import asked
from tests.commands.cases import FAST, save_tiny

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"
FACT = ["--prompt", "{} is in the city of", "--subject", "Big Ben"]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model's folder with a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    save_tiny(folder)
    named = folder / "tokenizer_config.json"
    named.write_text(json.dumps(json.loads(named.read_text()) | {"chat_template": TEMPLATE}))
    return str(folder)


def test_a_fact_in_a_chat_from_edit_to_gate(chatty, work, capsys):
    (work / "memit.json").write_text(json.dumps(FAST | {"layers": [1, 2], "mom2_adjustment": False}))
    options = ["--model", chatty, "--quiet"]
    how = ["--hparams", "memit.json", "--chat", "--system", "Be brief."]
    assert cli.main(["edit", *FACT, "--target", "Rome", *how, *options]) == 0
    edit = Edit.load("edit.safetensors")
    assert edit.facts[0].chat == (("system", "Be brief."),)
    assert edit.provenance["written"]["attached"] == [False]  # the template puts a space before an answer
    capsys.readouterr()
    assert cli.main(["eval", "edit.safetensors", "-o", "report.json", *options]) == 0
    shown = capsys.readouterr().out
    assert "1 fact, asked in a chat, edited by memit" in shown and "1 fact, edited by memit" in shown
    report = kf.EvalReport.load("report.json")
    assert report.facts[0].chat and not report.other.facts[0].chat
    assert cli.main(["gate", "edit.safetensors", "--no-builtin", "-o", "gate.json", *options]) == 1
    answers = json.loads((work / "gate.json").read_text())["answers"]
    assert {answer["kind"] for answer in answers} == {"rewrite prompt", "asked plainly"}
    assert cli.main(["gate", "edit.safetensors", "--chat", "--no-builtin", "-o", "again.json", *options]) == 1
    assert json.loads((work / "again.json").read_text())["answers"][0]["kind"] == "rewrite prompt"


def test_a_question_is_traced_and_answered(chatty, work, capsys):
    options = ["--model", chatty, "--quiet"]
    assert cli.main(["trace", *FACT, "--chat", "--kinds", "state", "--samples", "1", *options]) == 0
    lm = kf.open_model(chatty)
    fact = kf.Fact(prompt="{} is in the city of", subject="Big Ben", chat=True)
    record = json.loads((work / "kedit-fast-out" / "trace" / "traces.jsonl").read_text().splitlines()[0])
    assert "".join(record["tokens"]) == asked(lm.tokenizer, fact.text, True)
    capsys.readouterr()
    assert cli.main(["generate", "--chat", "--prompt", "Where is Big Ben?", "--tokens", "5", *options]) == 0
    assert capsys.readouterr().out.rstrip("\n") == escaped(lm.chat("Where is Big Ben?", 5)).rstrip("\n")


def test_what_is_refused(model, chatty, work, capsys):
    for args, message in (
        (["generate", "--prompt", "x", "--system", "Be brief.", "--model", chatty], "--system is a message of a chat"),
        (["generate", "--prompt", "x", "--chat", "--model", model], "has no chat template"),
        (["trace", *FACT, "--chat", "--model", model], "has no chat template"),
    ):
        assert cli.main([*args, "--quiet"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "--prompt", " ", "--model", chatty])
    assert end.value.code == 2 and "argument --prompt: is empty (' '); give it a text" in capsys.readouterr().err
