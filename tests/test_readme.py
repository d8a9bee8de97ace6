"""README's blocks run as they stand, on a tiny model: Python, JSON and shell; CI runs the two set-up commands."""

import re
import shlex
from pathlib import Path

import pytest

import kedit_fast as kf
from kedit_fast.commands import cli
from tests.conftest import save_tiny, tiny_lm
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
GATE = ["--no-builtin", "--generate", "2", "--context", "30"]  # less to ask; what stands in README is parsed as it is


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder to run in, with its own cache, README's facts.json and a tiny model in ./llama."""
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (record,) = blocks("json")
    (tmp_path / "facts.json").write_text(record, encoding="utf-8")
    save_tiny("llama", tiny_model("llama"))
    return tmp_path


def test_every_block_is_of_a_kind_that_is_run():
    assert {name for name, _ in BLOCKS} == {"python", "json", "bash"}
    set_up = [text for text in blocks("bash") if "python3 -m venv" in text]
    assert len(set_up) == 2 and all(len(text.splitlines()) == 1 for text in set_up)


def test_the_examples_run(work, monkeypatch, capsys):
    lm = tiny_lm("llama")
    monkeypatch.setattr(kf, "open_model", {"smollm2": lm}.__getitem__)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert "edited by memit" in capsys.readouterr().out
    assert (work / "eiffel.png").exists()
    assert kf.Edit.load(work / "edit.safetensors").facts[0].target_new == "Rome"
    assert names["singles"].independent and len(names["singles"].facts) == 8
    assert (work / "adapter" / "adapter_config.json").exists()
    assert names["question"].chat is True


def test_the_fact_file_is_read(work):
    (fact,) = kf.load_facts(work / "facts.json")
    assert fact.target_new == "Rome" and all(map(len, (fact.paraphrases, fact.neighborhood, fact.same_subject)))


def test_the_way_of_a_fact_into_a_model_and_out_again(work, capsys):
    (walk,) = [text for text in blocks("bash") if "python3 -m venv" not in text]
    before = {path.name: path.read_bytes() for path in (work / "llama").iterdir()}
    lines = [shlex.split(line, comments=True) for line in walk.splitlines()]
    assert all(words[0] == "kedit-fast" for words in lines)
    for words in lines:
        judged = words[1] == "gate" and "--init" not in words
        status = cli.main([*words[1:], *(GATE if judged else [])])
        # one fact has too few probes for a gate, and says so
        assert status == (1 if judged else 0), (words, capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in (work / "llama-edited").iterdir() if path.is_file()} == before
    assert {"eval.html", "gate.html"} <= {path.name for path in work.iterdir()}
    assert len(kf.EditHistory(work / "edits").current) == 1


def test_every_picture_is_there_and_small():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 2
    for name in pictures:
        assert (ROOT / name).read_bytes()[:4] == b"\x89PNG" and (ROOT / name).stat().st_size < 150_000


def test_every_formula_is_where_the_table_says():
    files = re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", README)
    assert len(files) > 10
    missing = [file for file in files if not (ROOT / "kedit_fast" / file).exists()]
    assert not missing


def test_every_method_is_in_the_table():
    table = README.partition("## Which way")[2].partition("\n## ")[0]
    assert set(kf.EDITORS) <= set(re.findall(r"`([a-z-]+)`", table))


def test_the_ratios_of_the_table_are_those_of_the_benchmarks():
    tables = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "bench" / "results").glob("*.md"))
    lines = [line for line in tables.splitlines() if line.startswith("|") and "published loop" in line]
    rows = [[float(x) for x in re.findall(r"([\d.]+)×", line)] for line in lines]
    measured = {round(x, 1) for row in rows for x in row}
    said = {float(x) for x in re.findall(r"([\d.]+)×", README)}
    assert said and said <= measured
