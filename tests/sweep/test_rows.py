"""Runs as tensors and the row table: where each position's key lies, and what each new row begins as."""

import random

import pytest
import torch

from kedit_fast.sweep.rows import Call, RowTable
from kedit_fast.sweep.runs import NEVER, RunList, add_sequences


def grown(runs, first=0, last=3, **options):
    """(table, [rows each new row begins as, by layer])"""
    table = RowTable(runs, first, last, **options)
    return table, [table.grow(layer).tolist() for layer in range(first, last + 1)]


def rows_of(table, run):
    """{pos: row} that a run owns."""
    return {int(p): i for i, (r, p) in enumerate(zip(table.run, table.pos, strict=True)) if int(r) == run}


# ---- runs


def test_a_block_of_runs():
    runs = RunList()
    root = runs.add([5, 6, 7])
    made = runs.add([5, 6, 9, 9], parent=root, first_pos=torch.tensor([2, 3]), branch_layer=1, graft=0, owner=7)
    assert root.tolist() == [0] and made.tolist() == [1, 2] and len(runs) == 3
    got = runs.runs()
    assert got.tokens.tolist() == [[5, 6, 7, 0], [5, 6, 9, 9], [5, 6, 9, 9]]
    assert got.length.tolist() == [3, 4, 4]
    assert got.parent.tolist() == [-1, 0, 0] and got.source.tolist() == [-1, 0, 0] and got.graft.tolist() == [-1, 0, 0]
    assert got.n_rows.tolist() == [3, 2, 1] and got.owner.tolist() == [0, 7, 7]


def test_a_block_of_no_runs():
    runs = RunList()
    runs.add([5, 6])
    none = torch.empty(0, dtype=torch.int64)
    for given in ({"parent": none}, {"first_pos": none, "parent": torch.tensor([0])}, {"tokens": none.view(0, 2)}):
        assert runs.add(**{"tokens": [5, 6]} | given).tolist() == []
    assert len(runs) == len(runs.runs()) == 1


def test_graft_and_source_default_to_what_stands_above():
    runs = RunList()
    runs.add([1, 2])
    runs.add([1, 2], parent=0, source=-1)
    runs.add([1, 2], parent=1, branch_layer=1)
    got = runs.runs()
    assert got.source.tolist() == [-1, -1, 1] and got.graft.tolist() == [-1, -1, 1]


def test_taking_runs_renumbers_what_they_name():
    runs = RunList()
    for parent in (-1, -1, 1, 2, 0):
        runs.add([1, 2, 3], parent=parent, first_pos=max(parent, 0), branch_layer=int(parent >= 0))
    taken = runs.runs().take(torch.tensor([1, 2, 3]))
    assert taken.parent.tolist() == [-1, 0, 1] == taken.source.tolist() == taken.graft.tolist()
    assert taken.first_pos.tolist() == [0, 1, 2]


def test_sequences_become_a_trie():
    """Each distinct prefix is one row, for random texts over two letters; numbers come in the order asked for."""
    draw = random.Random(0)
    texts = [[draw.choice([3, 4]) for _ in range(draw.randint(1, 7))] for _ in range(60)]
    runs = RunList()
    numbers = add_sequences(runs, texts)
    got = runs.runs()
    assert int(got.n_rows.sum()) == len({tuple(t[: i + 1]) for t in texts for i in range(len(t))})
    table, _ = grown(got)
    for text, number in zip(texts, numbers.tolist(), strict=True):
        rows = table.key_rows[number, : len(text)]
        owners, pos = table.run[rows], table.pos[rows]
        assert pos.tolist() == list(range(len(text)))
        assert got.tokens[owners, pos].tolist() == text
    assert (got.parent < torch.arange(len(got))).all()  # parents stand before their children
    equal = {tuple(t): n for t, n in zip(texts, numbers.tolist(), strict=True)}
    assert all(equal[tuple(t)] == n for t, n in zip(texts, numbers.tolist(), strict=True))


def test_edited_sequences_begin_as_their_base_runs():
    runs, texts = RunList(), [[1, 2, 3], [1, 2, 4], [5]]
    base = add_sequences(runs, texts, owner=-1)
    edited = add_sequences(runs, texts, branch_layer=2, owner=0, source=base)
    table, begins = grown(runs.runs())
    assert begins[1] == begins[3] == [] and len(begins[2]) == len(begins[0]) == 5
    for text, b, e in zip(texts, base.tolist(), edited.tolist(), strict=True):
        for pos in range(len(text)):
            row = int(table.key_rows[e, pos])
            assert begins[2][row - 5] == int(table.key_rows[b, pos])


# ---- the table


def test_branching_rows_and_the_keys_they_read():
    runs = RunList()
    clean = runs.add([1, 2, 3, 4])
    corrupted = runs.add([1, 2, 3, 4], parent=clean, first_pos=1, source=-1)
    restored = runs.add([1, 2, 3, 4], parent=corrupted, branch_layer=2, first_pos=2, graft=clean)
    table, begins = grown(runs.runs())
    assert begins == [[-1] * 7, [], [2, 6], []]  # the clean row at position 2, then the corrupted one at 3
    assert table.key_rows.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 4, 7, 8]]
    assert table.run.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2] and table.pos.tolist() == [0, 1, 2, 3, 1, 2, 3, 2, 3]
    assert table.ends.tolist() == [4, 7, 9]
    assert rows_of(table, int(restored)) == {2: 7, 3: 8}


