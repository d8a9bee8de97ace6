"""Names of what is being written: one writer a folder, and what a killed run left is found by the next one."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kedit_fast.basics import unfinished
from kedit_fast.basics.files import replace_file
from kedit_fast.basics.folders import new_folder
from tests.basics.test_files import names, write

ROOT = Path(unfinished.__file__).parents[2]


def killed_while_writing(where, text, folder):
    """Runs code in another Python that kills itself with ``path`` open for writing; what it left in the folder."""
    code = f"""
from pathlib import Path
from kedit_fast.basics.files import replace_file
from kedit_fast.basics.folders import new_folder
from kedit_fast.basics.unfinished import temporary_folder
with {where} as path:
    {text}
    import os, signal; os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, timeout=60, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    return names(folder)


def test_a_killed_write_leaves_nothing_behind_the_next_one(tmp_path):
    (left,) = killed_while_writing("replace_file('a.json')", "path.write_text('half')", tmp_path)
    assert left.startswith(".a.json.") and left.endswith(".unfinished")
    with replace_file(tmp_path / "a.json") as path:
        assert names(tmp_path) == [path.name] != [left]
        path.write_text("whole")
    assert names(tmp_path) == ["a.json"]


def test_who_writes_now_is_left_alone(tmp_path):
    with replace_file(tmp_path / "a") as first:
        first.write_text("first")
        with replace_file(tmp_path / "a") as second:
            second.write_text("second")
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first" and names(tmp_path) == ["a"]


def test_many_writers_of_one_file(tmp_path):
    """None takes another's file for a leftover, also in the moment before it is locked."""

    def write_often(text):
        for _ in range(50):
            write(tmp_path / "a", text)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_often, "abcdefgh"))  # raises what a writer raised
    assert (tmp_path / "a").read_text() in set("abcdefgh") and names(tmp_path) == ["a"]


def test_files_that_only_look_alike_stay(tmp_path):
    alike = [".a.notes.unfinished", ".a.unfinished", "a.12345678.unfinished", ".ab.12345678.unfinished"]
    for name in alike:
        (tmp_path / name).touch()
    write(tmp_path / "a")
    assert names(tmp_path) == sorted([*alike, "a"])


def test_a_name_of_any_length(tmp_path):
    for name in ("n" * 255, "名" * 85):  # bytes: as many as there may be
        write(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


def test_one_writer_a_folder(tmp_path):
    with new_folder(tmp_path / "out") as path:
        (path / "a").write_text("1")
        with pytest.raises(ValueError, match="out: another run writes there"), new_folder(tmp_path / "out"):
            pass
        assert names(path) == ["a"]
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]


def test_a_folder_that_was_filled_meanwhile(tmp_path):
    """The other run ended between the check and the claim: what it wrote is not replaced."""
    with pytest.raises(ValueError, match="is not empty"), new_folder(tmp_path / "out") as path:
        (path / "a").write_text("1")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").write_text("2")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["other"]


def test_a_killed_run_s_folder_is_taken_over(tmp_path):
    half = "(path / 'deep').mkdir(); (path / 'deep' / 'half').write_text('x')"
    assert killed_while_writing("new_folder('out')", half, tmp_path) == [".out.unfinished"]
    with new_folder(tmp_path / "out") as path:
        assert names(path) == []
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("without", ["system", "file system"])
def test_without_locks(without, tmp_path, monkeypatch):
    def flock(descriptor, what):
        raise OSError(95, "Operation not supported")

    if without == "system":
        monkeypatch.setattr(unfinished, "LOCKS", False)
        assert unfinished.locked(0) is None
    monkeypatch.setattr(unfinished.fcntl, "flock", flock)
    (tmp_path / ".a.12345678.unfinished").touch()  # nobody knows whose: it stays
    write(tmp_path / "a", "1")
    with new_folder(tmp_path / "out") as path:
        says = r"another run writes there, or one that was killed left .*\.out\.unfinished; delete that"
        with pytest.raises(ValueError, match=says), new_folder(tmp_path / "out"):
            pass
        assert path.is_dir()
    assert names(tmp_path) == [".a.12345678.unfinished", "a", "out"] and (tmp_path / "a").read_text() == "1"


def test_a_temporary_folder_of_a_killed_run_is_deleted(tmp_path):
    (left,) = killed_while_writing("temporary_folder(Path('model'))", "(path / 'half').write_text('x')", tmp_path)
    with unfinished.temporary_folder(tmp_path / "model") as a, unfinished.temporary_folder(tmp_path / "model") as b:
        assert names(tmp_path) == sorted([a.name, b.name]) and left not in names(tmp_path)
    assert names(tmp_path) == []


def test_a_killed_run_s_folder_of_another_name_is_warned_of(tmp_path):
    killed_while_writing("new_folder('out')", "pass", tmp_path)
    says = r"\.out\.unfinished is what a killed run left; delete it"
    with pytest.warns(UserWarning, match=says) as warned, new_folder(tmp_path / "a"), new_folder(tmp_path / "b"):
        pass
    assert [str(w.message).split("/")[-1][:16] for w in warned] == [".out.unfinished "] * 2  # not of one being written
    assert names(tmp_path) == [".out.unfinished", "a", "b"]
