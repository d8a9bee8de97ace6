"""Completion: what bash offers with the script that the command prints, and that the command is light."""

import subprocess
import sys

import pytest

from kedit_fast.commands import cli
from kedit_fast.commands.tool_arguments import SHELLS
from tests.commands.cases import run

ASK = """source {script}
ask() {{ COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=(); _shtab_kedit_fast; echo "${{COMPREPLY[*]}}"; }}
cd {folder}
ask kedit-fast {words}
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    made = subprocess.run([sys.executable, "-m", "kedit_fast", "completion", "bash"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    script = tmp_path_factory.mktemp("completion") / "kedit-fast"
    script.write_text(made.stdout)
    return script


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("his", "history"),
        ("history ''", "add log rollback"),
        ("edit ''", "inspect diff only without"),
        ("edit inspect ed", "edit.safetensors"),
        ("edit --facts ed", "edit.safetensors"),
        ("edit inspect --me", "--memory"),
        ("merge ed", "edit.safetensors"),
        ("merge undo ed", "edit.safetensors"),
        ("merge edit.safetensors --pe", "--peft"),
        ("trace --metric log", "logprob logit_diff"),
        ("completion ''", " ".join(SHELLS)),
    ],
)
def test_bash_offers(words, offered, bash_script, tmp_path):
    (tmp_path / "edit.safetensors").touch()
    asked = ASK.format(script=bash_script, folder=tmp_path, words=words)
    assert subprocess.run(["bash", "-c", asked], capture_output=True, text=True).stdout.strip() == offered


def test_bash_offers_every_command(bash_script, tmp_path):
    asked = ASK.format(script=bash_script, folder=tmp_path, words="''")
    offered = subprocess.run(["bash", "-c", asked], capture_output=True, text=True).stdout.split()
    assert set(offered) == {name.split()[0] for name in cli.COMMANDS}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_commands_of_one_and_two_words(shell, capsys):
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("capability", "rollback", "without", "metric"))
    assert cli.build_parser().commands.choices.keys() >= {"history add"}  # the parser itself is as it was


def test_without_shtab_the_way_out_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run("completion", "bash") == 2
    assert "pip install 'kedit-fast[completion]'" in capsys.readouterr().err


def test_neither_the_command_nor_the_package_waits_for_more():
    """shtab is imported by its command alone, and torch by none of this."""
    held = (
        "import sys; from kedit_fast.commands import cli; a = 'shtab' in sys.modules; cli.main(['completion', 'bash'])"
    )
    asked = f"{held}; print(); print(a, 'shtab' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert done.stdout.split("\n")[-2] == "False True False", done.stderr
