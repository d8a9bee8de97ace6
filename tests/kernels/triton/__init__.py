"""Triton's kernels against their references: in the interpreter, or on a GPU under TRITON_INTERPRET=0."""

import pytest
import torch

from kedit_fast.basics import settings
from tests.compare import close
from tests.kernels import normal

DEVICE = "cpu" if settings.triton_interprets() else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random(*shape, dtype=torch.float32, seed=0):
    return normal(*shape, seed=seed, dtype=dtype).to(DEVICE)


def skip_where_nothing_runs() -> None:
    """Skips the test, with the reason, where Triton cannot run a kernel."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("TRITON_INTERPRET=0 and there is no GPU")
        return
    from tests.kernels.triton.probe import why_not_interpreted

    if why_not := why_not_interpreted():
        pytest.skip(why_not)


def near(name: str, got: torch.Tensor, truth: torch.Tensor) -> None:
    """As ``close``, and no element of a bf16 result is off by more than one unit in its last place.

    truth: fp64. Why a unit: the interpreter cuts fp32 down to bf16 where a GPU rounds.
    """
    close(name, got, truth, got.dtype)
    if got.dtype == torch.bfloat16:
        unit = torch.finfo(torch.bfloat16).eps * truth.abs().clamp(min=torch.finfo(torch.bfloat16).tiny)
        slack = 1e-5 * truth.abs().max() if truth.numel() else 0.0  # of the fp32 sums, where they cancel
        assert ((got.double() - truth).abs() <= unit + slack).all(), f"{name}: off by more than one unit of bf16"
