"""Editors: one paper, one file. An editor is a frozen dataclass whose fields are its hyper-parameters."""

from .alphaedit import AlphaEdit
from .memit import Memit
from .rome import Rome

EDITORS = {"rome": Rome, "memit": Memit, "alphaedit": AlphaEdit}

__all__ = ["EDITORS", "AlphaEdit", "Memit", "Rome"]
