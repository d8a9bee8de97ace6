"""BLUE: the boundary layers alone are updated (Li et al. 2025, arXiv:2502.03748).

MEMIT asks each layer for a share of what is missing at the last one, and the shares do not add up to it. Here only the
first and the last edit layer are written. Each has values of its own, optimized at its own output with the layers below
already edited, and takes the whole of what is missing there.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from kedit_fast.editors.alphaedit import AlphaEdit
from kedit_fast.editors.memit import Memit
from kedit_fast.editors.spread import Spread
from kedit_fast.model.lm import LM, takes_lm

_Kind = TypeVar("_Kind", bound=Spread)


def boundary(editor: _Kind) -> _Kind:
    """The same for the first and the last of its layers."""
    layers = tuple(dict.fromkeys((editor.layers[0], editor.layers[-1])))
    return replace(editor, layers=layers, source=f"{editor.source}; boundary layers")


def _is_on(value: Any) -> dict:
    """Of a published file's switch. Raises ValueError where it is off."""
    if value is not True:
        raise ValueError("expected true; without it the file is of the method that BLUE is built on")
    return {}


@dataclass(frozen=True)
class MemitBlue(Memit):
    """``Memit`` with values of its own for each of ``layers``, which are the first and the last (published)."""

    METHOD: ClassVar = "memit-blue"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"MEMIT_BLUE": {}}
    IN_FILES: ClassVar = {"blue": _is_on}

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
    IN_FILES: ClassVar = {"blue": _is_on}

    def top(self, layer: int) -> int:
        """The layer itself."""
        return layer

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "AlphaEditBlue":
        """AlphaEdit's settings, for the first and the last of its layers; L2 as published, where it is."""
        made = boundary(cls(**vars(AlphaEdit.for_model(lm))))
        l2 = next(
            (l2 for name, l2 in PUBLISHED_L2.items() if made.source.startswith(f"published for {name};")), made.L2
        )
        return replace(made, L2=l2)


PUBLISHED_L2 = {"gpt2-xl": 80.0, "gpt-j-6B": 95.0}
