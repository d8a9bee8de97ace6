"""A benchmark: what is asked of facts, and what the answers are worth, in one file each (see ``benchmarks/``)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import NamedTuple

from kedit_fast.basics import checks
from kedit_fast.basics.intervals import HIGHEST, SCORE, Metrics
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import brief, counted
from kedit_fast.evaluation.probes import Answer, Probe, as_read, probe
from kedit_fast.evaluation.readings import Judge
from kedit_fast.facts.fact import BUILTIN, OWN_FACTS, Fact, fact_list, load_facts, made_of
from kedit_fast.facts.files import Notes, read_records
from kedit_fast.facts.formats import READ, Question
from kedit_fast.facts.subjects import Names
from kedit_fast.facts.tokens import asked, other_form


class Writing(NamedTuple):
    """How probes are written on: so many tokens, greedily, up to the first of the texts ``until``; and who judges it
    besides (``readings.Judge``)."""

    n_tokens: int = 0
    until: tuple[str, ...] = ()
    judge: Judge | None = None


NOTHING = Writing()


@dataclass(frozen=True)
class Case:
    """What is judged as one, a row of a report: a fact, or several, with further questions on them.

    questions: their ``kind`` says what they are to the benchmark
    writing: how answers are written
    number: of the row; edited: the subjects that are edited together with these facts; owner: the fact whose
    independent edit acts on the probes, 0 where edits are shared

    Raises BadArgument for no facts, and for anything but Facts and Questions.
    """

    facts: tuple[Fact, ...]
    questions: tuple[Question, ...] = ()
    writing: Writing = NOTHING
    number: int = 0
    edited: tuple[Names, ...] = ()
    owner: int = 0

    def __post_init__(self):
        asked = checks.listed("Case.questions", self.questions, Question, "Questions", empty=True)
        object.__setattr__(self, "facts", tuple(fact_list(self.facts, "Case.facts")))
        object.__setattr__(self, "questions", tuple(asked))

    @property
    def label(self) -> str:
        """The case as messages name it."""
        more = f" and {len(self.facts) - 1} more of its case" if len(self.facts) > 1 else ""
        return f"fact {self.facts[0].label}{more}"

    def names_edited(self, text: str) -> bool:
        """Whether a text names a subject that is edited together with this case."""
        return any(names.in_text(text) for names in self.edited)

    def probe(self, lm, fact: Fact, prompt: str, answers: Sequence[str | None] = (), kind: str = "", **how) -> Probe:
        """A probe of this case: a prompt asked in the fact's form (plainly or in a chat). how: as in ``Probe``, and
        attached, where it is another than the fact's"""
        text, attached = asked(lm.tokenizer, prompt, fact.chat), how.pop("attached", fact.attached)
        return probe(lm, text, answers, attached, kind=kind, case=self.number, owner=self.owner, **how)

    def question(self, lm, fact: Fact, question: Question, kind: str | None = None, **how) -> Probe:
        """The probe of a question, as ``probe``, which is also written on as ``writing`` says."""
        n, until, _ = self.writing
        accepted = () if question.answer is None else (question.answer, *question.aliases)
        how = {"n_written": n, "until": until if n else (), "accepted": accepted} | how
        answers = (question.answer, *question.against)
        return self.probe(lm, fact, question.prompt, answers, question.kind if kind is None else kind, **how)

    def in_other_form(self) -> "Case":
        """The case with its facts asked in the other form, see ``tokens.other_form``."""
        return replace(self, facts=tuple(map(other_form, self.facts)))


def case_list(facts, cases_of: Callable[[Sequence[Fact]], Iterable[tuple[Fact, ...]]]) -> list[Case]:
    """Cases as they are given, or facts as ``cases_of`` puts them together. Raises BadArgument for anything else."""
    if isinstance(facts, Case):
        return [facts]
    given = facts if isinstance(facts, Fact) else checks.items("facts", facts, "Facts, or the cases of a benchmark")
    if isinstance(given, list) and given and all(isinstance(one, Case) for one in given):
        return given
    return [Case(tuple(some)) for some in cases_of(fact_list(given))]


def one_by_one(facts: Sequence[Fact]) -> list[tuple[Fact, ...]]:
    """Each fact as a case of its own."""
    return [(fact,) for fact in facts]


def no_sentences(facts, base, edited) -> tuple[list[str], list[str]]:
    """Nothing to say besides the table."""
    return [], []


def said_left_out(facts: Iterable[Fact], n: int) -> list[str]:
    """A sentence that n of the facts' neighborhood prompts were not asked; none for none."""
    of = sum(len(fact.neighborhood) for fact in facts)
    return [f"{n} of {of} neighborhood prompts left out: they name an edited subject"] * bool(n)


