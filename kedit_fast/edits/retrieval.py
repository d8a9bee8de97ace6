"""Retrieval: which of some texts a prompt is nearest to.

    numbers, scores = retrieve(texts, queries, 3)                     # TF-IDF, which needs no model
    numbers, scores = retrieve(texts, queries, 3, "hidden", lm)       # the model's own hidden states

An index holds what its texts are compared by, and is part of an edit's file: words and their weights, or rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.edits.routes import check_width, prompt_features
from kedit_fast.facts.tfidf import TfIdf
from kedit_fast.model.family import check_layer
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.model.sentences import sentence_encoder
from kedit_fast.sweep.sites import Site


class Index(ABC):
    """Texts, and how alike others are to them. kind: as files call it; texts: [n]"""

    kind: ClassVar[str] = ""
    texts: tuple[str, ...]

    def __post_init__(self):
        texts = checks.listed("texts", self.texts, str, "a list of texts", empty=True, alone=False)
        object.__setattr__(self, "texts", tuple(texts))

    @abstractmethod
    def scores(self, lm, queries: Sequence[str]) -> Tensor:
        """[q, n] fp32: the cosine of each query and each text."""

    def nearest(self, lm, queries: Sequence[str], k: int) -> tuple[Tensor, Tensor]:
        """(numbers [q, k] of the texts that are most alike, most alike first, their scores [q, k]); k at most n. Of
        equal ones the first comes first."""
        scores, numbers = self.scores(lm, queries).sort(dim=-1, descending=True, stable=True)
        return numbers[:, :k], scores[:, :k]

    def take(self, which: Sequence[int]) -> "Index":
        """The index of some of its texts, compared as before."""
        return replace(self, texts=tuple(self.texts[i] for i in which))

    def check(self, lm) -> None:  # noqa: B027 (one that compares texts fits every model)
        """Raises ValueError where it does not fit a model."""

    def record(self) -> dict:
        """What a file says of it, ready for JSON, beside ``tensors``."""
        return {"texts": list(self.texts)}

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {}

    @classmethod
    def of(cls, record: dict, tensors: dict[str, Tensor]) -> "Index":
        """The index of a file."""
        return cls(**record, **tensors)


@dataclass(frozen=True, eq=False)
class TfIdfIndex(Index):
    """By the words they share, the rarer the more (``facts/tfidf.py``). words: [V]; idf: [V] fp64"""

    texts: tuple[str, ...]
    words: tuple[str, ...]
    idf: Tensor
    kind: ClassVar[str] = "tfidf"

    def __post_init__(self):
        super().__post_init__()
        words = checks.listed("words", self.words, str, "a list of words", alone=False)
        object.__setattr__(self, "words", tuple(words))
        if self.idf.shape != (len(words),) or self.idf.dtype != torch.float64 or not torch.isfinite(self.idf).all():
            shape = list(self.idf.shape)
            raise ValueError(
                f"idf: expected {len(words)} finite fp64 numbers, one a word, got {self.idf.dtype} {shape}"
            )
        if len(set(words)) < len(words):
            raise ValueError("words: expected each once")

    @classmethod
    def made(cls, texts: Sequence[str], background: Sequence[str] = ()) -> "TfIdfIndex":
        """Words and weights are of the texts and the background."""
        fitted = TfIdf.fit([*texts, *background])
        return cls(tuple(texts), fitted.words, torch.from_numpy(fitted.idf.copy()))

    def scores(self, lm, queries: Sequence[str]) -> Tensor:
        """Cosines of TF-IDF rows."""
        fitted = TfIdf(self.words, self.idf.numpy())
        return torch.from_numpy(fitted.similarity(queries, self.texts))

    def record(self) -> dict:
        """Texts and words."""
        return super().record() | {"words": list(self.words)}

    def tensors(self) -> dict[str, Tensor]:
        """The words' weights."""
        return {"idf": self.idf}


@dataclass(frozen=True, eq=False)
class RowIndex(Index):
    """By rows of an encoder, less their center. rows: [n, width]; center: [width]; both fp32"""

    texts: tuple[str, ...]
    rows: Tensor
    center: Tensor

    def __post_init__(self):
        super().__post_init__()
        if self.rows.ndim != 2 or len(self.rows) != len(self.texts) or self.center.shape != self.rows.shape[1:]:
            shapes = f"{list(self.rows.shape)} and {list(self.center.shape)}"
            raise ValueError(f"rows and center of {len(self.texts)} texts: expected [n, width], [width]; got {shapes}")
        if any(x.dtype != torch.float32 or not torch.isfinite(x).all() for x in (self.rows, self.center)):
            raise ValueError("rows and center: expected finite fp32 numbers")

    @abstractmethod
    def encode(self, lm, texts: Sequence[str]) -> Tensor:
        """[n, width] fp32 of texts."""

    def scores(self, lm, queries: Sequence[str]) -> Tensor:
        """Cosines of centered rows."""
        asked, held = (_unit(rows - self.center) for rows in (self.encode(lm, queries), self.rows))
        return asked @ held.T

    def take(self, which: Sequence[int]) -> "RowIndex":
        """As ``Index.take``."""
        return replace(self, texts=tuple(self.texts[i] for i in which), rows=self.rows[list(which)])

    def tensors(self) -> dict[str, Tensor]:
        """Rows and center."""
        return {"rows": self.rows, "center": self.center}

    def filled(self, lm, background: Sequence[str]) -> "RowIndex":
        """The index with its texts' rows; the center is the mean row of texts and background, if these are several."""
        rows = self.encode(lm, [*self.texts, *background])
        center = rows.mean(0) if len(rows) > 1 else torch.zeros(rows.shape[1])
        return replace(self, rows=rows[: len(self.texts)].clone(), center=center)


