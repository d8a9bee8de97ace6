"""What is asked of an edit, drawn from its own facts, the suite and this package's facts, before any model runs; and a
suite to complete: an edit's facts with the probes they carry, and places for those that are missing."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kedit_fast.basics import checks
from kedit_fast.basics.words import counted
from kedit_fast.edits.chain import facts_in_force
from kedit_fast.edits.edit import edit_list
from kedit_fast.edits.held_out import check_held_out
from kedit_fast.evaluation.canary import (
    CONTEXT,
    DOUBT,
    LANGUAGE,
    PLAIN,
    PROSE,
    Canary,
    canary,
    context_canaries,
    doubt_canaries,
    spread,
    with_old_answer,
)
from kedit_fast.evaluation.perplexity import text_windows
from kedit_fast.evaluation.probes import Probe, probe
from kedit_fast.facts import tokens
from kedit_fast.facts.fact import ANSWERED, OWN_FACTS, Chat, Fact, folded, load_facts, place
from kedit_fast.facts.subjects import Names
from kedit_fast.gating.suite import FORMAT, Question, Suite, merged, portability_of
from kedit_fast.gating.thresholds import Thresholds

REWRITE, PARAPHRASE, EARLIER = "rewrite prompt", "paraphrase", "earlier fact"
IN_CHAT, PLAINLY = "asked in a chat", "asked plainly"  # the facts in the form they were not edited in
NEIGHBORS, SAME_SUBJECT, SUITE, CONTROLS, BUILTIN = (
    "neighborhood", "same subject", "the suite's prompts", "the suite's other facts", "built-in facts",
)  # fmt: skip
SOURCES = (NEIGHBORS, SAME_SUBJECT, SUITE, CONTROLS, BUILTIN)
KINDS = (PLAIN, DOUBT, CONTEXT, LANGUAGE)
WORDING, PORTABILITY, KEPT, CANARY = "wording", "portability", "kept", "canary"  # kinds of probes


class Wording(NamedTuple):
    """One way to ask for a fact, in the fact's form (plainly or in a chat).

    kind: REWRITE, PARAPHRASE, EARLIER for the fact of an earlier edit of a chain, IN_CHAT or PLAINLY for the prompts of
    a fact in the other form
    """

    fact: Fact
    kind: str
    prompt: str


class Kept(NamedTuple):
    """A prompt that must keep its answer (None: whatever token the base model finds likeliest). source: of SOURCES;
    chat: how it is asked, see ``Fact.chat``"""

    prompt: str
    answer: str | None
    source: str
    chat: Chat = False


@dataclass(frozen=True)
class Questions:
    """Everything that is asked of each form of the edit.

    facts: those of the last edit, with the suite's probes; earlier: the ones of edits before it that still should hold
    wordings: of both; portability: questions that follow from them; kept: specificity prompts, distinct; left_out: how
    many were not taken, as they name an edited subject; windows: token lists for perplexity; canaries: for generation;
    max_new_tokens: written after each prompt; notes: where less is asked than was wanted, in words; chat: how prompts
    that belong to no fact are asked, as the edit's facts are
    """

    facts: tuple[Fact, ...]
    earlier: tuple[Fact, ...]
    wordings: tuple[Wording, ...]
    portability: tuple[Question, ...]
    kept: tuple[Kept, ...]
    left_out: int
    windows: tuple[list[int], ...]
    canaries: tuple[Canary, ...]
    max_new_tokens: int
    notes: tuple[str, ...] = ()
    chat: Chat = False

    @property
    def context_tokens(self) -> int:
        """Of the shortest long context that is really asked; 0 where there is none."""
        return min((c.context_tokens for c in self.canaries if c.kind == CONTEXT), default=0)

    def probes(self, lm) -> list[Probe]:
        """All that is asked: of each wording (new, true), of each portability question and each prompt that must keep
        its answer, or its likeliest token, that answer; canaries, like the first two, are written on."""

        def ask(kind: str, prompt: str, chat: Chat, answers: tuple, attached: bool | None = None, **how) -> Probe:
            return probe(lm, tokens.asked(lm.tokenizer, prompt, chat), answers, attached, kind=kind, **how)

        made, writes = [], {"n_written": self.max_new_tokens}
        for fact, _, prompt in self.wordings:
            made.append(ask(WORDING, prompt, fact.chat, (fact.target_new, fact.target_true), fact.attached, **writes))
        made += [ask(PORTABILITY, q.prompt, self.chat, (q.answer,), **writes) for q in self.portability]
        made += [ask(KEPT, k.prompt, k.chat, (k.answer,), likeliest=True) for k in self.kept]
        return made + [probe(lm, canary.prompt, kind=CANARY, **writes) for canary in self.canaries]


@dataclass(frozen=True)
class Sizes:
    """How much is asked where more would only cost time.

    max_new_tokens: written after each prompt (more where an answer is longer)
    text_tokens: of text, for perplexity, at most
    context_tokens: in front of a prompt, for the canary in a long context (fewer where the model does not read so many;
        the report notes it)
    canary_facts, context_facts: facts, spread evenly, that the canary asks under doubt and in other languages, and
        behind a long context; the plain prompts are asked for all
    """

    max_new_tokens: int = 16
    text_tokens: int = 5_120
    context_tokens: int = 1_000
    canary_facts: int = 50
    context_facts: int = 8

    def __post_init__(self):
        for name, value in vars(self).items():
            checks.whole(name, value, least=2 if name == "text_tokens" else 1, like=50)


def questions(lm, edits, suite: Suite, thresholds: Thresholds, builtin: bool, sizes: Sizes, chat=None) -> Questions:
    """What is asked of the last of these edits, and of those before it. Raises ValueError where there is nothing.

    chat: the form in which the facts are asked; None: the one they were edited in
    """
    facts, others = merged(edits[-1].facts, suite)
    facts = [fact for fact in facts if fact.target_new]
    check_held_out(edits, ((fact, 0) for fact in facts))
    if not facts:
        raise ValueError(
            f"{edits[-1]!r} holds no fact with a target_new; the gate would have nothing to ask for. "
            "Of facts that were to be forgotten, kf.verify_forgotten (kedit-fast forgotten) says whether they are"
        )
    # Of the edits before, but for those that the last wrote anew.
    last = {place(fact) for fact in facts}
    earlier = [fact for fact in facts_in_force(edits[:-1]) if fact.target_new and place(fact) not in last]
    if chat is not None:
        facts, earlier = ([replace(fact, chat=chat) for fact in some] for some in (facts, earlier))
    common = facts[0].chat if all(fact.chat == facts[0].chat for fact in facts) else False
    edited = {place(fact) for edit in edits for fact in edit.facts}
    controls = [fact for fact in others if place(fact) not in edited]
    wordings = [
        *(Wording(fact, kind, prompt) for fact in facts for kind, prompt in wordings_of(fact)),
        *(Wording(fact, EARLIER, fact.text) for fact in earlier),
    ]
    if tokens.has_template(lm.tokenizer):
        wordings += [
            Wording(fact, IN_CHAT if fact.chat else PLAINLY, prompt)
            for fact in map(tokens.other_form, facts)
            for _, prompt in wordings_of(fact)
        ]
    follows = [*suite.portability, *portability_of(facts, "the edit")]
    portability = [q for q in follows if q.answer and edited.issuperset(q.about)]
    names = Names(fact.subject for edit in edits for fact in edit.facts)
    taken = {folded(x.prompt) for x in (*wordings, *portability)}
    needed = thresholds.min_specificity_prompts if builtin else 0
    kept, left_out = _kept(_candidates(facts, suite, controls, common), names, taken, needed)
    answers = [answer for fact in facts for answer in (fact.target_new, fact.target_true) if answer]
    lengths = [len(lm.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
    room = max(sizes.max_new_tokens, max(lengths) + 4)
    prose = PROSE.read_text(encoding="utf-8")
    canaries, notes = _canaries(lm, facts, suite, prose, replace(sizes, max_new_tokens=room))
    paraphrases = sum(wording.kind == PARAPHRASE for wording in wordings)
    notes += thresholds.missing(len(facts), len(facts) + paraphrases, paraphrases, len(kept), _known(facts))
    notes += _not_asked(suite, follows, portability, facts)
    asked = Questions(
        facts=tuple(facts),
        earlier=tuple(earlier),
        wordings=tuple(wordings),
        portability=tuple({folded(q.prompt): q for q in reversed(portability)}.values())[::-1],
        kept=tuple(kept),
        left_out=left_out,
        windows=tuple(text_windows(lm, list(suite.text) or prose, sizes.text_tokens)),
        canaries=tuple(canaries),
        max_new_tokens=room,
        notes=tuple(notes),
        chat=common,
    )
    lm.check_length(max(one.longest for one in asked.probes(lm)))
    return asked


def wordings_of(fact: Fact) -> Iterator[tuple[str, str]]:
    """(kind, prompt) of each way to ask for a fact: its prompt, and its paraphrases that are not that again."""
    yield REWRITE, fact.text
    seen = {folded(fact.text)}
    for prompt in fact.paraphrases:
        if folded(prompt) not in seen:
            seen.add(folded(prompt))
            yield PARAPHRASE, prompt


# ---- specificity


def _kept(candidates: Iterable[Kept], names: Names, taken: set[str], needed: int) -> tuple[list[Kept], int]:
    """(distinct specificity prompts, number left out); this package's facts only as far as ``needed`` asks for more."""
    kept: list[Kept] = []
    left_out = 0
    for one in candidates:
        if one.source == BUILTIN and len(kept) >= needed:
            break
        key = folded(one.prompt)
        if key in taken:
            continue
        taken.add(key)
        # What a suite lists by itself, or a fact as its subject's other prompts, is meant as it stands.
        if one.source not in (SUITE, SAME_SUBJECT) and names.in_text(one.prompt):
            left_out += 1
            continue
        kept.append(one)
    return kept, left_out


