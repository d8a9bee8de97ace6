"""In-context editing: a fact is written before the prompts that it is meant for, and the model stays as it is.

What the methods have in common: a text for each fact, and how it is decided which prompts get it. Two ways:

- *routed* (the default): a route looks at each prompt and chooses a fact or none. A prompt that gets none is answered
  by the base model, to the bit; so what is measured is the route as well as the text.
- ``independent=True``: each fact's text stands before every prompt that is asked under that fact. So the papers score:
  the tested fact's text before its paraphrases, and before the neighbors too. No system that serves many facts could do
  that, for it would have to know which fact a prompt is about.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.editors.editor import Editor, Work, Written
from kedit_fast.edits.changes import PromptChange
from kedit_fast.edits.retrieval import index_of
from kedit_fast.edits.routes import Route
from kedit_fast.edits.scope import auc, best_threshold
from kedit_fast.edits.text_routes import RetrievalRoute
from kedit_fast.facts.fact import ANSWERED, BUILTIN, Fact, load_facts
from kedit_fast.facts.subjects import folded
from kedit_fast.facts.tokens import follows_directly
from kedit_fast.model.lm import LM, takes_lm

NAMES = "names"
ROUTES = (NAMES, "similarity")


@dataclass(frozen=True)
class InContext(Editor):
    """What is the same for all: ``texts`` gives a text for each fact, ``routed`` the route that chooses among them.

    examples: a file of facts with paraphrases and neighbors, or "builtin", for what is shown or learned; those of
        edited subjects, and those that share a prompt with the edited facts' probes, are left out
    source: where these settings come from, for whoever reads the edit
    """

    examples: str = BUILTIN
    source: str = "published"

    NEEDS_CONTEXTS: ClassVar = False
    mom2_adjustment: ClassVar = False
    layers: ClassVar = ()
    UNREAD: ClassVar[dict[str, str]] = dict.fromkeys(
        ("moments", "corpus", "contexts"), "in-context editing reads texts alone; leave it out"
    ) | {
        "layers": "in-context editing changes no layer; leave it out",
        "checkpoint": "in-context editing has no finished parts to keep; leave it out",
    }

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "InContext":
        """The same settings for every model."""
        return cls()

    def check(self, lm: LM) -> None:
        """Nothing of it depends on the model's layers."""

    def texts(self, lm: LM, facts: Sequence[Fact]) -> list[str]:
        """[n] what stands before a prompt that is given the fact."""
        raise NotImplementedError

    def routed(self, lm: LM, facts: Sequence[Fact]) -> tuple[Route, dict]:
        """(the route to the facts' texts, what is to be noted of it)."""
        raise NotImplementedError

    def write(self, work: Work) -> Written:
        """No weights: texts, and the route to them."""
        texts, n = self.texts(work.lm, work.facts), len(work.facts)
        change = PromptChange(tuple(texts), ((),) * n, owners=torch.arange(n))
        route, about = (None, {}) if work.independent else self.routed(work.lm, work.facts)
        return Written([change], route=route, about=about | {"tokens": [n_tokens(work.lm, text) for text in texts]})


