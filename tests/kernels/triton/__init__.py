"""Triton's kernels against their references: in the interpreter, or on a GPU under TRITON_INTERPRET=0."""

import torch

from kedit_fast import settings
from tests.kernels import close

DEVICE = "cpu" if settings.triton_interprets() else "cuda"


def near(name: str, got: torch.Tensor, truth: torch.Tensor) -> None:
    """As ``close``, and no element of a bf16 result is off by more than one unit in its last place.

    truth: fp64. Why a unit: the interpreter cuts fp32 down to bf16 where a GPU rounds.
    """
    close(name, got, truth, got.dtype)
    if got.dtype == torch.bfloat16:
        unit = torch.finfo(torch.bfloat16).eps * truth.abs().clamp(min=torch.finfo(torch.bfloat16).tiny)
        slack = 1e-5 * truth.abs().max() if truth.numel() else 0.0  # of the fp32 sums, where they cancel
        assert ((got.double() - truth).abs() <= unit + slack).all(), f"{name}: off by more than one unit of bf16"
