"""What somebody types who does not know the command line yet: nothing, a word with a slip in it, an old habit."""

import argparse
import subprocess
import sys
from contextlib import suppress
from functools import partial

import pytest

from kedit_fast.basics.catalog import EDITORS
from kedit_fast.commands import cli
from kedit_fast.commands.edit_arguments import KINDS
from tests.commands.cases import parsed, run

VALUES = ("3", "0.5", "8GB", "mlp", "none", "float32", "text")  # of every type of option one that it takes
COMMANDS = [f"\n    {name}" for name in cli.COMMANDS]
ACTIONS = [f"kedit-fast history {action} " for action in ("add", "log", "rollback")]


def test_every_method_stands_among_its_kind():
    assert sorted(" ".join(KINDS.values()).split()) == sorted(EDITORS)


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
        (["edit", "--method", "GRACE"], "grace"),
        (["forget"], "forgotten"),
        (["trace", "--kinds", "state,mpl"], "mlp"),
    ],
)
def test_a_slip_gets_a_suggestion(args, meant, complaint):
    assert f"did you mean {meant}?" in complaint(*args)


@pytest.mark.parametrize("args", [["quantum"], ["trace", "--zzz"], ["edit", "e.json"], ["edit", "--method", "xyz"]])
def test_nothing_alike_gets_none(args, complaint):
    assert "did you mean" not in complaint(*args)


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


@pytest.mark.parametrize("option", ["--edit", "--edits", "--edit=a.safetensors"])
def test_what_stands_without_an_option_is_said_to(option, complaint):
    says = complaint("eval", option, "a.safetensors")
    assert f"unrecognized arguments: {option}" in says and says.rstrip().endswith("; EDIT stands without an option")


def test_an_option_that_is_given_twice_is_refused(complaint):
    """Of every command, but for those that gather a list; the first value would be lost in silence."""
    gathers = set()
    for command, parser in cli.build_parser().commands.choices.items():
        for action in parser._actions:
            if not action.option_strings or action.nargs == 0:  # a flag says the same twice
                continue
            if isinstance(action, argparse._AppendAction):
                gathers.add((command, action.dest))
                continue
            value = next(iter(action.choices or filter(partial(_taken, action), VALUES)))
            first, last = action.option_strings[0], action.option_strings[-1]
            says = complaint(*command.split(), first, value, last, value)
            assert f"{'/'.join(action.option_strings)}: given twice; expected it once" in says, (command, first)
    assert gathers == {("edit", "on_top_of"), ("gate", "suite"), ("generate", "prompt"), ("implied", "relations")} | {
        ("summary", name) for name in ("suite", "relations")
    }
    assert "several are one value, with commas between" in complaint("edit", "--layers", "3", "--layers", "5")


def _taken(action, text) -> bool:
    with suppress(argparse.ArgumentTypeError):
        action.type(text)
        return True
    return False
