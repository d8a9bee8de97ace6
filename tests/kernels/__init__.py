"""What the kernel tests share: one tolerance for each dtype."""

import torch

# Relative RMS error. fp64 is for algebra that has two exact ways to the same matrix.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def close(name: str, got: torch.Tensor, ref: torch.Tensor, dtype: torch.dtype) -> None:
    """Asserts that ``got`` equals ``ref`` within the relative RMS error that ``dtype`` allows."""
    assert got.shape == ref.shape, f"{name}: shape {list(got.shape)}, expected {list(ref.shape)}"
    got, ref = got.detach().double(), ref.detach().double()
    assert torch.isfinite(got).all(), f"{name}: not finite"
    size = ref.square().mean().sqrt().item() if ref.numel() else 0.0
    error = (got - ref).square().mean().sqrt().item() if ref.numel() else 0.0
    assert error <= TOLERANCE[dtype] * size, f"{name}: relative RMS error {error / max(size, 1e-300):.2e}"
