"""Cutting runs into packs and rows into calls."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kedit_fast.sweep.plan import CALL_ROWS, TABLES, RowCost, calls, cut
from kedit_fast.sweep.runs import NEVER, RunList
from tests.conftest import tiny_lm

COST = RowCost(kept=10, passing=7)


def memory(rows: int) -> int:
    """Bytes that hold just so many rows."""
    return rows * COST.kept + CALL_ROWS * COST.passing


def random_runs(seed: int):
    """Roots and children of random lengths; a child names its parent, another source and another graft."""
    draw, runs = random.Random(seed), RunList()
    for i in range(40):
        above = [draw.randrange(i) if i and draw.random() < 0.6 else -1 for _ in range(3)]
        runs.add(list(range(draw.randint(1, 5))), parent=above[0], source=above[1], graft=above[2])
    return runs.runs()


@pytest.mark.parametrize("seed", range(5))
def test_packs_hold_every_run_with_its_ancestors_and_no_more_than_fits(seed):
    runs = random_runs(seed)
    packs = cut(runs, COST, memory(60))
    assert set(torch.cat(packs).tolist()) == set(range(len(runs))) and len(packs) > 1
    for pack in packs:
        assert pack.tolist() == sorted(set(pack.tolist()))
        assert int(runs.n_rows[pack].sum()) <= 60
        for above in (runs.parent, runs.source, runs.graft):
            assert set(above[pack].tolist()) <= {-1, *pack.tolist()}
        taken = runs.take(pack)
        assert (taken.parent < torch.arange(len(taken))).all()


def test_all_fits_in_one_pack():
    runs = random_runs(0)
    assert [p.tolist() for p in cut(runs, COST, memory(10_000))] == [list(range(len(runs)))]


def test_the_last_row_that_fits():
    runs = RunList()
    for _ in range(4):
        runs.add([1, 2, 3])
    assert [p.tolist() for p in cut(runs.runs(), COST, memory(6))] == [[0, 1], [2, 3]]
    assert [p.tolist() for p in cut(runs.runs(), COST, memory(6) - 1)] == [[0], [1], [2], [3]]


def test_stored_runs_hold_no_rows():
    runs = RunList()
    runs.add([1, 2, 3, 4], branch_layer=NEVER)
    runs.add([1, 2, 3, 4, 5], parent=0, first_pos=4)
    assert [p.tolist() for p in cut(runs.runs(), COST, memory(1))] == [[0, 1]]


def test_what_does_not_fit_says_how_much_it_needs():
    runs = RunList()
    runs.add([1, 2])
    runs.add([1, 2, 3], parent=0, source=-1)
    cost = RowCost(kept=10**9, passing=0)
    with pytest.raises(ValueError, match=r"needs 5 GB and memory allows 4 GB; .* a larger memory="):
        cut(runs.runs(), cost, 4 * 10**9)
    # the memory is the one that the user gave, and what is held beside the pack is needed too
    with pytest.raises(ValueError, match=r"needs 7 GB and memory allows 6 GB"):
        cut(runs.runs(), cost, 6 * 10**9, beside=2 * 10**9)
    # never the same figure twice, and what is said to be needed is enough
    with pytest.raises(ValueError, match=r"needs 14\.1 MB and memory allows 13\.9 MB"):
        cut(runs.runs(), RowCost(kept=2_810_001, passing=0), 13_999_999)


def test_no_runs_make_no_pack():
    runs = RunList()
    runs.add([1], parent=torch.empty(0, dtype=torch.int64))
    assert cut(runs.runs(), COST, memory(1)) == []


@pytest.mark.parametrize("size", [1, 5, 100])
def test_calls_end_where_a_segment_ends(size):
    ends = torch.tensor([3, 4, 9, 10, 12, 20])
    got = calls(ends, size)
    assert got[0][0] == 0 and got[-1][1] == 20
    assert all(stop == start for (_, stop), (start, _) in pairwise(got))
    assert {stop for _, stop in got} <= set(ends.tolist())
    for start, stop in got:
        segments = [e for e in ends.tolist() if start < e <= stop]
        assert stop - start <= size or len(segments) == 1


def test_a_row_costs_what_the_model_says():
    lm = tiny_lm("qwen3")  # width 48, d_ff 80, 2 key heads of 16
    wanted = RowCost(kept=4 * (3 * 48 + 2 * 2 * 16), passing=4 * (3 * 80 + 6 * 48), position=TABLES)
    assert replace(RowCost.of(lm), logits=0) == wanted
    assert RowCost.of(tiny_lm("qwen3", torch.bfloat16)).kept == RowCost.of(lm).kept // 2
