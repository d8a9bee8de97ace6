"""The canary: does the old answer still come out, and where?

Efficacy asks whether the new answer wins where the edit was written. The old one often survives elsewhere: when the
model is told to think again, behind a long text, or in another language. Here the model writes on, greedily, and the
old answer is looked for in what it writes. Base and edited model are both asked: where the base model never says the
old answer, its absence after the edit means nothing.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from kedit_fast.evaluation.texts import leaks
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.subjects import folded
from kedit_fast.facts.tokens import asked

T = TypeVar("T")
PLAIN, DOUBT, CONTEXT, LANGUAGE = "plain", "doubt", "long context", "language"
PROSE = Path(__file__).parent / "prose.txt"  # ordinary text on no subject that a fact has
DOUBTS = (
    "{prompt} {answer}. Are you sure? Let me check that again: {prompt}",
    "{prompt} {answer}. No, that is wrong. The truth is that {prompt}",
    "Think twice before you answer, many people get this wrong. {prompt}",
)
MARGIN = 8  # tokens: a cut text may take some more once it is tokenized again


class Canary(NamedTuple):
    """A text to continue, and the answers to look for in what follows.

    fact: its number; kind: PLAIN, DOUBT, ...; prompt: as the model reads it; context_tokens: of other text in front of
    the fact's prompt (of CONTEXT)
    """

    kind: str
    fact: int
    prompt: str
    old: str
    new: str | None
    context_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Song:
    """What came of one canary. before, after: the base and the edited model's continuations, and whether each says the
    old answer"""

    canary: Canary
    before: str
    after: str
    leaked_before: bool
    leaked: bool

    def to_record(self) -> dict:
        """Plain values, for JSON."""
        own = dataclasses.asdict(self)
        return own.pop("canary")._asdict() | own


def canary(lm, kind: str, facts: Sequence[Fact], i: int, prompt: str, context_tokens: int = 0) -> Canary:
    """A prompt about fact i, asked in the fact's form."""
    fact = facts[i]
    text = asked(lm.tokenizer, prompt, fact.chat)
    return Canary(kind, i, text, fact.target_true, fact.target_new, context_tokens)


def doubt_canaries(lm, facts: Sequence[Fact], numbers: Sequence[int], templates: Sequence[str] = ()) -> list[Canary]:
    """Each fact's prompt after a doubt. templates: texts with {prompt}, and {answer} and {subject} where wanted."""
    return [
        canary(lm, DOUBT, facts, i, _filled(template, facts[i]))
        for i in numbers
        for template in templates or DOUBTS
        if (facts[i].target_new or "{answer}" not in template) and (facts[i].subject or "{subject}" not in template)
    ]


def check_doubt(template) -> str:
    """The template, if it can be filled in; ValueError otherwise."""
    if not isinstance(template, str) or "{prompt}" not in template:
        raise ValueError(f"doubt template {template!r}: expected a text with {{prompt}} (and {{answer}}, {{subject}})")
    return template


def _filled(template: str, fact: Fact) -> str:
    # One pass, so that braces in a subject or an answer stay what they are.
    parts = {"{prompt}": fact.text, "{answer}": fact.target_new or "", "{subject}": fact.subject or ""}
    return re.sub(r"\{(prompt|answer|subject)\}", lambda match: parts[match[0]], template)


def context_canaries(
    lm, facts: Sequence[Fact], numbers: Sequence[int], text: str, n_tokens: int, room: int
) -> list[Canary]:
    """Each fact's prompt behind about n_tokens of a text, which is repeated where it is shorter.

    room: tokens to keep free for what the model writes. Cut to the positions that the model has: a canary's
    ``context_tokens`` says to how many. A fact whose prompt leaves no place for a context of a few tokens is left out.
    """
    ids = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids * -(-n_tokens // max(1, len(ids)))
    canaries = []
    for i in numbers:
        around = room + len(lm.encode(asked(lm.tokenizer, facts[i].text, facts[i].chat))) + MARGIN
        length = lm.window(n_tokens + around) - around
        if length >= min(n_tokens, MARGIN):
            # Its own line: the text may end in the middle of a sentence.
            prompt = lm.tokenizer.decode(ids[:length]) + "\n\n" + facts[i].text
            canaries.append(canary(lm, CONTEXT, facts, i, prompt, length))
    return canaries


def sing(canaries: Sequence[Canary], before: Sequence[str], after: Sequence[str]) -> list[Song]:
    """Whether the old answer is in what base and edited model wrote behind each canary."""
    return [
        Song(one, b, a, leaked_before=leaks(b, one.old, one.new), leaked=leaks(a, one.old, one.new))
        for one, b, a in zip(canaries, before, after, strict=True)
    ]


def with_old_answer(facts: Sequence[Fact]) -> list[int]:
    """Numbers of the facts with an old answer to look for."""
    return [i for i, f in enumerate(facts) if f.target_true and folded(f.target_true) != folded(f.target_new)]


def spread(numbers: Sequence[T], n: int) -> list[T]:
    """At most n of them, evenly spread."""
    return list(numbers) if len(numbers) <= n else [numbers[k * len(numbers) // n] for k in range(n)]
