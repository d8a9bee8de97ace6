"""A folder of edits in versions: what is in force, the way back, and that nothing is lost or taken unseen."""

import json
import multiprocessing
import warnings

import numpy as np
import pytest
import torch

from kedit_fast.edits.chain import check_chain
from kedit_fast.edits.edit import digest
from kedit_fast.shipping import history as module
from kedit_fast.shipping.history import EDITS, MANIFEST, EditHistory, Version
from tests.conftest import open_tiny, refused
from tests.make import lowrank, make_edit, owned_edit, watched
from tests.shipping.checkpoints import contents
from tests.tiny import tiny_model

MODEL = "llama-4-32-0123456789abcdef"


def edit_of(seed, below=(), model=MODEL):
    on_top = {"on_top_of": [{"digest": digest(each)} for each in below]} if below else {}
    return make_edit(deltas={1: lowrank(seed=seed)}, fingerprint=model, provenance=on_top)


@pytest.fixture
def history(tmp_path):
    """Two versions: one edit, then another on top of it."""
    history = EditHistory(tmp_path / "edits")
    first = edit_of(1)
    history.add(first, "one", "Ana")
    history.add(edit_of(2, [first]), "two", "Bo")
    return history


def digests(edits):
    return [digest(edit) for edit in edits]


def test_versions_and_the_chain_in_force(history):
    first, second = edit_of(1), edit_of(2)
    assert [(v.number, len(v.edits), v.message, v.who, v.rollback_of) for v in history.versions] == [
        (0, 0, "the model as it is", "", None),
        (1, 1, "one", "Ana", None),
        (2, 2, "two", "Bo", None),
    ]
    assert all(v.when.endswith("+00:00") for v in history.versions[1:])
    assert history.fingerprint == MODEL
    assert digests(history.current) == digests([first, second])
    assert digests(history.edits_of(1)) == digests([first])
    assert history.edits_of(0) == ()
    loaded = history.current[0]
    assert (loaded.facts, loaded.hparams, loaded.provenance) == (first.facts, first.hparams, first.provenance)


def test_rolling_back_makes_a_version_and_loses_none(history):
    assert history.rollback(np.int64(1), who="Cy") == history.versions[3]
    rolled_back = EditHistory(history.folder).versions[3]
    assert (rolled_back.rollback_of, rolled_back.message) == (1, "rollback to version 1")
    assert digests(history.current) == digests([edit_of(1)])
    history.rollback(0)
    assert history.current == ()
    history.rollback(2, "back again")
    assert digests(history.current) == digests([edit_of(1), edit_of(2)])
    assert [v.number for v in history.versions] == list(range(6))
    assert [len(v.edits) for v in history.versions] == [0, 1, 2, 1, 0, 2]
    assert len(list((history.folder / EDITS).iterdir())) == 2  # each edit is kept once
    after = edit_of(3, [edit_of(1), edit_of(2, [edit_of(1)])])
    assert history.add(after).number == 6


def test_the_chain_acts_as_the_edits_do(tmp_path):
    lm = open_tiny(tiny_model("llama"))
    history, wanted = EditHistory(tmp_path / "edits"), lm
    for seed in (1, 2):
        edit = edit_of(seed, wanted.edits, lm.fingerprint)
        history.add(edit)
        wanted = wanted.with_edit(edit)
    for edit in history.current:
        lm = lm.with_edit(edit)
    assert lm.top_tokens("The Eiffel Tower") == wanted.top_tokens("The Eiffel Tower")
    assert digests(lm.edits) == digests(wanted.edits)


def test_a_new_history_is_the_model_as_it_is(tmp_path):
    history = EditHistory(tmp_path / "edits")
    assert (history.current, history.fingerprint) == ((), "")
    assert history.versions == (Version(0, message="the model as it is"),)
    for number in (0, 1):
        refused(f"{tmp_path}/edits: no such folder", history.rollback, number, error=FileNotFoundError)
    assert not history.folder.exists()
    (tmp_path / "file").touch()
    says = "file is a file; expected a folder of versions"
    refused(says, EditHistory, tmp_path / "file", error=NotADirectoryError)


# ---- refusals


def not_added(history, edit, says):
    before = contents(history.folder)
    refused(says, history.add, edit)
    assert contents(history.folder) == before


def test_edits_of_another_model_and_independent_ones_are_refused(history):
    below = [edit_of(1), edit_of(2, [edit_of(1)])]
    not_added(history, edit_of(3, below, "gpt2-4-32-00"), "made for model gpt2-4-32-00, .* holds edits of llama-4-32")
    not_added(history, make_edit(), "does not say for which model")
    not_added(history, owned_edit(), r"edit\.only\(i\)")


