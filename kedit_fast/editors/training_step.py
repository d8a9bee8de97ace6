"""A step of a trained editor's training: edits of a batch of facts, asked in another wording.

For each fact of a batch, an edit of its own (or, where the method solves them together, all of them one):

    1. the factors of the edit's own loss -log p(target | prompt) at W, of all facts in one sweep
    2. ΔW, by the network, as a low-rank edit that acts in the next sweep and in no weight
    3. the factors of the outer loss at W + ΔW, of all facts in one sweep:
          w_edit · -log p(target | a paraphrase)  +  w_loc · KL(p_W || p_{W+ΔW}) after a prompt that must not change,
       of the next token, or the mean over more of them along what the model itself goes on with
    4. <G, ΔW> from these factors, whose gradient of the network is the outer loss's (``networks.pull``), exactly: x and
       δ at W do not depend on the network. No gradient of a weight is formed, and none of a gradient
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics.bits import digest
from kedit_fast.editors.networks import Network, Update
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import LowRank
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.fact import ANSWERED, Fact
from kedit_fast.facts.subjects import folded
from kedit_fast.facts.tokens import answer_tokens, asked, encode
from kedit_fast.jobs.below import Below
from kedit_fast.jobs.generate import generate
from kedit_fast.jobs.gradients import Factors, GradientTask, Place, gradient_factors
from kedit_fast.model.lm import LM

KEPT = 2  # prompts that must not change, of a fact and kind, at most
GOING_ON = "writing on"  # as the progress of ``going_on`` calls it
ANSWER = "answered"  # of the kinds of such prompts: the fact's own, with the new answer behind


class Weights(NamedTuple):
    """Of the two outer losses."""

    edit: float
    locality: float


class Example(NamedTuple):
    """A fact as token ids: the edit; its paraphrases with the target behind each; prompts that must not change"""

    fact: Fact
    edit: GradientTask
    asked: list[GradientTask]
    kept: list[GradientTask]


class Outcome(NamedTuple):
    """Of a batch of n facts. updates and outer: of each matrix, the outer factors weighted and their tasks facts; nll,
    kl [n] nats; exact [n]: whether the paraphrase is answered with the target, token for token"""

    updates: dict[Place, Update]
    outer: dict[Place, Factors]
    nll: Tensor
    kl: Tensor
    exact: Tensor

    def means(self, weights: Weights) -> dict[str, float]:
        """The loss, and what it is made of."""
        nll, kl = self.nll.mean().item(), self.kl.mean().item()
        loss = weights.edit * nll + weights.locality * kl
        return {"loss": loss, "nll": nll, "kl": kl, "success": self.exact.double().mean().item()}


def about(fact: Fact) -> str:
    """What a fact is about, up to case and spacing."""
    return folded(fact.text if fact.subject is None else fact.subject)


def subject_digest(fact: Fact) -> str:
    """What tells a fact's subject from others', in the record of what a network was trained on."""
    return digest(about(fact))[:8]


# ---- facts as tasks


def edit_task(lm: LM, fact: Fact, owner: int = 0) -> GradientTask:
    """The edit's own loss."""
    return _task(lm, fact, fact.text, owner)


def _task(lm: LM, fact: Fact, prompt: str, owner: int = 0) -> GradientTask:
    text = asked(lm.tokenizer, prompt, fact.chat)
    target = answer_tokens(lm.tokenizer, text, fact.target_new or "", fact.attached)
    return GradientTask(encode(lm.tokenizer, text), target, fact.label, owner)


def examples(lm: LM, facts: Sequence[Fact], keeps: Sequence[str] = ANSWERED, kept_tokens: int = 1) -> list[Example]:
    """The facts as tasks; one without prompts of the kinds that must not change has the next fact's, of another
    subject. kept_tokens: there is room for so many behind each of these (``going_on``)"""
    made = []
    for i, fact in enumerate(facts):
        wordings = [*(one.text for one in fact.phrased()), *fact.paraphrases] or [fact.text]
        asking = [edit_task(lm, fact), *(_task(lm, fact, text) for text in wordings)]
        around = (facts[(i + k) % len(facts)] for k in range(1, len(facts)))
        kept = _kept(lm, fact, keeps, asking) or [
            _read(lm, fact, next((other.text for other in around if about(other) != about(fact)), "The"))
        ]
        made.append(Example(fact, asking[0], asking[1:], [GradientTask(ids, [0], fact.label) for ids in kept]))
    for one in made:
        for task in (*one.asked, *one.kept):
            lm.check_length(task.n_rows + kept_tokens - 1, f"a prompt of fact {one.fact.label}")
    return made


