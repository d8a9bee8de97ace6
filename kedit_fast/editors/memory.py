"""What editors that leave the weights alone share: what they do not read, and what their published files say."""

import re
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from kedit_fast.basics import checks
from kedit_fast.editors.contexts import BARE
from kedit_fast.facts.fact import BUILTIN, Fact, load_facts
from kedit_fast.facts.subjects import Names, folded
from kedit_fast.facts.tokens import asked, fact_answer, fact_tokens

MEMORY_UNREAD = dict.fromkeys(
    ("moments", "corpus"), "a memory stands beside the weights and needs no statistics of their inputs; leave it out"
) | {
    "independent": "each prompt is answered by one fact's entry as it is; edit.only(i) takes one",
    "contexts": "keys are those of the prompts as they are asked; leave it out",
}  # fmt: skip


def layers_of(value: Any) -> dict:
    """The layers of a published file's ``inner_params``, paths of down projections. Raises ValueError for others."""
    paths = [value] if isinstance(value, str) else value
    found = [re.search(r"(?:\[|\.)(\d+)\]?\.mlp\.(?:down_proj|c_proj|fc_out|dense_4h_to_h)\b", str(p)) for p in paths]
    if not all(found):
        raise ValueError("a memory stands here beside a down projection; expected its path alone")
    return {"layers": tuple(int(match[1]) for match in found if match)}


def only(*values: Any) -> Callable[[Any], dict]:
    """Of a name whose other values are not done here: sets nothing. Raises ValueError for another value."""

    def check(value: Any) -> dict:
        if value not in values:
            raise ValueError(f"not done here; expected {values[0]!r}")
        return {}

    return check


def one_layer(editor) -> None:
    """Raises ValueError for several layers."""
    if len(editor.layers) > 1:
        checks.refuse("layers", editor.layers, "one layer: a memory stands beside one projection")


def prompts_of(lm, fact: Fact, templates: Sequence[str] = (BARE,)) -> list[tuple[list[int], list[int]]]:
    """(prompt, target) token ids of a fact in its contexts, the bare one first, and of its phrasings."""
    target = fact_answer(lm.tokenizer, fact)
    own = [(list(fact_tokens(lm.tokenizer, fact, template).ids), target) for template in templates]
    phrased = fact.phrased()
    return own + [(list(fact_tokens(lm.tokenizer, one).ids), fact_answer(lm.tokenizer, one)) for one in phrased]


def irrelevant(lm, facts: Sequence[Fact]) -> list[list[int]]:
    """Token ids of prompts that ask of something else: the package's own facts, without those of edited subjects, asked
    as the facts are: in a chat, whose template would else be what tells them apart; in several ways by turns.

    Raises ValueError where there are none."""
    edited, own = Names(fact.subject for fact in facts), {folded(fact.text) for fact in facts}
    texts = [fact.text for fact in load_facts(BUILTIN)]
    texts = [text for text in texts if folded(text) not in own and not edited.in_text(text)]
    if not texts:
        raise ValueError(
            "each of the package's own facts names a subject that is edited, so none is left for what a memory has to "
            "leave alone; edit fewer of them"
        )
    forms = cycle(dict.fromkeys(fact.chat for fact in facts))
    return [lm.encode(asked(lm.tokenizer, text, form)) for text, form in zip(texts, forms, strict=False)]
