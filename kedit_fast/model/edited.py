"""What a model has of the edits that its view carries: whose parts act on which prompts, and how they act."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from kedit_fast.facts.tokens import set_before

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kedit_fast.edits.edit import Edit
    from kedit_fast.edits.routes import Prompt

_V = TypeVar("_V", bound="CarriesEdits")


class CarriesEdits:
    """The edits of a view, see ``LM``."""

    edits: "tuple[Edit, ...]"
    prompted: bool
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def independent(self) -> bool:
        """Whether the view carries independent edits, each of which acts for its own fact alone."""
        return any(edit.independent for edit in self.edits)

    @property
    def routed(self) -> "Edit | None":
        """The routed edit that the view carries, if it carries one: it acts on a prompt where its route says so."""
        return next((edit for edit in self.edits if edit.route is not None), None)

    @property
    def owned(self) -> bool:
        """Whether parts of the edits act on some runs alone: of independent edits, or of a routed one."""
        return self.independent or self.routed is not None

    @property
    def by_owner(self) -> bool:
        """Whether rows depend on whose edit acts on them: some change of a layer has owners. Where texts alone have,
        equal beginnings are the same rows, whoever's they are."""
        return any(c.owners is not None and c.layer is not None for edit in self.edits for c in edit.changes)

    @property
    def run_owner(self) -> int:
        """The owner of runs that these edits act on: 0, or -1 without edits (``Runs.owner``).

        Raises ValueError for independent edits, which belong to one fact each, and for a routed one, which decides at
        each prompt (``owners``).
        """
        if self.independent:
            raise ValueError(
                "the model carries independent edits, each for its own fact; take one, lm.with_edit(edit.only(i)) "
                "(kedit-fast edit only EDIT N), or evaluate the facts, each under its own (kedit-fast eval)"
            )
        if self.routed is not None:
            raise ValueError(
                f"the model carries a routed edit ({self.routed.method}), which decides at each prompt whether it "
                "acts, and this asks no prompt; ask it (generate, evaluate, gate), or leave that edit out"
            )
        return 0 if self.edits else -1

    def owners(self, prompts: "Sequence[Prompt]") -> Tensor:
        """[n] int64: whose parts act on what is read behind each prompt (``Runs.owner``), said by a routed edit's route
        where there is one; prompts: as text, or token ids. Raises ValueError for independent edits."""
        edit = self.routed
        if edit is None or edit.route is None:
            return torch.full((len(prompts),), self.run_owner)
        below = replace(self, edits=tuple(other for other in self.edits if other is not edit))
        return edit.route.bound(edit.changes).owners(below, prompts)

    @property
    def acting(self) -> list:
        """The jobs by which the edits that this view carries act in a sweep.

        Raises ValueError where one of them puts text before prompts, and nobody has (``as_read``).
        """
        jobs = [change.job() for edit in self.edits for change in edit.changes]
        if None in jobs and not self.prompted:
            raise ValueError(
                "the model carries an edit that puts text before prompts, and this reads token sequences as they "
                "stand; ask it (generate, evaluate, gate), or leave that edit out"
            )
        return [job for job in jobs if job is not None]

    @property
    def prompting(self) -> list:
        """The changes that put text before prompts."""
        return [change for edit in self.edits for change in edit.changes if change.layer is None]

    def before(self, prompt: str, owner: int = 0) -> str:
        """The text that the edits put before a prompt; owner: as in ``Runs``."""
        return "".join(change.before(prompt, owner) for change in self.prompting)

    def as_read(self: _V, prompts: Sequence[str], owners: Sequence[int] | None = None) -> tuple[_V, list[str], Tensor]:
        """(the view to ask, the prompts as it reads them: with the text before each that the edits put there, whose
        parts act on what is read behind each: ``owners``, if not given)."""
        of_each = self.owners(prompts) if owners is None else torch.as_tensor(owners, dtype=torch.int64)
        if not self.prompting:
            return self, list(prompts), of_each
        each = zip(prompts, of_each.tolist(), strict=True)
        texts = [p if i < 0 else set_before(self.tokenizer, p, self.before(p, i)) for p, i in each]
        return replace(self, prompted=True), texts, of_each
