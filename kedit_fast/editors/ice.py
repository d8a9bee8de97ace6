"""ICE: the new fact before the prompt, as something to imagine (Cohen et al. 2023, Evaluating the Ripple Effects of
Knowledge Editing in Language Models, arXiv:2307.12976): the baseline that needs nothing at all.

    Imagine that {prompt} {target_new}.
    {what is asked}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kedit_fast.editors.in_context import Retrieved, check_template, filled
from kedit_fast.facts.fact import Fact
from kedit_fast.model.lm import LM


@dataclass(frozen=True)
class Ice(Retrieved):
    """In-context editing: the fact that a prompt is about, as a sentence before it.

    Hyper-parameters; those of ``Retrieved`` besides. template: the text, with {} for the fact as a statement.

    Raises ValueError for a template without or with several "{}".
    """

    template: str = "Imagine that {}.\n"

    METHOD: ClassVar = "ice"
    ALG_NAMES: ClassVar = {"ICE": {}}

    def __post_init__(self):
        super().__post_init__()
        check_template(self.template)

    def texts(self, lm: LM, facts: Sequence[Fact]) -> list[str]:
        """[n] the template, filled in."""
        return filled(self.template, facts)
