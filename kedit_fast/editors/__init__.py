"""Editors: one paper, one file. An editor is a frozen dataclass whose fields are its hyper-parameters."""

from .alphaedit import AlphaEdit
from .finetune import Ft, FtL
from .memit import Memit
from .rome import Rome

EDITORS = {"rome": Rome, "memit": Memit, "alphaedit": AlphaEdit, "ft": Ft, "ft-l": FtL}

__all__ = ["EDITORS", "AlphaEdit", "Ft", "FtL", "Memit", "Rome"]
