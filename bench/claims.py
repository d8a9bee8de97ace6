"""What papers say of editors beside each other, held against the rows of ``bench editors``.

Published figures are of models of 1.5 to 8 billion parameters and of other numbers of facts, so a claim here is which
of two is larger, and by how much: a difference that is published, and the same difference on the rows that are at hand.
"""

from collections.abc import Sequence
from typing import NamedTuple

from bench.common import Figure


class Claim(NamedTuple):
    """That ``metric`` of the row ``better`` is larger than that of ``worse``. published: both, in the metric's unit"""

    metric: str
    better: str
    worse: str
    published: tuple[float, float]
    source: str


CLAIMS = (
    Claim("PS", "ROME, n = 1", "FT, n = 1", (96.4, 87.9), "GPT-2 XL, one fact, ROME table 4"),
    Claim("PS", "ROME, n = 1", "FT-L, n = 1", (96.4, 48.7), "GPT-2 XL, one fact, ROME table 4"),
    Claim("NS", "ROME, n = 1", "FT, n = 1", (75.4, 40.4), "GPT-2 XL, one fact, ROME table 4"),
    Claim("NS", "FT-L, n = 1", "FT, n = 1", (70.3, 40.4), "GPT-2 XL, one fact, ROME table 4"),
    Claim("PS", "IKE, n = 1", "ROME, n = 1", (95.2, 99.1), "GPT-J, one fact, IKE table 2; ROME table 4"),
    Claim("ES", "PMET, n = 100", "MEMIT, n = 100", (99.5, 98.9), "GPT-J, 10,000 facts, PMET table 1"),
    Claim("PS", "PMET, n = 100", "MEMIT, n = 100", (92.8, 88.6), "GPT-J, 10,000 facts, PMET table 1"),
    Claim("NS", "PMET, n = 100", "MEMIT, n = 100", (71.4, 73.7), "GPT-J, 10,000 facts, PMET table 1"),
    Claim("PS", "AlphaEdit, n = 100", "MEMIT, n = 100", (96.4, 95.5), "GPT-J, 2,000 facts in hundreds, AlphaEdit"),
    Claim("NS", "AlphaEdit, n = 100", "MEMIT, n = 100", (75.5, 63.6), "GPT-J, 2,000 facts in hundreds, AlphaEdit"),
    Claim("PS", "MEMIT-BLUE, n = 100", "MEMIT, n = 100", (96.9, 95.5), "GPT-J, 2,000 facts in hundreds, BLUE"),
    Claim("NS", "MEMIT-BLUE, n = 100", "MEMIT, n = 100", (74.6, 63.6), "GPT-J, 2,000 facts in hundreds, BLUE"),
    Claim("NS", "AlphaEdit-BLUE, n = 100", "AlphaEdit, n = 100", (75.2, 75.5), "GPT-J, 2,000 facts in hundreds, BLUE"),
    Claim("PS", "MEMIT, n = 100", "RECT, n = 100", (95.3, 94.3), "Llama-3-8B, 2,000 facts in batches, with history"),
    Claim("NS", "RECT, n = 100", "MEMIT, n = 100", (81.6, 80.0), "Llama-3-8B, 2,000 facts in batches, with history"),
    Claim("ES", "ROME, n = 1", "KN, n = 1", (100.0, 28.7), "GPT-2 XL, one fact, ROME table 4"),
    Claim("NS", "ROME, n = 1", "KN, n = 1", (75.4, 72.9), "GPT-2 XL, one fact, ROME table 4"),
    Claim("PS", "MEND, n = 1", "ROME, n = 1", (97.0, 96.4), "GPT-2 XL, one fact, trained on CounterFact, ROME table 4"),
    Claim("NS", "ROME, n = 1", "MEND, n = 1", (75.4, 5.5), "GPT-2 XL, one fact, trained on CounterFact, ROME table 4"),
    Claim("NS", "KE, n = 1", "MEND, n = 1", (6.9, 5.5), "GPT-2 XL, one fact, trained on CounterFact, ROME table 4"),
    Claim("NS", "ROME, n = 1", "IKE, n = 1", (78.9, 77.0), "GPT-J, one fact, IKE table 2; ROME table 4"),
    Claim("ES", "FT-M, n = 1", "FT-L, n = 1", (100.0, 45.2), "Llama-2-7B, one fact, success in KnowEdit"),
    Claim("ES", "ROME, n = 1", "ICE, n = 1", (98.6, 69.8), "Llama-2-7B, one fact, success in KnowEdit"),
    Claim("NS", "ROME, n = 1", "ICE, n = 1", (52.0, 32.4), "Llama-2-7B, one fact, locality in KnowEdit"),
    Claim("PS", "SERAC, n = 1", "ROME, n = 1", (99.1, 87.0), "Llama-2-7B, one zsRE fact, rephrased, EasyEdit"),
    Claim("NS", "SERAC, n = 1", "IKE, n = 1", (100.0, 69.2), "Llama-2-7B, one zsRE fact, locality, EasyEdit"),
    Claim("PS", "WISE, n = 100", "GRACE, n = 100", (72.0, 8.0), "Llama-2-7B, 1,000 rephrased zsRE facts, WISE table 2"),
    Claim("NS", "GRACE, n = 100", "WISE, n = 100", (100.0, 100.0), "Llama-2-7B, 1,000 zsRE facts, WISE table 2"),
    Claim("PS", "UltraEdit, n = 100", "WISE, n = 100", (87.4, 40.3), "Llama-3-8B, 20,000 zsRE facts, UltraEdit"),
)


def held_against(figures: Sequence[Figure]) -> list[list[str]]:
    """Cells of a table, header first: the claims both of whose rows are among the figures; [] where there is none."""
    found = {(figure.case, figure.metric): figure.value for figure in figures}
    lines = []
    for claim in CLAIMS:
        both = [found.get((row, claim.metric)) for row in (claim.better, claim.worse)]
        if None in both:
            continue
        here, there = both[0] - both[1], claim.published[0] - claim.published[1]
        says = f"{claim.metric} of {claim.better} less that of {claim.worse}"
        lines.append([says, f"{there:+.1f} ({claim.source})", f"{here:+.1f}"])
    return [["published beside here", "published", "here"], ["---"] * 3, *lines] if lines else []
