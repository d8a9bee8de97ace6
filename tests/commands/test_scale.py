"""``kedit-fast edit``: independent, on top of others, with a checkpoint, and by every editor."""

import json

import pytest

import kedit_fast as kf
from kedit_fast.commands.edit_arguments import METHODS
from kedit_fast.edits.edit import Edit, digest
from tests.commands.cases import run as run_command
from tests.tiny import D_FF

FACTS = [
    {"prompt": "{} is in the city of", "subject": "The Eiffel Tower", "target_new": "Rome"},
    {"prompt": "The capital of {} is", "subject": "France", "target_new": "London"},
    {"prompt": "The capital of {} is", "subject": "England", "target_new": "Paris"},
]
FAST = {
    "rome": {"layers": [1], "v_num_grad_steps": 2, "mom2_adjustment": False},
    "memit": {"layers": [1, 2], "v_num_grad_steps": 2, "mom2_update_weight": D_FF, "mom2_adjustment": False},
    "alphaedit": {"layers": [1], "v_num_grad_steps": 2, "nullspace_threshold": 0.0},
    "ft": {"layers": [1], "num_steps": 2},
    "ft-l": {"layers": [1], "num_steps": 2, "norm_constraint": 0.001},
}


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """``run(method, n, *options)``: the command, its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    for name, fields in FAST.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(fields))

    def edit(method, facts, *options):
        (tmp_path / "facts.json").write_text(json.dumps(facts))
        common = ["--facts", "facts.json", "--hparams", f"{method}.json", "--model", model, "--quiet"]
        return run_command("edit", "--method", method, *common, *options)

    return edit


@pytest.mark.parametrize("method", METHODS)
def test_every_editor(run, method, capsys):
    assert set(METHODS) == set(kf.EDITORS)
    assert run(method, FACTS, "--tokens", 2 * D_FF, "-o", "made.safetensors") == 0
    made = Edit.load("made.safetensors")
    assert made.method == method and len(made.facts) == 3
    shown = capsys.readouterr().out
    assert all(fact["target_new"] in shown for fact in FACTS)


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_independent_facts_may_contradict_each_other(run, model, method, capsys):
    facts = [*FACTS, FACTS[0] | {"target_new": "London"}]
    assert run(method, facts, "-o", "made.safetensors") == 2
    assert "contradict each other" in capsys.readouterr().err
    assert run(method, facts, "--independent", "-o", "made.safetensors") == 0
    made = Edit.load("made.safetensors")
    assert made.independent and len(made.facts) == 4
    assert run_command("eval", "made.safetensors", "--model", model, "-o", "report.json") == 0


def test_on_top_of_others(run):
    assert run("memit", FACTS[:1], "-o", "one.safetensors") == 0
    assert run("memit", FACTS[1:2], "--on-top-of", "one.safetensors", "-o", "two.safetensors") == 0
    below = ["--on-top-of", "one.safetensors", "--on-top-of", "two.safetensors"]
    assert run("rome", FACTS[2:], *below, "-o", "three.safetensors") == 0
    one, two, three = (Edit.load(f"{name}.safetensors") for name in ("one", "two", "three"))
    assert [each["digest"] for each in two.provenance["on_top_of"]] == [digest(one)]
    assert [each["digest"] for each in three.provenance["on_top_of"]] == [digest(one), digest(two)]


def test_a_checkpoint_is_gone_on_with(run, tmp_path, capsys):
    assert run("memit", FACTS, "--checkpoint", "parts", "-o", "one.safetensors") == 0
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert run("memit", FACTS, "--checkpoint", "parts", "-o", "two.safetensors") == 0
    assert kept == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert run("memit", FACTS[:2], "--checkpoint", "parts", "-o", "three.safetensors") == 2
    assert "parts holds other work: its number of facts is 3, this one's 2" in capsys.readouterr().err
    assert not (tmp_path / "three.safetensors").exists()
