"""A short, fixed selection of the kills; ``python -m tests.kills`` draws sixty."""

import pytest

from tests.kills import Bench, Kill

# By command: a moment in the middle of what it keeps, and one between its result and the end of its run.
SELECTED = {
    "trace": (Kill(call=4, where="torn"),),
    "edit": (Kill(call=12, where="after"),),
    "eval": (Kill(call=7, where="torn"), Kill(call=9)),
    "stats": (Kill(call=20),),
    "merge": (Kill(call=9, where="torn"), Kill(call=15)),
    "history": (Kill(call=6, where="torn"), Kill(call=11, where="after")),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", SELECTED)
def test_a_killed_command_that_is_given_again_ends_with_the_same_bits(name, bench, tmp_path):
    for i, kill in enumerate(SELECTED[name]):
        assert bench.check(name, [kill], tmp_path / f"work-{i}") == "", f"{name} killed {kill}"


def test_the_bench_sees_what_differs(bench, tmp_path):
    """A run that left a file, and one whose result is another's, are told."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "left").touch()
    assert bench.check("history", [], tmp_path / "work") == "differs: ['left']"
    whole = bench.whole("merge")
    bench.whole_of["merge"] = whole[0], {**whole[1], "merged/config.json": "other"}
    assert bench.check("merge", [], tmp_path / "again") == "differs: ['merged/config.json']"
