"""What somebody types who does not know the command line yet: nothing, a word with a slip in it, an old habit."""

import subprocess
import sys

import pytest

from kedit_fast.commands import cli
from kedit_fast.commands.argument_types import did_you_mean


def refused(args, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_no_command_shows_help(capsys):
    assert cli.main([]) == 2
    shown, err = capsys.readouterr()
    assert not err
    for name in cli.COMMANDS:
        assert f"\n    {name}" in shown
    assert "Run `kedit-fast demo`" in shown


def test_the_first_word_of_several_shows_them(capsys):
    assert cli.main(["history"]) == 2
    shown, err = capsys.readouterr()
    assert not err
    for action in ("add", "log", "rollback"):
        assert f"kedit-fast history {action} " in shown


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
def test_a_slip_gets_a_suggestion(args, meant, capsys):
    assert f"did you mean {meant}?" in refused(args, capsys)


@pytest.mark.parametrize("args", [["forget"], ["trace", "--zzz"], ["edit", "e.json"], ["edit", "--method", "xyz"]])
def test_nothing_alike_gets_none(args, capsys):
    assert "did you mean" not in refused(args, capsys)


def test_suggestions_are_of_words_too():
    known = ("merge", "merge undo", "history log", "edit")
    assert did_you_mean("merg", known) == "; did you mean merge?"
    assert did_you_mean("log", known) == "; did you mean history log?"
    assert did_you_mean("quux", known) == ""


def test_an_edit_file_with_the_name_of_an_action(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "udno").write_text("an edit")
    args = cli.build_parser().parse_args(["merge", "udno", "-o", "out"])
    assert (args.command, args.edits) == ("merge", ["udno"])


@pytest.mark.parametrize("command", ["eval", "gate", "merge -o out", "edit inspect", "edit diff", "history add folder"])
def test_edits_are_named_in_one_way(command):
    args = cli.build_parser().parse_args([*command.split(), "a.safetensors", "b.safetensors"])
    assert args.edits == ["a.safetensors", "b.safetensors"]


def test_the_beginning_of_an_option_is_not_the_option(capsys):
    """`--fact` for `--facts` would run for minutes on what was not meant."""
    with pytest.raises(SystemExit):
        cli.main(["edit", "--fact", "facts.json"])
    assert "unrecognized arguments: --fact facts.json; did you mean --facts?" in capsys.readouterr().err
