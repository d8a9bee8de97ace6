"""Edits on top of each other: what may stand where, what is in force, what a new edit must know of those below."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import counted
from kedit_fast.edits.changes import weight_changes
from kedit_fast.edits.deltas import Delta
from kedit_fast.edits.edit import Edit, check_once, digest, edit_list
from kedit_fast.facts.fact import Fact, place


def check_follows(edit: Edit, below: Sequence[Edit]) -> None:
    """Raises ValueError unless ``edit`` was made on top of exactly the edits ``below``, in this order."""
    made_on, found = _made_on(edit), [digest(each) for each in _changing(below)]
    if made_on != found:
        raise ValueError(
            f"this edit was made on top of {_listed(made_on)} and would stand on {_listed(found)}: its values would be "
            "wrong there. Make it on top of those (previous=history.current, kedit-fast edit --on-top-of FOLDER), or "
            "add it all the same with check_chain=False (--force)"
        )


def check_chain(edits: Sequence[Edit]) -> None:
    """Raises ValueError where an edit names the edits it was made on top of and they are not those before it, and where
    one stands there twice.

    Edits that name none may stand anywhere: they were made on the bare model, and their deltas add up. Warns where such
    a one stands on others: P(new) of an edit of SmolLM2 fell from 0.977 to 0.266 beside another.
    """
    check_once(edits)
    edits = _changing(edits)
    apart = [i for i, edit in enumerate(edits, 1) if i > 1 and not _made_on(edit)]
    if apart:
        warn(
            f"edit {', '.join(map(str, apart))} of {len(edits)} was made without those before it, so each may undo a "
            "part of the other: evaluate them together, or make the later one on top (--on-top-of, previous=)",
        )
    digests = [digest(edit) for edit in edits]
    for i, edit in enumerate(edits):
        made_on, before = _made_on(edit), digests[:i]
        if made_on and made_on != before:
            raise ValueError(
                f"edit {i + 1} of {len(edits)} was made on top of {_listed(made_on)}, here stands before it: "
                f"{_listed(before)}; give the whole chain in its order"
            )


def facts_in_force(edits: Sequence[Edit]) -> list[Fact]:
    """The facts of a chain of edits, but for those that a later edit wrote anew."""
    facts: list[Fact] = []
    for edit in edits:
        written = {place(fact) for fact in edit.facts}
        facts = [fact for fact in facts if place(fact) not in written] + list(edit.facts)
    return facts


def with_edits(lm, edits: Edit | Iterable[Edit] | None, name: str):
    """The model with edits on top (an Edit, or several in their order); what they were made on top of must be there.

    name: of the argument that they were given as, for messages
    """
    edits = [] if edits is None else edit_list(edits, name, empty=True)
    if not lm.edits:  # with edits, these may be in another form: as written in some dtype
        check_chain(edits)
    for edit in edits:
        lm = lm.with_edit(edit)
    return lm


def _changing(edits: Sequence[Edit]) -> list[Edit]:
    """Those that change something: one of statistics alone (``UltraEdit.warm_up``) need not be there."""
    return [edit for edit in edits if edit.changes]


def _made_on(edit: Edit) -> list[str]:
    """Digests of the edits that an edit was made on top of."""
    return [below["digest"] for below in edit.provenance.get("on_top_of", [])]


def _listed(digests: Sequence[str]) -> str:
    return f"edit{'s' * (len(digests) > 1)} {', '.join(digests)}" if digests else "no edit"


def under(lm, previous):
    """The model with earlier edits (an Edit, or several in order), for an edit made on top of them.

    Raises ValueError for independent edits, for one that
    puts text before prompts, and for an edit that itself stands on others that are not given before it.
    """
    lm = with_edits(lm, previous, "previous")
    lm.run_owner, lm.acting  # noqa: B018 (they raise for edits that nothing can stand on: now, not in a sweep)
    return lm


def edited_so_far(lm, deltas: dict[int, Delta], facts: Sequence[Fact], owner: Tensor | None):
    """The model with the layers that the edit in making has done; owner: as in ``Written``."""
    if not deltas:
        return lm
    # Not with_edit: it asks whether the edit fits this model and is there already.
    return replace(lm, edits=(*lm.edits, Edit("in making", {}, "", tuple(facts), weight_changes(deltas, owner))))


def warn_of_overwritten(edits: Sequence[Edit], facts: Sequence[Fact]) -> None:
    """Warns of facts that an earlier edit wrote with another target.

    A later edit may correct an earlier one, so this is no error; but nobody should do it unknowingly."""
    written = {place: fact for edit in edits for fact in edit.facts for place in _places(fact) if fact.target_new}
    pairs = []
    for fact in facts:
        earlier = (written[place] for place in _places(fact) if place in written)
        other = next((f for f in earlier if f.target_new.strip() != (fact.target_new or "").strip()), None)
        if other is not None:
            pairs.append(f"{other.label} -> {other.target_new!r} by {fact.label} -> {fact.target_new!r}")
    if pairs:
        shown = "; ".join(pairs[:5]) + ("; ..." if len(pairs) > 5 else "")
        warn(f"{counted(len(pairs), 'fact')} of an earlier edit overwritten: {shown}")


def _places(fact: Fact) -> list[tuple[str, str]]:
    """What two facts share that say something of the same relation of one subject, up to case and spacing."""
    subject, prompt = place(fact)
    relation = fact.provenance.get("relation_id")
    return [(subject, prompt)] + ([(subject, f"relation {relation}")] if relation else [])


def chain(lm) -> dict:
    """{"on_top_of": the edits that a new edit stands on, in order}, for its provenance; empty where there are none.

    The new edit is right only on top of these: their keys and values are those of the edited model.
    """
    below = [
        {"method": e.method, "n_facts": len(e.facts), "layers": list(e.layers), "digest": digest(e)}
        for e in _changing(lm.edits)
    ]
    return {"on_top_of": below} if below else {}
