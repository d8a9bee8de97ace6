"""A tiny model's folder, and a folder to run commands in."""

import json

import pytest

from tests.commands.cases import FACTS, FAST, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to run in, with a fact file, settings and the cache beside it."""
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    (tmp_path / "memit.json").write_text(json.dumps(FAST | {"layers": [1, 2]}))
    return folder
