"""``kedit-fast gate``: exit status, reports, and what it refuses to start with."""

import dataclasses
import json
import pydoc

import pytest

from kedit_fast.commands.gate import REFUSED
from kedit_fast.gating import Thresholds, load_suite
from tests.commands.cases import parsed
from tests.commands.cases import run as run_command
from tests.conftest import save_tiny
from tests.gating.cases import FACT, LIMITS, OTHERS, TEXT, good_edit, make_lm, nothing
from tests.tiny import POSITIONS

QUICK = ["--no-builtin", "--generate", "2", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a good edit and an idle one, a suite, and limits that fit them."""
    folder = tmp_path_factory.mktemp("gate")
    lm = make_lm()
    save_tiny(folder / "model", lm.model)
    good_edit(lm).save(folder / "good.safetensors")
    nothing(lm).save(folder / "idle.safetensors")
    suite = {"format": "kedit_fast.suite", "specificity": list(OTHERS), "text": [TEXT]}
    (folder / "suite.json").write_text(json.dumps(suite))
    limits = {name: value for name, value in LIMITS.items() if name != "policy"} | {"policy": {"max_growth": 10}}
    (folder / "limits.json").write_text(json.dumps(limits))
    return folder


def run(folder, edit, *args):
    given = ["--model", folder / "model", "--suite", folder / "suite.json", *QUICK]
    for option, value in (("--thresholds", folder / "limits.json"), ("--context", 30)):
        given += [] if option in args else [option, value]
    return run_command("gate", folder / edit, *given, *args)


def test_passed(folder, tmp_path, capsys):
    assert run(folder, "good.safetensors", "-o", tmp_path / "g.json", "--html", tmp_path / "g.html") == 0
    shown = capsys.readouterr().out
    assert "\npassed\n" in shown and "wordings answered" in shown and f"written: {tmp_path / 'g.json'}" in shown
    assert json.loads((tmp_path / "g.json").read_text())["passed"] is True
    assert "Gate: passed" in (tmp_path / "g.html").read_text()


def test_a_context_beyond_the_model_is_noted(folder, tmp_path, capsys):
    args = ["--context", "3000", "-o", tmp_path / "g.json", "--html", tmp_path / "g.html"]
    assert run(folder, "good.safetensors", *args) == 0
    record = json.loads((tmp_path / "g.json").read_text())
    assert 0 < record["meta"]["sizes"]["context_tokens"] < POSITIONS
    (note,) = record["meta"]["notes"]
    assert f"Note: {note}." in capsys.readouterr().out and note in (tmp_path / "g.html").read_text()


def test_a_small_edit_is_told_what_to_add(folder, capsys):
    assert run(folder, "good.safetensors", "--min-probes", "30", "--min-specificity", "500") == REFUSED
    shown, before = capsys.readouterr()
    assert (
        "warning: too few probes to pass whatever is found: add 26 paraphrases; there are 4 wordings" in before
    )  # said before the work
    assert (
        "4 found, at least 30 needed" in shown
        and "Note: too few probes to pass whatever is found: add 26 paraphrases" in shown
    )
    complete = f"complete {folder / 'suite.json'}; to do with fewer: --min-probes, --min-specificity"
    assert f"to add probes: {complete}" in shown
    assert run_command("gate", folder / "good.safetensors", "--model", folder / "model", *QUICK) == REFUSED
    drafted = (
        f"`kedit-fast gate {folder / 'good.safetensors'} --init suite.json` writes a suite to complete for --suite"
    )
    assert f"to add probes: {drafted}" in capsys.readouterr().out


def test_init_writes_a_suite_to_complete(folder, tmp_path, said, complaint):
    edit, path = folder / "good.safetensors", tmp_path / "suite.json"
    shown = said("gate", edit, "--init", path, "--min-probes", "20")
    assert f"written: {path}" in shown and "1 fact; complete the lists" in shown
    there = "there are 4 wordings of the facts (20 needed), 3 of them paraphrases (30 needed)"
    assert f"add 27 paraphrases; {there}" in shown
    assert "filled up with this package's own" in shown and "prompts that must keep their answer (" not in shown
    alone = said("gate", edit, "--init", tmp_path / "alone.json", "--no-builtin")
    assert "add 497 prompts that must keep their answer" in alone and "old answer" not in alone
    suite = load_suite(path)
    assert suite.facts[0] == dataclasses.replace(FACT, id="0")
    assert {"portability", "specificity", "languages"} < set(json.loads(path.read_text()))
    assert "is there already" in complaint("gate", edit, "--init", path)
    says = complaint("gate", edit, "--init", tmp_path / "b.json", "--suite", path)
    assert "--suite has no place beside it" in says and not (tmp_path / "b.json").exists()


def test_refused(folder, tmp_path, capsys):
    assert run(folder, "idle.safetensors", "-o", tmp_path / "g.json") == REFUSED == 1
    assert "refused: wordings answered" in capsys.readouterr().out
    assert json.loads((tmp_path / "g.json").read_text())["passed"] is False


@pytest.mark.parametrize(
    "args, status",
    [
        (["--min-probes", "5"], 1),
        (["--confident"], 1),
        (["--min-specificity", "500"], 1),
        (["--min-answered", "0.1", "--measure", "exact", "--written", "bfloat16", "--requantize", "int8"], 0),
        (["--written", "none"], 0),
    ],
)
def test_options_come_before_the_file_of_limits(folder, args, status):
    assert run(folder, "good.safetensors", *args) == status


@pytest.mark.parametrize(
    "args, says",
    [
        (["--thresholds", "none.json"], "none.json"),
        (["--suite", "model"], "a fact file ends in"),
        (["-o", "suite.json", "--force"], "would replace what --suite reads"),
        (["--html", "good.safetensors"], "would replace an edit that is read"),
        (["--requantize", "int8", "--written", "none"], "after it was written"),
        (["--text", "none.txt"], "none.txt"),
    ],
)
def test_errors(folder, args, says, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert run(folder, "good.safetensors", *args) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, says", [(["--min-answered", "90"], "0.9, not 90"), (["--min-probes", "0"], "at least 1"), ([], "required")]
)
def test_arguments(args, says, complaint):
    assert says in complaint("gate", *(["e.safetensors"] if args else []), *args)


def test_help_names_the_defaults(said):
    shown = " ".join(said("gate", "--help").split())
    limits = Thresholds()
    args = vars(parsed("gate", "e.safetensors"))
    options = {name: getattr(limits, name) for name in args if hasattr(limits, name)}
    assert len(options) == 9 and all(args[name] is None for name in options)  # else they would replace a file's
    for name, value in options.items():
        assert isinstance(value, (bool, str)) or f"({value})" in shown, name
    assert "default: generated" in shown and limits.measure == "generated"


def test_help_says_where_more_stands(said):
    """The place is told, it is there, and what a suite's text does stands in both."""
    shown = " ".join(said("gate", "--help").split())
    for name, says in (("load_suite", '"format": "kedit_fast.suite"'), ("Thresholds", "min_retention:")):
        assert f"python -m pydoc kedit_fast.{name})" in shown and says in pydoc.render_doc(f"kedit_fast.{name}")
    assert 'the suite\'s "text", which replaces the built-in one' in shown
    assert "each replaces what is built in" in pydoc.render_doc("kedit_fast.load_suite")
