"""A fixed corpus of mutated files for each reader: it gives what it should, or refuses in words that help."""

import pytest

from tests.fuzz.judge import Count, fault_of, held, mutated, run, seeds_of, verdict
from tests.fuzz.mutate import SECRET
from tests.fuzz.readers import READERS, Reader

INPUTS = 40  # a reader: the same in each run. `python -m tests.fuzz` goes on from there


@pytest.mark.parametrize("name", READERS)
def test_a_reader_refuses_or_takes_each(name, tmp_path):
    found = run(name, READERS[name], tmp_path, iter(range(INPUTS)))
    assert found.inputs == INPUTS and not found.wrong, found.wrong
    assert found.refused.total() + found.taken == INPUTS and found.refused


def reading(function) -> Reader:
    return Reader(function, "file", lambda folder: (folder / "0").mkdir() or (folder / "0" / "file").write_bytes(b"1"))


def raising(error):
    def read(path):
        raise error

    return read


needs_figures = pytest.mark.skipif(not held(), reason="this system does not say what a process holds at its height")


def busy(path):
    while True:
        pass


@pytest.mark.parametrize(
    "read, says",
    [
        (raising(KeyError("a")), "KeyError: \"'a'\""),
        (raising(RecursionError()), "RecursionError: ''"),
        (raising(ValueError("it is damaged")), "ValueError that does not name it: 'it is damaged'"),
        (lambda path: raising(ValueError(f"{path}: invalid literal"))(path), "not in words that help: 'invalid"),
        (lambda path: raising(ValueError(f"{path}: {'x' * 5_000}"))(path), "characters"),
        pytest.param(lambda path: bytearray(1 << 28), "held more than", marks=needs_figures),
        (lambda path: (path.parent / SECRET).read_text(), "opened a file that it names"),
        (busy, "took more than"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_seen(read, says, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzz.judge.SECONDS", 0.1)
    ((path, _),) = seeds_of(reader := reading(read), tmp_path / "files")
    said, why = verdict(reader, path)
    assert said == "wrong" and says in why
    assert verdict(reading(lambda path: None), path) == ("taken", "")


def test_a_refusal_that_helps_is_right(tmp_path):
    path = tmp_path / "file"
    assert fault_of(ValueError(f"{path} is cut short; fetch it again"), reading(None), path) == ""
    assert fault_of(FileNotFoundError(2, "No such file", str(path)), reading(None), path) == ""


def test_the_same_seed_is_the_same_file(tmp_path):
    from random import Random

    ((_, data), *_) = seeds_of(READERS["edit"], tmp_path / "edit")
    a, b, c = (mutated(READERS["edit"], data, Random(seed)) for seed in ("1", "1", "2"))
    assert a == b != c


def test_a_table_is_told(tmp_path, capsys, monkeypatch):
    from tests.fuzz import __main__ as module

    monkeypatch.setattr(module, "limit_memory", lambda more: None)
    monkeypatch.setattr(module, "READERS", {"broken": reading(raising(KeyError("a")))})
    monkeypatch.setattr(module, "run", lambda *args: broken())
    assert module.main(["--inputs", "1", "--keep", str(tmp_path / "wrong")]) == 1
    shown = capsys.readouterr().out
    assert "wrong, 1 times: KeyError (--reader 'broken' --seed 7)" in shown and shown.splitlines()[-1].startswith("all")
    assert [path.read_bytes() for path in (tmp_path / "wrong").iterdir()] == [b"data"]


def broken() -> Count:
    made = Count(inputs=1, seconds=1.0)
    made.wrong["KeyError"], made.kept["KeyError"] = 1, (7, b"data")
    return made
