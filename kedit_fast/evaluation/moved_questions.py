"""What ``what_moved`` asks, drawn up before any model runs: windows of text, unrelated prompts, canaries."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kedit_fast.basics import checks
from kedit_fast.basics.words import counted
from kedit_fast.evaluation.canary import PROSE, Canary, context_canaries, doubt_canaries, spread, with_old_answer
from kedit_fast.evaluation.perplexity import n_predicted, text_windows
from kedit_fast.evaluation.probes import Probe, as_read, probe
from kedit_fast.facts.fact import OWN_FACTS, Fact, load_facts
from kedit_fast.facts.subjects import Names, folded
from kedit_fast.facts.tokens import asked

TEXTS = {"prose": PROSE, "dialogue": Path(__file__).parent / "dialogue.txt"}  # ordinary text on no fact's subject
PROMPTS, OF_TEXTS = 300, 60  # unrelated prompts at most where none are given, and of them beginnings of sentences
FEW_PROMPTS, FEW_TOKENS = 200, 50_000  # below these a reader is told
BEGINNING = 6  # words of a sentence, of which more follow
CANARY_FACTS, CONTEXT_FACTS, CONTEXT_TOKENS, N_WRITTEN = 50, 8, 1_000, 16  # as the gate has them


class Asked(NamedTuple):
    """facts; windows: {text: token lists} for perplexity; prompts: the unrelated ones; canaries, written on by
    n_written tokens; notes: where less is asked than was wanted"""

    facts: Sequence[Fact]
    windows: dict[str, list[list[int]]]
    prompts: list[Probe]
    canaries: list[Canary]
    n_written: int
    notes: list[str]


def checked_texts(texts) -> dict[str, str]:
    if texts is None:
        return {name: path.read_text(encoding="utf-8") for name, path in TEXTS.items()}
    given = checks.instance("texts", texts, Mapping, 'texts by name, {"news": "...", "code": "..."}')
    if not given:
        raise checks.BadArgument('texts is empty; expected texts by name, {"news": "...", "code": "..."}')
    return {checks.text("a name in texts", name): checks.text(f"texts[{name!r}]", text) for name, text in given.items()}


def questions(view, facts: Sequence[Fact], texts: dict[str, str], prompts, max_tokens: int) -> Asked:
    windows = {name: text_windows(view, text, max_tokens) for name, text in texts.items()}
    _check_windows(view, [window for some in windows.values() for window in some])
    unrelated, notes = _unrelated(view, facts, texts, prompts)
    probes = [probe(view, text, likeliest=True) for text in unrelated]
    read = as_read(view, probes)[1] if view.prompting else probes
    view.check_length(max(one.longest for one in read), "prompts")
    canaries, n_written = _canaries(view, facts)
    short = {name: n for name, some in windows.items() if (n := n_predicted(some)) < FEW_TOKENS}
    if not canaries:
        notes.append("the old answer: not measured, no fact has one to look for (target_true)")
    if len(windows) == 1:
        notes.append("perplexity of one text alone says nothing of other kinds of text: give another (texts=)")
    if short:
        told = " and ".join(f"{n:,} tokens of {name}" for name, n in short.items())
        notes.append(f"perplexity: {told}; a drift below 1 % takes {FEW_TOKENS:,} of each (texts=, max_tokens=)")
    return Asked(facts, windows, probes, canaries, n_written, notes)


def _check_windows(view, windows: list[list[int]]) -> None:
    """Raises ValueError where they are too long with what the edits put before them."""
    if view.prompting:
        for ids, owner in zip(windows, view.owners(windows).tolist(), strict=True):
            text = view.before(view.tokenizer.decode(ids), owner) if owner >= 0 else ""
            before = len(view.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0
            view.check_length(len(ids) + before, "a window of the texts, behind what the edit puts before it")


def _unrelated(view, facts: Sequence[Fact], texts: dict[str, str], prompts) -> tuple[list[str], list[str]]:
    """(prompts that neither name an edited subject nor are an edited fact's own, what a reader must know of them)."""
    every = [*facts, *(fact for edit in view.edits for fact in edit.facts)]
    names = Names(fact.subject for fact in every)
    own = {folded(prompt) for fact in every for prompt in _prompts_of(fact)}

    def kept(some: Iterable[str]) -> list[str]:
        distinct = {folded(prompt): prompt for prompt in reversed(list(some))}
        return [prompt for key, prompt in reversed(distinct.items()) if key not in own and not names.in_text(prompt)]

    if prompts is None:
        begun = spread(kept(each for text in texts.values() for each in beginnings(text)), OF_TEXTS)
        builtin = kept(prompt for fact in load_facts(OWN_FACTS) for prompt in _prompts_of(fact))
        return spread(builtin, PROMPTS - len(begun)) + begun, []
    given = [checks.text("prompts", prompt) for prompt in checks.listed("prompts", prompts, str, "a list of texts")]
    found = kept(given)
    if not found:
        raise ValueError(
            f"prompts: all {len(given)} name an edited subject or are an edited fact's own; expected unrelated ones"
        )
    notes = []
    if len(found) < len(given):
        notes.append(
            f"{len(given) - len(found)} of {counted(len(given), 'prompt')} left out: they name an edited subject, are "
            "an edited fact's own, or stand there twice"
        )
    if len(found) < FEW_PROMPTS:
        notes.append(f"unrelated prompts: {len(found)} are few, {FEW_PROMPTS} tell more")
    return found, notes


def _prompts_of(fact: Fact) -> Iterator[str]:
    yield from (fact.text, *fact.paraphrases)
    yield from (question.prompt for name in ("neighborhood", "same_subject") for question in fact.questions(name))


def beginnings(text: str) -> Iterator[str]:
    """The first words of each of a text's sentences that has more of them."""
    for sentence in re.findall(r"[^.!?\n]+[.!?]", text):
        words = sentence.split()
        if len(words) > BEGINNING + 1:
            yield " ".join(words[:BEGINNING]).lstrip("\"'“‘«([")


def _canaries(view, facts: Sequence[Fact]) -> tuple[list[Canary], int]:
    """(what is written on, by how many tokens), of the facts with an old answer."""
    known = with_old_answer(facts)
    answers = [answer for i in known for answer in (facts[i].target_true, facts[i].target_new) if answer]
    lengths = [len(view.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
    n_written = max([N_WRITTEN, *(n + 4 for n in lengths)])
    few = spread(known, CONTEXT_FACTS)
    plain = [asked(view.tokenizer, facts[i].text, facts[i].chat) for i in few]
    put = [0]  # tokens that the edits put before prompts: the long text must leave room for them
    if view.prompting:
        read = view.as_read(plain)[1]
        put += [len(view.encode(after)) - len(view.encode(text)) for after, text in zip(read, plain, strict=True)]
    contexts = context_canaries(
        view, facts, few, PROSE.read_text(encoding="utf-8"), CONTEXT_TOKENS, n_written + max(put)
    )
    return doubt_canaries(view, facts, spread(known, CANARY_FACTS)) + contexts, n_written