def _candidates(facts: Iterable[Fact], suite: Suite, controls: Iterable[Fact], chat: Chat) -> Iterator[Kept]:
    """chat: the form of prompts that belong to none of the facts"""
    for fact in facts:
        for name, source in (("neighborhood", NEIGHBORS), ("same_subject", SAME_SUBJECT)):
            yield from (Kept(q.prompt, q.answer, source, fact.chat) for q in fact.questions(name))
    yield from (Kept(question.prompt, question.answer, SUITE, chat) for question in suite.specificity)
    for source, others in ((CONTROLS, controls), (BUILTIN, load_facts(OWN_FACTS))):
        for fact in others:
            yield from (Kept(prompt, fact.target_true, source, chat) for prompt in (fact.text, *fact.paraphrases))
            for name in ("neighborhood", "same_subject"):
                yield from (Kept(q.prompt, q.answer, source, chat) for q in fact.questions(name))


# ---- canaries


def _canaries(lm, facts: Sequence[Fact], suite: Suite, prose: str, sizes: Sizes) -> tuple[list[Canary], list[str]]:
    """(the canaries, what a reader must know of them)."""
    known = with_old_answer(facts)
    some = spread(known, sizes.canary_facts)
    canaries = [canary(lm, PLAIN, facts, i, facts[i].text) for i in known]
    canaries += doubt_canaries(lm, facts, some, suite.doubt)
    text = "\n\n".join(suite.context) or prose
    few = spread(known, sizes.context_facts)
    contexts = context_canaries(lm, facts, few, text, sizes.context_tokens, sizes.max_new_tokens)
    canaries += contexts
    asked = set(some)
    for i in known:
        for entry in suite.languages:
            if entry.speaks_of(facts[i]) and (i in asked or entry.subject is not None):
                prompt = entry.prompt.replace("{}", facts[i].subject)
                old, new = entry.target_true or facts[i].target_true, entry.target_new or facts[i].target_new
                canaries.append(canary(lm, LANGUAGE, facts, i, prompt)._replace(old=old, new=new))
    return canaries, _context_notes(lm, contexts, len(few), sizes.context_tokens)


