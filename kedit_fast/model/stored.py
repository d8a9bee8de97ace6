"""A checkpoint folder's tensors, by the model's parameter names."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kedit_fast.basics.files import file_in
from kedit_fast.basics.words import counted

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a safetensors checkpoint folder, by the model's parameter names."""

    def __init__(self, folder: Path, prefix: str = "", stored_as: tuple[tuple[str, str], ...] = ()):
        self.folder, self._prefix, self._stored_as = Path(folder), prefix, stored_as
        self._file_of = self._index()
        self._open: dict[str, safe_open] = {}

    def _index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.exists():
            return _read_index(index)
        single = self.folder / "model.safetensors"
        if not single.exists():
            raise FileNotFoundError(
                f"{self.folder} has neither model.safetensors nor its index; reading layers from disk needs a "
                "safetensors checkpoint (save_pretrained writes one)"
            )
        with open_tensors(single) as f:
            return dict.fromkeys(f.keys(), single.name)

    def has(self, name: str) -> bool:
        """Whether a parameter is in the checkpoint."""
        return self._stored(name) is not None

    def _stored(self, name: str) -> str | None:
        short = name.removeprefix(self._prefix + ".")  # base models are saved without the head's prefix
        others = [there + name.removeprefix(here) for here, there in self._stored_as if name.startswith(here)]
        return next((n for n in (name, short, *others) if n in self._file_of), None)

    def tensor(self, name: str) -> Tensor:
        """One tensor, a view of the file in the checkpoint's own dtype. Raises ValueError where it is missing."""
        stored, file = self._found(name)
        return file.get_tensor(stored)

    def rows(self, name: str, index: tuple) -> Tensor:
        """``tensor(name)[index]``, read alone."""
        stored, file = self._found(name)
        return file.get_slice(stored)[index]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        stored, file = self._found(name)
        return tuple(file.get_slice(stored).get_shape())

    def _found(self, name: str) -> tuple[str, safe_open]:
        stored = self._stored(name)
        if stored is None:
            raise ValueError(f"{self.folder} has no tensor {name!r}; is it a checkpoint of this model?")
        file = self._file_of[stored]
        if file not in self._open:
            self._open[file] = open_tensors(self.folder / file)
        return stored, self._open[file]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensor files."""
        return sum((self.folder / f).stat().st_size for f in set(self._file_of.values()))


def _read_index(index: Path) -> dict[str, str]:
    """{tensor: file}, each the plain name of a file beside the index."""
    try:
        found = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        for file in dict.fromkeys(found.values()):
            file_in(index.parent, file, index)
        return found
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is damaged ({error}); fetch the checkpoint again") from error


def check_index(folder: Path) -> None:
    """Raises ValueError where the index of a checkpoint folder names files outside it, before anything reads them."""
    index = folder / INDEX
    if index.is_file():
        _read_index(index)


def open_tensors(path: Path) -> safe_open:
    """An open safetensors file. Raises ValueError, naming it, for one that is cut short or something else."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut short or no safetensors file ({error}); fetch or save the checkpoint again"
        ) from error


def check_complete(folder, missing, mismatched) -> None:
    """Raises ValueError for parameters that a checkpoint lacks, or has in another shape.

    missing: their names, in the model's order; mismatched: (name, shape in the checkpoint, the model's shape)
    """
    if missing:
        raise ValueError(f"{folder} lacks {counted(len(missing), 'tensor')} of this model, {missing[0]!r} first")
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise ValueError(
            f"{folder}: tensor {name!r} is {list(stored)}, its config.json says {list(wanted)}; "
            "the checkpoint's files do not belong together"
        )
