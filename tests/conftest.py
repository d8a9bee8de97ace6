"""What the tests share: one tolerance for each dtype, one thread, tiny models as the package sees them."""

import functools
import os

# Read when a kernel is first imported; there is no GPU to count on, and TRITON_INTERPRET=0 says that there is one.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

import kedit_fast as kf
from kedit_fast.model.smollm2 import smollm2_folder
from tests.tiny import tiny_model, tiny_tokenizer

# Relative RMS error, set here once. float64 serves where two exact ways to one number meet.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

torch.set_num_threads(1)  # tiny products: a second thread costs more than it brings, and rounding stays put


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS of the difference over the RMS of what is wanted; infinite where a value is not finite."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error, size = (x.square().mean().sqrt().item() if x.numel() else 0.0 for x in (got - want, want))
    return float("inf") if error != error else error / max(size, 1e-300)


def close(name: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Asserts that two tensors agree within the tolerance of ``dtype`` (default: that of ``got``)."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    tolerance = TOLERANCE[dtype or got.dtype]
    error = relative_error(got, want)
    assert error <= tolerance, f"{name}: relative RMS error {error:.2e}, allowed {tolerance:.0e}"


def open_tiny(model, **options) -> kf.LM:
    """A tiny Hugging Face model, opened."""
    return kf.open_model(model, tokenizer=tiny_tokenizer(), **options)


@functools.cache
def tiny_lm(family: str, dtype: torch.dtype = torch.float32, layers: int = 4) -> kf.LM:
    """The opened tiny model of a family. One object for all tests: those that change a model make their own."""
    return open_tiny(tiny_model(family, dtype, layers=layers))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """The real model's products are large enough for every core: its tests take 0.6 of the time on two."""
    of_tests = torch.get_num_threads()
    if item.get_closest_marker("smollm2"):
        torch.set_num_threads(os.cpu_count())
    try:
        return (yield)
    finally:
        torch.set_num_threads(of_tests)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that is not written to is NaN, so that reading it shows."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))


@pytest.fixture(scope="session")
def smollm2() -> kf.LM:
    """The real demo model, where it has been fetched before; a test never downloads it."""
    try:
        smollm2_folder(fetch=False)
    except (ValueError, OSError) as reason:
        pytest.skip(f"SmolLM2 is not at hand: {reason}")
    return kf.open_model("smollm2")
