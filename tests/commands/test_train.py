"""``kedit-fast train``, and editing by what it made."""

import json

import pytest

from kedit_fast.editors import training as training_module
from kedit_fast.editors.networks import Network
from kedit_fast.edits.edit import Edit
from tests.commands.cases import ONE, run
from tests.make import killed_at, watched

pytestmark = pytest.mark.filterwarnings("ignore:the trained network writes none", "ignore:facts not written")
SUBJECTS = ("Space Needle", "Big Ben", "Vimeo", "Zürich", "Microsoft", "Miles Davis")
QUICK = {"layers": [2, 3], "rank": 4, "max_iters": 3, "val_interval": 1, "batch_size": 2, "edit_lr": 0.01}


@pytest.fixture
def train(work, tmp_path, model):
    """``train(*options)``: the command over a few facts; its exit status."""
    facts = [
        {"prompt": "The {} is in", "subject": subject, "target_new": "Rome", "provenance": {"relation_id": "P1"},
         "paraphrases": [f"{subject} is located in"], "neighborhood": ["The capital of France is"]}
        for subject in SUBJECTS
    ]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(facts))
    (tmp_path / "quick.json").write_text(json.dumps(QUICK))
    given = ["--facts", "../train.json", "--hparams", "../quick.json", "--model", model, "--quiet"]
    return lambda *options: run("train", *given, *options)


def test_a_network_and_an_edit_by_it(train, model, capsys):
    assert train("--steps", 2, "--routed", "-o", "net.safetensors") == 0
    shown = capsys.readouterr().out
    assert "mend, settings read from ../quick.json; layers 2, 3" in shown
    assert "trained on 5 facts; 1 of other subjects held out" in shown and "net.safetensors: Network(mend" in shown
    made = Network.load("net.safetensors")
    assert made.settings["keeps"] == ["same_subject", "answered"] and made.settings["kept_tokens"] == 8
    assert made.settings["max_iters"] == 2 and made.provenance["steps"] == 2
    edit = ["edit", "--method", "mend", *ONE, "--target", "Rome", "--model", model, "--quiet"]
    assert run(*edit, "--network", "net.safetensors", "-o", "edit.safetensors") == 0
    assert f"settings network {made.digest}, trained 2 steps; layers 2, 3" in capsys.readouterr().out
    assert Edit.load("edit.safetensors").hparams["network"] == made.digest
    assert run(*edit, "--network", "net.safetensors", "--layers", "1", "-o", "other.safetensors") == 2
    assert "this network changes" in capsys.readouterr().err


def test_related_prompts_are_the_whole_files(train, work, tmp_path, monkeypatch, capsys):
    """Also of those behind -n; what the network must leave alone is then of the fact's own subject."""
    facts = json.loads((tmp_path / "train.json").read_text())
    for i, fact in enumerate(facts):
        fact["neighborhood"] = []
        fact["prompt"] = ("The {} is in", "The {} stands in")[i % 2]
    other = {"prompt": "{} was built by", "subject": facts[0]["subject"], "target_new": "Paris"}
    facts += [other | {"provenance": {"relation_id": "P2"}, "target_true": "Ada"}]
    (tmp_path / "train.json").write_text(json.dumps(facts))
    seen = watched(monkeypatch, training_module, "examples")
    assert train("--related", "--routed", "-n", 6, "--steps", 1, "-o", "net.safetensors") == 0
    given = [fact for _, some, *_ in seen for fact in some]
    assert len(given) == 6 and all(len(fact.phrasings) == 1 for fact in given)
    assert {question for fact in given for question in fact.same_subject} == {
        f"{f['subject']} was built by" for f in facts[:6]
    }
    shown = capsys.readouterr()
    assert "of 6 facts 6 have phrasings, 6 prompts on other relations" in shown.out
    assert "without same_subject prompts" not in shown.err
    assert train("--routed", "-n", 6, "--steps", 1, "-o", "other.safetensors") == 0
    assert "6 facts without same_subject prompts: what an edit does to these is not" in capsys.readouterr().err


def test_the_same_command_goes_on(train, work):
    assert train("-o", "whole.safetensors") == 0
    with killed_at(3):
        train("-o", "net.safetensors")
    assert (work / "net.safetensors.run").is_dir() and not (work / "net.safetensors").exists()
    assert train("-o", "net.safetensors") == 0
    assert (work / "net.safetensors").read_bytes() == (work / "whole.safetensors").read_bytes()
    assert not (work / "net.safetensors.run").exists()


def test_what_is_refused(train, work, model, complaint):
    assert "which facts? give --facts FILE" in complaint("train", "--model", model)
    net = work / "rome.safetensors"
    edit = ["edit", *ONE, "--target", "Rome", "--model", model, "-o", "edit.safetensors"]
    assert "--network: memit edits without one" in complaint(*edit, "--network", net)
    assert "no such file; expected a network" in complaint(*edit, "--method", "mend", "--network", net)
    assert "Mend needs a --network that was trained" in complaint(*edit, "--method", "mend")
    assert "argument --steps" in complaint("train", "--steps", "0")
    assert not list(work.iterdir())
