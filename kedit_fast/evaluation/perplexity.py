"""Perplexity of a text before and after an edit: how far general language drifted."""

import math
from collections.abc import Iterable

from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.jobs.score import text_logprobs

WINDOW = 256  # tokens; a model with fewer positions takes as many as it has
MAX_TOKENS = 5_120


def text_windows(lm, text: str | Iterable[str], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """The first ``max_tokens`` tokens of a text, or of several, cut into windows of 256; texts share no window.

    Each window's first token is given, the others are predicted. A tokenizer's start token stands before each window,
    not only before the text's first one: models trained with it are lost without it.
    Raises ValueError where no token is left to predict, TypeError for anything but text.
    """
    texts = checks.listed("text", text, str, "a text or a list of texts")
    start = [i for i in lm.encode("")[:1] if i == lm.tokenizer.bos_token_id]
    size = lm.window(WINDOW) - len(start)
    windows, left = [], max_tokens
    for one in texts:
        if left < 2:
            break
        ids = lm.tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"]
        for begin in range(0, len(ids), size):
            window = [*start, *ids[begin : begin + size]][:left]
            if len(window) > 1:
                windows.append(window)
                left -= len(window)
    if not windows:
        raise ValueError(
            f"text of {sum(map(len, texts))} characters with max_tokens={max_tokens} leaves no token to predict; "
            "a text needs two tokens at least, and some thousand to say anything of drift"
        )
    return windows


def perplexity(lm, windows: list[list[int]]) -> tuple[float, float | None]:
    """(base, edited) exp(Σ NLL / predicted tokens) over all windows, in one sweep; edited is None without an edit.

    Raises ValueError where the base model gives NaN; an edited one's perplexity is then NaN.
    """
    base, edited = (_of_windows(side, windows) for side in text_logprobs(lm, windows))
    return base, edited if lm.edits else None


def edited_perplexity(lm, windows: list[list[int]]) -> float:
    """That of the model as its edits have it, without a row of the base model."""
    (edited,) = text_logprobs(lm, windows, alone=True)
    return _of_windows(edited, windows)


def _of_windows(logprobs: Iterable[Tensor], windows: list[list[int]]) -> float:
    return perplexity_of([x.double().sum().item() for x in logprobs], windows)


def n_predicted(windows: list[list[int]]) -> int:
    """Tokens that are predicted: all but the first of each window."""
    return sum(len(window) - 1 for window in windows)


def perplexity_of(logprobs: Iterable[float], windows: list[list[int]]) -> float:
    """exp(Σ NLL / predicted tokens); logprobs: of each window, summed over its tokens, in nats."""
    nll = -math.fsum(logprobs) / n_predicted(windows)
    try:
        return math.exp(nll)
    except OverflowError:  # a wrecked model: above 709 nats a token
        return math.inf
