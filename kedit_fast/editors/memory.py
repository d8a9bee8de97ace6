"""What editors that leave the weights alone share: what they do not read, and what their published files say."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from kedit_fast.basics import checks
from kedit_fast.editors.contexts import BARE
from kedit_fast.facts.fact import BUILTIN, Fact, load_facts
from kedit_fast.facts.subjects import Names
from kedit_fast.facts.tokens import fact_answer, fact_tokens

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
    """Token ids of prompts that ask of something else: the package's own facts, without those of edited subjects."""
    edited = Names(fact.subject for fact in facts)
    asked = (fact.text for fact in load_facts(BUILTIN))
    return [lm.encode(text) for text in asked if not edited.in_text(text)]
