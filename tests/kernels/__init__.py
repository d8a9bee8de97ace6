"""What the kernel tests share: random matrices."""

import torch


def normal(*shape, seed=0, dtype=torch.float64):
    """The same numbers in every dtype, rounded."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_moment(d, seed=0):
    """A well conditioned second moment with unequal variances."""
    samples = normal(4 * d + 8, d, seed=seed) * torch.linspace(0.3, 2, d, dtype=torch.float64)
    return samples.T @ samples / len(samples)
