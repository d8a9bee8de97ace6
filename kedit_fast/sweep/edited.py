"""Sequences on a model that carries edits: on which runs an edit acts, and from which layer on these own their rows."""

import torch
from torch import Tensor

from kedit_fast.sweep.runs import RunList, add_sequences


def add_edited(lm, runs: RunList, sequences: list[list[int]], owners=None) -> tuple[Tensor, Tensor]:
    """Adds each sequence as a base run and, where ``lm`` carries edits, as an edited run that branches from it.

    Gives the run numbers (base [n], edited [n]). The edited run begins as its base run at the first edited layer, so
    everything below is shared; without an edit both are the same run. Equal prefixes are one row.

    owners: [n] the fact whose independent edit acts on each sequence; shared edits act on all.
    Raises ValueError for independent edits without owners.
    """
    base = add_sequences(runs, sequences, owner=-1)
    first = first_edited(lm, owners)
    if first is None:
        return base, base
    owners = torch.zeros(len(sequences), dtype=torch.int64) if owners is None else torch.as_tensor(owners)
    edited = torch.empty_like(base)
    for owner in owners.unique().tolist():
        mine = (owners == owner).nonzero()[:, 0]
        edited[mine] = add_sequences(
            runs, [sequences[i] for i in mine.tolist()], branch_layer=first, owner=owner, source=base[mine]
        )
    return base, edited


def add_under(lm, runs: RunList, sequences: list[list[int]], owners=None) -> Tensor:
    """Adds each sequence as a run [n] on the model as its edits have it; ``owners`` as in ``add_edited``."""
    if lm.independent:
        return add_edited(lm, runs, sequences, owners)[1]
    return add_sequences(runs, sequences, owner=lm.run_owner)


def first_edited(lm, owners=None) -> int | None:
    """The lowest layer that the model's edits change; None where none does."""
    if owners is None and lm.run_owner < 0:
        return None
    return min((change.layer for edit in lm.edits for change in edit.changes), default=None)