def test_a_narrow_run_owns_one_row_in_its_first_layer():
    runs = RunList()
    runs.add([1, 2, 3, 4])
    runs.add([1, 2, 3, 4], parent=0, branch_layer=1, first_pos=1, narrow=True)
    table = RowTable(runs.runs(), 0)
    table.grow(0)
    assert table.key_rows[1].tolist() == [0, 4, 5, 6], "as it is in the end"
    places = torch.ones(4, dtype=torch.int64), torch.arange(4)
    assert table.rows_of(*places).tolist() == [-1] * 4, "the run has not begun"
    assert table.grow(1).tolist() == [1] and [call.stop for call in table.calls(1)] == [4, 5]
    assert table.rows_of(*places).tolist() == [0, 4, 2, 3], "what has not joined yet is as above it"
    assert table.grow(2).tolist() == [2, 3] and table.rows_of(*places).tolist() == [0, 4, 5, 6]
    assert table.grow(3).tolist() == [] and [call.stop for call in table.calls(1)] == [4, 5, 7]
    assert [len(table.at_layer(layer)) for layer in range(4)] == [4, 5, 7, 7]
    assert table.at_layer(1).rows_of(*places).tolist() == [0, 4, 2, 3]


def test_windows_that_branch_from_each_other():
    """The longer window begins where the shorter one ends, after the shorter one's other rows have joined."""
    runs = RunList()
    runs.add([1, 2, 3])
    short = runs.add([1, 2, 3], parent=0, branch_layer=0, first_pos=0, narrow=True)
    runs.add([1, 2, 3], parent=short, branch_layer=1, first_pos=0, narrow=True)
    table, begins = grown(runs.runs())
    assert begins == [[-1, -1, -1, 0], [1, 2, 3], [4, 5], []]
    assert table.key_rows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_sweeps_that_start_above_the_branch():
    runs = RunList()
    runs.add([1, 2, 3])
    runs.add([1, 2, 3], parent=0, branch_layer=1, first_pos=1)
    table, begins = grown(runs.runs(), first=2)
    assert begins[0] == [-1, -1, -1, 1, 2] and table.key_rows.tolist() == [[0, 1, 2], [0, 3, 4]]


def test_rows_over_a_store():
    runs = RunList()
    runs.add([1, 2], branch_layer=NEVER)
    runs.add([1, 2, 3, 4], parent=0, first_pos=2, source=-1)
    table, begins = grown(runs.runs(), store_table=torch.tensor([[4, 9]]), base=10)
    assert table.key_rows.tolist() == [[4, 9, -1, -1], [4, 9, 10, 11]]
    assert begins[0] == [-1, -1] and table.slots(slice(0, 2)) == slice(10, 12) and len(table) == 2
    assert table.row_of(torch.tensor([4, 9, 10, 11, -1])).tolist() == [-1, -1, 0, 1, -1]


def test_rows_with_slots_of_their_own():
    runs = RunList()
    runs.add([[1, 2, 0], [3, 4, 5]], length=torch.tensor([2, 3]), first_pos=torch.tensor([1, 1]))
    store = torch.arange(8).view(2, 4)
    table, _ = grown(runs.runs(), store_table=store, base=0, slots=torch.tensor([1, 5, 6]))
    assert table.key_rows.tolist() == [[0, 1, 2], [4, 5, 6]] and table.slots(slice(0, 3)).tolist() == [1, 5, 6]
    assert table.row_of(torch.tensor([0, 1, 5, 6, -1])).tolist() == [-1, 0, 1, 2, -1]


def test_a_circle_is_refused():
    runs = RunList()
    runs.add([1, 2], parent=1)
    runs.add([1, 2], parent=0)
    with pytest.raises(ValueError, match="in a circle"):
        RowTable(runs.runs(), 0)


# ---- what jobs see


def three_runs():
    runs = RunList()
    runs.add([1, 2, 3])
    runs.add([1, 2, 4], parent=0, first_pos=2, source=-1)
    runs.add([7, 8])
    return grown(runs.runs())[0]


def test_places_are_found_at_their_own_or_inherited_rows():
    table = three_runs()
    assert table.run.tolist() == [0, 0, 0, 2, 2, 1]  # children stand behind all roots
    call = Call(table, slice(0, 6), torch.arange(3))
    places = torch.tensor([1, 1, 2, 0]), torch.tensor([2, 1, 0, 2])
    which, row = call.find(*places)
    assert which.tolist() == [1, 3, 2, 0] and row.tolist() == [1, 2, 3, 5], "in the order of the rows"
    which, row = Call(table, slice(2, 5), torch.arange(3)).find(*places)
    assert which.tolist() == [3, 2] and row.tolist() == [0, 1]
    assert call.tokens.tolist() == [1, 2, 3, 7, 8, 4]


def test_places_outside_the_call_or_the_pack_are_not_found():
    table = three_runs()
    part = Call(table, torch.tensor([1, 3, 5]), torch.arange(3))
    which, row = part.find(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 2, 0, 2]))
    assert which.tolist() == [1, 3, 2] and row.tolist() == [0, 1, 2]
    empty = Call(table, torch.arange(0), torch.arange(3))
    assert empty.find(torch.tensor([0]), torch.tensor([0]))[0].tolist() == []
    renumbered = Call(three_runs(), slice(0, 6), torch.tensor([-1, 0, -1, 1, 2]))
    which, row = renumbered.find(torch.tensor([0, 1, 3, 4]), torch.tensor([0, 0, 2, 1]))
    assert which.tolist() == [1, 3, 2] and row.tolist() == [0, 4, 5]


def test_owners_of_rows():
    runs = RunList()
    runs.add([1, 2], owner=-1)
    runs.add([1, 2], parent=0, branch_layer=1, first_pos=1, owner=4)
    table, _ = grown(runs.runs())
    assert Call(table, torch.tensor([0, 2]), torch.arange(2)).owner.tolist() == [-1, 4]
