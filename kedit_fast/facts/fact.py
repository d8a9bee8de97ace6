"""Facts: what a model says, or shall say, of a subject, and their checks before any work starts.

A fact is a prompt with a place for its subject, and the answers: "{} is in the city of", "The Eiffel Tower", Paris.
tokens.py says how a model reads it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from kedit_fast.basics import checks
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import brief, counted
from kedit_fast.facts.files import Notes, read_records
from kedit_fast.facts.formats import ANSWERED, READ, Question, fact_fields
from kedit_fast.facts.subjects import as_template, folded

Chat = bool | tuple[tuple[str, str], ...]  # of Fact.chat: no, yes, or the turns before the question
NO_ANSWER = "an edit needs the answer to write (kf.Unlearn, --method unlearn, needs none: target_true is to be gone)"
BUILTIN = "builtin"  # instead of a fact file: the facts of this package
OWN_FACTS = Path(__file__).parent / "own.json"  # 77 facts that SmolLM2-135M-Instruct knows
T = TypeVar("T")
LISTS = ("paraphrases", "neighborhood", "same_subject")


@dataclass(frozen=True)
class Fact:
    """What a model says, or shall say, of a subject: prompt with "{}" for the subject, and the answers.

    prompt: template with exactly one "{}"; subject: the text that goes there. None: the prompt is the whole text and
    has no "{}"; fine-tuning and evaluation take such a fact, while tracing, ROME and MEMIT need a subject.
    target_new, target_true (o*, o^c): the answers after and before an edit, without the space that leads to them.
    phrasings: other wordings of the fact that editors train on: prompts with the subject in them, or with "{}" for it.
    paraphrases: other wordings of the same relation and subject, held out to test an edit. neighborhood: other subjects
    that keep their answer, which is target_true. same_subject: the same subject, other relations. These three are
    tuples of whole prompts; "{}" in one is filled with the subject, and refused in a neighbor, which has another.
    Prompts that differ in white space alone count once. A prompt of the last two may have an answer of its own: given
    as a pair (prompt, answer), kept as a ``Question``.
    id: a name for messages and reports. provenance: who, when, why; JSON values, free.
    chat: the prompts are questions in a chat, asked in the model's own template. True, or the turns that come before
        the question, as (role, content) or {"role", "content"}: a system message, for instance. prompt may also be the
        messages themselves, the question last.
    attached: whether an answer follows its prompt without a space; None: guessed from both (tokens.follows_directly).

    Warns where a prompt ends in white space: it is read as it stands, and its answer follows without a space.

    Raises ValueError for a prompt without or with several "{}", a phrasing without the subject, one that is among the
    paraphrases, a blank subject, target or prompt, or a non-string.
    """

    prompt: str
    subject: str | None = None
    target_new: str | None = None
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str | Question, ...] = ()
    same_subject: tuple[str | Question, ...] = ()
    id: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)
    chat: Chat = False
    attached: bool | None = None
    phrasings: tuple[str, ...] = ()

    def __post_init__(self):
        self._take_messages()
        if self.subject is not None:
            check_text("Fact.subject", self.subject)
        check_text("Fact.prompt", self.prompt)
        _check_place(self.prompt, self.subject)
        for name in ("target_new", "target_true"):
            if getattr(self, name) is not None:
                _check_answer(f"Fact.{name}", getattr(self, name))
        if self.attached is not None and not isinstance(self.attached, bool):
            raise ValueError(f"Fact.attached: expected True, False or None (guess), got {self.attached!r}")
        checks.text("Fact.id", self.id, blank=True)
        for name in LISTS:
            usual, of_subject = self._usual_answer(name), None if name == "neighborhood" else self.subject
            given = _prompt_tuple(f"Fact.{name}", getattr(self, name), name in ANSWERED, usual, of_subject)
            object.__setattr__(self, name, given)
        self._take_phrasings()
        if not isinstance(self.provenance, Mapping):
            raise ValueError(f"Fact.provenance: expected a mapping, got {self.provenance!r}")
        object.__setattr__(self, "provenance", dict(self.provenance))
        prompts = [self.prompt, *self.phrasings, *self.paraphrases]
        prompts += [question.prompt for name in ANSWERED for question in self.questions(name)]
        if not self.chat and any(prompt[-1:].isspace() for prompt in prompts):
            # the same words for every fact, so that Python shows them once
            warn("prompts that end in white space are read as they stand: answers follow directly")

    def _take_messages(self) -> None:
        """prompt and chat as text and earlier turns, where they were given as messages."""
        chat = self.chat
        if isinstance(self.prompt, list | tuple):
            *before, (role, prompt) = _turns("Fact.prompt", self.prompt) or [("", "")]
            if role != "user" or not isinstance(chat, bool):
                raise ValueError("Fact.prompt as messages: the last must be the user's, and chat True or left out")
            object.__setattr__(self, "prompt", prompt)
            chat = before or True
        if not isinstance(chat, bool):
            chat = _turns("Fact.chat", chat) or True
        object.__setattr__(self, "chat", chat)

    def _take_phrasings(self) -> None:
        """Each phrasing once, and none that is the prompt itself."""
        given = _prompt_tuple("Fact.phrasings", self.phrasings, False, None, "{}")  # places stay
        kept = {folded(self.text): self.prompt} if given else {"": ""}
        for phrasing in map(str, given):
            try:
                prompt, subject = self._template(phrasing)
                _check_place(prompt, subject)
            except ValueError as error:
                raise ValueError(f"Fact.phrasings: {error}") from error
            kept.setdefault(folded(prompt if subject is None else prompt.replace("{}", subject)), phrasing)
        _, *others = kept
        object.__setattr__(self, "phrasings", tuple(kept[text] for text in others))
        if others and (held_out := [prompt for prompt in self.paraphrases if folded(prompt) in others]):
            raise ValueError(
                f"paraphrase {held_out[0]!r} is among the phrasings, which an edit is trained on; paraphrases are held "
                "out to test it: leave it in one of the two"
            )

    def _template(self, phrasing: str) -> tuple[str, str | None]:
        """(a phrasing with "{}" for the subject, the subject as it is spelled there)"""
        return (phrasing, None) if self.subject is None else as_template(phrasing, self.subject)

    def phrased(self) -> tuple["Fact", ...]:
        """The fact in each of its phrasings, as facts of their own: what an editor is trained on besides the prompt."""
        same: dict[str, Any] = {"target_new": self.target_new, "target_true": self.target_true, "id": self.id}
        same |= {"chat": self.chat, "attached": self.attached}
        return tuple(Fact(*self._template(phrasing), **same) for phrasing in self.phrasings)

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        # Not str.format: subjects and prompts may hold braces.
        return self.prompt if self.subject is None else self.prompt.replace("{}", self.subject)

    @property
    def label(self) -> str:
        """The fact as messages name it: its id where it has one, its text, and whether it is asked in a chat."""
        text = repr(self.text) + ", in a chat" * bool(self.chat)
        return f"{self.id} ({text})" if self.id else text

    def questions(self, name: str) -> tuple[Question, ...]:
        """The prompts of a list ("neighborhood", "same_subject") with their answers: their own, else the usual one,
        which is target_true for neighbors and None (not known) for other relations."""
        usual = self._usual_answer(name)
        return tuple(x if isinstance(x, Question) else Question(x, usual) for x in getattr(self, name))

    def _usual_answer(self, name: str) -> str | None:
        return self.target_true if name == "neighborhood" else None

    def to_record(self) -> dict:
        """The fact in CounterFact's field names, ready for JSON; ``from_record`` gives the same fact again."""
        provenance = dict(self.provenance)
        turns = self.chat if isinstance(self.chat, bool) else [list(turn) for turn in self.chat]
        asked = ({"chat": turns} if turns else {}) | ({} if self.attached is None else {"attached": self.attached})
        rewrite: dict[str, Any] = {"prompt": self.prompt} | ({} if self.subject is None else {"subject": self.subject})
        for name in ("target_new", "target_true"):
            if getattr(self, name) is not None:
                rewrite[name] = {"str": getattr(self, name)}
        if provenance.get("relation_id"):
            rewrite["relation_id"] = provenance.pop("relation_id")
        return {
            "case_id": self.id,
            "requested_rewrite": rewrite,
            **({"phrasing_prompts": list(self.phrasings)} if self.phrasings else {}),
            "paraphrase_prompts": list(self.paraphrases),
            "neighborhood_prompts": [_record_of(entry) for entry in self.neighborhood],
            "same_subject_prompts": [_record_of(entry) for entry in self.same_subject],
            **asked,
            "provenance": provenance,
        }

    @classmethod
    def from_record(cls, record: dict) -> "Fact":
        """The fact in one record of any format that :func:`load_facts` reads.

        Raises ValueError where the record fits no format or holds several facts (MQuAKE: read it with load_facts).
        """
        fields = fact_fields(record)
        if len(fields) != 1:
            raise ValueError(f"record holds {counted(len(fields), 'fact')}, from_record reads one; use load_facts")
        return cls(**fields[0])


