"""A suite to complete: an edit's facts with the probes they carry, and places for those that are missing."""

from kedit_fast.edits.chain import facts_in_force
from kedit_fast.edits.edit import edit_list
from kedit_fast.facts.fact import ANSWERED, Fact, folded
from kedit_fast.gating.questions import wordings_of
from kedit_fast.gating.suite import FORMAT
from kedit_fast.gating.thresholds import Thresholds


def draft_suite(edit) -> dict:
    """A suite of the facts that an edit writes, as ``load_suite`` reads it once it is JSON; lists stand empty where
    nothing is known yet.

    edit: an Edit, or several in their order; of these, what is in force after the last
    """
    return {
        "format": FORMAT,
        "facts": [_record(fact) for fact in _facts(edit)],
        "portability": [],
        "specificity": [],
        "languages": [],
    }


def _facts(edit) -> list[Fact]:
    return [fact for fact in facts_in_force(edit_list(edit, "edit")) if fact.target_new]


def _record(fact: Fact) -> dict:
    record = fact.to_record()
    provenance = record.pop("provenance")
    record["portability"] = provenance.pop("portability", [])
    return record | ({"provenance": provenance} if provenance else {})


def missing(edit, thresholds: Thresholds) -> list[str]:
    """What must be added to the probes that an edit's facts carry, before these limits can be met: sentences."""
    facts = _facts(edit)
    wordings = [prompt for fact in facts for _, prompt in wordings_of(fact)]
    prompts = {folded(question.prompt) for fact in facts for name in ANSWERED for question in fact.questions(name)}
    return thresholds.missing(len(facts), len(wordings), len(wordings) - len(facts), len(prompts))
