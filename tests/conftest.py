"""What the tests share: one thread, tiny models as the package sees them, memory that is not written to."""

import functools
import math
import os
from dataclasses import replace

# Read when a kernel is first imported; there is no GPU to count on, and TRITON_INTERPRET=0 says that there is one.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

import kedit_fast as kf
from kedit_fast.basics import checks
from kedit_fast.model.folder import read_config
from kedit_fast.model.packaged import packaged_folder
from kedit_fast.model.placement import SLOTS, WEIGHTS_SHARE
from kedit_fast.model.shape import shape_of
from kedit_fast.model.smollm2 import SMOLLM2
from kedit_fast.sweep import engine
from tests.compare import TOLERANCE, close, refused, relative_error  # noqa: F401 (for the tests)
from tests.tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)  # tiny products: a second thread costs more than it brings, and rounding stays put


def open_tiny(model, **options) -> kf.LM:
    """A tiny Hugging Face model, opened."""
    return kf.open_model(model, tokenizer=tiny_tokenizer(), **options)


@functools.cache
def tiny_lm(family: str, dtype: torch.dtype = torch.float32, layers: int = 4) -> kf.LM:
    """The opened tiny model of a family. One object for all tests: those that change a model make their own."""
    return open_tiny(tiny_model(family, dtype, layers=layers))


def save_tiny(folder, model, **options):
    """The folder of a tiny model and its tokenizer, as save_pretrained writes it."""
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def disk_and_resident(folder, **options) -> tuple[kf.LM, kf.LM]:
    """A folder opened twice: with its layers on disk, and in memory; both have the same memory to work in."""
    disk, resident = on_disk(folder, **options), kf.open_model(folder, **options)
    return replace(disk, memory=resident.memory), resident


def on_disk(folder, **options) -> kf.LM:
    """A folder's model with so little memory that its layers stay on disk."""
    lm = kf.open_model(folder, memory=least_memory(folder, options.get("dtype")), **options)
    assert lm.source.name == "disk"
    return lm


def least_memory(folder, dtype=None) -> int:
    """Bytes with which a folder's model can be opened; of more than two layers they stay on disk then."""
    shape = shape_of(read_config(folder), dtype and getattr(torch, checks.dtype("dtype", dtype)))
    return math.ceil((shape.around + SLOTS * max(shape.layers)) / WEIGHTS_SHARE) + 1


@pytest.fixture
def threads():
    """Sets torch's threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def no_sweep(monkeypatch):
    """A sweep that begins is an AssertionError: for input that has to be refused before any work."""

    def prepared(*args):
        raise AssertionError("a sweep ran before the input was checked")

    monkeypatch.setattr(engine, "prepared", prepared)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Floating memory that is not written to is NaN, so that reading it shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        out = new_empty(*args, **kwargs)  # Triton's interpreter makes byte tensors of its own
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(scope="session")
def smollm2() -> kf.LM:
    """The real demo model, where it has been fetched before; a test never downloads it."""
    try:
        packaged_folder(SMOLLM2, fetch=False)
    except (ValueError, OSError) as reason:
        pytest.skip(f"SmolLM2 is not at hand: {reason}")
    return kf.open_model("smollm2")