def _context_notes(lm, contexts: Sequence[Canary], n_facts: int, wanted: int) -> list[str]:
    """Sentences for where the model's positions leave less than the long context that was wanted, or none.

    contexts: those that were made for n_facts facts; wanted: tokens
    """
    notes = []
    lengths = [canary.context_tokens for canary in contexts if canary.context_tokens < wanted]
    if lengths:
        least, most = min(lengths), max(lengths)
        length = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        some = "" if len(lengths) == n_facts else f" for {len(lengths)} of {n_facts} facts"
        notes.append(
            f"the long context was shortened from {wanted:,} to {length} tokens{some}: the model reads "
            f"{lm.positions:,}, the prompt and what it writes among them"
        )
    if len(contexts) < n_facts:
        notes.append(
            f"no long context for {n_facts - len(contexts)} of {n_facts} facts: their prompts leave no place for it in "
            f"the {lm.positions:,} tokens that the model reads"
        )
    return notes


def _not_asked(suite: Suite, follows, portability, facts: Sequence[Fact]) -> list[str]:
    """Sentences for what a suite holds and this edit has no use for, or none."""
    unanswered = sum(not question.answer for question in follows)
    foreign = len(follows) - unanswered - len(portability)
    known = [facts[i] for i in with_old_answer(facts)]
    mute = [entry for entry in suite.languages if not any(entry.speaks_of(fact) for fact in known)]
    shown = ", ".join(f"{entry.language} {entry.prompt!r}" for entry in mute[:3]) + ", ..." * (len(mute) > 3)
    said = (
        (unanswered, "portability question", "without an answer"),
        (foreign, "portability question", "of facts that this edit does not write"),
        (len(mute), "language prompt", f"about no edited fact with an old answer (target_true): {shown}"),
    )
    return [f"{counted(n, what)} {why}: not asked" for n, what, why in said if n]


