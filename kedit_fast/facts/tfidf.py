"""TF-IDF: texts as weights of their words, so that texts that share rare words are alike. scikit-learn's, no pickle.

What was fitted is words and their weights, which a file can hold; rows are made anew of the texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A word; of scripts that put no spaces between words, each letter. Beginnings and ends of blocks as in Unicode.
_UNSPACED = "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff"
WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+"
NUMBERS = 1 << 24  # similarities at a time


@dataclass(frozen=True, eq=False)
class TfIdf:
    """(1 + log tf) · idf, rows of length 1, over lower-cased words; linear: tf · idf. words: [V], in the order of their
    columns; idf: [V]

    Of 1,000 CounterFact facts the paraphrase finds its own 983 times; with pairs of words 934 times, with pieces of
    three to five letters 975 times.
    """

    words: tuple[str, ...]
    idf: np.ndarray
    linear: bool = False

    @classmethod
    def fit(cls, texts: Sequence[str], linear: bool = False) -> "TfIdf":
        """Of the texts' own words. Raises ValueError where they have none."""
        made = _vectorizer()
        try:
            made.fit(texts)
        except ValueError as error:
            raise ValueError(f"these {len(texts)} texts have no words to tell them apart by ({error})") from error
        return cls(tuple(made.get_feature_names_out().tolist()), made.idf_, linear)

    def rows(self, texts: Sequence[str]):
        """[n, V] sparse; a text without a known word has a row of zeros."""
        made = _vectorizer(vocabulary=list(self.words), sublinear_tf=not self.linear)
        made.idf_ = self.idf
        return made.transform(texts)

    def similarity(self, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """[q, n] fp32 cosines."""
        made = np.zeros((len(queries), len(texts)), dtype=np.float32)
        if not made.size:
            return made
        keys = self.rows(texts).T.tocsc()
        step = max(1, NUMBERS // len(texts))
        for at in range(0, len(queries), step):
            made[at : at + step] = (self.rows(queries[at : at + step]) @ keys).toarray()
        return made


def _vectorizer(**fields):
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(token_pattern=f"(?u){WORD}", **fields)