@dataclass(frozen=True, eq=False)
class HiddenIndex(RowIndex):
    """By the model's own hidden states: the mean of layer_out over a text's tokens but the first, where models park
    attention. layer: of them, an early one: there a text's words are, later what comes next"""

    layer: int = 0
    kind: ClassVar[str] = "hidden"

    def __post_init__(self):
        super().__post_init__()
        checks.whole("layer", self.layer, most=checks.MOST_LAYERS, like=5)

    @classmethod
    def made(cls, lm, texts: Sequence[str], background: Sequence[str] = (), layer: int | None = None) -> "RowIndex":
        """At an eighth of the model's depth, unless told otherwise: of 100 CounterFact facts the paraphrase finds its
        own 90 times at layer 4 of SmolLM2's 30, 68 times at layer 12 (rows standardized)."""
        layer = lm.n_layers // 8 if layer is None else layer
        blank = torch.zeros(len(texts), lm.d_model)
        return cls(tuple(texts), blank, blank.new_zeros(lm.d_model), layer).filled(lm, background)

    def encode(self, lm, texts: Sequence[str]) -> Tensor:
        """One sweep up to the layer."""
        return prompt_features(lm, texts, self.layer, Site.layer_out, every=True, skip=1).float()

    def check(self, lm) -> None:
        """Raises ValueError for a layer that the model does not have, and for another width."""
        check_layer(self.layer, lm.n_layers)
        check_width(self.rows.shape[1], Site.layer_out, self.layer, lm)

    def record(self) -> dict:
        """Texts and layer."""
        return super().record() | {"layer": self.layer}


@dataclass(frozen=True, eq=False)
class SentenceIndex(RowIndex):
    """By a sentence encoder, one that is installed. encoder: its folder or hub id (``model/sentences.py``)"""

    encoder: str = ""
    kind: ClassVar[str] = "sentence"

    def __post_init__(self):
        super().__post_init__()
        checks.text("encoder", self.encoder, like="all-MiniLM-L6-v2")

    @classmethod
    def made(cls, texts: Sequence[str], encoder: str) -> "RowIndex":
        """Not centered: such encoders are trained for plain cosines."""
        rows = sentence_encoder(encoder).rows(texts)
        return cls(tuple(texts), rows, torch.zeros(rows.shape[1]), encoder)

    def encode(self, lm, texts: Sequence[str]) -> Tensor:
        """By the encoder, whatever the model."""
        return sentence_encoder(self.encoder).rows(texts)

    def record(self) -> dict:
        """Texts and encoder."""
        return super().record() | {"encoder": self.encoder}


INDEXES: dict[str, type[Index]] = {index.kind: index for index in (TfIdfIndex, HiddenIndex, SentenceIndex)}


def index_of(retriever: str, lm, texts: Sequence[str], background: Sequence[str] = ()) -> Index:
    """The index of texts by a retriever: "tfidf", "hidden", or the folder or hub id of a sentence encoder.

    background: further texts of their kind, which words are weighed and rows are centered by
    Raises ValueError for no texts, and where there is no such encoder.
    """
    checks.text("retriever", retriever, like="tfidf")
    checks.listed("texts", texts, str, "texts to find", alone=False)
    if retriever == TfIdfIndex.kind:
        return TfIdfIndex.made(texts, background)
    if retriever == HiddenIndex.kind:
        if lm is None:
            raise ValueError("retriever 'hidden' compares a model's hidden states; give lm=, or take 'tfidf'")
        return HiddenIndex.made(lm, texts, background)
    return SentenceIndex.made(texts, retriever)


@takes_lm
def retrieve(
    texts: Sequence[str], queries: Sequence[str], k: int, retriever: str = "tfidf", lm: LM | None = None
) -> tuple[Tensor, Tensor]:
    """(numbers [q, k] of the texts nearest to each query, nearest first, their cosines [q, k]); see ``index_of``."""
    texts = checks.listed("texts", texts, str, "texts to find", alone=False)
    k = checks.whole("k", k, least=1, most=len(texts), like=1)
    queries = checks.listed("queries", queries, str, "texts to find the nearest of", alone=False)
    return index_of(retriever, lm, texts).nearest(lm, queries, k)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1)
