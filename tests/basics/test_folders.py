"""Writing that fails: the error keeps its type and errno, names the user's own path, and nothing is left behind."""

import errno
import stat
from pathlib import Path

import pytest

from kedit_fast.basics.files import named_instead
from kedit_fast.basics.folders import new_folder, pieces, write_json
from kedit_fast.shipping.adapter import WEIGHTS, export_peft
from kedit_fast.shipping.history import EditHistory
from kedit_fast.shipping.merge import merge_checkpoint
from kedit_fast.shipping.unmerge import unmerge
from tests.basics.test_files import no_file_over
from tests.make import lowrank, make_edit
from tests.shipping.checkpoints import contents, save_checkpoint

LIMIT = 4096  # bytes: less than any weights


WRITERS = {
    "merge": (lambda edit: merge_checkpoint("base", edit, "out"), "out/model.safetensors"),
    "merge again": (lambda edit: merge_checkpoint("merged", edit, "out", force=True), "out/model.safetensors"),
    "undo": (lambda edit: unmerge("merged", "out"), "out/model.safetensors"),
    "undo in place": (lambda edit: unmerge("merged"), "merged/model.safetensors"),
    "adapter": (lambda edit: export_peft(edit, "out"), f"out/{WEIGHTS}"),
}


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """An edit of the checkpoint ``base``, which ``merged`` holds already, in the working directory."""
    monkeypatch.chdir(tmp_path)
    edit = make_edit(save_checkpoint(tmp_path / "base"), deltas={1: lowrank(rank=20)})
    merge_checkpoint("base", edit, "merged")
    return edit


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_with_the_users_path(name, edit, tmp_path):
    write, path = WRITERS[name]
    before = contents(tmp_path)
    with pytest.raises(OSError, match="File too large") as caught, no_file_over(LIMIT):
        write(edit)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, path)
    assert contents(tmp_path) == before


def test_a_full_disk_adds_no_version_and_is_told_with_the_folder(edit, tmp_path):
    with pytest.raises(OSError, match="File too large") as caught, no_file_over(LIMIT):
        EditHistory("edits").add(edit)
    assert "edits/edits" in str(caught.value)
    assert "unfinished" not in str(caught.value)
    assert len(EditHistory("edits").versions) == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here in which nothing can be made")
def test_a_folder_that_cannot_be_made_is_named(edit):
    with pytest.raises(FileNotFoundError) as caught:
        merge_checkpoint("base", edit, "/proc/m")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "/proc/m")


def test_other_errors_pass_as_they_are(tmp_path):
    mine = OSError(errno.EACCES, "Permission denied", str(tmp_path / "other"))
    with pytest.raises(PermissionError) as caught, new_folder(tmp_path / "out"):
        raise mine
    assert caught.value is mine
    with pytest.raises(OSError, match=r"^out is full$"), named_instead(tmp_path / ".x", Path("out")):
        raise OSError(f"{tmp_path / '.x'} is full")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that opens and cannot be read")
def test_reading_that_fails_names_the_file_that_is_read():
    with pytest.raises(OSError, match="Input/output error") as caught:
        list(pieces("/proc/self/mem", 0, 8))  # nothing lies at address 0
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "/proc/self/mem")


def test_a_record_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="File too large") as caught, no_file_over(LIMIT):
        write_json(tmp_path / "record.json", {"x": "y" * LIMIT})
    assert caught.value.filename == str(tmp_path / "record.json")


def test_an_adapter_is_readable_by_whom_the_other_files_are(edit, tmp_path):
    export_peft(edit, "out")
    assert len({stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}) == 1
