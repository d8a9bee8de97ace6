"""Checkpoints: a killed run goes on where it stood and ends with the same bits."""

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
import kedit_fast.jobs.values as values_module
from kedit_fast.basics.bits import digest
from kedit_fast.basics.parts import MANIFEST, Held, Parts, keep_json, keep_whole, make_now, remove_parts
from tests.conftest import close, tiny_lm
from tests.editors.cases import FACTS, GROUPS, moments
from tests.make import killed_at, watched

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
EDITOR = kf.Memit(layers=(0, 1, 2), mom2_update_weight=5.0, v_lr=1.0, v_num_grad_steps=4, clamp_norm_factor=0.4)


def edit(lm, facts=FACTS, editor=EDITOR, **options):
    return editor.edit(lm, facts, **{"moments": moments(), "contexts": GROUPS} | options)


def one_by_one(monkeypatch):
    monkeypatch.setattr(values_module, "groups", lambda lm, tasks, settings: ([task] for task in tasks))


def assert_same(a, b, folder):
    a.save(folder / "a"), b.save(folder / "b")
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


# ---- parts


def begun(folder, asked):
    """A run that has kept a part and is no longer at work."""
    with Parts(folder, asked) as keep:
        keep("part", lambda: {"x": torch.ones(3)})


def test_a_part_is_made_once_and_comes_back_bit_for_bit(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": torch.tensor([0.1, torch.nan, -0.0]), "n": torch.arange(3)[::2]}

    for _ in range(2):
        with Parts(tmp_path / "work", {"what": (1, 2)}) as keep:
            part = keep("part", make)
        assert digest(part["x"]) == digest(make()["x"]) and part["n"].tolist() == [0, 2]
        made.pop()
    assert len(made) == 1
    assert make_now("part", make)["n"].tolist() == [0, 2]
    with Parts(tmp_path / "work", {"what": [1, 2]}) as keep:
        assert keep_json(keep, "text", lambda: [["é", 1]]) == [["é", 1]]


def test_a_checkpoint_of_other_work_is_refused(tmp_path):
    begun(tmp_path / "work", {"what": 1, "model": "a"})
    with pytest.raises(ValueError, match='its model is "a", this one\'s "b"'):
        Parts(tmp_path / "work", {"what": 1, "model": "b"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="not empty and no checkpoint"):
        Parts(tmp_path / "other", {})
    with pytest.raises(NotADirectoryError):
        Parts(tmp_path / "other" / "thesis.txt", {})
    with pytest.raises(FileNotFoundError):
        Parts(tmp_path / "none" / "work", {})


def test_a_damaged_part_is_named(tmp_path):
    begun(tmp_path / "work", {})
    path = tmp_path / "work" / "part.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[:-1] + b"\x01"):
        path.write_bytes(damaged)
        with Parts(tmp_path / "work", {}) as keep, pytest.raises(ValueError, match=r"part\.safetensors is damaged"):
            keep("part", lambda: {})
    (tmp_path / "work" / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json is damaged .*; delete the folder"):
        Parts(tmp_path / "work", {})


def test_a_full_disk_leaves_the_parts_before_and_nothing_half(tmp_path, monkeypatch):
    begun(tmp_path / "work", {})
    before = {path.name: path.read_bytes() for path in (tmp_path / "work").iterdir()}
    with Parts(tmp_path / "work", {}) as keep, monkeypatch.context() as patch:
        watched(patch, os, "fsync", break_at=(1,), error=lambda _: OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space left on device; the parts before it are kept") as error:
            keep("next", lambda: {"x": torch.ones(3)})
    assert error.value.filename == str(tmp_path / "work" / "next.safetensors")
    assert {path.name: path.read_bytes() for path in (tmp_path / "work").iterdir()} == before


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    with Parts(tmp_path / "work", {}), pytest.raises(ValueError, match="another run works there; wait for it"):
        Parts(tmp_path / "work", {})
    assert not (tmp_path / "work").exists()  # nothing was kept
    Parts(tmp_path / "work", {}).close()


def test_a_part_made_in_parts_of_its_own(tmp_path):
    """They are found again until it is whole, and gone then."""
    made = []

    def make(keep, stop):
        inner = [keep(name, lambda name=name: made.append(name) or {"x": torch.ones(1)})["x"] for name in "ab"]
        if stop:
            raise KeyboardInterrupt
        return {"x": torch.cat(inner)}

    held = Held()
    for keep in (lambda: Parts(tmp_path / "work", {}), lambda: nullcontext(held)):
        made.clear()
        with keep() as run, pytest.raises(KeyboardInterrupt):
            keep_whole(run, "whole", lambda inside: make(inside, stop=True))
        with keep() as run:
            for was_found in (False, True):
                part, is_found = keep_whole(run, "whole", lambda inside: make(inside, stop=False))
                assert part["x"].tolist() == [1, 1] and is_found is was_found
        assert made == ["a", "b"]
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [MANIFEST, "whole.safetensors"]
    remove_parts(tmp_path / "work")
    remove_parts(tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_digests_tell_things_apart():
    x = torch.arange(6.0)
    others = [x.view(2, 3), x.double(), x + 1, "x", None]
    assert digest(x) == digest(x.clone()) and digest(x) not in [digest(other) for other in others]


# ---- an edit


@pytest.mark.parametrize("stop_at", ["contexts", "values-000002", "layer-1"])
def test_an_interrupted_edit_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch, stop_at):
    one_by_one(monkeypatch)
    lm = tiny_lm("llama")
    sampled = dict(contexts=None, seed=3)
    whole = edit(lm, **sampled)
    call, made = Parts.__call__, []

    def stopping(self, name, make):
        if name == stop_at:
            raise KeyboardInterrupt
        return call(self, name, lambda: made.append(name) or make())

    monkeypatch.setattr(Parts, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        edit(lm, checkpoint=tmp_path / "work", **sampled)
    before, stop_at = list(made), None
    again = edit(lm, checkpoint=tmp_path / "work", **sampled)
    assert len(made) == len(set(made)) == 1 + len(FACTS) + 3 and made[: len(before)] == before
    assert_same(again, whole, tmp_path)
    assert_same(edit(lm, checkpoint=tmp_path / "work", **sampled), whole, tmp_path)
    assert len(made) == 1 + len(FACTS) + 3


def test_an_edit_that_runs_out_of_memory_is_cut_anew_and_that_is_kept(tmp_path, monkeypatch):
    lm, seen, found = tiny_lm("llama"), [], values_module._side_by_side
    whole = edit(lm)

    def short(now, tasks, *rest):
        seen.append((len(tasks), now.memory))
        if len(tasks) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return found(now, tasks, *rest)

    monkeypatch.setattr(values_module, "_side_by_side", short)
    one = values_module.held_bytes
    monkeypatch.setattr(values_module, "held_bytes", lambda now, *task: one(now, *task) and lm.memory // len(FACTS))
    with pytest.warns(UserWarning, match="out of memory: what is not done yet is cut for 2.15 GB"), killed_at(2):
        edit(lm, checkpoint=tmp_path / "work")
    assert seen == [(4, lm.memory), (2, lm.memory // 2), (2, lm.memory // 2)]
    assert json.loads((tmp_path / "work" / MANIFEST).read_text())["memory"] == lm.memory // 2
    again = edit(lm, checkpoint=tmp_path / "work")
    assert len(seen) == 3
    for layer, delta in whole.deltas.items():
        close(f"layer {layer}", again.deltas[layer].dense(), delta.dense())


CHANGES = {
    "facts": lambda lm, first: {"facts": FACTS[:3]},
    "contexts": lambda lm, first: {"contexts": [["{}"]]},
    "editor": lambda lm, first: {"editor": replace(EDITOR, v_num_grad_steps=5)},
    "independent": lambda lm, first: {"independent": True},
    "moments": lambda lm, first: {"moments": {i: replace(m, matrix=m.matrix * 2) for i, m in moments().items()}},
    "previous": lambda lm, first: {"previous": first},
    "model": lambda lm, first: {"lm": tiny_lm("gpt2")},
    "memory": lambda lm, first: {"lm": replace(lm, memory=lm.memory // 2)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_bits_is_noticed(tmp_path, change):
    asked = {"lm": tiny_lm("llama"), "checkpoint": tmp_path / "work"}
    first = edit(**asked)
    with pytest.raises(ValueError, match="holds other work"):
        edit(**asked | CHANGES[change](asked["lm"], first))


SCRIPT = """
import sys
import kedit_fast.jobs.values as values
from kedit_fast.basics.parts import Parts
from tests.basics.test_parts import FACTS, edit, tiny_lm
values.groups = lambda lm, tasks, settings: [[task] for task in tasks]
call = Parts.__call__
def told(self, name, make):
    part = call(self, name, make)
    print(name, flush=True)
    if name == sys.argv[2]:
        sys.stdin.readline()  # until killed
    return part
Parts.__call__ = told
edit(tiny_lm("llama"), checkpoint=sys.argv[1]).save(sys.argv[1] + ".edit")
"""


def test_a_killed_process(tmp_path, monkeypatch):
    """kill -9, in another process, while the third value has been kept and the fourth has not."""
    one_by_one(monkeypatch)
    folder = str(tmp_path / "work")
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, folder, "values-000002"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while (line := child.stdout.readline().strip()) != "values-000002":
        assert line, "the process ended before it was killed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close(), child.stdout.close()
    assert not (tmp_path / "work.edit").exists()
    assert_same(edit(tiny_lm("llama"), checkpoint=folder), edit(tiny_lm("llama")), tmp_path)
