"""Triton may be absent, and a kernel runs only where it is asked for."""

import pytest
import torch

from tests.kernels.triton import DEVICE


@pytest.fixture(autouse=True)
def triton():
    """Triton itself; tests are skipped where it cannot run kernels."""
    module = pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 and there is no GPU")
    return module


@pytest.fixture
def on_triton(monkeypatch):
    """The public ops run on Triton, where they have a kernel."""
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "triton")


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Floating memory that no program writes to is NaN (the interpreter makes byte tensors of its own)."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        out = new_empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