def test_an_edit_that_stands_on_others_is_refused(history, tmp_path):
    first, second = edit_of(1), edit_of(2)
    not_added(history, edit_of(3), "on top of no edit and would stand on edits .*check_chain=False")
    not_added(history, edit_of(3, [second, first]), "its values would be wrong there")
    not_added(history, edit_of(3, [first]), "on top of edit ")
    fresh = EditHistory(tmp_path / "fresh")
    refused("and would stand on no edit", fresh.add, edit_of(2, [first]))
    assert fresh.versions[-1].number == 0
    assert history.add(edit_of(3), check_chain=False).number == 3


@pytest.mark.parametrize("number", [-1, 3, True, "1", 1.0])
def test_a_version_that_is_not_there(history, number):
    refused("expected a whole number from 0 to 2", history.rollback, number)
    refused("expected a whole number from 0 to 2", history.edits_of, number)
    assert len(history.versions) == 3


def test_a_refused_rollback_leaves_nothing_in_the_folder(tmp_path):
    refused("number = 1: expected 0, there is no other", EditHistory(tmp_path).rollback, 1)
    assert not list(tmp_path.iterdir())


# ---- damage


def test_a_damaged_or_missing_edit_is_seen(history):
    path = history.folder / EDITS / f"{history.versions[1].edits[0]}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("is damaged: its digest is not its name", history.edits_of, 1)
    refused("is damaged", history.rollback, 1)
    assert len(history.versions) == 3
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        _ = history.current


def test_a_manifest_changed_by_hand_is_seen(history):
    path = history.folder / MANIFEST
    record = json.loads(path.read_text())
    record["versions"][1]["message"] = "another"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was it edited by hand"):
        _ = history.versions
    path.write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        _ = history.versions
    path.unlink()
    with pytest.raises(ValueError, match="is gone, but its edits are there"):
        _ = history.versions


def test_an_error_while_writing_leaves_the_versions_as_they_were(history, monkeypatch):
    below = [edit_of(1), edit_of(2, [edit_of(1)])]
    with monkeypatch.context() as patch:
        watched(patch, EditHistory, "_write", break_at=(1,), error=OSError)
        refused("broken by a test", history.add, edit_of(3, below), error=OSError)
    assert len(history.versions) == 3
    assert history.add(edit_of(3, below)).number == 3


def _roll(folder, times):
    torch.set_num_threads(1)
    for _ in range(times):
        EditHistory(folder).rollback(1)


def test_programs_that_write_at_the_same_time_lose_no_version(history):
    pytest.importorskip("fcntl", reason="folders are locked on Unix only")
    fork = multiprocessing.get_context("fork")
    programs = [fork.Process(target=_roll, args=(history.folder, 20)) for _ in range(3)]
    for program in programs:
        program.start()
    for program in programs:
        program.join(60)
    assert [program.exitcode for program in programs] == [0, 0, 0]
    assert [v.number for v in history.versions] == list(range(63))


# ---- chains


def test_chains_for_merging():
    """An edit may name none below it, and then stand anywhere; one that names some must stand on these."""
    first = edit_of(1)
    second = edit_of(2, [first])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_chain([first, second])
    with pytest.warns(UserWarning, match="edit 2 of 2 was made without those before it"):
        check_chain([edit_of(3), first])
    refused(r"edit 1 of 2 was made on top of edit .* no edit; give the whole chain", check_chain, [second, first])
    refused("edit 1 of 1 was made on top", check_chain, [second])


def test_a_first_addition_that_was_killed_can_be_made_again(tmp_path, monkeypatch):
    """Between the edit's file and the manifest that lists it."""
    history = EditHistory(tmp_path / "edits")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watched(patch, EditHistory, "_keep", break_at=(1,), error=KeyboardInterrupt, after=True)
        history.add(edit_of(1))
    assert len(list((history.folder / EDITS).iterdir())) == 1 and history.current == ()
    assert history.add(edit_of(1)).number == 1
    assert digests(history.current) == digests([edit_of(1)]) and history.fingerprint == MODEL


def test_what_a_killed_addition_left_is_written_over(history):
    (history.folder / EDITS / ".new").write_bytes(b"half an edit")
    history.add(edit_of(3, history.current))
    assert not (history.folder / EDITS / ".new").exists() and len(history.current) == 3


def test_a_listed_name_that_is_a_path_is_refused(history):
    """The list's own digest fits: whoever wrote the name wrote that too."""
    path = history.folder / MANIFEST
    record = json.loads(path.read_text())
    record["versions"][1]["edits"] = ["../../victim"]
    record["sha256"] = module._sha256_of_list(record["fingerprint"], record["versions"])
    path.write_text(json.dumps(record))
    refused(rf"{MANIFEST} names the file '../../victim.safetensors'", history.edits_of, 1)
