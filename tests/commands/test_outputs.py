"""What the commands do with paths and screens: refused before the work, written through, never replaced unasked."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import kedit_fast as kf
from kedit_fast.basics.files import append_records
from kedit_fast.commands import cli, inputs
from kedit_fast.commands import eval as eval_command
from kedit_fast.commands.outputs import fresh_log
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.fact import Fact
from kedit_fast.shipping.history import EditHistory
from kedit_fast.tracing.results import read_log
from tests.basics.test_files import own_null
from tests.commands.cases import FACTS, ONE, files, run
from tests.make import make_edit
from tests.shipping.checkpoints import contents, save_checkpoint

ROOT = Path(cli.__file__).parents[2]
ESCAPE = "\x1b]0;owned\x07"
NAMELESS = "'': expected a path that names something"


@pytest.fixture
def no_work(monkeypatch):
    """Any model that is opened is one too many."""
    monkeypatch.setattr(inputs, "open_model", lambda *_, **__: pytest.fail("a model was opened"))


# ---- refused before the work

TRACE, EDIT = ["trace", *ONE], ["edit", *ONE, "--target", "Rome"]
ONE_FILE = [
    [*EDIT, "-o"],
    ["eval", "--facts", "../facts.json", "-o"],
    ["eval", "--facts", "../facts.json", "--html"],
    ["eval", "--facts", "../facts.json", "--log"],
    ["info", "-o"],
    ["rounds", "--facts", "../facts.json", "-o"],
    ["rounds", "--facts", "../facts.json", "--log"],
    ["layers", "--facts", "../facts.json", "--plot"],
]


@pytest.mark.parametrize("command", ONE_FILE, ids=lambda command: f"{command[0]} {command[-1]}")
def test_what_is_no_file_is_refused_by_every_command(command, work, complaint, no_work):
    (work / "there.png").write_text("x"), os.symlink("loop", "loop")
    refusals = {"": NAMELESS, "new/": "in a slash", "there.png": "there already; --force replaces it", "loop": "link"}
    for path, says in refusals.items():
        assert says in complaint(*command, path), path
    assert (work / "there.png").read_text() == "x" and sorted(p.name for p in work.iterdir()) == ["loop", "there.png"]


@pytest.mark.parametrize("command", [["trace", *ONE], ["stats"], ["demo"]], ids=lambda command: command[0])
def test_what_is_no_folder_is_refused_by_every_command(command, work, complaint, no_work):
    (work / "file").write_text("x")
    for path, says in (("", NAMELESS), ("file", "file is no folder"), ("file/deeper/", "file is no folder")):
        assert says in complaint(*command, "-o", path)
    assert [p.name for p in work.iterdir()] == ["file"]


def test_pictures_and_averages_are_not_replaced_unasked(work, complaint, no_work):
    (work / "out").mkdir()
    for name in ("average-mlp.png", "average-state.npz", "fact-0.png"):
        (work / "out" / name).write_text("mine")
        assert f"{name} is there already" in complaint(*TRACE, "-o", "out")
        (work / "out" / name).unlink()


def test_a_checkpoint_is_looked_at_before_statistics_are_measured(work, complaint, no_work):
    (work / "full").mkdir(), (work / "full" / "mine").touch()
    refusals = {"full": "not empty and no checkpoint", "none/a": "there is no folder none", "": NAMELESS}
    for path, says in refusals.items():
        assert says in complaint(*EDIT, "--checkpoint", path)


def test_a_trace_s_log_is_looked_at_before_the_sweeps(model, tmp_path, monkeypatch):
    lm = kf.open_model(model)
    monkeypatch.setattr("kedit_fast.tracing.trace.tasks_of", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is no folder"):
        kf.trace(lm, Fact("The capital of {} is", "France"), log=tmp_path / "file" / "log.jsonl")


def test_folders_of_versions(work, complaint):
    (work / "file").touch()
    for command, says in (
        (["history", "log", "file"], "file is a file; expected a folder of versions"),
        (["history", "log", "typo"], "typo: no such folder; expected a folder of versions, as `kedit-fast history add"),
        (["history", "rollback", "typo", "0"], "typo: no such folder"),
        (["history", "log", ""], f"argument FOLDER: {NAMELESS}"),
        (["edit", *ONE, "--target", "Rome", "--stats", "file"], "file is a file; expected a folder of statistics"),
        (["merge", "undo", ""], f"argument FOLDER: {NAMELESS}"),
    ):
        assert says in complaint(*command)
    assert [p.name for p in work.iterdir()] == ["file"]


def test_an_undo_into_a_folder_without_a_name_is_not_one_in_place(work, complaint):
    edit = make_edit(save_checkpoint(work / "base"))
    edit.save("edit.safetensors")
    assert run("merge", "--model", "base", "edit.safetensors", "-o", "") == 2
    assert run("merge", "--model", "base", "edit.safetensors", "-o", "out") == 0
    before = contents(work / "out")
    assert NAMELESS in complaint("merge", "undo", "out", "-o", "") and contents(work / "out") == before


def test_a_trace_log_that_is_none(work, model, complaint):
    (work / "binary").write_bytes(bytes(range(256)))
    says = complaint("layers", *ONE, "--target", "Rome", "--traces", "binary", "--model", model)
    assert "binary is no trace log" in says


# ---- written through


def test_a_device_is_never_replaced(work, model, capsys):
    own_null(work / "null")
    assert run("info", "-o", "null") == 0
    for option in ("-o", "--log"):
        assert run("eval", "--facts", "../facts.json", "--model", model, option, "null", "--force") == 0
    assert stat.S_ISCHR(Path("null").lstat().st_mode)
    assert "written: null" in capsys.readouterr().out and [p.name for p in work.iterdir()] == ["null"]


def test_a_link_stays_a_link(work, model):
    (work / "real").write_text("old"), os.symlink("real", "link"), os.symlink("log-behind", "log")
    asked = ["eval", "--facts", "../facts.json", "--model", model, "-o", "link", "--log", "log"]
    assert (run(*asked), run(*asked, "--force")) == (2, 0)
    assert Path("link").is_symlink() and Path("log").is_symlink()
    assert json.loads(Path("real").read_text())["format"]
    assert len(Path("log-behind").read_text().splitlines()) == len(FACTS)


def test_an_empty_log_is_no_result(work, model):
    (work / "out").mkdir(), (work / "out" / "traces.jsonl").touch()
    assert run(*TRACE, "--kinds", "state", "--samples", "1", "--model", model, "-o", "out") == 0
    assert len(read_log("out/traces.jsonl")) == 1
    assert run(*TRACE, "--kinds", "state", "--samples", "1", "--model", model, "-o", "out") == 2


def test_a_log_into_a_pipe_is_one_stream(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    with fresh_log(tmp_path / "pipe"):
        for number in (1, 2):
            append_records(tmp_path / "pipe", [{"number": number}])
    reader.join(10)
    assert got == ['{"number": 1}\n{"number": 2}\n']


# ---- the screen


def command_line(args, folder, shell="", **env):
    script = "import sys; from kedit_fast.commands.cli import main; sys.exit(main())"
    made = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" "${{@:2}}" {shell}', sys.executable, script, *args],
        cwd=folder, capture_output=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
    )  # fmt: skip
    return made.returncode, made.stdout, made.stderr.decode(errors="replace")


def versions(folder, message="why", who="me"):
    EditHistory(folder).add(make_edit(fingerprint="llama-1-1-0"), message, who)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_answer_on_a_screen_that_lacks_its_letters(encoding, tmp_path):
    versions(tmp_path / "edits", message="≥ 東京")
    status, shown, errors = command_line(["history", "log", "edits"], tmp_path, PYTHONIOENCODING=encoding)
    assert status == 0 and rb">= \u6771" in shown and not errors


def test_closed_and_full_screens(tmp_path):
    """One line, the status of a closed pipe; nothing is opened in the place of stdout or stderr."""
    versions(tmp_path / "edits")
    log = ["history", "log", "edits"]
    status, _, errors = command_line(log, tmp_path, ">&-")
    assert status == 141 and errors == "kedit-fast: error: standard output is closed; nothing was done\n"
    assert command_line(log, tmp_path, "2>&-")[0] == 0
    assert command_line(["history", "log", "typo"], tmp_path, "2>&-")[:2] == (2, b"")
    if Path("/dev/full").exists():
        status, _, errors = command_line(log, tmp_path, ">/dev/full")
        assert status == 2 and errors == "kedit-fast: error: standard output: No space left on device\n"


def test_files_are_written_before_the_screen_is(work, model, monkeypatch):
    """A screen that fails takes no file with it."""

    def fails(text=""):
        raise BrokenPipeError(32, "Broken pipe", "standard output")

    monkeypatch.setattr(eval_command, "say", fails)
    monkeypatch.setattr(cli, "stop_printing", lambda: None)
    assert run("eval", "--facts", "../facts.json", "--model", model, "-o", "a.json", "--html", "a.html") == 141
    assert Path("a.json").stat().st_size and Path("a.html").stat().st_size


def test_no_order_of_a_file_reaches_the_terminal(work, capsys):
    fact = Fact("{} is" + ESCAPE, "It" + ESCAPE, "Rome", id="1" + ESCAPE, provenance={"who": ESCAPE})
    edit = make_edit(facts=[fact, fact], provenance={"why\n": ESCAPE, "list": [ESCAPE]}, hparams={ESCAPE: ESCAPE})
    edit.save("edit.safetensors")
    versions(work / "edits", message=f"why{ESCAPE}\nforged", who=ESCAPE)
    (work / f"none{ESCAPE}").touch()
    for command in (
        ["edit", "inspect", "edit.safetensors"],
        ["edit", "diff", "edit.safetensors", "edit.safetensors"],
        ["history", "log", "edits"],
        ["edit", "inspect", f"none{ESCAPE}"],
    ):
        run(*command)
        shown = "".join(capsys.readouterr())
        assert "\x1b" not in shown and "\x07" not in shown and "\nforged" not in shown
        assert "\\x1b]0;owned\\x07" in shown or "diff" in command
    assert Edit.load("edit.safetensors").provenance["list"] == [ESCAPE]  # files keep what they were given


@pytest.mark.parametrize(
    "args, says",
    [
        (["eval", "-o", "new", "--html", "new"], "--output and --html both name new"),
        (["eval", "-o", "new", "--log", "../work/new"], "--output and --log both name ../work/new"),
        (["eval", "--html", "new", "--log", "linked/new"], "--html and --log both name"),
        (["eval", "--html", "edit.safetensors"], "--html edit.safetensors would replace an edit that is read"),
        (["eval", "-o", "linked/edit.safetensors"], "would replace an edit that is read"),
        (["eval", "-o", "hard"], "would replace an edit that is read"),
        (["eval", "--log", "facts.json"], "would replace what --facts reads"),
        (["eval", "--html", "text.txt"], "would replace what --text reads"),
        (["eval", "-o", "model/config.json"], "would replace what --model reads"),
        (["compare", "-o", "edit.safetensors"], "would replace a file that is compared"),
        (["edit", "-o", "facts.json"], "would replace what --facts reads"),
        (["edit", "-o", "hparams.json"], "would replace what --hparams reads"),
        (["edit", "-o", "text.txt", "--corpus", "text.txt"], "would replace what --corpus reads"),
        (["edit", "-o", "stats/one.safetensors", "--stats", "stats"], "would replace what --stats reads"),
        (["edit", "-o", "model/config.json"], "would replace what --model reads"),
        (["trace", "-o", "traced"], "is the log that these traces would replace"),
    ],
)
def test_outputs_spare_each_other_and_what_is_read(args, says, work, complaint):
    for name in ("edit.safetensors", "facts.json", "text.txt", "hparams.json"):
        (work / name).write_text(name)
    for name in ("stats/one.safetensors", "model/config.json", "traced/traces.jsonl"):
        (work / name).parent.mkdir()
        (work / name).write_text(name)
    (work / "linked").symlink_to(work)
    (work / "hard").hardlink_to(work / "edit.safetensors")
    (work / "facts.json").write_text(json.dumps(FACTS))
    (work / "traced" / "traces.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    command, *rest = args
    given = {
        "eval": ["edit.safetensors", "--facts", "facts.json", "--text", "text.txt"],
        "compare": ["edit.safetensors", "--facts", "facts.json"],
        "edit": ["--facts", "facts.json"] + ["--hparams", "hparams.json"] * (rest[1] == "hparams.json"),
        "trace": ["--facts", "traced/traces.jsonl"],
    }[command]
    before = contents(work)
    assert says in complaint(command, *rest, *given, "--force", "--model", "model")
    assert contents(work) == before


def test_a_log_that_gets_no_line_gives_the_older_one_back(tmp_path):
    log = tmp_path / "a" / "log.jsonl"
    with fresh_log(log):
        assert files(tmp_path / "a") == []
        log.write_text("first")
    with pytest.raises(RuntimeError), fresh_log(log):
        raise RuntimeError
    assert log.read_text() == "first"
    with pytest.raises(RuntimeError), fresh_log(log):
        log.write_text("begun")
        raise RuntimeError
    assert log.read_text() == "begun" and files(tmp_path / "a") == ["log.jsonl"]
