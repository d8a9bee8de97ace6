"""Files are written whole or not at all, with the mode of any other file, and errors name what the user named."""

import json
import os
import resource
import stat
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kedit_fast.basics import files
from kedit_fast.basics.files import append_records, check_folder, check_place, file_in, replace_file
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation import EvalReport
from kedit_fast.facts.fact import Fact
from kedit_fast.moments.second_moment import SecondMoment
from kedit_fast.pictures.page import write_report
from kedit_fast.tracing.results import average
from tests.tracing.test_results import result


def write(path, text="new"):
    with replace_file(path) as unfinished:
        unfinished.write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_or_replaced(tmp_path):
    write(tmp_path / "a", "one"), write(str(tmp_path / "a"), "two")
    assert (tmp_path / "a").read_text() == "two" and names(tmp_path) == ["a"]


def test_an_error_leaves_no_folder_that_was_made_for_it(tmp_path):
    with pytest.raises(KeyError), replace_file(tmp_path / "new" / "deep" / "file"):
        raise KeyError
    assert names(tmp_path) == []


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "a", "old")
    with pytest.raises(KeyError), replace_file(tmp_path / "a") as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def write_private(path):
    with replace_file(path) as unfinished:
        save_file({"x": torch.ones(1)}, unfinished)
        unfinished.chmod(0o600)


WRITERS = {
    "text": write,
    "private": write_private,
    "tensors": lambda path: SecondMoment(torch.eye(2), 5, 1).save(path),
    "edit": lambda path: Edit("memit", {}, "", (Fact("{} is", "It"),), {}).save(path),
    "report": lambda path: EvalReport({}, None, (), {}, {}).save(path),
    "page": lambda path: write_report(path, "title", "first", []),
    "trace": lambda path: result([[0.1, 0.5]], (0, 1)).save(path),
    "average": lambda path: average([result([[0.1, 0.5]], (0, 1))])["state"].save(path),
    "picture": lambda path: result([[0.1, 0.5]], (0, 1)).plot(path),
    "log": lambda path: append_records(path, [{"a": 1}]),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_is_saved_makes_its_folders_and_replaces_what_is_there(writer, tmp_path):
    path = tmp_path / "new" / "deep" / "file"
    WRITERS[writer](path), path.write_text("old"), WRITERS[writer](path)
    assert names(path.parent) == ["file"] and path.read_bytes() != b"old"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_mode_is_that_of_any_file(writer, umask, tmp_path):
    before = os.umask(umask)
    try:
        (tmp_path / "plain").touch()
        WRITERS[writer](tmp_path / "written")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "written").stat().st_mode) == 0o666 & ~umask
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "path, error, says",
    [
        ("file/a", NotADirectoryError, "is no folder"),
        ("file/b/a", (FileNotFoundError, NotADirectoryError), "folder"),
        ("folder", IsADirectoryError, "is a folder"),
    ],
)
def test_where_no_file_can_be(path, error, says, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for act in (check_place, write):
        with pytest.raises(error, match=says) as caught:
            act(tmp_path / path)
        assert str(tmp_path / path) in str(caught.value) and "unfinished" not in str(caught.value)
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == []


def test_where_one_may_not_write(tmp_path, monkeypatch):
    """Root may write wherever a mode is concerned, and on some file systems nobody may, whatever the mode."""

    def refuse(dir):
        raise PermissionError(1, "Operation not permitted", str(dir))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=f"{tmp_path}/a cannot be written: you may not write to {tmp_path}$"):
        write(tmp_path / "a")
    assert names(tmp_path) == []


def test_trying_whether_one_may_write_leaves_nothing(tmp_path):
    assert files.writable(tmp_path)
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):  # what is not about permission is told as it is
        files.writable(tmp_path / "none")


def test_a_file_that_one_may_write_in_a_folder_that_one_may_not(tmp_path, monkeypatch):
    (tmp_path / "log").touch()
    monkeypatch.setattr(files, "writable", lambda folder: False)
    assert check_place(tmp_path / "log") == tmp_path / "log"
    with pytest.raises(PermissionError, match="you may not write to"):
        check_place(tmp_path / "other")


def test_a_failed_write_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    with pytest.raises(OSError) as caught, replace_file(tmp_path / "a") as unfinished:
        raise OSError(28, "No space left on device", str(unfinished))
    assert caught.value.errno == 28 and caught.value.filename == str(tmp_path / "a")

    with pytest.raises(OSError) as caught, replace_file(tmp_path / "a"):
        save_file({"x": torch.ones(1)}, tmp_path / "none" / "x")  # safetensors' own error, with a name of its own
    assert str(tmp_path / "a") in str(caught.value) and "/none/" not in str(caught.value)

    with pytest.raises(OSError, match="other") as caught, replace_file(tmp_path / "a"):
        raise OSError(5, "not of this file", "other")
    assert caught.value.filename == "other"

    def refuse(old, new):
        raise OSError(1, "no", str(old))

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError) as caught:
        write(tmp_path / "a")
    assert caught.value.filename == str(tmp_path / "a") and names(tmp_path) == []


def test_a_report_as_a_page_is_whole_or_not_there(tmp_path):
    report = EvalReport({}, None, (), {}, {})
    report.to_html(tmp_path / "page.html")
    before = (tmp_path / "page.html").read_text()
    with pytest.raises(OSError, match="File too large"), no_file_over(10):
        EvalReport({}, None, (), {"model": "another"}, {}).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == before and names(tmp_path) == ["page.html"]


# ---- what is no regular file


