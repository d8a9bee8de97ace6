"""A fact in several wordings: what a model reads in each, and the answer behind it."""

from collections.abc import Sequence

from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import fact_answer, fact_tokens


def wordings(
    tokenizer, fact: Fact, others: Sequence[Fact] = (), answer: str | None = None
) -> tuple[list[list[int]], list[list[int]] | None, str, str]:
    """(prompts, answers, label, relation) of a fact, and of others that are other wordings of it.

    prompts: token ids of each; answers: those of ``answer`` as it continues each, by default of target_true, None where
    the fact has none; relation: the same for facts of one relation_id, or else of one prompt
    """
    answer = answer or fact.target_true
    every = (fact, *others)
    prompts = [list(fact_tokens(tokenizer, one).ids) for one in every]
    answers = None if answer is None else [fact_answer(tokenizer, one, answer) for one in every]
    return prompts, answers, fact.label, str(fact.provenance.get("relation_id") or fact.prompt)
