"""A tiny model's folder, a folder to run commands in, and what commands say."""

import json

import pytest

from tests.commands.cases import FACTS, FAST, run
from tests.conftest import save_tiny
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model"), tiny_model("llama")))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to run in, with a fact file, settings and the cache beside it."""
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    (tmp_path / "memit.json").write_text(json.dumps(FAST | {"layers": [1, 2]}))
    rome = {name: value for name, value in FAST.items() if name != "mom2_update_weight"}
    (tmp_path / "rome.json").write_text(json.dumps(rome | {"layers": [1]}))
    return folder


@pytest.fixture
def said(capsys):
    """``said(*args)``: what a command prints that ends well."""

    def printed(*args, status=0):
        capsys.readouterr()
        assert run(*args) == status
        return capsys.readouterr().out

    return printed


@pytest.fixture
def complaint(capsys):
    """``complaint(*args)``: what a command that is refused, with status 2, says on the standard error."""

    def told(*args):
        capsys.readouterr()
        assert run(*args) == 2
        return capsys.readouterr().err

    return told