@dataclass(frozen=True)
class Benchmark:
    """How facts are asked and judged. ``kf.evaluate(lm, facts, edit, benchmark=...)`` runs it; one that stands in
    ``kf.BENCHMARKS`` goes by its name on the command line.

    metrics: {name: (kind, what it says of a case)}, in the order reports show them; kinds: ``intervals.SHARE``,
        PROBABILITY, DIFFERENCE, and COUNT, which stands in no table: ``sentences`` may say it
    probes(lm, case): what is asked of a case; ``case.probe`` makes one
    columns(case, probes, answers, base): {metric: value} of a case, by one model's answers to its probes; base: those
        of the model without edits, the same list where it is judged itself. A metric that is left out is NaN
    cases(facts): the facts that are judged together, a tuple a case; ValueError for a fact of which nothing is asked
    read(record, index, notes): the case of a record of the benchmark's own files; None: what ``load_facts`` makes of it
    reads: fields of a record that this reads besides those of facts
    n_written, until: how answers are written where a caller does not say it; 0: they are not
    score_of: metrics the harmonic mean of whose means is the score; none: no score
    sentences(facts, base, edited): (what the edit did, what a reader must know), below the table; base and edited
        (None without an edit) are columns {metric: fp32 [n_cases]}
    """

    name: str
    metrics: Metrics
    probes: Callable[[object, Case], list[Probe]]
    columns: Callable[[Case, list[Probe], list[Answer], list[Answer]], Mapping[str, float]]
    cases: Callable[[Sequence[Fact]], Iterable[tuple[Fact, ...]]] = one_by_one
    score_of: tuple[str, ...] = ()
    sentences: Callable[..., tuple[list[str], list[str]]] = no_sentences
    read: Callable[..., Case] | None = None
    reads: frozenset[str] = frozenset()
    n_written: int = 0
    until: tuple[str, ...] = ()

    def __post_init__(self):
        check_metrics(f"benchmark {self.name!r}", self.metrics, self.score_of)

    def load(self, path: checks.AnyPath, n: int | None = None, *, skip_bad: bool = False) -> list[Case]:
        """The first n cases of a file, .json or .jsonl (.gz), as this benchmark reads its records; "builtin": the facts
        of this package.

        skip_bad, warnings, errors: as in ``load_facts``
        """
        n, skip_bad = checks.optional(checks.whole, "n", n, least=1, like=10), checks.flag("skip_bad", skip_bad)
        path = OWN_FACTS if path == BUILTIN else path
        if self.read is None:
            facts = load_facts(path, skip_bad=skip_bad)
            return case_list(self._asked_of(facts, path) if skip_bad else facts, self.cases)[:n]
        notes = Notes(READ | self.reads)
        made = made_of(read_records(path, notes), partial(self.read, notes=notes), notes, skip_bad)
        found = list(islice(made, n))
        for name in self.reads:
            del notes.unused[name]
        notes.tell(path, found)
        return found

    def _asked_of(self, facts: list[Fact], path) -> list[Fact]:
        """Those of which this benchmark asks something, where it does not ask of all; warns of the others. Raises
        ValueError where it asks of none."""
        try:
            case_list(facts, self.cases)
        except ValueError:
            kept, why = [], []
            for fact in facts:
                try:
                    kept += [one for some in self.cases([fact]) for one in some]
                except ValueError as error:
                    why.append(str(error))
            if not kept:
                raise
            warn(f"{path}: passed over, {counted(len(why), 'fact')}: {brief(why[0])}")
            return kept
        return facts

    def values(self, case: Case, probes: list[Probe], answers: list[Answer], base: list[Answer]) -> dict[str, float]:
        """{metric: value} of a case, of every metric."""
        found = self.columns(case, probes, answers, base)
        unknown = set(found) - set(self.metrics)
        if unknown:
            raise ValueError(f"benchmark {self.name!r} gives {sorted(unknown)}, which its metrics do not name")
        return {name: float(found.get(name, math.nan)) for name in self.metrics}

    def check_fit(self, lm, facts: Sequence[Fact]) -> None:
        """Raises ValueError for facts that ask more than the model has positions for, whatever is asked last."""
        cases = case_list(facts, self.cases)
        check_lengths(lm, [(case, self.probes(lm, case)) for case in cases])


def check_lengths(lm, asked: Sequence[tuple[Case, Sequence[Probe]]]) -> None:
    """Raises ValueError for a probe of a case that is longer than the model reads, with what it is written on by and
    what the model's edits put before it."""
    probes = [one for _, some in asked for one in some]
    read = as_read(lm, probes)[1] if lm.prompting else probes  # all at once: a route may sweep for what it says
    for case, one in zip((case for case, some in asked for _ in some), read, strict=True):
        written = f" and {one.n_written} new tokens" if one.n_written else ""
        lm.check_length(one.longest, f"{case.label}{written}")


def check_metrics(whose: str, metrics: Metrics, score_of: Iterable[str]) -> None:
    """Raises ValueError for metrics of no known kind, and for a score of others than these."""
    for name, (kind, says) in metrics.items():
        if not isinstance(name, str) or name == SCORE or kind not in HIGHEST or not isinstance(says, str):
            raise ValueError(
                f"{whose}: metric {name!r} = {(kind, says)!r}; expected (one of {', '.join(HIGHEST)}, text)"
            )
    unknown = [name for name in score_of if name not in metrics]
    if unknown:
        raise ValueError(f"{whose}: a score of {unknown}, which are none of its metrics")
