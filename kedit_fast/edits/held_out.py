"""What tests an edit must not be what it was trained on."""

from collections.abc import Iterable, Iterator, Sequence

from kedit_fast.edits.compose import PARTS
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.subjects import folded


def check_held_out(edits: Sequence[Edit], facts: Iterable[tuple[Fact, int]]) -> None:
    """Raises ValueError for a paraphrase of a fact that an edit was trained on, as a phrasing of one of its facts; and
    for another prompt on the subject that an edit was trained to keep. Texts count as one where they differ in case,
    quotes and spacing alone.

    facts: each with the number of its fact in independent edits, of which it is asked under its own alone
    """
    shared = {text for edit in edits if not edit.independent for fact in edit.facts for text in trained(edit, fact)}
    for fact, owner in facts:
        seen = {text for edit in edits if edit.independent for text in trained(edit, edit.facts[owner])} | shared
        if not seen:
            continue
        asked = [("paraphrase", prompt) for prompt in fact.paraphrases]
        asked += [("same_subject prompt", question.prompt) for question in fact.questions("same_subject")]
        for kind, prompt in asked:
            if folded(prompt) in seen:
                raise ValueError(
                    f"{kind} {prompt!r} of fact {fact.label} is one that the edit was trained on (a phrasing of its "
                    "facts, or what its editor keeps), so it tests nothing; leave it out, or train without it"
                )


def trained(edit: Edit, fact: Fact) -> Iterator[str]:
    """Prompts, besides the fact's own, that an edit was trained on for one of its facts; folded."""
    for one in fact.phrased():
        yield folded(one.text)
    for settings in (edit.hparams, *(part["hparams"] for part in edit.provenance.get(PARTS, ()))):
        if settings.get("keep_factor") and fact.subject is not None:
            yield from (folded(keep.replace("{}", fact.subject)) for keep in settings.get("keeps", ()))
