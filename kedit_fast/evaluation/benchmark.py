"""A benchmark: what is asked of facts, and what the answers are worth, in one file each (see counterfact.py)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kedit_fast.basics.intervals import HIGHEST, SCORE, Metrics
from kedit_fast.evaluation.probes import Answer, Probe, as_read, probe
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.subjects import Names
from kedit_fast.facts.tokens import asked, other_form


@dataclass(frozen=True)
class Case:
    """What is judged as one, a row of a report: a fact, or several with the questions that follow from all of them.

    number: of the row; edited: the subjects that are edited together with these facts; owner: the fact whose
    independent edit acts on the probes, 0 where edits are shared
    """

    facts: tuple[Fact, ...]
    number: int = 0
    edited: tuple[Names, ...] = ()
    owner: int = 0

    @property
    def label(self) -> str:
        """The case as messages name it."""
        more = f" and {len(self.facts) - 1} more of its case" if len(self.facts) > 1 else ""
        return f"fact {self.facts[0].label}{more}"

    def names_edited(self, text: str) -> bool:
        """Whether a text names a subject that is edited together with this case."""
        return any(names.in_text(text) for names in self.edited)

    def probe(self, lm, fact: Fact, prompt: str, answers: Sequence[str | None] = (), kind: str = "", **how) -> Probe:
        """A probe of this case: a prompt asked in the fact's form (plainly or in a chat). how: as in ``Probe``"""
        text = asked(lm.tokenizer, prompt, fact.chat)
        return probe(lm, text, answers, fact.attached, kind=kind, case=self.number, owner=self.owner, **how)

    def in_other_form(self) -> "Case":
        """The case with its facts asked in the other form, see ``tokens.other_form``."""
        return replace(self, facts=tuple(map(other_form, self.facts)))


def one_by_one(facts: Sequence[Fact]) -> list[tuple[Fact, ...]]:
    """Each fact as a case of its own."""
    return [(fact,) for fact in facts]


def no_sentences(facts, base, edited) -> tuple[list[str], list[str]]:
    """Nothing to say besides the table."""
    return [], []


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

    def __post_init__(self):
        check_metrics(f"benchmark {self.name!r}", self.metrics, self.score_of)

    def values(self, case: Case, probes: list[Probe], answers: list[Answer], base: list[Answer]) -> dict[str, float]:
        """{metric: value} of a case, of every metric."""
        found = self.columns(case, probes, answers, base)
        unknown = set(found) - set(self.metrics)
        if unknown:
            raise ValueError(f"benchmark {self.name!r} gives {sorted(unknown)}, which its metrics do not name")
        return {name: float(found.get(name, math.nan)) for name in self.metrics}

    def check_fit(self, lm, facts: Sequence[Fact]) -> None:
        """Raises ValueError for facts that ask more than the model has positions for, whatever is asked last."""
        cases = (Case(tuple(some)) for some in self.cases(facts))
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