# ---- a suite to complete


def draft_suite(edit) -> dict:
    """A suite of the facts that an edit writes, as ``load_suite`` reads it once it is JSON; lists stand empty where
    nothing is known yet.

    edit: an Edit, or several in their order; of these, what is in force after the last
    """
    return {
        "format": FORMAT,
        "facts": [_record(fact) for fact in _written(edit)],
        "portability": [],
        "specificity": [],
        "languages": [],
    }


def _written(edit) -> list[Fact]:
    return [fact for fact in facts_in_force(edit_list(edit, "edit")) if fact.target_new]


def _record(fact: Fact) -> dict:
    record = fact.to_record()
    provenance = record.pop("provenance")
    record["portability"] = provenance.pop("portability", [])
    return record | ({"provenance": provenance} if provenance else {})


def missing(edit, thresholds: Thresholds, builtin: bool) -> list[str]:
    """What must be added to the probes that an edit's facts carry, before these limits can be met: sentences.

    builtin: whether prompts that must keep their answer are filled up with this package's own
    """
    facts = _written(edit)
    wordings = [prompt for fact in facts for _, prompt in wordings_of(fact)]
    prompts = {folded(question.prompt) for fact in facts for name in ANSWERED for question in fact.questions(name)}
    n_prompts = max(len(prompts), thresholds.min_specificity_prompts if builtin else 0)
    return thresholds.missing(len(facts), len(wordings), len(wordings) - len(facts), n_prompts, _known(facts))


def _known(facts: Sequence[Fact]) -> int:
    """How many of them say their old answer."""
    return sum(bool(fact.target_true) for fact in facts)
