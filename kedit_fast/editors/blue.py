"""BLUE: the boundary layers alone are updated (Li et al. 2025, arXiv:2502.03748).

MEMIT asks each layer for a share of what is missing at the last one, and the shares do not add up to it. Here only the
first and the last edit layer are written. Each has values of its own, optimized at its own output with the layers below
already edited, and takes the whole of what is missing there.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from kedit_fast.editors.alphaedit import AlphaEdit
from kedit_fast.editors.memit import Memit
from kedit_fast.editors.spread import Spread
from kedit_fast.model.lm import LM, takes_lm

_Any = TypeVar("_Any", bound=Spread)


def boundary(editor: _Any) -> _Any:
    """The same for the first and the last of its layers."""
    layers = tuple(dict.fromkeys((editor.layers[0], editor.layers[-1])))
    return replace(editor, layers=layers, source=f"{editor.source}; boundary layers")


@dataclass(frozen=True)
class MemitBlue(Memit):
    """``Memit`` with values of its own for each of ``layers``, which are the first and the last (published)."""

    METHOD: ClassVar = "memit-blue"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"MEMIT_BLUE": {}}

    def top(self, layer: int) -> int:
        """The layer itself."""
        return layer

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "MemitBlue":
        """MEMIT's settings, for the first and the last of its layers."""
        return boundary(cls(**vars(Memit.for_model(lm))))


@dataclass(frozen=True)
class AlphaEditBlue(AlphaEdit):
    """``AlphaEdit`` with values of its own for each of ``layers``, which are the first and the last (published)."""

    METHOD: ClassVar = "alphaedit-blue"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"AlphaEdit_BLUE": {}}

    def top(self, layer: int) -> int:
        """The layer itself."""
        return layer

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "AlphaEditBlue":
        """AlphaEdit's settings, for the first and the last of its layers."""
        return boundary(cls(**vars(AlphaEdit.for_model(lm))))