def _kept(lm: LM, fact: Fact, keeps: Sequence[str], asking: Sequence[GradientTask]) -> list[list[int]]:
    """Token ids of the prompts of each kind, by turns; of those with the answer behind the fact's own comes first."""
    kinds = [
        [task.prompt + task.target for task in asking[:KEPT]]
        if name == ANSWER
        else [_read(lm, fact, question.prompt) for question in fact.questions(name)[:KEPT]]
        for name in keeps
    ]
    return [ids for turn in zip_longest(*kinds) for ids in turn if ids is not None]


def _read(lm: LM, fact: Fact, prompt: str) -> list[int]:
    return encode(lm.tokenizer, asked(lm.tokenizer, prompt, fact.chat))


def going_on(lm: LM, made: list[Example], n_tokens: int) -> list[Example]:
    """The examples with the n tokens that the model goes on with behind each prompt that must not change; of one token
    there is nothing to read behind the prompt."""
    if n_tokens == 1:
        return made
    prompts = [task.prompt for one in made for task in one.kept]
    texts = iter(generate(lm, prompts, n_tokens, repetition_penalty=1, label=GOING_ON))
    return [one._replace(kept=[replace(task, target=next(texts) or task.target) for task in one.kept]) for one in made]


# ---- a step


def edited(lm: LM, updates: Mapping[Place, Update], facts: Sequence[Fact], alone: bool) -> LM:
    """The model with these updates on it."""
    changes = [
        WeightChange(
            layer, LowRank(update.out.detach().T, update.into.detach().T), role, update.task if alone else None
        )
        for (layer, role), update in updates.items()
        if len(update.out)
    ]
    # not with_edit, which asks whether the edit fits this model and is there already
    return replace(lm, edits=(*lm.edits, Edit("in making", {}, "", tuple(facts), tuple(changes))))


def outcome(
    lm: LM,
    network: Network,
    batch: Sequence[tuple[Fact, GradientTask, GradientTask, GradientTask]],
    weights: Weights,
    alone: bool,
    below: Below | None = None,
) -> Outcome:
    """Edits facts by the network and asks the edited model. batch: each fact, its edit, a paraphrase, and a prompt that
    must not change."""
    n, places = len(batch), network.places
    before: dict[int, Tensor] = {}
    nll, kl, exact = torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.bool)

    def own(i: int, log_p: Tensor) -> Tensor:
        if i < n:
            return -log_p[range(len(log_p)), batch[i][1].target].mean()
        before[i - n] = log_p.detach()
        return 0 * log_p[0, 0]  # no gradient: its rows are left out

    def outer(i: int, log_p: Tensor) -> Tensor:
        if i < n:
            target = log_p.new_tensor(batch[i][2].target, dtype=torch.int64)
            loss = -log_p[range(len(log_p)), target].mean()
            nll[i], exact[i] = loss.detach(), bool((log_p.argmax(1) == target).all())
            return weights.edit / n * loss
        base = before[i - n]
        loss = (base.exp() * (base - log_p)).sum(1).mean()
        kl[i - n] = loss.detach()
        return weights.locality / n * loss

    facts, edits, questions, kept = zip(*batch, strict=True)
    factors = gradient_factors(lm, [*edits, *kept], places, own, below=below).factors
    updates = network.transformed(factors, alone)
    view = edited(lm, updates, facts, alone)
    tasks = [replace(task, owner=i if alone else 0) for some in (questions, kept) for i, task in enumerate(some)]
    found = gradient_factors(view, tasks, places, outer, below=below).factors
    return Outcome(updates, {at: replace(of, task=of.task % n) for at, of in found.items()}, nll, kl, exact)
