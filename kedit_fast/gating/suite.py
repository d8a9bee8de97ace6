"""What a gate asks: the suite, in files of its own format (see ``load_suite``) or in fact files as they are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kedit_fast.basics import checks
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import brief, json_kind, reason
from kedit_fast.evaluation.canary import check_doubt
from kedit_fast.facts.fact import ANSWERED, Fact, Question, facts_of, folded, load_facts, place
from kedit_fast.facts.files import Notes, read_json
from kedit_fast.facts.formats import READ, questions_of

FORMAT = "kedit_fast.suite"


@dataclass(frozen=True)
class Translation:
    """A prompt in another language: with "{}" for the subject, or with the subject in it.

    Speaks of ``subject``, or of all facts whose provenance has this ``relation_id``. target_new, target_true: the
    answers in this language (None: as in the fact). Raises ValueError for one that speaks of neither or of both.
    """

    language: str
    prompt: str
    relation_id: str | None = None
    subject: str | None = None
    target_new: str | None = None
    target_true: str | None = None

    def __post_init__(self):
        for name in ("language", "prompt"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ValueError(f"languages: {name} is {getattr(self, name)!r}; expected a text")
        if (self.relation_id is None) == (self.subject is None):
            raise ValueError(f"languages: {self.prompt!r} needs either relation_id or subject, to say whom it is about")
        if self.subject is None and self.prompt.count("{}") != 1:
            raise ValueError(f"languages: {self.prompt!r} is for a whole relation and needs one {{}} for the subject")

    def speaks_of(self, fact: Fact) -> bool:
        if fact.subject is None:
            return False
        if self.subject is not None:
            return folded(self.subject) == folded(fact.subject)
        return str(fact.provenance.get("relation_id")) == str(self.relation_id)


@dataclass(frozen=True)
class Suite:
    """Facts and prompts to judge an edit by; ``load_suite`` says what the fields mean. ``name`` is for reports."""

    facts: tuple[Fact, ...] = ()
    portability: tuple[Question, ...] = ()
    specificity: tuple[Question, ...] = ()
    text: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    doubt: tuple[str, ...] = ()
    languages: tuple[Translation, ...] = ()
    name: str = ""

    def __post_init__(self):
        kinds = {"facts": Fact, "portability": Question, "specificity": Question, "languages": Translation}
        for each in fields(self)[:-1]:
            kind = kinds.get(each.name, str)
            wanted = f"a tuple of {kind.__name__}; load_suite reads a file"
            found = checks.listed(f"Suite.{each.name}", getattr(self, each.name), kind, wanted, empty=True, alone=False)
            object.__setattr__(self, each.name, tuple(found))
        checks.text("Suite.name", self.name, blank=True)
        for template in self.doubt:
            check_doubt(template)

    def __repr__(self) -> str:
        parts = [f"{len(value)} {name}" for name, value in vars(self).items() if name != "name" and value]
        return f"Suite({', '.join([*filter(None, [self.name]), *parts]) or 'empty'})"

    def __add__(self, other: "Suite") -> "Suite":
        """Both together; what both hold stands twice only until the gate takes out duplicates."""
        parts = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "name"}
        return Suite(**parts, name=", ".join(filter(None, (self.name, other.name))))


def load_suite(*paths: checks.AnyPath, skip_bad: bool = False) -> Suite:
    """The suite of one or several files: suite files (.json) and fact files in any format of ``load_facts``.

    A suite file is one JSON object; every field but ``format`` may be absent, and an unknown field is an error:

        {"format": "kedit_fast.suite",
         "facts": [{"requested_rewrite": {"prompt": "{} is in the city of", "subject": "The Eiffel Tower",
                                          "relation_id": "P131",
                                          "target_new": {"str": "Rome"}, "target_true": {"str": "Paris"}},
                    "paraphrase_prompts": ["To see the Eiffel Tower you go to"],
                    "neighborhood_prompts": ["The Louvre is in the city of"],
                    "same_subject_prompts": ["The Eiffel Tower was built by"],
                    "portability": [{"prompt": "The Eiffel Tower is in the country of", "answer": "Italy"}]}],
         "portability": [{"prompt": "From the Eiffel Tower one looks down on the river", "answer": "Tiber"}],
         "specificity": ["Water boils at", {"prompt": "The capital of Spain is", "answer": "Madrid"}],
         "text": ["Ordinary text, some thousand tokens of it, to measure perplexity on."],
         "context": ["Ordinary text to put in front of a prompt."],
         "doubt": ["{prompt} {answer}. Are you sure? {prompt}"],
         "languages": [{"language": "German", "relation_id": "P131", "prompt": "{} liegt in der Stadt",
                        "target_new": "Rom"},
                       {"language": "French", "subject": "The Eiffel Tower", "prompt": "La tour Eiffel est à",
                        "target_new": "Rome", "target_true": "Paris"}]}

    facts: records of any format that ``load_facts`` reads. One that the edit writes adds its probes to the edit's own;
        any other is a control: its prompts must keep their answers.
    portability: questions whose answer follows from the edit
    specificity: prompts that must keep their answer; one without an answer must keep its likeliest token
    text, context, doubt: each replaces what is built in: the text that perplexity is measured on (so drift of one suite
        cannot be compared with drift of another), the text of the long context, and the doubts, in which {prompt},
        {answer} and {subject} are filled in from the fact
    languages: prompts in other languages, about one subject or all facts of a relation; answers that are spelled as in
        the fact need not be given
    skip_bad: records of facts that make none are passed over and counted

    ``kedit-fast gate EDIT --init FILE`` writes one of an edit, to be completed. Warns as ``load_facts`` does.

    Raises ValueError, naming the file and the place, for anything else; OSError where a file cannot be opened.
    """
    suite = Suite()
    for path in (checks.path("paths", each) for each in paths):
        notes = Notes(READ)
        record = _object_in(path, notes)
        if record is None:
            facts = tuple(load_facts(path, skip_bad=skip_bad))
            suite += Suite(facts=facts, portability=portability_of(facts, str(path)), name=path.name)
        else:
            suite += _from_object(path, record, notes, skip_bad)
            for sentence in notes.sentences():
                warn(f"{path}: {sentence}")
    return suite


def _object_in(path: Path, notes: Notes) -> dict | None:
    """The object that a .json file holds; None where it holds records, or another kind of file is meant."""
    if path.suffix != ".json":
        return None
    try:
        value = read_json(path.read_text(encoding="utf-8-sig"), path, notes)
    except ValueError:
        return None  # read again as facts, which says what is wrong and where
    return value if isinstance(value, dict) else None


def portability_of(facts: Iterable[Fact], where: str) -> tuple[Question, ...]:
    """The portability questions that data sets keep beside a fact; each follows from it, and from others it names."""
    return tuple(
        question._replace(about=(place(fact), *question.about))
        for fact in facts
        for question in questions_of(fact.provenance.get("portability"), f"{where}: portability of {fact.label}")
    )


def _from_object(path: Path, record: dict, notes: Notes, skip_bad: bool) -> Suite:
    if record.get("format") != FORMAT:
        raise ValueError(
            f'{path}: an object without "format": "{FORMAT}"; expected a suite, or a fact file (an array of records)'
        )
    known = {f.name for f in fields(Suite)} - {"name"}
    unknown = set(record) - known - {"format", "version", "name"}
    if unknown:
        named = brief(", ".join(sorted(unknown)))
        raise ValueError(f"{path}: unknown fields {named}; a suite has {', '.join(sorted(known))}")
    entries = ((f"{path}: facts, entry {i}", entry) for i, entry in enumerate(_list(path, "facts", record)))
    facts = tuple(facts_of(entries, notes, skip_bad))
    asked = (*questions_of(record.get("portability"), f"{path}: portability"), *portability_of(facts, str(path)))
    try:
        return Suite(
            facts=facts,
            portability=asked,
            specificity=tuple(questions_of(record.get("specificity"), "specificity")),
            **{name: _texts(path, name, record) for name in ("text", "context", "doubt")},
            languages=tuple(_translation(entry) for entry in _list(path, "languages", record)),
            name=path.name,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {reason(error)}") from error


def _list(path: Path, name: str, record: dict) -> list:
    value = record.get(name, [])
    if not isinstance(value, list):
        raise ValueError(f"{path}: {name}: expected a list, found {json_kind(value)}")
    return value


def _texts(path: Path, name: str, record: dict) -> tuple[str, ...]:
    value = record.get(name, [])
    texts = [value] if isinstance(value, str) else _list(path, name, record)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path}: {name}: expected texts")
    return tuple(texts)


def _translation(entry: Any) -> Translation:
    if not isinstance(entry, dict):
        raise ValueError(f"languages: expected objects, found {checks.shown(entry)}")
    try:
        return Translation(**entry)
    except TypeError:
        names = ", ".join(f.name for f in fields(Translation))
        raise ValueError(f"languages: {checks.shown(entry)} has not the fields of a translation ({names})") from None


# ---- which fact is which


def merged(edited: Sequence[Fact], suite: Suite) -> tuple[list[Fact], list[Fact]]:
    """(the edited facts with the suite's probes added to their own, the suite's other facts).

    Raises ValueError where the suite expects another new answer than the edit writes.
    """
    facts = {place(fact): fact for fact in edited}
    controls = []
    for fact in suite.facts:
        mine = facts.get(place(fact))
        if mine is None:
            controls.append(fact)
            continue
        if fact.target_new and mine.target_new and folded(fact.target_new) != folded(mine.target_new):
            raise ValueError(
                f"the suite expects {fact.target_new!r} for {fact.label}, and the edit writes {mine.target_new!r}; "
                "is it the suite of another edit?"
            )
        asked: dict[str, Any] = {name: mine.questions(name) + fact.questions(name) for name in ANSWERED}
        facts[place(fact)] = replace(
            mine,
            target_new=mine.target_new or fact.target_new,
            target_true=mine.target_true or fact.target_true,
            paraphrases=mine.paraphrases + fact.paraphrases,
            **asked,
            id=mine.id or fact.id,
            provenance={**fact.provenance, **mine.provenance},
        )
    return list(facts.values()), controls
