"""MeLLo, driven through its hops by a model that says what it is told to; and what a real one is asked."""

import copy
from importlib.resources import files

import pytest

import kedit_fast as kf
from kedit_fast.edits.edit import Edit
from kedit_fast.experiments.mello import FACT, QUESTION, Hop, reasoned
from kedit_fast.model.lm import LM
from tests.commands.cases import run as run_command
from tests.conftest import refused, save_tiny, tiny_lm
from tests.make import make_edit
from tests.tiny import tiny_model

EXAMPLES = files("kedit_fast.experiments").joinpath("mello.txt").read_text(encoding="utf-8")
FACTS = (
    kf.Fact("{} is in the city of", "The Eiffel Tower", "Rome", "Paris"),
    kf.Fact("The capital of {} is", "France", "Madrid", "Paris"),
)
TOWER = "In which country is the city where the Eiffel Tower is?"
MEMORY = ["The Eiffel Tower is in the city of Rome.", "The capital of France is Madrid."]
JUDGED = "the generated answer, so the intermediate answer is:"
WRITES = {  # what the model writes, by the last line of the text that it is given
    f"{QUESTION} {TOWER}": "Subquestion: Where is The Eiffel Tower?\nGenerated answer: It is in Paris.\n"
                           "Retrieved fact: what it makes up",
    f"{FACT} {MEMORY[0]}": f"The retrieved fact contradicts {JUDGED} Rome\n"
                           "Subquestion: Of which country is Rome the capital?\n"
                           "Generated answer: Rome is in Italy.\n\nQuestion: x",
    f"{FACT} {MEMORY[1]}": f" The retrieved fact does not contradict {JUDGED} Italy \n"
                           "Final answer: Italy\nQuestion: what else?\nSubquestion: y",
}  # fmt: skip
HOPS = (
    Hop("Where is The Eiffel Tower?", "It is in Paris.", MEMORY[0], True, "Rome"),
    Hop("Of which country is Rome the capital?", "Rome is in Italy.", MEMORY[1], False, "Italy"),
)


def stub(given):
    """Writes what ``WRITES`` has behind a text's last line; keeps the texts."""

    def write(texts):
        given.extend(texts)
        return [WRITES.get(text.strip().splitlines()[-1], "I do not know.") for text in texts]

    return write


def recall(questions):
    return [MEMORY[0] if "Eiffel" in question else MEMORY[1] for question in questions]


def test_two_hops_to_an_answer():
    given = []
    one, lost = reasoned(stub(given), recall, [TOWER, "What?"])
    assert (one.question, one.answer, one.hops) == (TOWER, "Italy", HOPS)
    assert (lost.answer, lost.hops) == (None, ())
    assert [text.startswith(EXAMPLES) for text in given] == [True] * 4  # both, then the one that goes on
    assert given[-1] == f"{EXAMPLES}\n" + one.text.partition("The retrieved fact does not")[0]
    lines = one.text.splitlines()
    assert lines[0] == f"{QUESTION} {TOWER}" and lines[-1] == "Final answer: Italy" and "what else" not in one.text
    assert [line for line in lines if line.startswith(FACT)] == [f"{FACT} {fact}" for fact in MEMORY]


@pytest.mark.parametrize(("most", "n", "answer"), [(1, 1, None), (2, 2, "Italy"), (9, 2, "Italy")])
def test_hops_are_bounded(most, n, answer):
    given = []
    (one,) = reasoned(stub(given), recall, [TOWER], most)
    assert (len(one.hops), one.answer, len(given)) == (n, answer, n + 1)
    (one,) = reasoned(lambda texts: ["Subquestion: And?\nGenerated answer: x\n"], recall, [TOWER], most)
    assert len(one.hops) == most and one.answer is None and {hop.contradicts for hop in one.hops} == {None}


def test_what_a_model_is_asked(monkeypatch):
    """The nearest of the edit's facts stands behind its answers, whatever the edit changes; a later edit overrules."""
    lm, given = tiny_lm("llama"), []
    write = stub(given)
    monkeypatch.setattr(LM, "generate", lambda self, texts, n: [*write(texts)] if not self.edits and n == 80 else None)
    edit = kf.Edit("ice", {}, lm.fingerprint, FACTS, ())
    assert kf.mello(lm, edit, TOWER)[0].hops[0].fact == MEMORY[0]
    (one,) = kf.mello(lm, [make_edit(lm.model), edit], [TOWER])
    assert one.answer == "Italy" and one.hops == HOPS
    later = Edit("ice", {}, lm.fingerprint, [kf.Fact(FACTS[0].prompt, FACTS[0].subject, "London")], ())
    assert kf.mello(lm, [edit, later], TOWER, retriever="hidden")[0].hops[0].fact.endswith("London.")
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}{% endfor %}<a>"
    given.clear()
    kf.mello(
        kf.open_model(tiny_model("llama"), tokenizer=tokenizer), kf.Edit("ice", {}, "", FACTS, ()), TOWER, chat=True
    )
    assert given[0] == f"<u>{EXAMPLES}\n{QUESTION} {TOWER}\n<a>"


def test_what_cannot_be_asked_is_refused():
    lm = tiny_lm("llama")
    edit = Edit("ice", {}, lm.fingerprint, FACTS, ())
    refused("has no chat template", kf.mello, lm, edit, TOWER, chat=True)
    refused("edit: expected one whose facts have a target_new", kf.mello, lm, Edit("ft", {}, "", (), ()), TOWER)
    refused("max_hops = 0", kf.mello, lm, edit, TOWER, max_hops=0)
    refused("questions is empty", kf.mello, lm, edit, [])
    refused("retriever is empty", kf.mello, lm, edit, TOWER, retriever="")


def test_the_command_shows_the_hops(tmp_path, monkeypatch, capsys):
    model = save_tiny(tmp_path / "model", tiny_model("llama"))
    edit = Edit("ice", {}, kf.open_model(model).fingerprint, FACTS, ())
    edit.save(tmp_path / "edit.safetensors")
    write = stub([])
    monkeypatch.setattr(LM, "generate", lambda self, texts, n: write(texts))
    args = [
        "generate",
        str(tmp_path / "edit.safetensors"),
        "--prompt",
        TOWER,
        "--prompt",
        "What?",
        "--model",
        str(model),
    ]
    assert run_command(*args, "--hops", "4") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        TOWER,
        "  Where is The Eiffel Tower? It is in Paris.",
        f"    fact: {MEMORY[0]}: contradicts, so Rome",
        "  Of which country is Rome the capital? Rome is in Italy.",
        f"    fact: {MEMORY[1]}: does not contradict, so Italy",
        "  answer: Italy",
        "What?",
        "  no answer: the model did not go on in the form of the examples",
    ]
    assert run_command("generate", "--prompt", "What?", "--hops", "4", "--model", str(model)) == 2
    assert "--hops answers with an edit's facts as the memory; name an edit" in capsys.readouterr().err
