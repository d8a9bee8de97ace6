"""IKE: in-context knowledge editing (Zheng et al. 2023, Can We Edit Factual Knowledge by In-Context Learning?,
arXiv:2305.12740).

Before a prompt stand demonstrations of how a new fact is used, then the fact:

    New Fact: {prompt of another fact} {its new answer}
    Prompt: {a prompt} {its answer}

    ... k of them, and the edited fact itself as the last
    New Fact: {prompt} {target_new}
    Prompt: {what is asked}

*copy*: the other fact's own prompt, with its new answer; *update*: a paraphrase, with the new answer; *retain*: a
neighbor, with its old answer. One to three to four of these, of the k facts most alike to the edited one, the nearest
last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from kedit_fast.basics import checks
from kedit_fast.editors.in_context import Retrieved, example_facts, n_tokens, statement
from kedit_fast.edits.retrieval import index_of
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.formats import Question
from kedit_fast.facts.subjects import Names
from kedit_fast.model.lm import LM

COPY, UPDATE, RETAIN = "copy", "update", "retain"
ROLES = (RETAIN, UPDATE, RETAIN, UPDATE, COPY, RETAIN, UPDATE, RETAIN)  # by rank, the nearest first, over and over


@dataclass(frozen=True)
class Ike(Retrieved):
    """IKE: the fact and demonstrations of similar facts, as a text before the prompt.

    Hyper-parameters; those of ``Retrieved`` besides. Published: 32 demonstrations, found by a sentence encoder.

    k: demonstrations; 0: the fact alone, without even itself as a demonstration
    shared: the same demonstrations for all facts, those most alike to them on average: then the model reads them once
        for all prompts of all facts, where it otherwise reads a fact's own once for all of its prompts
    max_tokens: of a fact's text; demonstrations that do not fit are left out, the least alike first. 0: half of what
        the model reads

    Differs: the published order of the roles is random, here they are spread evenly, so that a text that is cut keeps
    their proportion; "alike" is by TF-IDF unless told otherwise.
    """

    k: int = 32
    shared: bool = False
    max_tokens: int = 0

    METHOD: ClassVar = "ike"
    ALG_NAMES: ClassVar = {"IKE": {}}
    IN_FILES: ClassVar = {"sentence_model_name": lambda name: {"retriever": checks.text("retriever", name)}}

    def texts(self, lm: LM, facts: Sequence[Fact]) -> list[str]:
        """[n] demonstrations, and the line before the prompt."""
        heads = [f"New Fact: {statement(fact, fact.target_new or '')}\nPrompt: " for fact in facts]
        if not self.k:
            return heads
        examples = shown_examples(self.examples, facts)
        texts = []
        for fact, head, numbers in zip(facts, heads, self._ranked(lm, facts, examples), strict=True):
            own = demonstration(fact, fact.text, fact.target_new or "")
            shown = [examples[i].in_role(ROLES[rank % len(ROLES)]) for rank, i in enumerate(numbers)]
            most = self._most(lm) - n_tokens(lm, own + head)
            texts.append("".join(reversed(fitting(lm, shown, most))) + own + head)
        return texts

    def _ranked(self, lm: LM, facts: Sequence[Fact], examples: "Sequence[Example]") -> list[list[int]]:
        """[n] numbers of the k examples that are shown for each fact, the nearest first."""
        index = index_of(self.retriever, lm, [statement(one.fact, one.fact.target_new or "") for one in examples])
        asked = [statement(fact, fact.target_new or "") for fact in facts]
        if not self.shared:
            return index.nearest(lm, asked, self.k)[0].tolist()
        order = index.scores(lm, asked).mean(0).argsort(descending=True, stable=True)
        return [order[: self.k].tolist()] * len(facts)

    def _most(self, lm: LM) -> int:
        longest = min((n for n in (lm.positions, lm.longest) if n), default=None)
        return self.max_tokens or (1 << 30 if longest is None else longest // 2)


@dataclass(frozen=True)
class IkePlain(Ike):
    """``Ike`` without demonstrations: the fact alone before the prompt."""

    k: int = 0

    METHOD: ClassVar = "ike-plain"


class Example(NamedTuple):
    """A fact that can be shown in every role, and the neighbor that is shown of it."""

    fact: Fact
    neighbor: Question

    def in_role(self, role: str) -> str:
        """The demonstration."""
        new = self.fact.target_new or ""
        if role == RETAIN:
            return demonstration(self.fact, self.neighbor.prompt, self.neighbor.answer or "")
        return demonstration(self.fact, self.fact.paraphrases[0] if role == UPDATE else self.fact.text, new)


def shown_examples(name: str, facts: Sequence[Fact]) -> list[Example]:
    """The examples that can be shown in every role: with a new answer, a paraphrase, and a neighbor whose answer is
    known and that names no edited subject. Raises ValueError where there are none."""
    edited = Names(fact.subject for fact in facts)
    found = []
    for fact in example_facts(name, facts):
        neighbors = (q for q in fact.questions("neighborhood") if q.answer and not edited.in_text(q.prompt))
        neighbor = next(neighbors, None)
        if fact.target_new and fact.paraphrases and neighbor:
            found.append(Example(fact, neighbor))
    if not found:
        raise ValueError(
            f"examples = {name!r}: no fact there can be shown as a demonstration; expected facts with target_new, "
            "paraphrases and neighbors, of other subjects than the edited ones (or k = 0, which shows none)"
        )
    return found


def demonstration(fact: Fact, prompt: str, answer: str) -> str:
    """What is said of a prompt where a fact is new."""
    return f"New Fact: {statement(fact, fact.target_new or '')}\nPrompt: {statement(fact, answer, prompt)}\n\n"


def fitting(lm: LM, texts: Sequence[str], most: int) -> list[str]:
    """The first of the texts that take no more than so many tokens together."""
    kept = []
    for text in texts:
        most -= n_tokens(lm, text)
        if most < 0:
            break
        kept.append(text)
    return kept
