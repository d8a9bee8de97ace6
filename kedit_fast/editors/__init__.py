"""Editors: one paper, one file. An editor is a frozen dataclass whose fields are its hyper-parameters."""

from .memit import Memit
from .rome import Rome

EDITORS = {"rome": Rome, "memit": Memit}

__all__ = ["EDITORS", "Memit", "Rome"]
