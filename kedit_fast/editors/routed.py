"""A route around any editor: each fact's edit acts on prompts that ask for the fact, and on no others.

What an edit costs grows with the facts that share the weights, and the same subject's other relations pay most. Here
each fact keeps the edit that it would have alone (``independent=True``), and a route says at each prompt which one
acts, if any:

    y = W x + Δ_i x        behind a prompt that the route gives to fact i
    y = W x                behind every other: the base run itself

So text and neighbors that name no subject are as they were, whatever the number of facts. It is a memory: served, and
not merged.
"""

from collections.abc import Sequence
from dataclasses import replace

from kedit_fast.basics import checks
from kedit_fast.basics.catalog import ROUTES
from kedit_fast.basics.parts import Held
from kedit_fast.editors.in_context import NAMES, InContext, by_name
from kedit_fast.editors.serac import Serac
from kedit_fast.editors.written import with_written
from kedit_fast.edits.chain import check_follows, under
from kedit_fast.edits.edit import Edit
from kedit_fast.edits.routes import Route
from kedit_fast.facts.fact import Fact, check_facts, place
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.sweep.kept import fitting

SCOPE = "scope"  # of ``ROUTES`` the one that is learned


@takes_lm
def routed(lm: LM, edit: Edit, route: str | InContext) -> Edit:
    """Independent edits behind a route: of each prompt it says whose edit acts, or that none does.

    edit: of any editor, made with ``independent=True``, or of one fact; lm: the model that it was made on
    route: "names": all prompts that name the subject, between ends of words and whatever the case ("US" is named by
        "told us"), of several facts of one subject the most alike; "scope": those of them that also ask for what the
        fact, or one of its phrasings, says, by ``Serac``'s classifier; or an editor with such a route and its settings,
        ``kf.Serac(examples="mine.json")``

    On SmolLM2-135M, 100 CounterFact facts (``python -m bench phrasings``): text and neighbors stay to the bit, where
    plain MEMIT raises perplexity by 2.3 % and takes NS from 87.9 to 81.6. "names" finds every paraphrase, and takes
    every other relation of the subject for the fact: by MEMIT 60 % of those answers stay (69 % without a route).
    "scope", which the package's own facts train, leaves half of the paraphrases to the base model and keeps 84 %: give
    it examples of the relations that are edited. Best are edits of a network that is trained for it
    (``kf.train_editor(..., routed=True)``): by "names" P(new) on paraphrases is 0.54 (MEMIT's 0.14), 81 % stay, and the
    same for 500 facts; they take 0.5 MB each, and 17 ms a token of a core.

    Raises ValueError for facts that were solved together, that contradict each other or name no subject, for an edit
    that is routed already, and for examples that nothing can be learned from. Warns of facts that are not written.
    """
    edit = checks.instance("edit", edit, Edit, "an Edit, made with independent=True")
    _check(lm, edit)
    found = fitting(lm, Held(), lambda lm: route_to(lm, edit.facts, route))
    return fitting(lm, Held(), lambda lm: behind(lm, edit, *found))


def route_to(lm: LM, facts: Sequence[Fact], route: str | InContext) -> tuple[Route, dict]:
    """(the route to these facts, an entry each, what is to be noted of it); route, errors: as in ``routed``."""
    if not isinstance(route, InContext):
        checks.choice("route", route, ROUTES)
    facts = _told_apart(facts)
    if route == NAMES:
        return by_name(lm, facts, "tfidf"), {"route": {"method": NAMES}}
    how = route if isinstance(route, InContext) else Serac.for_model(lm)
    how.check(lm)
    found, about = how.routed(lm, facts)
    return found, {"route": {"method": how.method} | how.record | about.pop("route", {})} | about


def behind(lm: LM, edit: Edit, route: Route, about: dict) -> Edit:
    """Independent edits behind a route that ``route_to`` found; asked for their facts once more, through it."""
    changes = tuple(change.owned() for change in edit.changes)
    kept = {name: said for name, said in edit.provenance.items() if name != "growth"}  # an edit of one fact has it
    made = replace(edit, changes=changes, route=route, provenance=kept | about)
    return with_written(lm, made)


def _check(lm: LM, edit: Edit) -> None:
    """Raises ValueError for what is not to be put behind a route."""
    if edit.route is not None:
        raise ValueError(
            f"this edit is routed already ({edit.route.kind}); make it again with independent=True (--independent)"
        )
    if not edit.independent and len(edit.facts) > 1:
        raise ValueError(
            f"these {len(edit.facts)} facts were solved together, and a route takes one fact's part: make the edit "
            "with independent=True (--independent)"
        )
    check_follows(edit, under(lm, None).edits)
    edit.acting_on(lm)
    for change in edit.changes:
        change.owned()


def _told_apart(facts: Sequence[Fact]) -> list[Fact]:
    """The facts as one model may have them. Raises ValueError where two of them contradict each other or are the same:
    no prompt tells which one is meant."""
    for fact in facts:
        if fact.subject is None:
            raise ValueError(f"fact {fact.label} names no subject, by which a route tells prompts apart; give it one")
    found = check_facts(facts)
    if extra := len(facts) - len({place(fact) for fact in found}):
        raise ValueError(
            f"{extra} of {len(facts)} facts ask what another one does (a chat's question and a statement are one to a "
            "route); make the edit without them"
        )
    return found
