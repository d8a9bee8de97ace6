"""Work in groups that are kept, and memory that runs out on the way."""

import logging
from dataclasses import dataclass

import pytest
import torch

from kedit_fast.basics.parts import Held, Parts
from kedit_fast.sweep.kept import fitting, in_groups
from kedit_fast.sweep.plan import RowCost, together, too_large
from tests.conftest import tiny_lm


@dataclass
class Work:
    """Squares of numbers, in groups whose sum the memory holds; a group whose sum is above ``there`` runs out of it."""

    items: tuple = tuple(range(1, 11))
    there: int = 10**9
    unit: int = 1
    kill_at: int | None = None

    def __call__(self, lm, keep):
        self.cuts = []

        def make(group, first):
            if first == self.kill_at:
                raise KeyboardInterrupt
            if sum(group) > self.there:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
            self.cuts.append(list(group))
            return {"squares": torch.tensor(group) ** 2}

        groups = in_groups(
            keep,
            "squares",
            self.items,
            lambda rest: together(rest, float, lm.memory // self.unit),
            make,
            "number",
            size=float,
        )
        return torch.cat([group.part["squares"] for group in groups]).tolist()


SQUARES = [n * n for n in range(1, 11)]


def test_a_run_that_goes_on_makes_the_same_groups(tmp_path, caplog):
    lm, whole = tiny_lm("llama"), Work(unit=tiny_lm("llama").memory // 15)
    assert fitting(lm, Held(), lambda lm: whole(lm, Held())) == SQUARES and len(whole.cuts) == 5
    work, done = Work(unit=whole.unit), []
    for stop in (5, 9, None):
        work.kill_at = stop
        with Parts(tmp_path / "run", {}) as keep, caplog.at_level(logging.INFO, "kedit_fast"):
            try:
                assert work(lm, keep) == SQUARES
            except KeyboardInterrupt:
                assert stop
        done += work.cuts
    assert done == whole.cuts
    assert "5 of 10 numbers are done" in caplog.text and "going on with the run of " in caplog.text


def test_out_of_memory_halves_what_is_cut_and_is_written_down(tmp_path):
    lm = tiny_lm("llama")
    work = Work(unit=lm.memory // 40, there=12)
    with Parts(tmp_path / "run", {}) as keep, pytest.warns(UserWarning, match="out of memory: what is not done yet"):
        assert fitting(lm, keep, lambda lm: work(lm, keep)) == SQUARES
        assert max(map(sum, work.cuts)) <= 10 and keep.memory == lm.memory // 4
    (tmp_path / "run" / "squares-000009.safetensors").unlink()
    with Parts(tmp_path / "run", {}) as keep:  # a run that goes on begins with the cut that was found
        assert keep.memory == lm.memory // 4
        assert fitting(lm, keep, lambda lm: [lm.memory, work(lm, keep)]) == [lm.memory // 4, SQUARES]


def test_memory_that_never_suffices_is_told(monkeypatch):
    lm = tiny_lm("llama")
    work = Work(there=0)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(MemoryError, match="end other programs"):
        fitting(lm, Held(), lambda lm: work(lm, Held()))

    def cut(lm):
        raise too_large("one fact", 10**10, lm.memory) if lm.memory < RowCost.of(lm).call * 40 else MemoryError()

    with pytest.warns(UserWarning), pytest.raises(MemoryError, match="out of memory: one fact needs"):
        fitting(lm, Held(), cut)
    with pytest.raises(ValueError, match="open the model with a larger memory="):
        fitting(lm, Held(), lambda lm: (_ for _ in ()).throw(too_large("one fact", 10**10, lm.memory)))
    with pytest.raises(RuntimeError, match="anything else"):
        fitting(lm, Held(), lambda lm: (_ for _ in ()).throw(RuntimeError("anything else")))


def test_a_part_that_does_not_say_its_items_is_refused():
    with pytest.raises(ValueError, match="holds numbers -1 to -1 of 3; begin anew"):
        list(in_groups(lambda name, make: {}, "x", [1, 2, 3], lambda rest: iter([rest]), None, "number", size=float))
