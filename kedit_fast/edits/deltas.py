"""Updates of a down projection's weight, and what remains of them once written in the model's dtype."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kedit_fast.basics.state import wide
from kedit_fast.kernels.lowrank import lowrank_add

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TINY = torch.finfo(torch.float32).tiny
_BLOCK = 2**24  # elements summed at a time: 128 MiB of fp64, so a 70B layer's weight is never widened whole


@dataclass(frozen=True, eq=False)
class LowRank:
    """Δ = u vᵀ, an update [d, d_ff] of a down projection's weight [out, in].

    u: [d, r], v: [d_ff, r], floating, of one dtype on one device. Raises ValueError otherwise.
    """

    u: Tensor
    v: Tensor

    def __post_init__(self):
        u, v = self.u, self.v
        if not (u.ndim == v.ndim == 2 and u.shape[1] == v.shape[1]):
            raise ValueError(f"expected u [d, r] and v [d_ff, r], got {list(u.shape)} and {list(v.shape)}")
        if u.dtype not in FLOATS or u.dtype != v.dtype or u.device != v.device:
            raise ValueError(
                f"u and v need one floating dtype and device; got {u.dtype} on {u.device}, {v.dtype} on {v.device}"
            )

    @property
    def rank(self) -> int:
        """The number of factors r; the matrix rank is at most this."""
        return self.u.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[0], self.v.shape[0]

    @property
    def nbytes(self) -> int:
        return self.u.nbytes + self.v.nbytes

    def dense(self) -> Tensor:
        """Δ [d, d_ff], fp32 (fp64 from fp64 factors)."""
        return self.u.to(wide(self.u.dtype)) @ self.v.to(wide(self.v.dtype)).T

    def part(self, outputs: slice) -> Tensor:
        """Δ[outputs], fp64: what this slice of the outputs gets."""
        return self.u[outputs].double() @ self.v.double().T

    def norm(self) -> float:
        """‖Δ‖ (Frobenius) = sqrt(Σ (uᵀu) ∘ (vᵀv)): two [r, r] Grams in fp64, Δ itself is never formed."""
        u, v = (_widen(factor) for factor in (self.u, self.v))
        return float(((u.T @ u) * (v.T @ v)).sum().clamp(min=0).sqrt())

    def add_to(self, y: Tensor, x: Tensor, row_owner=None, factor_owner=None) -> Tensor:
        """y + x Δᵀ for rows y [rows, d], x [rows, d_ff]; owners as in ``lowrank_add``. A new tensor in y's dtype."""
        return lowrank_add(y, x, self.u, self.v, row_owner, factor_owner)

    def to(self, device=None, dtype=None) -> "LowRank":
        return LowRank(self.u.to(device=device, dtype=dtype), self.v.to(device=device, dtype=dtype))

    def __repr__(self):
        return f"LowRank({self.shape[0]} x {self.shape[1]}, rank {self.rank}, {self.u.dtype})"


@dataclass(frozen=True, eq=False)
class Dense:
    """Δ itself: delta [d, d_ff], floating. Raises ValueError otherwise."""

    delta: Tensor

    def __post_init__(self):
        if self.delta.ndim != 2 or self.delta.dtype not in FLOATS:
            raise ValueError(f"expected a floating delta [d, d_ff], got {list(self.delta.shape)} {self.delta.dtype}")

    @property
    def rank(self) -> int:
        """min(d, d_ff): what the matrix rank can be, not what it is."""
        return min(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.delta.shape)

    @property
    def nbytes(self) -> int:
        return self.delta.nbytes

    def dense(self) -> Tensor:
        """Δ [d, d_ff], fp32 (fp64 from an fp64 delta)."""
        return self.delta.to(wide(self.delta.dtype))

    def part(self, outputs: slice) -> Tensor:
        """Δ[outputs], fp64: what this slice of the outputs gets."""
        return self.delta[outputs].double()

    def norm(self) -> float:
        """‖Δ‖ (Frobenius), accumulated in fp64."""
        return float(torch.linalg.vector_norm(self.delta.to(_fp64_device(self.delta.device)), dtype=torch.float64))

    def add_to(self, y: Tensor, x: Tensor, row_owner=None, factor_owner=None) -> Tensor:
        """y + x Δᵀ for rows y [rows, d], x [rows, d_ff], which no owner can divide. A new tensor in y's dtype."""
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        return (y.to(wide) + x.to(wide) @ self.delta.to(wide).T).to(y.dtype)

    def to(self, device=None, dtype=None) -> "Dense":
        return Dense(self.delta.to(device=device, dtype=dtype))

    def __repr__(self):
        return f"Dense({self.shape[0]} x {self.shape[1]}, {self.delta.dtype})"


Delta = LowRank | Dense
# How much faster a GPU multiplies bf16 than fp32, which no tensor core takes as it is: 798 TFLOP/s measured on an H100,
# 67 in its data sheet.
BF16_OVER_FP32 = 12


class Halves:
    """A dense Δ for the rows of a bf16 model on a GPU: two bf16 matrices, whose sum is each element to 2⁻¹⁸ of it.

    In fp32 the product would take twelve times as long as the matrix that the edit stands beside; so it takes twice as
    long, and is added in fp32 and rounded once, as that of ``Dense`` is: to 2⁻⁹ of the result. (A product that cuBLAS
    splits along d_ff it may add in bf16, as it may the model's own: torch allows it unless told otherwise.)
    """

    def __init__(self, delta: Tensor):
        high = delta.bfloat16()
        self.both = torch.cat([high, (delta - high.to(delta.dtype)).bfloat16()], 1)  # [d, 2 d_ff]

    def add_to(self, y: Tensor, x: Tensor, row_owner=None, factor_owner=None) -> Tensor:
        """y + x Δᵀ for rows y [rows, d], x [rows, d_ff], which no owner can divide. A new tensor in y's dtype."""
        return torch.addmm(y, torch.cat([x, x], 1), self.both.T)


