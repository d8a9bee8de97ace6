"""README's examples run as they stand, here on a tiny model; its prose cannot be tested, its names can."""

import re
from pathlib import Path

import kedit_fast as kf
from tests.conftest import tiny_lm

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm("llama")
    monkeypatch.setattr(kf, "open_model", {"smollm2": lm}.__getitem__)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(block, names)
    told = capsys.readouterr().out
    assert "with the subject corrupted" in told and "edited by memit" in told
    assert (tmp_path / "eiffel.png").exists()
    assert kf.Edit.load(tmp_path / "edit.safetensors").facts[0].target_new == "Rome"
    assert names["singles"].owners and len(names["singles"].facts) == 8
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert [len(edit.facts) for edit in kf.EditHistory(tmp_path / "edits").current] == [4, 4]


def test_the_fact_file_is_read(tmp_path):
    (record,) = re.findall(r"```json\n(.*?)```", README, re.S)
    (tmp_path / "facts.json").write_text(record, encoding="utf-8")
    (fact,) = kf.load_facts(tmp_path / "facts.json")
    assert fact.target_new == "Rome" and all(map(len, (fact.paraphrases, fact.neighborhood, fact.same_subject)))


def test_every_formula_is_where_the_table_says():
    files = re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", README)
    assert len(files) > 10
    missing = [file for file in files if not (ROOT / "kedit_fast" / file).exists()]
    assert not missing
