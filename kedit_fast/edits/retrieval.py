"""Retrieval: which of some texts a prompt is nearest to, and the route of an edit that asks that.

    numbers, scores = retrieve(texts, queries, 3)                     # TF-IDF, which needs no model
    numbers, scores = retrieve(texts, queries, 3, "hidden", lm)       # the model's own hidden states
    RetrievalRoute(index, entry, names=..., threshold=...)            # the entry whose text is nearest (IKE)

An index holds what its texts are compared by, and is part of an edit's file: words and their weights, or rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.edits.routes import Prompt, Route, check_width, prompt_features, text_of
from kedit_fast.facts.subjects import Names
from kedit_fast.facts.tfidf import TfIdf
from kedit_fast.model.family import check_layer
from kedit_fast.model.lm import LM
from kedit_fast.model.sentences import sentence_encoder
from kedit_fast.sweep.sites import Site

NONE = -2.0  # the score of an entry that a prompt does not name: below every cosine


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
        own 90 times at layer 4 of SmolLM2's 30, 68 times at layer 12."""
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


def retrieve(
    texts: Sequence[str], queries: Sequence[str], k: int, retriever: str = "tfidf", lm: LM | None = None
) -> tuple[Tensor, Tensor]:
    """(numbers [q, k] of the texts nearest to each query, nearest first, their cosines [q, k]); see ``index_of``."""
    texts = checks.listed("texts", texts, str, "texts to find", alone=False)
    k = checks.whole("k", k, least=1, most=len(texts), like=1)
    queries = checks.listed("queries", queries, str, "texts to find the nearest of", alone=False)
    return index_of(retriever, lm, texts).nearest(lm, queries, k)


# ---- the route


@dataclass(frozen=True, eq=False)
class RetrievalRoute(Route):
    """The entry whose text is most alike to a prompt, if it is so by ``threshold`` at least.

    index: of a text for each of m entries; entry: as in ``Route``
    names: [m] names of each, one of which has to stand in the prompt, between ends of words, whatever the case; of
        several entries that are named the most alike acts. None: no names are asked for
    """

    index: Index
    entry: Tensor
    names: tuple[tuple[str, ...], ...] | None = None
    threshold: float = -1.0
    kind: ClassVar[str] = "retrieval"

    def __post_init__(self):
        checks.instance("index", self.index, Index, "an Index, index_of(retriever, lm, texts)")
        checks.number("threshold", self.threshold, least=-1, most=1)
        if self.names is not None:
            object.__setattr__(self, "names", checked_names(self.names, self.n_entries))

    @property
    def n_entries(self) -> int:
        """As many as texts."""
        return len(self.index.texts)

    def check(self, lm) -> None:
        """As the index has it."""
        self.index.check(lm)

    def choose(self, lm, prompts: Sequence[Prompt]) -> Tensor:
        """The nearest entry; prompts that name none are compared with nothing."""
        texts = [text_of(lm, prompt) for prompt in prompts]
        entries = torch.full((len(texts),), -1)
        if not self.n_entries or not texts:
            return entries
        if self.names is None:
            return chosen(self.index.scores(lm, texts), self.threshold)
        named = self._named.in_texts(texts)
        asked = named.any(1).nonzero()[:, 0].tolist()
        if asked:
            scores = self.index.scores(lm, [texts[i] for i in asked])
            entries[asked] = chosen(scores.masked_fill(~named[asked], NONE), self.threshold)
        return entries

    @cached_property
    def _named(self) -> "NamedEntries":
        return NamedEntries(self.names or ())

    def take(self, entries: Tensor, entry: Tensor, facts: Tensor) -> "RetrievalRoute":
        """Some texts, with their rows, and names."""
        which = entries.tolist()
        names = None if self.names is None else tuple(self.names[i] for i in which)
        return replace(self, index=self.index.take(which), names=names, entry=entry)

    def record(self) -> dict:
        """Names, threshold, and what the index says of itself."""
        names = None if self.names is None else [list(some) for some in self.names]
        index = {"kind": self.index.kind} | self.index.record()
        return {"names": names, "threshold": self.threshold, "index": index}

    def tensors(self) -> dict[str, Tensor]:
        """The facts' entries, and the index's."""
        return {"entry": self.entry} | {f"index.{name}": tensor for name, tensor in self.index.tensors().items()}

    @classmethod
    def of(cls, record: dict, tensors: dict[str, Tensor]) -> "RetrievalRoute":
        """The route of a file."""
        said = dict(record.pop("index"))
        held = {name.removeprefix("index."): tensors.pop(name) for name in list(tensors) if name.startswith("index.")}
        return cls(INDEXES[said.pop("kind")].of(said, held), **record, **tensors)


class NamedEntries:
    """Which entries a text names. names: [m] of each entry"""

    def __init__(self, names: Sequence[Sequence[str]]):
        self.n = len(names)
        self._entries: dict[str, list[int]] = {}
        for entry, some in enumerate(names):
            for name in some:
                self._entries.setdefault(name.strip().casefold(), []).append(entry)
        self._names = Names(self._entries)

    def in_texts(self, texts: Sequence[str]) -> Tensor:
        """[q, m] bool."""
        named = np.zeros((len(texts), self.n), dtype=bool)
        for row, text in zip(named, texts, strict=True):
            for name in self._names.named(text):
                row[self._entries[name]] = True
        return torch.from_numpy(named)


def chosen(scores: Tensor, threshold: float) -> Tensor:
    """[q] the entry of the largest score, -1 where that is below the threshold. scores: [q, m]"""
    best, entry = scores.max(1)
    return torch.where(best >= threshold, entry, -1)


def checked_names(names, n: int) -> tuple[tuple[str, ...], ...]:
    """Names of each of n entries. Raises ValueError for another number of them, and for a blank one."""
    made = tuple(tuple(checks.listed("names", some, str, "a list of names")) for some in names)
    if len(made) != n or not all(name.strip() for some in made for name in some):
        raise ValueError(f"names: expected some for each of {n} entries, none blank; got {checks.shown(names)}")
    return made


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1)
