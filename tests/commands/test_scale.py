"""``kedit-fast edit``: independent, on top of others, with a checkpoint, and by every editor."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import kedit_fast as kf
from kedit_fast.basics.catalog import TRAINED
from kedit_fast.basics.parts import Parts
from kedit_fast.commands.edit_arguments import METHODS
from kedit_fast.edits.edit import Edit, digest
from tests.commands.cases import run as run_command
from tests.editors.test_serac import examples as scope_examples
from tests.make import killed_at, watched
from tests.tiny import D_FF

FACTS = [
    {"prompt": "{} is in the city of", "subject": "The Eiffel Tower", "target_new": "Rome", "target_true": "Paris"},
    {"prompt": "The capital of {} is", "subject": "France", "target_new": "London"},
    {"prompt": "The capital of {} is", "subject": "England", "target_new": "Paris"},
]
FAST = {
    "rome": {"layers": [1], "v_num_grad_steps": 2, "mom2_adjustment": False},
    "memit": {"layers": [1, 2], "v_num_grad_steps": 2, "mom2_update_weight": D_FF, "mom2_adjustment": False},
    "alphaedit": {"layers": [1], "v_num_grad_steps": 2, "nullspace_threshold": 0.0},
    "emmet": {"layers": [1], "v_num_grad_steps": 2, "mom2_update_weight": D_FF, "mom2_adjustment": False},
    "encore": {"layers": [1, 2], "v_num_grad_steps": 2, "mom2_update_weight": D_FF, "mom2_adjustment": False},
    "pmet": {"layers": [1, 2], "v_num_grad_steps": 2, "mom2_update_weight": D_FF, "mom2_adjustment": False},
    "memit-blue": {"layers": [1, 2], "v_num_grad_steps": 2, "mom2_update_weight": D_FF, "mom2_adjustment": False},
    "alphaedit-blue": {"layers": [1, 2], "v_num_grad_steps": 2, "nullspace_threshold": 0.0},
    "betaedit": {"layers": [1], "v_num_grad_steps": 2, "nullspace_threshold": 0.0},
    "rect": {"layers": [1, 2], "v_num_grad_steps": 2, "mom2_update_weight": D_FF, "mom2_adjustment": False},
    "nas": {"layers": [1, 2], "v_num_grad_steps": 2, "mom2_update_weight": D_FF, "mom2_adjustment": False},
    "grace": {"layers": [1], "n_iter": 2},
    "wise": {"layers": [1], "n_iter": 2, "batch_size": 9, "context_template_length_params": [[3, 1]]},
    "memoir": {"layers": [1], "n_iter": 2, "top_k": 20, "batch_size": 9},
    "kn": {"layers": [1], "steps": 2},
    "ft": {"layers": [1], "num_steps": 2},
    "ft-l": {"layers": [1], "num_steps": 2, "norm_constraint": 0.001},
    "ft-m": {"layers": [1], "num_steps": 2},
    "locft-bf": {"layers": [1], "num_steps": 2, "batch_size": 2},
    "ultraedit": {"layers": [1, 2], "roles": ["gate+up"]},
    "stableedit": {"layers": [1, 2]},
    "crispedit": {"layers": [1, 2], "num_steps": 2},
    "ike": {"k": 2},
    "ike-plain": {},
    "ice": {},
    "serac": {"layer": 1, "steps": 2},
    "mend": {"network": "mend.safetensors"},
    "malmen": {"network": "malmen.safetensors"},
    "ke": {"network": "ke.safetensors"},
    "unlearn": {"layers": [1], "num_steps": 2},
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


@pytest.mark.filterwarnings("ignore:the trained network writes none", "ignore:3 subjects of these facts")
@pytest.mark.parametrize("method", METHODS)
def test_every_editor(run, model, method, capsys):
    assert set(METHODS) == set(kf.EDITORS)
    if method in TRAINED:
        training = {"layers": [2, 3], "max_iters": 1, "val_interval": 1}
        training |= {"condition_dim": 8, "hidden_dim": 4} if method == "ke" else {"rank": 4}
        Path("training.json").write_text(json.dumps(training))
        Path("facts.json").write_text(json.dumps(FACTS))
        given = ["--facts", "facts.json", "--hparams", "training.json", "--model", model, "--quiet"]
        assert run_command("train", "--method", method, *given, "-o", f"{method}.safetensors") == 0
    assert run(method, FACTS, "--tokens", 2 * D_FF, "-o", "made.safetensors") == 0
    made = Edit.load("made.safetensors")
    assert made.method == method and len(made.facts) == 3
    shown = capsys.readouterr().out
    assert all(fact["target_new"] in shown for fact in FACTS)


def test_facts_to_forget_need_no_new_answer(run, capsys):
    """Beside one that is kept, by its new answer; an editor that writes answers says what is missing."""
    facts = [{"prompt": "The capital of {} is", "subject": "France", "target_true": "Paris"}, FACTS[2]]
    assert run("unlearn", facts, "-o", "made.safetensors") == 0
    assert "not Paris" in capsys.readouterr().out
    assert [fact.target_new for fact in Edit.load("made.safetensors").facts] == [None, "Paris"]
    assert run("memit", facts, "-o", "other.safetensors") == 2
    assert "has no target_new; an edit needs the answer to write" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_independent_facts_may_contradict_each_other(run, model, method, capsys):
    facts = [*FACTS, FACTS[0] | {"target_new": "London"}]
    assert run(method, facts, "-o", "made.safetensors") == 2
    assert "contradict each other" in capsys.readouterr().err
    assert run(method, facts, "--independent", "-o", "made.safetensors") == 0
    made = Edit.load("made.safetensors")
    assert made.independent and len(made.facts) == 4
    assert run_command("eval", "made.safetensors", "--model", model, "-o", "report.json") == 0


def test_a_route_around_an_editor(run, model, tmp_path, capsys):
    examples = tmp_path / "examples.json"
    examples.write_text(json.dumps([fact.to_record() for fact in scope_examples()]))
    assert run("memit", FACTS, "--independent", "-o", "alone.safetensors") == 0
    assert run("memit", FACTS, "--route", "names", "-o", "named.safetensors") == 0
    assert run("memit", FACTS, "--route", "scope", "--examples", examples, "-o", "scoped.safetensors") == 0
    alone, named, scoped = (Edit.load(f"{name}.safetensors") for name in ("alone", "named", "scoped"))
    assert digest(replace(named, route=None)) == digest(replace(scoped, route=None)) == digest(alone)
    assert (named.route.kind, scoped.route.kind) == ("retrieval", "scope")
    assert 0 < scoped.provenance["scope"]["examples"] <= 12 and named.hparams == alone.hparams
    assert digest(kf.routed(kf.open_model(model), alone, "names")) == digest(named)
    capsys.readouterr()
    for options, says in (
        (("memit", "--examples", examples), "--examples .*: a scope is learned from them; add --route scope"),
        (("memit", "--route", "names", "--examples", examples), "add --route scope"),
        (("grace", "--route", "names"), "--route names: grace makes no independent edits to choose from"),
        (("memit", "--route", "scope", "--examples", "facts.json"), "--examples 'facts.json': .*lack one of these"),
    ):
        assert run(options[0], FACTS, *options[1:], "-o", "none.safetensors") == 2
        assert re.search(says, capsys.readouterr().err) and not Path("none.safetensors").exists()


def test_on_top_of_others(run):
    assert run("memit", FACTS[:1], "-o", "one.safetensors") == 0
    assert run("memit", FACTS[1:2], "--on-top-of", "one.safetensors", "-o", "two.safetensors") == 0
    below = ["--on-top-of", "one.safetensors", "--on-top-of", "two.safetensors"]
    assert run("rome", FACTS[2:], *below, "-o", "three.safetensors") == 0
    one, two, three = (Edit.load(f"{name}.safetensors") for name in ("one", "two", "three"))
    assert [each["digest"] for each in two.provenance["on_top_of"]] == [digest(one)]
    assert [each["digest"] for each in three.provenance["on_top_of"]] == [digest(one), digest(two)]


def test_the_same_command_goes_on_after_an_interruption(run, tmp_path, capsys):
    """Beside the output, or where --checkpoint says; with the same bits, and nothing is left of the run."""
    assert run("memit", FACTS, "-o", "whole.safetensors") == 0
    before = set(tmp_path.iterdir())
    for more, parts in (((), "one.safetensors.run"), (("--checkpoint", "parts"), "parts")):
        one = (*more, "-o", "one.safetensors")
        capsys.readouterr()
        with killed_at(2):
            run("memit", FACTS, *one)
        assert {path.name for path in set(tmp_path.iterdir()) - before} == {parts}
        assert run("memit", FACTS[:2], *one) == 2
        shown = capsys.readouterr().err
        assert f"{parts} keeps an unfinished run: its number of facts is 3, this one's 2" in shown
        assert "--force to begin anew" in shown and not (tmp_path / "one.safetensors").exists()
        assert run("memit", FACTS, *one) == 0
        assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
        assert {path.name for path in set(tmp_path.iterdir()) - before} == {"one.safetensors"}
        (tmp_path / "one.safetensors").unlink()
    with killed_at(2):
        run("memit", FACTS, "-o", "one.safetensors")
    assert run("memit", FACTS[:2], "-o", "one.safetensors", "--force") == 0
    assert len(Edit.load("one.safetensors").facts) == 2 and not (tmp_path / "one.safetensors.run").exists()
    (tmp_path / "one.safetensors.run").mkdir()  # killed at its very end
    assert run("memit", FACTS[:2], "-o", "one.safetensors") == 2
    assert "there already" in capsys.readouterr().err and not (tmp_path / "one.safetensors.run").exists()


def test_ctrl_c_says_how_to_go_on(run, tmp_path, capsys):
    def stopped(n):
        with pytest.MonkeyPatch.context() as patch:
            watched(patch, Parts, "write", break_at=(n,), error=lambda *_: KeyboardInterrupt())
            return run("rome", FACTS, "-o", "one.safetensors"), capsys.readouterr().err

    status, shown = stopped(1)
    nothing = "kedit-fast: interrupted: no part of the work was done yet, so nothing is kept\n"
    assert (status, shown) == (130, nothing) and not list(tmp_path.glob("*.run"))
    status, shown = stopped(2)
    assert status == 130 and "one.safetensors.run; the same command goes on" in shown
