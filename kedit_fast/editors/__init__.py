"""Editors: one paper, one file. An editor is a frozen dataclass whose fields are its hyper-parameters."""

from kedit_fast.basics import catalog
from kedit_fast.editors.alphaedit import AlphaEdit
from kedit_fast.editors.editor import Editor
from kedit_fast.editors.finetune import Ft, FtL
from kedit_fast.editors.memit import Memit
from kedit_fast.editors.rome import Rome

EDITORS: dict[str, type[Editor]] = catalog.loaded(catalog.EDITORS)

__all__ = ["EDITORS", "AlphaEdit", "Ft", "FtL", "Memit", "Rome"]