def for_products(delta: Delta, owned: bool, device: torch.device, dtype: torch.dtype) -> "Delta | Halves":
    """Δ on a device, as it multiplies rows of this dtype the fastest there; owned: whether facts own its factors."""
    d, d_ff = delta.shape
    low_rank = isinstance(delta, LowRank) and delta.rank * (d + d_ff) * BF16_OVER_FP32 <= 2 * d * d_ff
    delta = delta.to(device=device)
    if owned or low_rank or device.type == "cpu" or dtype != torch.bfloat16:
        return delta
    return Halves(delta.dense())


def as_smallest(delta: LowRank) -> Delta:
    """The smaller of u, v and their product: low rank up to r = d·d_ff/(d + d_ff) (3,277 for GPT-J), dense above."""
    d, d_ff = delta.shape
    return delta if delta.rank * (d + d_ff) <= d * d_ff else Dense(delta.dense())


def check_fits(delta: Delta, shape, where: str, whose: str = "this model's") -> None:
    """Raises ValueError for a delta of another shape than the weight's, [out, in]."""
    if delta.shape != tuple(shape):
        raise ValueError(
            f"{where}: the edit changes a weight of {list(delta.shape)}, {whose} is {list(shape)} ([out, in]); it was "
            "made for another model"
        )


@torch.no_grad()
def edited_weight(weight: Tensor, delta: Delta) -> Tensor:
    """W + Δ [d, d_ff]: summed in fp64 and rounded to the weight's dtype. A new tensor on the weight's device.

    weight: [d, d_ff] floating, [out, in], not changed
    """
    if tuple(weight.shape) != delta.shape:
        raise ValueError(f"a delta of {list(delta.shape)} does not fit a weight of {list(weight.shape)} ([out, in])")
    device = _fp64_device(weight.device)
    delta = delta.to(device=device)
    edited = torch.empty_like(weight)
    height = max(1, _BLOCK // max(1, weight.shape[1]))
    for begin in range(0, len(weight), height):
        block = slice(begin, begin + height)
        edited[block] = weight[block].to(device, torch.float64) + delta.part(block)
    return edited


@torch.no_grad()
def weight_under(weight: Tensor, edits, place: tuple[int, str]) -> Tensor:
    """W + Σ Δ [out, in] at a place (layer, role) of edits, in the dtype and on the device of W; W itself stays."""
    for edit in edits:
        if (delta := edit.weights.get(place)) is not None:
            weight = weight + delta.dense().to(weight)
    return weight


def written_delta(weight: Tensor, delta: Delta, dtype: torch.dtype) -> Dense:
    """The difference that ``apply`` really makes on a model held in ``dtype``: round(W + Δ) - W, fp32.

    weight: [d, d_ff], taken as ``dtype`` holds it, so that the difference is the edit's alone. A change under half a
    step of its weight is lost, a larger one goes to the nearest step.
    """
    if dtype not in FLOATS:
        raise ValueError(f"weights are written as one of {[str(d) for d in FLOATS]}, not {dtype}")
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"the weight is packed ({weight.dtype}), so W + Δ cannot be written into it as {dtype}; view the edit "
            "without written=, or open the model without quantization"
        )
    base = weight.to(dtype)
    return difference(edited_weight(base, delta), base)


def difference(after: Tensor, before: Tensor) -> Dense:
    """after - before, fp32, of two weights of one dtype [d, d_ff]."""
    after, before = (weight.detach().to(wide(weight.dtype)) for weight in (after, before))
    return Dense((after - before).float())


def growth(lm, edits, norms: dict[tuple[int, str], float]) -> dict[int, float]:
    """{layer: ‖ΣΔ‖ / ‖W‖ (Frobenius) of its matrix that edits, all together, move furthest}. Packed weights have no
    norm to be read. norms: {(layer, role): ‖W‖}, those known, and added to."""
    deltas: dict[tuple[int, str], list[Delta]] = {}
    for place, delta in (each for edit in edits for each in edit.weights.items()):
        deltas.setdefault(place, []).append(delta)
    moved: dict[tuple[int, str], tuple[float, float]] = {}
    for place, (first, *others) in deltas.items():
        if place not in norms and (weight := lm.source.weight(*place).detach()).dtype in FLOATS:
            norms[place] = Dense(weight).norm()
        if place in norms:
            all_of_them = Dense(sum((delta.dense() for delta in others), first.dense())) if others else first
            moved[place] = all_of_them.norm(), norms[place]
    return grown(moved)


def grown(norms: Mapping[tuple[int, str], tuple[float, float]]) -> dict[int, float]:
    """{layer: ‖Δ‖ / ‖W‖ of its matrix that grew most}, NaN where one of them is; norms: {(layer, role): both norms}."""
    shares: dict[int, float] = {}
    for (layer, _), (change, weight) in sorted(norms.items()):
        shares[layer] = float(np.maximum(change / max(weight, TINY), shares.get(layer, 0.0)))  # max() may drop a NaN
    return shares


def _fp64_device(device):
    """Where fp64 sums for a tensor of this device are made: there, unless the device has none (Apple's)."""
    return torch.device("cpu") if device.type == "mps" else device


def _widen(tensor):
    return tensor.to(_fp64_device(tensor.device)).double()


def storable(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors as an Edit keeps them, for a model of this dtype: fp32, or fp64 for an fp64 model; contiguous, as they
    come back from a file, for a product's last bits depend on the strides."""
    return factors.to(wide(dtype)).cpu().contiguous()
