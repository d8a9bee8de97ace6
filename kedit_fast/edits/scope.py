"""Scope: whether a prompt asks for what a fact says, by a small classifier over a model's hidden states (SERAC).

A prompt is in the scope of (subject, relation) if it names the subject and asks for the relation. The first is read off
the text; the second is learned: both prompts are read with "it" in the subject's place, and compared by

    s(q, e) = σ(a · cos(W x_q, W x_e) + b),        x: the last token's layer_out, standardized

a bilinear form of low rank, trained on pairs of prompts that ask the same and pairs that do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.edits.routes import Prompt, Route, check_width, prompt_features, text_of
from kedit_fast.edits.text_routes import NONE, NamedEntries, check_whose, checked_names, chosen, rows_of
from kedit_fast.facts.subjects import places_alike
from kedit_fast.model.family import check_layer
from kedit_fast.sweep.sites import Site

PLACEHOLDER = "it"


@dataclass(frozen=True, eq=False)
class Scope:
    """The classifier. layer: whose output it reads; weight: W [r, d]; shift, scale: [d] that x is standardized by;
    slope, offset: a, b; threshold: the score from which on two prompts ask the same. All fp32"""

    layer: int
    weight: Tensor
    shift: Tensor
    scale: Tensor
    slope: float
    offset: float
    threshold: float = 0.5

    def __post_init__(self):
        checks.whole("layer", self.layer, most=checks.MOST_LAYERS, like=5)
        checks.share("threshold", self.threshold)
        tensors = (self.weight, self.shift, self.scale)
        if self.weight.ndim != 2 or any(x.shape != self.weight.shape[1:] for x in tensors[1:]):
            raise ValueError(
                f"a scope's weight, shift, scale: expected [r, d], [d], [d]; got {[list(x.shape) for x in tensors]}"
            )
        if not all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in tensors):
            raise ValueError("a scope's weight, shift, scale: expected finite fp32 numbers")
        for name in ("slope", "offset"):
            checks.number(name, getattr(self, name))

    def rows(self, x: Tensor) -> Tensor:
        """[n, r] W x of length 1, of hidden states x [n, d]."""
        return torch.nn.functional.normalize((x.float() - self.shift) / self.scale @ self.weight.T, dim=-1)

    def scores(self, asked: Tensor, held: Tensor) -> Tensor:
        """[q, n] probability that two prompts ask the same; asked, held: of ``rows``."""
        return (self.slope * (asked @ held.T) + self.offset).sigmoid()

    @classmethod
    def fit(cls, x: Tensor, pairs: Tensor, same: Tensor, *, layer: int, rank: int, steps: int, lr: float, seed: int):
        """Trained on pairs [k, 2] of rows of x [n, d], which ask the same or not: same [k] bool.

        Full-batch AdamW on the cross entropy, of which each class makes half; a fifth of x's entries is left out at
        random in each step. W begins at random from ``seed``. Raises ValueError for pairs of one class alone.
        """
        if same.all() or not same.any():
            raise ValueError("a scope is learned from pairs that ask the same and pairs that do not; one is missing")
        draw = torch.Generator().manual_seed(seed)
        x = x.float()
        shift, scale = x.mean(0), x.std(0, correction=0) + 1e-6
        x, d = (x - shift) / scale, x.shape[1]
        weight = (torch.randn(rank, d, generator=draw) / d**0.5).requires_grad_()
        line = torch.tensor([8.0, -4.0], requires_grad=True)  # σ is 1/2 at a cosine of 1/2
        balance = torch.where(same, 0.5 / same.sum(), 0.5 / (~same).sum())
        optimizer = torch.optim.AdamW([weight, line], lr=lr, weight_decay=0.1)
        with torch.enable_grad():
            for _ in range(steps):
                kept = (torch.rand(x.shape, generator=draw) >= DROPPED) / (1 - DROPPED)
                rows = torch.nn.functional.normalize(x * kept @ weight.T, dim=-1)
                logits = line[0] * (rows[pairs[:, 0]] * rows[pairs[:, 1]]).sum(-1) + line[1]
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, same.float(), reduction="none")
                optimizer.zero_grad()
                (loss * balance).sum().backward()
                optimizer.step()
        return cls(layer, weight.detach(), shift, scale, *line.tolist())

    def on_pairs(self, x: Tensor, pairs: Tensor) -> Tensor:
        """[k] scores of pairs [k, 2] of rows of x [n, d]."""
        rows = self.rows(x)
        return (self.slope * (rows[pairs[:, 0]] * rows[pairs[:, 1]]).sum(-1) + self.offset).sigmoid()


DROPPED = 0.2


def best_threshold(inside: Tensor, outside: Tensor) -> float:
    """The score that parts two sets of scores best: with the largest sum of the shares of ``inside`` that reach it and
    of ``outside`` that do not; the middle between the scores next to it."""
    inside, outside = inside.double(), outside.double()
    scores = torch.cat([inside, outside]).unique()
    right = (inside[:, None] >= scores).double().mean(0) + (outside[:, None] < scores).double().mean(0)
    at = int(right.argmax())
    return float((scores[at] + scores[max(0, at - 1)]) / 2)


def auc(inside: Tensor, outside: Tensor) -> float:
    """How often a score of ``inside`` is above one of ``outside``; ties count a half."""
    above = (inside[:, None] > outside).double().mean() + (inside[:, None] == outside).double().mean() / 2
    return above.item()


def unnamed(text: str, subject: str) -> str | None:
    """The text with PLACEHOLDER where it names the subject; None where it does not."""
    places = places_alike(text, subject)
    if not places:
        return None
    for begin, end in reversed(places):
        text = text[:begin] + PLACEHOLDER + text[end:]
    return text


def scope_features(lm, texts: Sequence[str], layer: int) -> Tensor:
    """[n, d] fp32: what a scope reads of texts without their subject."""
    return prompt_features(lm, texts, layer, Site.layer_out).float()


@dataclass(frozen=True, eq=False)
class ScopeRoute(Route):
    """The entry in whose scope a prompt is: of those whose subject it names, the one with the highest score, if that
    reaches the scope's threshold.

    subjects: [m] of each entry; rows: [k, r] of its prompt, by ``Scope.rows``; entry: as in ``Route``
    whose: [k] the entry that each row is of, where one has several (its fact's phrasings); None: one row each, in order
    Cost: one sweep up to the scope's layer, of the prompts that name a subject.
    """

    scope: Scope
    subjects: tuple[str, ...]
    rows: Tensor
    entry: Tensor
    whose: Tensor | None = None
    kind: ClassVar[str] = "scope"
    when: ClassVar[str] = "on a prompt that names the fact's subject and is in its scope"

    def __post_init__(self):
        names = checked_names([[subject] for subject in self.subjects], len(self.subjects))
        object.__setattr__(self, "subjects", tuple(name for (name,) in names))
        expected = [len(names) if self.whose is None else len(self.whose), len(self.scope.weight)]
        if list(self.rows.shape) != expected:
            raise ValueError(f"rows of a scope's entries: expected {expected}, got {list(self.rows.shape)}")
        check_whose(self.whose, len(names), len(self.rows))

    @property
    def n_entries(self) -> int:
        """As many as subjects."""
        return len(self.subjects)

    def check(self, lm) -> None:
        """Raises ValueError for a layer that the model does not have, and for another width."""
        check_layer(self.scope.layer, lm.n_layers)
        check_width(len(self.scope.shift), Site.layer_out, self.scope.layer, lm)

    def _choose(self, lm, prompts: Sequence[Prompt]) -> Tensor:
        """The entry with the highest score."""
        texts = [text_of(lm, prompt) for prompt in prompts]
        named = self._named.in_texts(texts).nonzero().tolist()  # (prompt, entry)
        if not named:
            return torch.full((len(texts),), -1)
        read = [unnamed(texts[i], self.subjects[j]) or texts[i] for i, j in named]
        asked = self.scope.rows(scope_features(lm, read, self.scope.layer))
        which, entry = torch.tensor(named).unbind(1)
        pair, row = rows_of(self.whose, self.n_entries, entry)
        logits = self.scope.slope * (asked[pair] * self.rows[row]).sum(-1) + self.scope.offset
        best = torch.full((len(named),), NONE).scatter_reduce(0, pair, logits.sigmoid(), "amax")
        scores = torch.full((len(texts), self.n_entries), NONE)
        scores[which, entry] = best
        return chosen(scores, self.scope.threshold)

    @cached_property
    def _named(self) -> NamedEntries:
        return NamedEntries([[subject] for subject in self.subjects])

    def take(self, entries: Tensor, entry: Tensor, facts: Tensor) -> "ScopeRoute":
        """Some subjects and rows."""
        subjects = tuple(self.subjects[i] for i in entries.tolist())
        which, row = rows_of(self.whose, self.n_entries, entries)
        whose = None if self.whose is None else which
        return replace(self, subjects=subjects, rows=self.rows[row], entry=entry, whose=whose)

    def record(self) -> dict:
        """Subjects, and the classifier's numbers."""
        scope = {name: getattr(self.scope, name) for name in ("layer", "slope", "offset", "threshold")}
        return {"subjects": list(self.subjects), "scope": scope}

    def tensors(self) -> dict[str, Tensor]:
        """The facts' entries, rows, and the classifier's tensors."""
        held = {f"scope.{name}": getattr(self.scope, name) for name in ("weight", "shift", "scale")}
        several = {} if self.whose is None else {"whose": self.whose}
        return {"entry": self.entry, "rows": self.rows} | several | held

    @classmethod
    def of(cls, record: dict, tensors: dict[str, Tensor]) -> "ScopeRoute":
        """The route of a file."""
        tensors = dict(tensors)
        held = {name.removeprefix("scope."): tensors.pop(name) for name in list(tensors) if name.startswith("scope.")}
        return cls(Scope(**record["scope"], **held), record["subjects"], **tensors)
