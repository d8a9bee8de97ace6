"""When two tensors are the same: one tolerance for each dtype; and when a call is refused as it should be."""

import pytest
import torch

# Relative RMS error, set here once. float64 serves where two exact ways to one number meet.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


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


def refused(says: str, call, *args, error: type[Exception] = ValueError, **options) -> str:
    """Asserts that a call is refused in these words; -> all that it says."""
    with pytest.raises(error, match=says) as raised:
        call(*args, **options)
    return str(raised.value)
