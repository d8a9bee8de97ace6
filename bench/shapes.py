"""Widths of the models that ``bench.kernels`` takes its shapes from, and random numbers in them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Widths of a model: residual stream d, down projection's input d_ff, heads and those of keys, vocabulary."""

    name: str
    d: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def smaller(self, by: int) -> "Shape":
        """All widths divided, the sizes of a head and of a group of heads kept; the name says by how much."""
        if by == 1:
            return self
        kv_heads = max(1, self.kv_heads // by)
        heads, group = kv_heads * (self.heads // self.kv_heads), f"{self.name} / {by}"
        return replace(
            self, name=group, d=self.d // by, d_ff=self.d_ff // by, heads=heads, kv_heads=kv_heads,
            vocab=self.vocab // by,
        )  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3-8b", 4096, 14336, 32, 8, 128, 128256),
        Shape("gpt2-xl", 1600, 6400, 25, 25, 64, 50257),
        Shape("llama-3-70b", 8192, 28672, 64, 8, 128, 128256),
        Shape("gpt-j", 4096, 16384, 16, 16, 256, 50400),
    )
}


@dataclass(frozen=True)
class Setup:
    """Where and in what a case is made. rows: of a large call; of an op that is costly in each row a share of them."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    rows: int

    def random(self, *size: int, std: float = 1.0, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return (std * torch.randn(*size, generator=generator, device=self.device)).to(dtype or self.dtype)

    def integers(self, below: int, *size: int, seed: int = 0) -> Tensor:
        return torch.randint(below, size, generator=torch.Generator().manual_seed(seed)).to(self.device)
