"""MALMEN: MEND's updates of many facts as one least-squares problem (Tan et al. 2024, arXiv:2311.04661).

Summed up, the updates of many facts cancel each other. So each token's update -α δ̃_t x̃_tᵀ counts by what it does at
that token's own input, v_t = -α (x_t · x̃_t) δ̃_t, and ΔW is what does all of that, by the normal equations with a
learned weight λ = exp(l) of each matrix: with inputs H [t, in] and V [t, out] as rows,

    ΔWᵀ = (Hᵀ H + λ I)⁻¹ Hᵀ V = Hᵀ (H Hᵀ + λ I)⁻¹ V

For few tokens the right form gives ΔW in factors, with a graph for training; for many the left one is solved in fp64.
The facts of a training step are one edit (``batch_size`` of them), as they are when it is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kedit_fast.editors.mend import MendNetwork, MendTraining
from kedit_fast.editors.networks import Total, Update, joined
from kedit_fast.editors.trained import Trained
from kedit_fast.edits.deltas import Delta, Dense
from kedit_fast.jobs.gradients import Factors, Place


class MalmenNetwork(MendNetwork):
    """MEND's network, with s_m and t_m behind the maximum, and l of each matrix."""

    METHOD: ClassVar = "malmen"
    LATE: ClassVar = True

    def __init__(self, fingerprint: str, shapes: Mapping[Place, tuple[int, int]], settings: dict):
        super().__init__(fingerprint, shapes, settings)
        self.scales["ridge"] = nn.Parameter(torch.zeros(len(shapes)))

    def transformed(self, factors: Mapping[Place, Factors], alone: bool) -> dict[Place, Update]:
        """ΔW = Vᵀ (H Hᵀ + λ I)⁻¹ H; alone: each fact by its own tokens."""
        made = {}
        for place, found in factors.items():
            h, v = self.shifts(place, found)
            sizes = found.task.unique_consecutive(return_counts=True)[1].tolist() if alone else [len(h)]
            ridge = self.scale("ridge", place).exp()
            solved = [_solved(*rows, ridge) for rows in zip(h.split(sizes), v.split(sizes), strict=True)]
            made[place] = Update(torch.cat(solved), h, found.task)
        return made

    def shifts(self, place: Place, found: Factors) -> tuple[Tensor, Tensor]:
        """H [t, in], and V [t, out], what ΔW is to add at each of them."""
        x, delta = self.pseudo(place, found)
        h = self.taken(found.x)
        return h, -self.scale("alpha", place) * (h * x).sum(1, keepdim=True) * delta

    def total(self, place: Place, alone: bool) -> Total:
        if alone:
            return super().total(place, alone)
        return _Equations(self.shapes[place], self.scale("ridge", place).exp().item())

    def add(self, sums: Mapping[Place, Total], factors: Mapping[Place, Factors], alone: bool) -> None:
        if alone:
            return super().add(sums, factors, alone)
        for place, found in factors.items():
            h, v = self.shifts(place, found)
            sums[place].add(Update(v, h, found.task))


class _Equations(Total):
    """The normal equations of one matrix: their rows, or, of many, HᵀH and HᵀV in fp64."""

    def __init__(self, shape: tuple[int, int], ridge: float):
        super().__init__(shape, keeps_rows=False)
        self.ridge, self.gram = ridge, torch.zeros(shape[1], shape[1], dtype=torch.float64)

    def add(self, update: Update) -> None:
        out, h = update.out.double().cpu(), update.into.double().cpu()
        self.gram += h.T @ h
        super().add(Update(out, h, update.task))  # Σ v hᵀ, in rows or dense

    def made(self) -> tuple[Delta, Tensor | None]:
        out, into, task = joined(self.rows, self.shape)
        if self.dense is None:
            self.rows = [Update(_solved(into, out, torch.tensor(self.ridge)), into, task)]
            return super().made()
        right = self.dense + out.double().T @ into.double()  # VᵀH [out, in]
        self.gram.diagonal().add_(self.ridge)
        solved = torch.cholesky_solve(right.T, torch.linalg.cholesky(self.gram)).T
        return Dense(solved.contiguous()), None


def _solved(h: Tensor, v: Tensor, ridge: Tensor) -> Tensor:
    """(H Hᵀ + λ I)⁻¹ V, in fp64 inside."""
    inner = h.double() @ h.double().T
    inner = inner + ridge.double() * torch.eye(len(h)).to(inner)
    return torch.linalg.solve(inner, v.double()).to(v.dtype)


@dataclass(frozen=True)
class MalmenTraining(MendTraining):
    """MEND's hyper-parameters; published: rank 1,024 of 1,920, two blocks, cedit 1, cloc 0.6 to 1."""

    rank: int = 1024
    cedit: float = 1.0
    batch_size: int = 32

    METHOD: ClassVar = "malmen"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"MALMEN": {}}
    TOGETHER: ClassVar = True
    NETWORK: ClassVar = MalmenNetwork


@dataclass(frozen=True)
class Malmen(Trained):
    """MALMEN: a trained network's shifts for many facts, brought together by least squares.

    The editor: its one setting is the network, see ``Trained``.
    """

    METHOD: ClassVar = "malmen"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"MALMEN": {}}
    NETWORK: ClassVar = MalmenNetwork
