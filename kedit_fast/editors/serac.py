"""SERAC: a memory of facts, and a classifier that says which prompts are in their scope (Mitchell et al. 2022,
Memory-Based Model Editing at Scale, arXiv:2206.06520).

    scope(q) = max over facts of s(q, fact);   at the threshold or above it, another model answers, given the fact:
    "{prompt} {target_new}. {what is asked}";  else the base model does

Here the other model is the base model itself, with the fact before the prompt: no second model of the same vocabulary
is needed, and there is only the classifier to train (``edits/scope.py``). It is trained on other facts, and its
threshold calibrated on paraphrases that it was not trained on, against hard negatives: the same subject's other
relations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.editors.in_context import InContext, check_template, example_facts, filled, whose_of, worded_facts
from kedit_fast.edits.routes import Route
from kedit_fast.edits.scope import PLACEHOLDER, Scope, ScopeRoute, auc, best_threshold, scope_features, unnamed
from kedit_fast.facts.fact import Fact
from kedit_fast.model.lm import LM, takes_lm

HELD_OUT = 4  # one example of so many is kept for the threshold
# Pairs grow with the square of the examples: 300 CounterFact facts take 5 s on SmolLM2, all 19,900 were 34 GB.
MOST_EXAMPLES = 500


@dataclass(frozen=True)
class Serac(InContext):
    """SERAC: a small classifier says which fact a prompt is about, if any; its text comes before the prompt.

    Hyper-parameters; those of ``InContext`` besides.

    examples: of more than 500 so many are drawn, the same ones each time
    layer: whose output the classifier reads, None: the middle one; rank: of its bilinear form
    steps, lr: of its training; template: the text of a fact, {} is its statement

    Differs: the published classifier is a BERT over texts, with a pair's score exp(-‖difference‖²) or of a joint
    reading; the published counterfactual model is a small one of its own. A prompt that does not name the subject is
    out of scope here, whatever it means.
    """

    layer: int | None = None
    rank: int = 64
    steps: int = 150
    lr: float = 2e-3
    template: str = "{}. "
    source: str = "derived, see Serac.for_model"

    METHOD: ClassVar = "serac"
    POSITIVE: ClassVar[tuple[str, ...]] = ("rank", "steps", "lr")
    ALG_NAMES: ClassVar = {"SERAC": {}}
    UNREAD: ClassVar[dict[str, str]] = InContext.UNREAD | {
        "independent": "the classifier decides which fact a prompt is for; leave it out (edit.only(i) takes one)"
    }

    def __post_init__(self):
        super().__post_init__()
        check_template(self.template)

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Serac":
        """The middle layer. Give examples of the relations that are edited: on SmolLM2-135M the package's own 77 facts
        part what they hold out by an AUC of 0.98, but of 60 CounterFact facts 32 % of the paraphrases are then in
        scope, and 77 % of the subjects' other relations out of it. With 190 CounterFact facts as examples (held out:
        0.87) these are 67 % and 92 %. Neighbors are out of it by their subject."""
        return cls(layer=lm.n_layers // 2)

    def check(self, lm: LM) -> None:
        """Raises ValueError for a layer that the model does not have."""
        checks.optional(checks.whole, "layer", self.layer, most=lm.n_layers - 1, like=lm.n_layers // 2)

    def texts(self, lm: LM, facts: Sequence[Fact]) -> list[str]:
        """[n] the template, filled in."""
        return filled(self.template, facts)

    def routed(self, lm: LM, facts: Sequence[Fact]) -> tuple[Route, dict]:
        """The classifier, trained on the examples, and the facts, each in all its phrasings, as it sees them."""
        scope, notes = self.scope(lm, example_facts(self.examples, facts))
        worded = worded_facts(facts)
        rows = scope.rows(scope_features(lm, [_blank(one) for _, one in worded], scope.layer))
        entry, subjects = torch.arange(len(facts)), tuple(fact.subject or "" for fact in facts)
        return ScopeRoute(scope, subjects, rows, entry, whose_of(worded, facts)), {"scope": notes}

    @takes_lm
    def scope(self, lm: LM, examples: Sequence[Fact]) -> tuple[Scope, dict]:
        """(the classifier, how it does on what it was not trained on).

        Raises ValueError where the examples lack prompts that ask the same, or prompts that do not.
        """
        layer = lm.n_layers // 2 if self.layer is None else self.layer
        drawn = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:MOST_EXAMPLES]
        examples = [examples[i] for i in drawn.sort().values.tolist()]
        trained, held = self._pairs(examples)
        texts = list(dict.fromkeys(text for pair in (*trained, *held) for text in pair[:2]))
        x, number = scope_features(lm, texts, layer), {text: i for i, text in enumerate(texts)}
        pairs, same = _as_tensors(trained, number)
        scope = Scope.fit(x, pairs, same, layer=layer, rank=self.rank, steps=self.steps, lr=self.lr, seed=0)
        pairs, same = _as_tensors(held, number)
        scores = scope.on_pairs(x, pairs)
        inside, outside = scores[same], scores[~same]
        scope = replace(scope, threshold=best_threshold(inside, outside))
        shares = (inside >= scope.threshold).float().mean(), (outside < scope.threshold).float().mean()
        return scope, {
            "examples": len(examples), "trained_on": len(trained), "held_out": [len(inside), len(outside)],
            "auc": round(auc(inside, outside), 4), "threshold": scope.threshold,
            "in_scope_kept": round(shares[0].item(), 4), "out_of_scope_kept_out": round(shares[1].item(), 4),
        }  # fmt: skip

    def _pairs(self, examples: Sequence[Fact]) -> "tuple[list[Pair], list[Pair]]":
        held_out = {text for fact in examples[::HELD_OUT] for text in (*_alike(fact), *_unlike(fact))}
        trained = [pair for pair in pairs_of(examples) if pair.right not in held_out]
        held = [pair for pair in pairs_of(examples[::HELD_OUT]) if pair.right in held_out]
        for pairs in (trained, held):
            if {pair.same for pair in pairs} != {True, False}:
                raise ValueError(
                    f"examples = {self.examples!r}: a scope is learned from facts with paraphrases that name the "
                    "subject and with same_subject prompts or a relation_id, of other subjects than the edited ones; "
                    f"{len(examples)} are left, which lack one of these"
                )
        return trained, held


class Pair(NamedTuple):
    """Two prompts without their subject, and whether they ask the same."""

    left: str
    right: str
    same: bool


def pairs_of(facts: Sequence[Fact]) -> list[Pair]:
    """Each fact's prompt with its own paraphrases and other relations, and with prompts and paraphrases of the facts of
    known relations: those of its own relation ask the same, those of others do not. Each pair once; one that would do
    both is none."""
    found: dict[tuple[str, str], set[bool]] = {}
    for pair in _all_pairs(facts):
        if pair.left != pair.right:
            found.setdefault(pair[:2], set()).add(pair.same)
    return [Pair(*texts, same=min(said)) for texts, said in found.items() if len(said) == 1]


def _all_pairs(facts: Sequence[Fact]) -> Iterator[Pair]:
    by_relation: dict[str, set[str]] = {}
    lefts: dict[tuple[str, str], None] = {}
    for fact in facts:
        yield from (Pair(_blank(fact), text, True) for text in _alike(fact))
        yield from (Pair(_blank(fact), text, False) for text in _unlike(fact))
        if relation := fact.provenance.get("relation_id"):
            lefts[_blank(fact), str(relation)] = None
            by_relation.setdefault(str(relation), set()).update((_blank(fact), *_alike(fact)))
    for left, own in lefts:
        for relation, texts in by_relation.items():
            yield from (Pair(left, text, relation == own) for text in sorted(texts))


def _blank(fact: Fact) -> str:
    return fact.prompt.replace("{}", PLACEHOLDER)


def _alike(fact: Fact) -> list[str]:
    """Paraphrases without the subject, those that name it."""
    return [text for prompt in fact.paraphrases if (text := unnamed(prompt, fact.subject or ""))]


def _unlike(fact: Fact) -> list[str]:
    """The subject's other relations, without it."""
    prompts = (question.prompt for question in fact.questions("same_subject"))
    return [text for prompt in prompts if (text := unnamed(prompt, fact.subject or ""))]


def _as_tensors(pairs: Sequence[Pair], number: dict[str, int]) -> tuple[Tensor, Tensor]:
    numbers = torch.tensor([[number[pair.left], number[pair.right]] for pair in pairs])
    return numbers, torch.tensor([pair.same for pair in pairs])