def _turns(name, messages) -> tuple[tuple[str, str], ...]:
    """Messages as (role, content); given as such pairs, or as {"role", "content"}."""
    turns = []
    for message in messages if isinstance(messages, list | tuple) else [None]:
        pair = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else message
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(x, str) and x for x in pair):
            raise ValueError(f'{name}: expected True or messages [{{"role": ..., "content": ...}}], got {messages!r}')
        turns.append(tuple(pair))
    return tuple(turns)


def check_text(name, value):
    """Raises ValueError for anything but a text with more than white space in it."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {value!r}")
    if not value.strip():
        raise ValueError(f"{name} is empty ({value!r}); give it a text, or None where a target is not known")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: {value!r} holds half a character (a surrogate); no tokenizer takes it") from None


def _check_place(prompt, subject):
    places = prompt.count("{}")
    if subject is None:
        if places:
            raise ValueError(f"prompt {prompt!r} has a place for a subject ({{}}), and Fact.subject is None; name it")
    elif places != 1:
        raise ValueError(
            f"subject {subject!r} {'not in' if places == 0 else 'in several places of'} prompt "
            f"{prompt!r}; Fact.prompt needs one {{}}, it has {places}"
        )


def _check_answer(name, value):
    check_text(name, value)
    control = next((c for c in value if (c < " " and c not in "\t\n") or c == "\x7f"), None)
    if control is not None:
        raise ValueError(f"{name}: {value!r} holds the control character {control!r}; no answer has one, leave it out")


def _prompt_tuple(name, entries, answered: bool, usual: str | None, subject: str | None) -> tuple[str | Question, ...]:
    """Each prompt once, up to white space; as a Question where it has another answer than the usual one.

    answered: whether an entry may be a pair (prompt, answer)
    subject: what a place for it is filled with; None: one is refused
    """
    if isinstance(entries, str | Question | Mapping) or not isinstance(entries, Iterable):
        raise ValueError(f"{name}: expected a tuple of prompts, got {entries!r}")
    kept: dict[str, str | Question] = {}
    for entry in entries:
        is_pair = isinstance(entry, Question) or (isinstance(entry, tuple) and len(entry) == 2)
        prompt, answer = entry[:2] if answered and is_pair else (entry, None)
        check_text(name, prompt)
        prompt = _filled(name, prompt, subject)
        if answer is not None:
            check_text(f"{name}: the answer to {prompt!r}", answer)
        key, own = " ".join(prompt.split()), answer is not None and answer.strip() != (usual or "").strip()
        # An answer of its own says more than none.
        if key not in kept or (own and isinstance(kept[key], str)):
            kept[key] = Question(prompt, answer) if own else prompt
    return tuple(kept.values())


def _filled(name: str, prompt: str, subject: str | None) -> str:
    if subject is None and "{}" in prompt:
        raise ValueError(f"{name}: {prompt!r} has a place for a subject ({{}}), and there is none to fill it with")
    return prompt if subject is None else prompt.replace("{}", subject)


def _record_of(entry: str | Question) -> str | dict:
    return {"prompt": entry.prompt, "answer": entry.answer} if isinstance(entry, Question) else entry


def load_facts(path: checks.AnyPath, n: int | None = None, *, skip_bad: bool = False) -> list[Fact]:
    """The facts of a file, in its order, the first n of them where n is given.

    path: .json, .jsonl, .json.gz or .jsonl.gz in any format of :mod:`kedit_fast.fact_formats`: CounterFact and
    multi_counterfact, known_1000, zsRE as prepared for MEND, EasyEdit, KnowEdit, WikiBigEdit, QAEdit, MQuAKE, questions
    with answers, ``Fact.to_record``. A fact whose record has no id is named by the record's index. "builtin": the facts
    of this package.
    skip_bad: records that make no fact are passed over and counted, instead of an error for the first of them

    Warns, once for each kind of thing and with counts, of fields that are not used, keys that are given twice, subjects
    that are spelled otherwise than in their prompt (and taken as they stand there), and records passed over.
    Raises ValueError for n < 1 and for every problem of the file, with the file and the record's place; OSError where
    the file cannot be opened.
    """
    n, skip_bad = checks.optional(checks.whole, "n", n, least=1, like=10), checks.flag("skip_bad", skip_bad)
    path, notes = OWN_FACTS if path == BUILTIN else path, Notes(READ)
    facts = list(islice(facts_of(read_records(path, notes), notes, skip_bad), n))
    notes.tell(path, facts)
    return facts


def facts_of(records: Iterable[tuple[str, Any]], notes: Notes, skip_bad: bool = False) -> Iterator[Fact]:
    """The facts of records that stand at places (place, record); notes: told of what must be said of them.

    skip_bad: a record that makes no fact is noted, else it raises ValueError with its place
    """
    for made in made_of(records, partial(record_facts, notes=notes), notes, skip_bad):
        yield from made


def record_facts(record, index: int, notes: Notes) -> list[Fact]:
    """The facts of one record; one without an id is named by the record's index."""
    return [Fact(**fields | {"id": fields["id"] or str(index)}) for fields in fact_fields(record, notes)]


