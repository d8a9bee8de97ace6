"""What somebody types who does not know the command line yet: nothing, a word with a slip in it, an old habit."""

import subprocess
import sys

import pytest

from kedit_fast.commands import cli
from kedit_fast.commands.argument_types import did_you_mean
from tests.commands.cases import parsed, run

COMMANDS = [f"\n    {name}" for name in cli.COMMANDS]
ACTIONS = [f"kedit-fast history {action} " for action in ("add", "log", "rollback")]


@pytest.mark.parametrize("words, shows", [([], [*COMMANDS, "Run `kedit-fast demo`"]), (["history"], ACTIONS)])
def test_the_beginning_of_a_command_shows_how_it_goes_on(words, shows, capsys):
    assert run(*words) == 2
    shown, err = capsys.readouterr()
    assert not err and all(text in shown for text in shows)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "kedit_fast", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("kedit-fast ")


@pytest.mark.parametrize(
    "args, meant",
    [
        (["trce"], "trace"),
        (["undo", "./out"], "merge undo"),
        (["rollbak", "./edits"], "history rollback"),
        (["edit", "undo", "./out"], "merge undo"),
        (["edit", "add", "./edits", "e.safetensors"], "history add"),
        (["edit", "inspct", "e.safetensors"], "edit inspect"),
        (["merge", "udno", "./out"], "merge undo"),
        (["history", "lgo", "./edits"], "history log"),
        (["trace", "--subjet", "France"], "--subject"),
        (["trace", "--subjet=France"], "--subject"),
        (["stats", "--layers", "3", "--token5", "9"], "--tokens"),
        (["gate", "e.safetensors", "--thresold", "t.json"], "--thresholds"),
        (["edit", "--method", "memti"], "memit"),
        (["trace", "--kinds", "state,mpl"], "mlp"),
    ],
)
def test_a_slip_gets_a_suggestion(args, meant, complaint):
    assert f"did you mean {meant}?" in complaint(*args)


@pytest.mark.parametrize("args", [["forget"], ["trace", "--zzz"], ["edit", "e.json"], ["edit", "--method", "xyz"]])
def test_nothing_alike_gets_none(args, complaint):
    assert "did you mean" not in complaint(*args)


def test_suggestions_are_of_words_too():
    known = ("merge", "merge undo", "history log", "edit")
    assert did_you_mean("merg", known) == "; did you mean merge?"
    assert did_you_mean("log", known) == "; did you mean history log?"
    assert did_you_mean("quux", known) == ""


def test_an_edit_file_with_the_name_of_an_action(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "udno").write_text("an edit")
    args = parsed("merge", "udno", "-o", "out")
    assert (args.command, args.edits) == ("merge", ["udno"])


@pytest.mark.parametrize("command", ["eval", "gate", "merge -o out", "edit inspect", "edit diff", "history add folder"])
def test_edits_are_named_in_one_way(command):
    names = ["a.safetensors", "b.safetensors"]
    assert parsed(*command.split(), *names).edits == names


def test_the_beginning_of_an_option_is_not_the_option(complaint):
    """`--fact` for `--facts` would run for minutes on what was not meant."""
    says = complaint("edit", "--fact", "facts.json")
    assert "unrecognized arguments: --fact facts.json; did you mean --facts?" in says
