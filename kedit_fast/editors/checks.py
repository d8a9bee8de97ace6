"""What editors refuse: facts that cannot be written, texts that are too long, values that are not finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kedit_fast.facts.fact import Fact, check_facts
from kedit_fast.facts.tokens import fact_answer, fact_tokens
from kedit_fast.jobs.finite import not_finite


def checked_facts(facts, independent: bool = False, need_subject: bool = True) -> list[Fact]:
    """Facts an editor can write: targets and subjects present, no contradictions unless each is an edit of its own. One
    Fact is a list of one."""
    return check_facts(facts, need_new=True, need_subject=need_subject, together=not independent)


def check_lengths(lm, facts: Sequence[Fact], groups: list[list[str]]) -> None:
    """Raises ValueError where a fact in one of its contexts, with its new target behind it, is too long for the model
    or has characters that the tokenizer drops. Tokenizes all of them."""
    for fact in facts:
        target = fact_answer(lm.tokenizer, fact)
        for template in (t for group in groups for t in group):
            whose = f"fact {fact.label} in context {template!r}"
            try:
                tokens = fact_tokens(lm.tokenizer, fact, template).ids
            except ValueError as error:
                raise ValueError(f"{whose}: {error}") from error
            lm.check_length(len(tokens) + len(target) - 1, whose)  # the target's last token is predicted, not read


def check_finite(lm, rows: Tensor, facts: Sequence[Fact], what: str) -> None:
    """Raises ValueError, naming the fact, where a fact's row of rows [n, width] holds NaN or infinity."""
    bad = (~torch.isfinite(rows)).any(1).nonzero()[:, 0].tolist()
    if bad:
        raise not_finite(
            lm,
            f"the {what} of fact {facts[bad[0]].label} holds NaN or infinity ({len(bad)} of {len(facts)} facts)",
            "v_lr or clamp_norm_factor that is too high (lower them)",
        )