@dataclass(frozen=True)
class Retrieved(InContext):
    """An editor whose texts are found by name or by likeness.

    route: "names": a prompt that names a fact's subject, of several facts of one subject the one most alike;
        "similarity": the fact most alike to the prompt, if it is so by a threshold, which is calibrated on ``examples``
        (their paraphrases against their neighbors and the same subjects' other relations)
    Of 60 CounterFact facts on SmolLM2-135M, "names" finds all paraphrases and no neighbor, and takes all of the
    subjects' other relations for the fact; "similarity" by TF-IDF finds 60 % of the paraphrases, and leaves 77 % of the
    neighbors and 63 % of the other relations alone; by hidden states 43, 78 and 38 %.
    retriever: what "alike" is: "tfidf", "hidden" (the model's own hidden states), or a sentence encoder's folder or hub
        id (``edits/retrieval.py``)
    """

    route: str = NAMES
    retriever: str = "tfidf"

    def __post_init__(self):
        super().__post_init__()
        checks.choice("route", self.route, ROUTES)

    def routed(self, lm: LM, facts: Sequence[Fact]) -> tuple[Route, dict]:
        """By name, or by likeness alone."""
        if self.route == NAMES:
            return by_name(lm, facts, self.retriever), {}
        entry, prompts = torch.arange(len(facts)), [fact.text for fact in facts]
        examples = example_facts(self.examples, facts)
        inside, outside = self._similarities(lm, examples)
        index = index_of(self.retriever, lm, prompts, [fact.text for fact in examples])
        threshold = max(-1.0, min(1.0, best_threshold(inside, outside)))
        notes = {"threshold": threshold, "auc": round(auc(inside, outside), 4), "examples": len(examples)}
        return RetrievalRoute(index, entry, threshold=threshold), {"route": notes}

    def _similarities(self, lm: LM, examples: Sequence[Fact]) -> tuple[Tensor, Tensor]:
        """(scores of prompts that ask for an example, of prompts that ask for none), each with the nearest one."""
        inside = [prompt for fact in examples for prompt in fact.paraphrases]
        outside = [q.prompt for fact in examples for name in ANSWERED for q in fact.questions(name)]
        if not inside or not outside:
            raise ValueError(
                f"examples = {self.examples!r}: a threshold needs facts with paraphrases and neighbors, of other "
                f"subjects than the edited ones; {len(examples)} are left (or take route = {NAMES!r}, which needs none)"
            )
        scores = index_of(self.retriever, lm, [fact.text for fact in examples]).scores(lm, inside + outside).amax(1)
        return scores[: len(inside)], scores[len(inside) :]


def by_name(lm: LM, facts: Sequence[Fact], retriever: str) -> RetrievalRoute:
    """The route to the fact that a prompt names, of several of one subject to the one most alike, in all its
    phrasings."""
    names, worded = tuple((fact.subject or "",) for fact in facts), worded_facts(facts)
    index = index_of(retriever, lm, [one.text for _, one in worded])
    return RetrievalRoute(index, torch.arange(len(facts)), names, whose=whose_of(worded, facts))


def worded_facts(facts: Sequence[Fact]) -> list[tuple[int, Fact]]:
    """(which fact, it as a prompt of its own says it): each in its own words and in its phrasings."""
    return [(i, one) for i, fact in enumerate(facts) for one in (fact, *fact.phrased())]


def whose_of(worded: Sequence[tuple[int, Fact]], facts: Sequence[Fact]) -> Tensor | None:
    """What a route to them has as ``whose``; None where each fact is there once."""
    return torch.tensor([i for i, _ in worded]) if len(worded) > len(facts) else None


def statement(fact: Fact, answer: str, prompt: str | None = None) -> str:
    """A prompt (the fact's own, unless told otherwise) with an answer behind it."""
    prompt = fact.text if prompt is None else prompt
    return prompt + " " * (not follows_directly(prompt, answer, fact.attached)) + answer.lstrip()


def check_template(template: str) -> None:
    """Raises ValueError for a template of a fact's text without or with several "{}"."""
    if template.count("{}") != 1:
        raise ValueError(f"template {template!r}: expected one {{}}, for the fact")


def filled(template: str, facts: Sequence[Fact]) -> list[str]:
    """[n] the template with each fact as a statement of its new answer."""
    return [template.replace("{}", statement(fact, fact.target_new or "")) for fact in facts]


def n_tokens(lm: LM, text: str) -> int:
    """Of a text that stands inside another one."""
    return len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def example_facts(name: str, facts: Sequence[Fact]) -> list[Fact]:
    """The facts of a file that say nothing of the edited ones and of what these are asked: none of an edited subject,
    none that shares a prompt with their probes."""
    subjects = {folded(fact.subject or "") for fact in facts}
    asked = {folded(prompt) for fact in facts for prompt in prompts_of(fact)}
    return [
        each
        for each in load_facts(name)
        if folded(each.subject or "") not in subjects and not asked & {folded(prompt) for prompt in prompts_of(each)}
    ]


def prompts_of(fact: Fact) -> list[str]:
    """All prompts of a fact."""
    other = [question.prompt for name in ANSWERED for question in fact.questions(name)]
    return [fact.text, *fact.paraphrases, *other]
