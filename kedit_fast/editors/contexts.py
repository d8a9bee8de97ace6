"""Contexts: short texts put before a prompt, over which keys and values are averaged."""

from collections.abc import Sequence

from kedit_fast.basics import checks
from kedit_fast.jobs.generate import generate
from kedit_fast.model.lm import LM

Lengths = Sequence[Sequence[int]]  # (tokens, samples of that many) each
AnyContexts = Sequence[Sequence[str]] | Sequence[str]  # groups of templates; templates alone are one group
BARE = "{}"
TOP_K = 5  # published: the samples are drawn among the five likeliest tokens
MEMIT_STARTS = ("The", "Therefore", "Because", "I", "You")


def rome_contexts(lm: LM, length_params: Lengths = ((5, 10), (10, 10)), *, seed: int = 0) -> list[list[str]]:
    """One group: the bare prompt and, for each (length, n), n samples of that many tokens from the start token.

    Flat, so each of the 21 templates weighs 1/21 (published).
    """
    start = lm.tokenizer.bos_token_id
    start = lm.tokenizer.eos_token_id if start is None else start
    if start is None:
        raise ValueError("this tokenizer has no start or end token to sample contexts from; give contexts=")
    made = [BARE]
    for i, (length, n) in enumerate(length_params):
        made += _templates(lm, [[start]] * n, length - 1, seed + i)
    return [made]


def memit_contexts(lm: LM, length_params: Lengths = ((10, 5),), *, seed: int = 0) -> list[list[str]]:
    """Two groups: the bare prompt, and n samples of ``length`` tokens begun with "The", "Therefore", ... .

    Keys are averaged within a group and then over groups: the bare prompt weighs 1/2, each sample 1/10 (published).
    """
    samples = []
    for i, (length, n) in enumerate(length_params):
        prompts = [lm.encode(MEMIT_STARTS[j % len(MEMIT_STARTS)]) for j in range(n)]
        samples += _templates(lm, prompts, length - min(map(len, prompts)), seed + i)
    return [[BARE], samples] if samples else [[BARE]]


def _templates(lm, prompts, n_new: int, seed: int) -> list[str]:
    made = generate(
        lm, prompts, max(1, n_new), temperature=1.0, top_k=TOP_K, repetition_penalty=1, seed=seed,
        label="sampling contexts",
    )  # fmt: skip
    texts = [lm.tokenizer.decode(p + m, skip_special_tokens=True) for p, m in zip(prompts, made, strict=True)]
    return [_clean(text) + ". {}" for text in texts]


def _clean(text: str) -> str:
    """One line without braces, which would be read as the place of the prompt."""
    return " ".join(text.replace("{", " ").replace("}", " ").split())


def checked_contexts(contexts) -> list[list[str]]:
    """Groups of templates, each with one "{}", the bare prompt first. A flat list of templates is one group."""
    wanted = 'groups of templates, none empty, e.g. [["{}"], ["So. {}"]]'
    contexts = [contexts] if isinstance(contexts, str) else checks.items("contexts", contexts, wanted)
    groups = [contexts] if contexts and all(isinstance(t, str) for t in contexts) else contexts
    groups = [checks.listed("contexts", group, str, wanted, alone=False) for group in groups]
    if not groups:
        checks.refuse("contexts", groups, wanted)
    templates = [t for group in groups for t in group]
    if templates[0] != BARE:
        raise ValueError(
            f'contexts: the first template must be the bare prompt "{{}}", got {templates[0]!r}; '
            'e.g. [["{}"], ["So. {}"]]'
        )
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"context {template!r}: expected text with one {{}} for the prompt")
    return groups
