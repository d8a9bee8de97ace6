"""Facts that a model is to forget, and those that it is to keep, as editors read them.

An editor writes ``target_new``. A refusal in its place is an answer like any other (``forgetting(facts, say=...)``);
a fact with target_true alone is one whose answer is to be gone, whatever comes in its place: ``kf.Unlearn`` takes it.
"""

from collections.abc import Iterable
from dataclasses import replace

from kedit_fast.basics import checks
from kedit_fast.facts.fact import Fact, fact_list
from kedit_fast.facts.subjects import folded

REFUSAL = "I don't know"


def forgetting(facts: Fact | Iterable[Fact], say: str | None = None) -> list[Fact]:
    """The facts as ones to be forgotten: target_true, or where there is none target_new, is what is to be gone.

    say: what is to be said in its place, the same for all, for instance "I don't know" or "." (the sentence ends, an
        empty answer): any editor writes that. None: nothing is, for ``kf.Unlearn``
    Raises ValueError for a fact without an answer.
    """
    say = None if say is None else checks.text("say", say, like=REFUSAL)
    return [replace(fact, target_true=_known(fact), target_new=say) for fact in fact_list(facts)]


def keeping(facts: Fact | Iterable[Fact]) -> list[Fact]:
    """The facts as ones that ``kf.Unlearn`` is to leave as they are: target_true, where there is one, or target_new is
    what is to be said. Raises ValueError for a fact without an answer."""
    return [replace(fact, target_new=_known(fact), target_true=None) for fact in fact_list(facts)]


def judged_by(fact: Fact) -> str:
    """The answer that tells whether an edit has written the fact: target_new, or of a fact that is to be forgotten
    target_true, which is then not to be said. Raises ValueError for a fact with neither."""
    if fact.target_new is None and fact.target_true is None:
        raise ValueError(f"fact {fact.label} has neither target_new nor target_true: nothing to write or to forget")
    return fact.target_new if fact.target_new is not None else str(fact.target_true)


def is_forgotten(fact: Fact) -> bool:
    """Whether the fact has an old answer that is not to be said any more."""
    return fact.target_true is not None and folded(fact.target_true) != folded(fact.target_new or "")


def _known(fact: Fact) -> str:
    if fact.target_true is None and fact.target_new is None:
        raise ValueError(f"fact {fact.label} has neither target_true nor target_new: no answer to forget or to keep")
    return str(fact.target_true if fact.target_true is not None else fact.target_new)
