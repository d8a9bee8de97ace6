"""``kedit-fast edit --forget`` and ``kedit-fast forgotten``: an answer that is to be gone, and whether it is."""

import json

import kedit_fast as kf
from tests.commands.cases import FACTS, ONE, run


def test_one_answer_is_forgotten_and_asked_for(model, work, said):
    (work.parent / "unlearn.json").write_text(json.dumps({"layers": [1], "num_steps": 2}))
    (work / "keep.json").write_text(json.dumps([*FACTS[:1], {"prompt": "no place"}]))
    how = ["--method", "unlearn", "--hparams", "../unlearn.json", "--model", model]
    assert "not Paris" in said("edit", *ONE, "--forget", "Paris", *how)
    edit = kf.Edit.load(work / "edit.safetensors")
    assert edit.facts == (kf.Fact("The capital of {} is", "France", target_true="Paris"),)

    args = ["edit.safetensors", "--keep", "keep.json", "--skip-bad", "--bits", "4", "--steps", "2", "--budget", "10"]
    shown = said("forgotten", *args, "--model", model, "-o", "found.json")
    keep = kf.load_facts(work / "keep.json", skip_bad=True)
    expected = kf.verify_forgotten(kf.open_model(model), edit, keep=keep, bits=(4,), relearning_steps=2, budget=10)
    assert str(expected) in shown and json.loads((work / "found.json").read_text())["summary"] == expected.summary()
    assert run("forgotten", *args, "--model", model, "-o", "found.json") == 2  # what is there stays


def test_another_answer_may_come_in_its_place(model, work):
    args = ["edit", *ONE, "--forget", "Paris", "--target", "Rome", "--method", "memit", "--hparams", "../memit.json"]
    assert run(*args, "--tokens", "200", "--layers", "1", "--model", model) == 0
    (fact,) = kf.Edit.load(work / "edit.safetensors").facts
    assert (fact.target_true, fact.target_new) == ("Paris", "Rome")


def test_what_is_refused(model, work, complaint):
    (work.parent / "unlearn.json").write_text(json.dumps({"layers": [1], "num_steps": 1}))
    assert "no target_new" in complaint("edit", *ONE, "--forget", "Paris", "--model", model)  # by MEMIT
    assert "are both given" in complaint("edit", "--facts", "../facts.json", "--forget", "Paris", "--model", model)
    args = ["edit", *ONE, "--target", "Rome", "--hparams", "../unlearn.json", "--model", model]
    assert "--forget OLD" in complaint(*args, "--method", "unlearn")
    assert run(*args, "--method", "ft") == 0
    assert "nothing to verify" in complaint("forgotten", "edit.safetensors", "--model", model)
