"""The command line: what it accepts, and how it fails."""

import shlex
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.basics import progress
from kedit_fast.basics.catalog import BENCHMARKS
from kedit_fast.commands import cli
from kedit_fast.editors import EDITORS
from kedit_fast.tracing.trace import KINDS, METRICS
from tests.commands.cases import parsed, raising, run

UNSEEDED = ("info", "merge", "generate", "neurons", "forgotten", "implied")

# ---- help


def test_help_imports_little():
    """What makes it quick: 0.2 s for the help of all commands; torch alone takes a second."""
    script = (
        "import sys, kedit_fast.commands.cli as cli\n"
        "for name in (None, *cli.COMMANDS):\n"
        "    try: cli.main([*(name or '').split(), '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'matplotlib', 'rich', 'safetensors', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 200, sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_explains_itself_and_its_example_is_accepted(command, said):
    shown = said(*command.split(), "--help")
    example = shown[shown.index("example:") :].split("\n")[1].strip()
    assert example.startswith(f"kedit-fast {command}") and "--debug" in shown
    assert parsed(*shlex.split(example)[1:]).command == command
    if " " in command or command == "completion":  # an action on what is there, or none of a model
        return
    runs_a_model = () if command == "merge" else ("--memory", "--device", "--dtype", "--threads")
    assert all(option in shown for option in ("--model", *runs_a_model))
    assert ("--output" in shown) == (command != "generate")  # it writes to the screen alone
    assert ("--seed" in shown) == (command not in UNSEEDED)


def test_the_parser_knows_what_the_package_knows():
    assert parsed("trace").kinds == KINDS
    for metric in METRICS:
        assert parsed("trace", "--metric", metric).metric == metric
    assert tuple(kf.BENCHMARKS) == tuple(BENCHMARKS)
    for method in EDITORS:
        assert parsed("edit", "--method", method).method == method


@pytest.mark.parametrize(
    "command, text, layers",
    [
        ("stats", "3-7", (3, 4, 5, 6, 7)),
        ("stats", "5", (5,)),
        ("stats", "3, 5", (3, 5)),
        ("stats", "0-2,8,1", (0, 1, 2, 8)),
        ("layers", "0-29:3", tuple(range(0, 30, 3))),
        ("layers", "0-4:2,7", (0, 2, 4, 7)),
        ("layers", "5:2", (5,)),
    ],
)
def test_layers(command, text, layers):
    assert parsed(command, "--layers", text).layers == layers


@pytest.mark.parametrize(
    "args, says",
    [
        (["stats", "--layers", "7-3"], "expected layers such as"),
        (["stats", "--layers", "x"], "expected layers such as"),
        (["stats", "--layers=-3"], "expected layers such as"),
        *(
            (["layers", "--layers", text], "expected layers such as")
            for text in ("0-4:0", "0-4:", "0-4:x", ":2", "4-0:2")
        ),
        (["trace", "--kinds", "state,foo"], "'state,foo': expected some of"),
        (["trace", "--samples", "0"], "at least 1"),
        (["trace", "--plots", "-1"], "at least 0"),
        (["edit", "--method", "magic"], "invalid choice"),
        (["forget"], "invalid choice"),
    ],
)
def test_wrong_arguments(args, says, complaint):
    assert says in complaint(*args)


# ---- errors


def handler(monkeypatch, act):
    module = SimpleNamespace(run=act)
    monkeypatch.setattr(cli, "import_module", lambda name: module)


class OutOfMemoryError(RuntimeError):
    """Named as torch's for CUDA, which a test without a GPU cannot raise."""


@pytest.mark.parametrize("kind", [ValueError, OSError, ImportError, FileNotFoundError, MemoryError, OutOfMemoryError])
def test_an_error_is_a_line(kind, monkeypatch, capsys):
    handler(monkeypatch, raising(kind("v")))
    assert run("info") == 2
    assert capsys.readouterr() == ("", "kedit-fast: error: v\n")
    with pytest.raises(kind):
        run("info", "--debug")


def test_too_little_memory_on_the_cpu_is_a_line(monkeypatch, capsys):
    handler(monkeypatch, lambda args: torch.empty(1 << 60))
    assert run("info") == 2 and "can't allocate memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "said, told",
    [
        ("needs 2 GB; open the model with a larger memory=, or shorten the text", "a larger --memory, or shorten"),
        ("open the model without memory=", "without --memory"),
        ("the edit (on_top_of=) is another's", "the edit (--on-top-of) is"),
        ("samples = 0: expected a whole number", "error: --samples 0: expected"),
        ("previous= and corpus= are both given", "previous= and --corpus are both given"),
        ("if meant, merge with force=True (--force)", "if meant, merge with --force"),
        ("x=3 and memory=8, not for a word=by itself", "x=3 and memory=8, not for a word=by itself"),
    ],
)
def test_arguments_are_named_as_options(said, told, monkeypatch, capsys):
    """In errors and warnings alike; what is no argument of the command stays as it is."""
    args = ("edit", "--facts", "f.json") if "samples" not in said else ("trace", "--facts", "f.json")
    for act in (raising(ValueError(said)), lambda args: warnings.warn(said, stacklevel=1)):
        monkeypatch.setattr(f"kedit_fast.commands.{args[0]}.run", act)
        run(*args)
        assert told.removeprefix("error: ") in capsys.readouterr().err


def test_an_error_without_words_is_named(monkeypatch, capsys):
    handler(monkeypatch, raising(MemoryError()))
    assert run("info") == 2 and capsys.readouterr().err == "kedit-fast: error: MemoryError\n"


@pytest.mark.parametrize("kind", [AssertionError, TypeError, RuntimeError, KeyError, AttributeError, IndexError])
def test_a_fault_of_the_package_keeps_its_traceback(kind, monkeypatch, capsys):
    handler(monkeypatch, raising(kind("ours")))
    with pytest.raises(kind):
        run("info")
    assert capsys.readouterr().err == ""


def test_interrupt(monkeypatch, capsys):
    handler(monkeypatch, raising(KeyboardInterrupt()))
    assert run("info") == 130 and capsys.readouterr().err == "kedit-fast: interrupted\n"


def test_a_closed_pipe_is_quiet():
    script = "import sys; from kedit_fast.commands.cli import main; sys.exit(main(['info']))"
    command = f"{sys.executable} -c {script!r} | head -c 1"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 141)


def test_warnings_are_lines(monkeypatch, capsys):
    def act(args):
        warnings.warn("mind this", stacklevel=1)
        warnings.warn("not for users", DeprecationWarning, stacklevel=1)

    handler(monkeypatch, act)
    shown = warnings.showwarning
    assert run("info") == 0 and capsys.readouterr().err == "kedit-fast: warning: mind this\n"
    assert warnings.showwarning is shown


def test_progress_is_on_unless_quiet(monkeypatch):
    seen = []
    handler(monkeypatch, lambda args: seen.append(progress._shown.get()))
    run("info"), run("info", "--quiet")
    assert seen == [True, False] and progress._shown.get() is False
