"""The route that finds an entry by its text: the most alike of those that a prompt names, or of all (IKE, ICE)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.edits.retrieval import INDEXES, Index
from kedit_fast.edits.routes import Prompt, Route, text_of
from kedit_fast.facts.subjects import Names

NONE = -2.0  # the score of an entry that a prompt does not name: below every cosine


@dataclass(frozen=True, eq=False)
class RetrievalRoute(Route):
    """The entry whose text is most alike to a prompt, if it is so by ``threshold`` at least.

    index: of a text for each of m entries, or of several, with ``whose``; entry: as in ``Route``
    whose: [k] the entry that each text is of, where one has several (its fact's phrasings); None: one each, in order
    names: [m] names of each, one of which has to stand in the prompt, between ends of words, whatever the case; of
        several entries that are named the most alike acts. None: no names are asked for
    """

    index: Index
    entry: Tensor
    names: tuple[tuple[str, ...], ...] | None = None
    threshold: float = -1.0
    whose: Tensor | None = None
    kind: ClassVar[str] = "retrieval"

    def __post_init__(self):
        checks.instance("index", self.index, Index, "an Index, index_of(retriever, lm, texts)")
        checks.number("threshold", self.threshold, least=-1, most=1)
        check_whose(self.whose, self.n_entries, len(self.index.texts))
        if self.names is not None:
            object.__setattr__(self, "names", checked_names(self.names, self.n_entries))

    @property
    def when(self) -> str:
        """In words."""
        of_several = "that names its subject, of several facts of one subject on that most alike"
        return f"on a prompt {of_several if self.names is not None else 'that is more like it than like the others'}"

    @property
    def n_entries(self) -> int:
        """As many as texts, or as these are of."""
        return len(self.index.texts) if self.whose is None else int(self.whose.max()) + 1 if len(self.whose) else 0

    def check(self, lm) -> None:
        """As the index has it."""
        self.index.check(lm)

    def _choose(self, lm, prompts: Sequence[Prompt]) -> Tensor:
        """The nearest entry; prompts that name none are compared with nothing."""
        texts = [text_of(lm, prompt) for prompt in prompts]
        if self.names is None:
            return chosen(self._scores(lm, texts), self.threshold)
        entries = torch.full((len(texts),), -1)
        named = self._named.in_texts(texts)
        asked = named.any(1).nonzero()[:, 0].tolist()
        if asked:
            scores = self._scores(lm, [texts[i] for i in asked])
            entries[asked] = chosen(scores.masked_fill(~named[asked], NONE), self.threshold)
        return entries

    def _scores(self, lm, texts: Sequence[str]) -> Tensor:
        """[q, m] of each entry the best of its texts."""
        scores = self.index.scores(lm, texts)
        if self.whose is None:
            return scores
        best = torch.full((len(scores), self.n_entries), NONE, dtype=scores.dtype)
        return best.scatter_reduce(1, self.whose.expand(len(scores), -1), scores, "amax")

    @cached_property
    def _named(self) -> "NamedEntries":
        return NamedEntries(self.names or ())

    def take(self, entries: Tensor, entry: Tensor, facts: Tensor) -> "RetrievalRoute":
        """Some texts, with their rows, and names."""
        names = None if self.names is None else tuple(self.names[i] for i in entries.tolist())
        which, row = rows_of(self.whose, self.n_entries, entries)
        whose = None if self.whose is None else which
        return replace(self, index=self.index.take(row.tolist()), names=names, entry=entry, whose=whose)

    def record(self) -> dict:
        """Names, threshold, and what the index says of itself."""
        names = None if self.names is None else [list(some) for some in self.names]
        index = {"kind": self.index.kind} | self.index.record()
        return {"names": names, "threshold": self.threshold, "index": index}

    def tensors(self) -> dict[str, Tensor]:
        """The facts' entries, and the index's."""
        several = {} if self.whose is None else {"whose": self.whose}
        held = {f"index.{name}": tensor for name, tensor in self.index.tensors().items()}
        return {"entry": self.entry} | several | held

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


def check_whose(whose: Tensor | None, n: int, k: int) -> None:
    """Raises ValueError unless ``whose`` names an entry, of n, for each of k rows, and each entry once at least."""
    if whose is None:
        return
    if whose.dtype != torch.int64 or len(whose) != k or whose.unique().tolist() != list(range(n)):
        raise ValueError(f"whose: expected int64, an entry for each of {k} rows, some of each of {n}")


def rows_of(whose: Tensor | None, n: int, entries: Tensor) -> tuple[Tensor, Tensor]:
    """(which of these entries, a row of it), one after the other, of all their rows; whose: as in a route of n"""
    whose = torch.arange(n) if whose is None else whose
    which, row = (entries[:, None] == whose[None]).nonzero().unbind(1)
    return which, row


def checked_names(names, n: int) -> tuple[tuple[str, ...], ...]:
    """Names of each of n entries. Raises ValueError for another number of them, and for a blank one."""
    made = tuple(tuple(checks.listed("names", some, str, "a list of names")) for some in names)
    if len(made) != n or not all(name.strip() for some in made for name in some):
        raise ValueError(f"names: expected some for each of {n} entries, none blank; got {checks.shown(names)}")
    return made
