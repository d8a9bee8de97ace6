"""Triton may be absent, and a kernel runs only where it is asked for."""

import pytest

from tests.kernels.triton import DEVICE, skip_where_nothing_runs


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def triton(request):
    """Triton itself; tests are skipped where it cannot run kernels, unless they only compile."""
    module = pytest.importorskip("triton", reason="Triton is not installed")
    if request.path.stem != "test_compile":
        skip_where_nothing_runs()
    return module


@pytest.fixture
def on_triton(monkeypatch):
    """The public ops run on Triton, where they have a kernel."""
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "triton")
