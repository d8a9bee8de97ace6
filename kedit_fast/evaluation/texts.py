"""Finding answers in what a model writes, and how varied it is."""

import math
import re
import string
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from kedit_fast.facts.subjects import folded

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


def normalized(text: str) -> str:
    """A text as SQuAD compares answers (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single spaces.
    Of a text that is nothing else ("The The"), lower case and single spaces alone."""
    bare = " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())
    return bare or " ".join(text.lower().split())


def matches(text: str, accepted: Iterable[str]) -> bool:
    """Whether a text equals one of these answers, both normalized; a blank one is equal to none."""
    said = normalized(text)
    return bool(said) and any(said == normalized(answer) for answer in accepted)


def contains(text: str, accepted: Iterable[str]) -> bool:
    """Whether one of these answers stands in a text as whole words, both normalized."""
    said = normalized(text)
    return any(says(said, normalized(answer)) for answer in accepted)


def says(text: str, answer: str) -> bool:
    """Whether a text holds an answer as a whole word or words, whatever the case; a blank one is held by none."""
    return bool(answer.strip()) and re.search(_pattern(answer), text, re.IGNORECASE) is not None


def leaks(text: str, old: str, new: str | None) -> bool:
    """Whether a text says the old answer; not where it stands inside the new one ("York" in "New York")."""
    if not (old.strip() and new and new.strip()):
        return says(text, old)
    if folded(old) == folded(new):
        return False
    # At one place the longer of the two is what the text says.
    either = sorted((old, new), key=len, reverse=True)
    found = re.finditer("|".join(_pattern(answer) for answer in either), text, re.IGNORECASE)
    return any(folded(match[0]) == folded(old) for match in found)


def _pattern(answer: str) -> str:
    """A pattern for an answer with any white space between its words, bound to word ends where its script has them."""
    answer = answer.strip()
    words = r"\s+".join(map(re.escape, answer.split()))
    return _bound(answer[0], r"(?<![^\W_])") + words + _bound(answer[-1], r"(?![^\W_])")


def _bound(char: str, pattern: str) -> str:
    # Letters without case (Chinese, Thai, ...) are written without spaces between words.
    return pattern if char.isdigit() or char.lower() != char.upper() else ""


# ---- how varied


def ngram_entropy(text: str) -> float:
    """((2/3) H_2 + (4/3) H_3) / 2 in bits, H_n = -Σ f log2 f over the frequencies f of a text's n-grams of words and
    marks; 0 of a text that repeats one word, or says next to nothing.

    Meng et al. 2022, section 3.3 (fluency, reported x 100). Differs: words are split where letters end ("don't" is
    three), not by a tokenizer for English.
    """
    words = WORD_OR_MARK.findall(text)
    pairs = list(pairwise(words))
    return (2 / 3 * _entropy(pairs) + 4 / 3 * _entropy(list(zip(pairs, words[2:], strict=False)))) / 2


def _entropy(things: list) -> float:
    counts = Counter(things).values()
    return sum(n / len(things) * math.log2(len(things) / n) for n in counts)
