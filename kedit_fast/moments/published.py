"""Statistics that the rome and memit repositories published: .npz files; pickles are refused."""

from pathlib import Path

import torch
from torch import Tensor

from kedit_fast.basics.files import existing_file, reading
from kedit_fast.basics.packed import read_arrays


def read_published(path: Path, layer: int | None) -> tuple[Tensor, int]:
    """(C [d_ff, d_ff] fp32, the number of tokens) of an .npz file. Raises ValueError for any other, and without a
    layer, which the file does not say."""
    if layer is None:
        raise ValueError(f"{path} does not say which layer it is of; give layer=")
    what = "is damaged or not a statistics file of rome or memit"
    with reading(existing_file(path, "a statistics file"), "fetch it again, or measure (kedit-fast stats)", what):
        total, count = read_arrays(path, ("mom2.mom2", "mom2.count")).values()
        count = int(count)
        if total.ndim != 2 or total.shape[0] != total.shape[1] or count < 1:
            raise ValueError(f"expected a square sum over at least one token, got {list(total.shape)} over {count}")
        return torch.from_numpy(total / count).float(), count


def refuse_pickled(path) -> None:
    """Raises ValueError for a file of torch's pickle format, and says why it is not needed."""
    try:
        with open(path, "rb") as file:
            begin = file.read(9)
    except OSError:  # whoever reads it says so
        return
    is_safetensors = begin[8:] == b"{"  # behind the length of its header, which may begin as a pickle does
    if begin[:4] == b"PK\x03\x04" or (begin[:1] == b"\x80" and not is_safetensors):
        raise ValueError(
            f"{path} is a pickle of torch, which runs code when it is read, so it is not. A projection published for "
            "AlphaEdit (null_space_project.pt) is not needed: its null space is computed here from the second moments, "
            "which kedit_fast.second_moments (kedit-fast stats) measures, or rome's and memit's .npz files hold"
        )
