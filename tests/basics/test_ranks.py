"""Work shared by ranks equals one process's; their errors, and a rank that is gone. One run of two processes for all.

What each public function shares is in ``of_ranks``, which both sides run.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kedit_fast.basics import ranks
from kedit_fast.basics.settings import Launch, launch
from kedit_fast.editors.written import counted_elsewhere
from kedit_fast.tracing.results import read_log
from tests.basics import of_ranks
from tests.compare import relative_error
from tests.conftest import save_tiny
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent.parent
Z = 1e-4  # of values after all their steps, and what is made of them; all else is equal to 1e-6


def started(n: int, folder: Path, *names: str) -> list[subprocess.Popen]:
    """n ranks of ``of_ranks``."""
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in (one, two)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0], "SECOND_PORT": ports[1]}
    place |= {"WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.basics.of_ranks", str(folder), *names]
    return [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **place, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) for i in range(n)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder in which two ranks left what they made."""
    folder = save_tiny(tmp_path_factory.mktemp("ranks") / "model", tiny_model("llama")).parent
    running = started(2, folder)
    said = [process.communicate(timeout=300)[0] for process in running]
    assert running[0].returncode == 0 and running[1].returncode == -9, "\n".join(said)
    assert "3 facts, 3 traces" in said[0] and "3 facts" not in said[1]
    return folder


@pytest.fixture(scope="module")
def found(two) -> list[dict[str, torch.Tensor]]:
    return [load_file(two / f"rank-{i}.safetensors") for i in range(2)]


@pytest.mark.parametrize("name", of_ranks.WORK)
def test_ranks_give_what_one_process_gives(name, found, tmp_path):
    of_first, of_second = ({k: x for k, x in of.items() if k.startswith(f"{name} ")} for of in found)
    alone = {f"{name} {key}": x for key, x in of_ranks.WORK[name](tmp_path).items()}
    assert alone and alone.keys() == of_first.keys() == of_second.keys()
    for key, x in alone.items():
        assert torch.equal(of_first[key], of_second[key]), f"{key} differs between ranks"
        if name == "trace":  # in the groups of one process
            assert torch.equal(of_first[key], x), f"{key} has other bits"
        apart = (of_first[key].double() - x.double()).abs().max()
        apart /= x.double().abs().max().clamp(min=1e-30)
        assert apart <= (Z if name == "edit" else 1e-6), f"{key} is {apart:.1e} off"


def test_an_error_of_one_rank_is_raised_on_all_and_a_rank_that_is_gone_ends_the_others(two):
    memory, missing, other, after, lost, soon = json.loads((two / "rank-0.json").read_text())
    assert (memory, missing) == ("rank 1: no room for 3", "rank 1: no such file")
    assert other.startswith("number of facts: 5 on rank 0, 6 on rank 1; ranks share work themselves")
    assert after == "[0, 1]"
    assert lost.startswith("one of the 2 ranks is gone") and soon == "True"


def test_a_command_of_several_ranks_leaves_the_files_of_one(two, tmp_path):
    (tmp_path / "model").symlink_to(two / "model")
    assert of_ranks.command(tmp_path) == 0
    ours, theirs = (read_log(folder / "command" / "traces.jsonl") for folder in (tmp_path, two))
    assert {p.name for p in (two / "command").iterdir()} == {p.name for p in (tmp_path / "command").iterdir()}
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.answer == other.answer and abs(mine.p_restored - other.p_restored).max() < 1e-6


def test_what_a_rank_had_done_when_another_was_killed_is_found_by_one_alone(two, tmp_path):
    """The first rank's values are a part; the second one's facts are done anew, and the edit is that of one process."""
    parts = two / "killed"
    (kept,) = parts.glob("values-*.safetensors")
    before = kept.stat().st_mtime_ns
    with counted_elsewhere():
        resumed, whole = of_ranks.begun_and_killed(two), of_ranks.begun_and_killed(None)
    assert kept.name == "values-000000.safetensors" and kept.stat().st_mtime_ns == before
    assert sorted(path.name for path in parts.glob("values-*")) == [kept.name, "values-000003.safetensors"]
    assert relative_error(resumed.values, whole.values) < Z
    for got, want in zip(resumed.changes, whole.changes, strict=True):
        assert (got.delta.dense() - want.delta.dense()).norm() < Z * want.delta.dense().norm()


def test_shares_are_consecutive_and_of_like_sizes():
    assert ranks.shares([1] * 10, 4) == [range(2), range(2, 5), range(5, 7), range(7, 10)]
    assert ranks.shares([9, 1, 1, 1], 2) == [range(1), range(1, 4)]
    assert ranks.shares([5], 3) == [range(0), range(1), range(1, 1)]
    assert ranks.shares([], 2) == [range(0), range(0)]
    assert ranks.shares([0, 0], 2) == [range(2), range(2, 2)]


def test_without_a_group_every_function_is_what_one_process_does():
    part = {"x": torch.arange(3)}
    assert (ranks.n_ranks(), ranks.rank(), ranks.first(), ranks.anyone(True)) == (1, 0, True, True)
    assert ranks.gathered(part) == [part] and ranks.from_first(lambda: part) is part
    assert ranks.json_from_first(lambda: {1, 2}) == {1, 2}  # no JSON between
    assert list(ranks.dealt([1, 2], lambda n: {"n": n}, float, lambda n: None)) == [{"n": 1}, {"n": 2}]
    total = torch.ones(2, 2)
    ranks.summed_on_first_(total)
    assert total.sum() == 4
    with pytest.raises(ValueError, match=r"^as it is$"), ranks.joint():
        raise ValueError("as it is")


def test_a_launcher_is_known_by_its_environment(monkeypatch):
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        assert launch() is None
        monkeypatch.setenv(name, value)
    assert launch() == Launch(1, 2, 0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch() is None
