"""--chat on the command line: facts asked as the users of an instruct model ask, from trace to gate."""

import json

import pytest

import kedit_fast as kf
from kedit_fast.basics.printing import escaped
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.tokens import asked
from tests.commands.cases import FAST
from tests.conftest import save_tiny
from tests.tiny import tiny_model

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"
FACT = ["--prompt", "{} is in the city of", "--subject", "Big Ben"]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model's folder with a chat template."""
    folder = save_tiny(tmp_path_factory.mktemp("chatty"), tiny_model("llama"))
    named = folder / "tokenizer_config.json"
    named.write_text(json.dumps(json.loads(named.read_text()) | {"chat_template": TEMPLATE}))
    return str(folder)


def test_a_fact_in_a_chat_from_edit_to_gate(chatty, work, said):
    (work / "memit.json").write_text(json.dumps(FAST | {"layers": [1, 2], "mom2_adjustment": False}))
    options = ["--model", chatty, "--quiet"]
    how = ["--hparams", "memit.json", "--chat", "--system", "Be brief."]
    said("edit", *FACT, "--target", "Rome", *how, *options)
    edit = Edit.load("edit.safetensors")
    assert edit.facts[0].chat == (("system", "Be brief."),)
    assert edit.provenance["written"]["attached"] == [False]  # the template puts a space before an answer
    shown = said("eval", "edit.safetensors", "-o", "report.json", *options)
    assert "1 fact, asked in a chat, edited by memit" in shown and "1 fact, edited by memit" in shown
    report = kf.EvalReport.load("report.json")
    assert report.facts[0].chat and not report.other.facts[0].chat
    said("gate", "edit.safetensors", "--no-builtin", "-o", "gate.json", *options, status=1)
    answers = json.loads((work / "gate.json").read_text())["answers"]
    assert {answer["kind"] for answer in answers} == {"rewrite prompt", "asked plainly"}
    said("gate", "edit.safetensors", "--chat", "--no-builtin", "-o", "again.json", *options, status=1)
    assert json.loads((work / "again.json").read_text())["answers"][0]["kind"] == "rewrite prompt"


def test_a_question_is_traced_and_answered(chatty, work, said):
    options = ["--model", chatty, "--quiet"]
    said("trace", *FACT, "--chat", "--kinds", "state", "--samples", "1", *options)
    lm = kf.open_model(chatty)
    fact = kf.Fact(prompt="{} is in the city of", subject="Big Ben", chat=True)
    record = json.loads((work / "kedit-fast-out" / "trace" / "traces.jsonl").read_text().splitlines()[0])
    assert "".join(record["tokens"]) == asked(lm.tokenizer, fact.text, True)
    shown = said("generate", "--chat", "--prompt", "Where is Big Ben?", "--tokens", "5", *options)
    assert shown.rstrip("\n") == escaped(lm.chat("Where is Big Ben?", 5)).rstrip("\n")


def test_what_is_refused(model, chatty, work, complaint):
    for args, message in (
        (["generate", "--prompt", "x", "--system", "Be brief.", "--model", chatty], "--system is a message of a chat"),
        (["generate", "--prompt", "x", "--chat", "--model", model], "has no chat template"),
        (["trace", *FACT, "--chat", "--model", model], "has no chat template"),
        (["generate", "--prompt", " ", "--model", chatty], "argument --prompt: is empty (' '); give it a text"),
    ):
        assert message in complaint(*args, "--quiet")
