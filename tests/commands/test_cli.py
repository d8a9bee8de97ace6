"""The command line: what it accepts, and how it fails."""

import resource
import shlex
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.basics import progress
from kedit_fast.commands import cli
from kedit_fast.commands.arguments import BENCHMARKS
from kedit_fast.editors import EDITORS
from kedit_fast.tracing.trace import KINDS, METRICS
from tests.commands.cases import raising, run

COMMANDS = tuple(name for name in cli.COMMANDS if " " not in name)  # the others: test_edits.py


# ---- help


def test_help_imports_no_torch_and_is_quick():
    script = (
        "import sys, kedit_fast.commands.cli as cli\n"
        "for name in (None, *cli.COMMANDS):\n"
        "    try: cli.main([*(name or '').split(), '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # the least of CPU times, which a busy machine stretches less than the clock
    assert min(took) < 0.3


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    example = shown[shown.index("example:") :].split("\n")[1].strip()
    assert end.value.code == 0 and example.startswith(f"kedit-fast {command}")
    runs_a_model = () if command == "merge" else ("--memory", "--device", "--dtype", "--threads")
    for option in ("--model", "--debug", *runs_a_model):
        assert option in shown
    assert ("--output" in shown) == (command != "generate")  # it writes to the screen alone
    assert ("--seed" in shown) == (command not in ("info", "merge", "generate"))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_example_is_accepted(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    line = shown[shown.index("example:") :].split("\n")[1]
    assert cli.build_parser().parse_args(shlex.split(line)[1:]).command == command


def test_the_parser_knows_what_the_package_knows():
    assert cli.build_parser().parse_args(["trace"]).kinds == KINDS
    for metric in METRICS:
        assert cli.build_parser().parse_args(["trace", "--metric", metric]).metric == metric
    assert tuple(kf.BENCHMARKS) == BENCHMARKS
    for method in EDITORS:
        assert cli.build_parser().parse_args(["edit", "--method", method]).method == method


@pytest.mark.parametrize(
    "text, layers", [("3-7", (3, 4, 5, 6, 7)), ("5", (5,)), ("3, 5", (3, 5)), ("0-2,8,1", (0, 1, 2, 8))]
)
def test_layers(text, layers):
    assert cli.build_parser().parse_args(["stats", "--layers", text]).layers == layers


@pytest.mark.parametrize(
    "args, says",
    [
        (["stats", "--layers", "7-3"], "expected layers such as"),
        (["stats", "--layers", "x"], "expected layers such as"),
        (["stats", "--layers=-3"], "expected layers such as"),
        (["trace", "--kinds", "state,foo"], "'state,foo': expected some of"),
        (["trace", "--samples", "0"], "at least 1"),
        (["trace", "--plots", "-1"], "at least 0"),
        (["edit", "--method", "mend"], "invalid choice"),
        (["forget"], "invalid choice"),
    ],
)
def test_wrong_arguments(args, says, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2 and says in capsys.readouterr().err


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