def test_a_pipe_is_written_through(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write(pipe, "through")
    reader.join(10)
    assert got == [b"through"] and stat.S_ISFIFO(pipe.stat().st_mode) and names(tmp_path) == ["pipe"]


def own_null(path):
    """A device as /dev/null is, of our own: code that replaces it must not replace the system's."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        path.write_text("")
    except OSError as error:
        pytest.skip(f"no device can be made here: {error}")
    return path


def test_a_device_is_written_through(tmp_path):
    """Neither the device nor a link to it becomes a file."""
    device, link = own_null(tmp_path / "null"), tmp_path / "link"
    link.symlink_to("null")
    for path in (device, link):
        write(path, "gone"), append_records(path, [{"a": 1}])
    assert link.is_symlink() and stat.S_ISCHR(device.lstat().st_mode) and names(tmp_path) == ["link", "null"]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    link, real = tmp_path / "a" / "link", tmp_path / "b" / "real"
    link.symlink_to("../b/real")
    for text in ("made", "replaced"):
        write(link, text)
        assert link.is_symlink() and real.read_text() == text
    assert names(tmp_path / "a") == ["link"] and names(tmp_path / "b") == ["real"]
    real.unlink(), append_records(link, [{"a": 1}])
    assert link.is_symlink() and real.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(
    "path, error, says",
    [
        ("", ValueError, "expected the name of a file to write"),
        ("new/", ValueError, "'new/': expected the name of a file to write; what ends in a slash"),
        ("a\0b", ValueError, "expected the name of a file to write"),
        (3, TypeError, "3: expected the name of a file to write"),
        ("loop", ValueError, "a link that leads nowhere"),
        ("socket", ValueError, "a block device or a socket"),
    ],
)
def test_paths_that_name_no_file(path, error, says, tmp_path, monkeypatch):
    import socket

    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        before = names(tmp_path)
        for act in (check_place, write):
            with pytest.raises(error, match=says):
                act(path)
        assert names(tmp_path) == before


@pytest.mark.parametrize(
    "name, version, fits", [("new", 1, True), ("old", "1", True), ("new", 2, False), ("x", 1, False)]
)
def test_formats_and_versions(name, version, fits):
    with nullcontext() if fits else pytest.raises(ValueError, match=f"it is '{name}' of version {version}"):
        files.check_format({"format": name, "version": version}, "new", "old", version=1)


def test_an_empty_file_holds_nothing(tmp_path):
    (tmp_path / "empty").touch(), (tmp_path / "full").write_text("x")
    held = [files.holds_something(tmp_path / name) for name in ("empty", "full", "none", ".")]
    assert held == [False, True, False, False]


def test_folders_that_can_be_made(tmp_path):
    (tmp_path / "file").touch(), os.symlink("nowhere", tmp_path / "link")
    assert check_folder(f"{tmp_path}/a/b/") == tmp_path / "a" / "b" and names(tmp_path) == ["file", "link"]
    for place in ("file", "file/deeper", "link"):
        with pytest.raises(NotADirectoryError, match="is no folder"):
            check_folder(tmp_path / place)
    with pytest.raises(ValueError, match="expected the name of a folder"):
        check_folder("")


# ---- a full disk


@contextmanager
def no_file_over(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_lines_before_in_a_log(tmp_path):
    log = tmp_path / "log.jsonl"
    append_records(log, [{"number": 1}])
    with pytest.raises(OSError, match="the lines before are kept") as caught, no_file_over(100):
        append_records(log, [{"number": i} for i in range(2, 50)])
    assert caught.value.filename == str(log)
    append_records(log, [{"number": 2}])  # no half line stands before it
    assert [json.loads(line)["number"] for line in log.read_text().splitlines()] == [1, 2]


def test_a_full_disk_is_told_of_a_file(tmp_path):
    with pytest.raises(OSError, match="File too large") as caught, no_file_over(10):
        write(tmp_path / "a", "x" * 100)
    assert caught.value.filename == str(tmp_path / "a") and names(tmp_path) == []


# ---- names in files


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", ".hidden", "a b", "Käse"])
def test_plain_names(name, tmp_path):
    assert file_in(tmp_path, name, "index") == tmp_path / name


ELSEWHERE = ("", ".", "..", "../a", "a/b", "/etc/passwd", "a/../b", "..\\a", "C:a", "c:\\a", "\\\\server\\a")


@pytest.mark.parametrize("name", [*ELSEWHERE, "a\0b", "a\nb", 3, None])
def test_names_that_lead_elsewhere(name, tmp_path):
    with pytest.raises(ValueError, match="index names the file") as caught:
        file_in(tmp_path, name, "index")
    assert "\0" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_a_link(tmp_path):
    home = tmp_path / "model"
    home.mkdir(), (tmp_path / "victim").touch(), (home / "inside").touch()
    os.symlink("../victim", home / "out"), os.symlink("inside", home / "in"), os.symlink(tmp_path, home / "folder")
    assert file_in(home, "in", "index") == home / "in"
    for name in ("out", "folder"):
        with pytest.raises(ValueError, match="a link out of"):
            file_in(home, name, "index")


def test_the_hub_s_cache_is_links(tmp_path):
    """models--x/snapshots/<revision>/name links to models--x/blobs/<digest>."""
    home, blobs = tmp_path / "models--x" / "snapshots" / "r", tmp_path / "models--x" / "blobs"
    home.mkdir(parents=True), blobs.mkdir(), (blobs / "d").touch(), (tmp_path / "victim").touch()
    os.symlink("../../blobs/d", home / "model"), os.symlink("../../../victim", home / "out")
    assert file_in(home, "model", "index") == Path(home, "model")
    with pytest.raises(ValueError, match="a link out of"):
        file_in(home, "out", "index")
