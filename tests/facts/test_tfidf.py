"""TF-IDF against its formula, and as numbers and words that a file can hold."""

import math
import re

import numpy as np
import pytest

import kedit_fast.facts.tfidf as tfidf
from kedit_fast.facts.tfidf import WORD, TfIdf

TEXTS = ["The Eiffel Tower is in the city of Paris", "Big Ben is in London", "the Louvre is in the city of Paris"]
ASKED = ["Where is the eiffel tower?", "London", "nothing known", "BIG BEN, big ben"]


def by_hand(texts, asked):
    """Cosines of (1 + log tf) (1 + log((1 + n) / (1 + df))), [q, n]."""
    held = [words.lower().split() for words in texts]
    idf = {w: 1 + math.log((1 + len(held)) / (1 + sum(w in words for words in held))) for text in held for w in text}

    def row(words):
        return {w: (1 + math.log(words.count(w))) * idf[w] for w in set(words) if w in idf}

    def cosine(a, b):
        lengths = [math.sqrt(sum(x * x for x in each.values())) for each in (a, b)]
        return sum(a[w] * b[w] for w in a if w in b) / (lengths[0] * lengths[1]) if all(lengths) else 0.0

    return [[cosine(row(re.sub(r"[?,]", "", q).lower().split()), row(words)) for words in held] for q in asked]


def test_similarity_is_the_formulas(monkeypatch):
    made, expected = TfIdf.fit(TEXTS), by_hand(TEXTS, ASKED)
    for numbers in (tfidf.NUMBERS, 1):  # all at once, and query by query
        monkeypatch.setattr(tfidf, "NUMBERS", numbers)
        np.testing.assert_allclose(made.similarity(ASKED, TEXTS), expected, rtol=1e-5, atol=1e-7)
    again = TfIdf(made.words, np.array(made.idf.tolist()))  # as a file has it
    assert (again.similarity(ASKED, TEXTS) == made.similarity(ASKED, TEXTS)).all()
    assert made.similarity(ASKED, []).shape == (4, 0) and made.similarity([], TEXTS).shape == (0, 3)


def test_letters_of_scripts_without_spaces_are_words():
    assert re.findall(WORD, "首都はパリ, c'est 2 Straße") == ["首", "都", "は", "パ", "リ", "c", "est", "2", "Straße"]
    assert TfIdf.fit(["東京は日本", "パリ"]).similarity(["日本の首都"], ["東京は日本", "パリ"]).argmax() == 0


def test_texts_without_words_are_refused():
    with pytest.raises(ValueError, match="these 2 texts have no words to tell them apart by"):
        TfIdf.fit(["?", "..."])
