"""Files are written whole or not at all, with the mode of any other file, and errors name what the user named."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from kedit_fast import files
from kedit_fast.edit import Edit
from kedit_fast.evaluation import EvalReport
from kedit_fast.facts import Fact
from kedit_fast.files import check_place, replace_file
from kedit_fast.html_report import write_report
from kedit_fast.moments import SecondMoment


def write(path, text="new"):
    with replace_file(path) as unfinished:
        unfinished.write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_or_replaced(tmp_path):
    write(tmp_path / "a", "one"), write(str(tmp_path / "a"), "two")
    assert (tmp_path / "a").read_text() == "two" and names(tmp_path) == ["a"]


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "a", "old")
    with pytest.raises(KeyError), replace_file(tmp_path / "a") as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


WRITERS = {
    "text": write,
    "tensors": lambda path: SecondMoment(torch.eye(2), 5, 1).save(path),
    "edit": lambda path: Edit("memit", {}, "", (Fact("{} is", "It"),), {}).save(path),
    "report": lambda path: EvalReport({}, None, (), {}).save(path),
    "page": lambda path: write_report(path, "title", "first", []),
}


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


def test_the_mode_is_given_in_one_place(tmp_path):
    with replace_file(tmp_path / "a") as unfinished:
        save_file({"x": torch.ones(1)}, unfinished)
        unfinished.chmod(0o600)
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "path, error, says",
    [
        ("none/a", FileNotFoundError, "there is no folder"),
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
    with pytest.raises(PermissionError, match="you may not write there"):
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
    with pytest.raises(PermissionError, match="you may not write there"):
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

    monkeypatch.setattr(files.os, "replace", lambda old, new: (_ for _ in ()).throw(OSError(1, "no", str(old))))
    with pytest.raises(OSError) as caught:
        write(tmp_path / "a")
    assert caught.value.filename == str(tmp_path / "a") and names(tmp_path) == []


def test_a_report_as_a_page_is_whole_or_not_there(tmp_path, monkeypatch):
    report = EvalReport({}, None, (), {})
    monkeypatch.setattr(EvalReport, "summary", lambda self: {})
    monkeypatch.setattr(EvalReport, "_lines", lambda self: [])
    report.to_html(tmp_path / "page.html")
    before = (tmp_path / "page.html").read_text()
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        EvalReport({}, None, (), {"model": "another"}).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == before and names(tmp_path) == ["page.html"]