def made_of(
    records: Iterable[tuple[str, Any]], make: Callable[[Any, int], T], notes: Notes, skip_bad: bool = False
) -> Iterator[T]:
    """What ``make(record, index)`` gives of each record; records, notes, skip_bad: as in ``facts_of``, of what makes a
    ValueError."""
    for index, (place, record) in enumerate(records):
        try:
            made = make(record, index)
        except ValueError as error:
            problem = str(error) if error is record else f"{place}: {brief(f'{error}{notes.misspelled(record)}')}"
            if not skip_bad:
                raise ValueError(problem) from error
            notes.skipped.append(problem)
            continue
        yield made


def fact_list(facts, name: str = "facts", *, empty: bool = False) -> list[Fact]:
    """Facts, or one, as a list. Raises BadArgument for anything else, and for none unless ``empty``."""
    wanted = "Facts, kf.Fact(prompt=..., subject=...) or what load_facts gives"
    return checks.listed(name, facts, Fact, wanted, empty=empty)


def check_facts(
    facts: Iterable[Fact],
    *,
    need_new: bool = False,
    need_subject: bool = False,
    together: bool = True,
    skip_bad: bool = False,
) -> list[Fact]:
    """The facts without duplicates, checked before any work starts; what editors call first.

    Two facts are at the same place where subject and prompt are equal but for case and spacing. At one place the same
    target_new is a duplicate: the first is kept, a warning counts the rest. Another target_new is a contradiction.
    Warned of as well: a target_new that equals target_true (nothing to edit), and different new targets for one subject
    and ``provenance["relation_id"]`` under different prompts (right for relations that take several objects).

    need_new: every fact must have a target_new; need_subject: and a subject
    together: whether they are written into one model. Independent edits see nothing of each other, so they neither
        contradict each other nor clash.
    skip_bad: facts without a target_new or subject that they need are left out and counted
    Raises ValueError for no facts, for a contradiction (both facts and targets are named) and for a missing target_new
    or subject; BadArgument for anything but Facts.
    """
    kept: dict[tuple, Fact] = {}
    places: dict[tuple, Fact] = {}
    relations: dict[tuple, Fact] = {}
    repeated, pointless, clashes, unfit = [], [], [], []
    for fact in fact_list(facts):
        if skip_bad and ((need_new and not fact.target_new) or (need_subject and fact.subject is None)):
            unfit.append(fact)
            continue
        if need_subject:
            check_subject(fact)
        target = fact.target_new and fact.target_new.strip()
        at = place(fact)
        key = (*at, fact.chat, target)  # a statement and a question in a chat are two ways to write one fact
        if key in kept:
            repeated.append(fact)
        kept.setdefault(key, fact)
        if target is None:
            if need_new:
                raise ValueError(f"fact {fact.label} has no target_new; {NO_ANSWER}")
            continue
        first = places.setdefault(at, fact)
        if together and (first.target_new or "").strip() != target:
            raise ValueError(
                f"facts {first.label} and {fact.label} contradict each other: target_new {first.target_new!r} and "
                f"{fact.target_new!r} for one subject and prompt; keep one of them"
            )
        if fact.target_true and fact.target_true.strip() == target:
            pointless.append(fact)
        relation = fact.provenance.get("relation_id") if together else None
        other = relations.setdefault((at[0], str(relation)), fact) if relation else fact
        if (other.target_new or "").strip() != target:
            clashes.append(fact)
    _warn(unfit, "left out: no target_new, or no subject")
    _warn(repeated, "left out: the same subject, prompt and target_new as a fact before")
    _warn(pointless, "target_new equals target_true, there is nothing to edit")
    _warn(clashes, "another target_new than a fact before it with the same subject and relation_id")
    return list(kept.values())


def check_subject(fact: Fact) -> Fact:
    """The fact; ValueError for one without a subject, where it is needed."""
    if fact.subject is None:
        raise ValueError(
            f"fact {fact.label} has no subject: tracing corrupts the subject's tokens, and ROME and MEMIT write at its "
            "last one. Name the subject and put {} in its place, or edit by fine-tuning (ft, ft-l), which needs none"
        )
    return fact


def place(fact: Fact) -> tuple[str, str]:
    """What a fact is about: subject and prompt, folded."""
    return folded(fact.subject or ""), folded(fact.prompt)


def _warn(facts, what):
    if facts:
        shown = ", ".join(fact.label for fact in facts[:5]) + (", ..." if len(facts) > 5 else "")
        warn(f"{counted(len(facts), 'fact')}: {what}: {shown}")
