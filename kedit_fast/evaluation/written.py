"""What models write behind probes: greedily, up to a stop rule, each prompt once."""

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from kedit_fast.evaluation.probes import Probe, as_read
from kedit_fast.jobs.generate import generate


def write_probes(lm, probes: Sequence[Probe], label: str = "generating") -> list[str | None]:
    """What the model, as its edits have it, writes behind each prompt, greedily; None where no text is asked for.

    Equal prompts are written on once, also where only one of them has a stop rule; under independent edits each under
    its owner's. A text ends before the first of the probe's ``until``, and where an edited model gives NaN; of one
    without edits that is a ValueError. As many texts at a time as the memory holds.
    """
    lm, probes = as_read(lm, probes)
    keys = [(_how(one), (tuple(one.prompt), one.owner if lm.owned else 0)) for one in probes]
    groups: dict[_How, dict[tuple, str | None]] = {}
    for how, asked in keys:
        groups.setdefault(how, {})[asked] = None
    for how, texts in sorted(groups.items(), key=lambda each: len(each[0].until)):
        whole = groups.get(_How(how.n), {}) if how.until else {}  # what is written to its end holds the rest
        texts.update((asked, how.cut(whole[asked] or "")) for asked in texts if asked in whole)
        new = {asked: None for asked in texts if asked not in whole}
        if how.n and new:
            owners = {"owners": torch.tensor([owner for _, owner in new])} if lm.owned else {}
            ids = [list(prompt) for prompt, _ in new]
            ended = Ends(lm.tokenizer, how.certain) if how.certain else None
            made = generate(lm, ids, how.n, until=ended, nan_ends=bool(lm.edits), label=label, **owners)
            said = (lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in made)
            texts.update(zip(new, map(how.cut, said), strict=True))
    return [groups[how][asked] for how, asked in keys]


class _How(NamedTuple):
    """How texts are written: n tokens, ending before ``until``, but not inside one of ``kept``."""

    n: int
    until: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def certain(self) -> tuple[str, ...]:
        """Ends that writing may stop at: they are in no answer that may be under way."""
        return tuple(end for end in self.until if not any(end in answer for answer in self.kept))

    def cut(self, text: str) -> str:
        return before_any(text, self.until, self.kept)


def _how(one: Probe) -> _How:
    kept = tuple(answer for answer in one.accepted if any(end in answer for end in one.until))
    return _How(one.n_written, one.until, kept)


class Ends:
    """Whether the last of a text's tokens completes one of the texts that it ends before."""

    def __init__(self, tokenizer, until: Sequence[str]):
        self._tokenizer, self._until = tokenizer, until
        last = {text[-1] for text in until}
        self._last = last if "".join(last).isascii() else set()  # another character may be of several tokens
        self._spelled = cache(lambda token: tokenizer.decode([token]))

    def __call__(self, made: list[int]) -> bool:
        # completed by a token that holds its last character: few tokens have all that came before them decoded too
        if self._last and not self._last.intersection(self._spelled(made[-1])):
            return False
        text = self._tokenizer.decode(made, skip_special_tokens=True)
        return before_any(text, self._until) != text


def before_any(text: str, ends: Sequence[str], kept: Sequence[str] = ()) -> str:
    """A text as far as the first place where one of these ends begins, which is not white space before its first word,
    nor inside one of the texts ``kept`` (in whatever case)."""
    first = len(text) - len(text.lstrip())
    spans = [match.span() for one in kept for match in re.finditer(re.escape(one), text, re.IGNORECASE)]
    places = (match.start() for end in ends for match in re.finditer(re.escape(end), text))
    free = (at for at in places if at >= first and not any(b <= at < e for b, e in spans))
    return text[: min(free, default=len(text))]
