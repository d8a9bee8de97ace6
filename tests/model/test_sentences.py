"""Sentence encoders: a folder's rows are in tests/edits/test_retrieval.py; here the one that a package carries."""

import sys
import zipfile

import torch

from kedit_fast.model.sentences import MINILM, MODULE, installed_minilm, sentence_encoder
from tests.conftest import close, refused
from tests.edits.test_retrieval import ASKED, encoder  # noqa: F401 (a fixture)


def test_the_encoder_of_an_installed_package_is_unpacked_once(encoder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    sentence_encoder.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert installed_minilm() is None
    refused(f"sentence encoder '/no/{MINILM}'.*pip install", sentence_encoder, f"/no/{MINILM}")
    monkeypatch.undo()
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "site" / MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it is not to be imported')")
    with zipfile.ZipFile(package / "model.zip", "w") as carried:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            carried.write(f"{encoder}/{name}", name)
        carried.writestr("../outside.txt", "x")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    made = sentence_encoder(f"sentence-transformers/{MINILM}").rows(ASKED)
    close("as in its folder", made, sentence_encoder(encoder).rows(ASKED))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [MINILM.lower()]
    (package / "model.zip").unlink()
    sentence_encoder.cache_clear()
    assert torch.equal(sentence_encoder(MINILM).rows(ASKED), made) and MODULE not in sys.modules
    sentence_encoder.cache_clear()
