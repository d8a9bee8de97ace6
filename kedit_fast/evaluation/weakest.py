"""The cases of a report one by one, the weakest first: what an edit did to which prompt."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kedit_fast.basics.words import counted
from kedit_fast.facts.fact import Fact
from kedit_fast.pictures.page import Table

N_SHOWN = 50  # cases on a page; all of them are in the report's file and records
P = "p_new"  # shown beside what the score is of, where a benchmark has it


def weakest(
    cases: Sequence[Sequence[Fact]], base: dict[str, Tensor], edited: dict[str, Tensor] | None, score_of: Sequence[str]
) -> list:
    """A table of the cases by the mean of what the score is of, the lowest first (in their order without an edit), and
    how many more there are. Nothing where no score is defined.

    cases: the facts of each; base, edited: {metric: [n_cases]}
    """
    names = [name for name in (P, *score_of) if name in base and not base[name].isnan().all()]
    judged = [name for name in names if name != P]
    if not judged or not cases:
        return []
    order = list(range(len(cases)))
    if edited is not None:
        worth = torch.stack([edited[name] for name in judged]).nanmean(0).nan_to_num(math.inf)
        order = torch.argsort(worth, stable=True).tolist()
    sides = [side for side in (base, edited) if side is not None]
    rows = [
        (_asked(cases[i]), _answers(cases[i]), *(before_after(float(side[n][i]) for side in sides) for n in names))
        for i in order[:N_SHOWN]
    ]
    table = Table(("prompt", "answer", *names), rows, "" if edited is None else "before -> after")
    if len(order) <= N_SHOWN:
        return [table]
    return [table, f"{counted(len(order) - N_SHOWN, 'case')} more: to_records() and the saved report hold all of them."]


def _asked(facts: Sequence[Fact]) -> str:
    return facts[0].text + (f" (and {len(facts) - 1} more)" if len(facts) > 1 else "")


def _answers(facts: Sequence[Fact]) -> str:
    return ", ".join((fact.target_new or f"not {fact.target_true}").strip() for fact in facts)


def before_after(values: Iterable[float]) -> str:
    """ "0.12 -> 0.98"; a dash for NaN."""
    return " -> ".join(f"{value:.2f}" for value in values).replace("nan", "–")
