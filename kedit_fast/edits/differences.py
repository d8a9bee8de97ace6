"""What differs between two edits: facts, hyper-parameters, and their deltas layer by layer."""

import math
from dataclasses import dataclass

import torch

from kedit_fast.basics.bits import digest
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import Delta, Dense, LowRank
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.fact import Fact


@dataclass(frozen=True)
class LayerDifference:
    """‖ΔA‖, ‖ΔB‖, ‖ΔA - ΔB‖ (Frobenius) and the cosine ⟨ΔA, ΔB⟩ / ‖ΔA‖‖ΔB‖ of one matrix; NaN where one is zero.

    role: which matrix of the layer, see ``Family.roles``
    """

    layer: int
    role: str
    norm_a: float
    norm_b: float
    difference: float
    cosine: float


@dataclass(frozen=True)
class EditDifference:
    """What ``compare`` found. ``parts`` and ``hparams`` hold {name: (of a, of b)} where these differ.

    parts: method, fingerprint, and by kind and digest a route and changes that are none of weights
    only_a, only_b: facts (prompt, subject, new target) that one of them writes;
    layers: all that either edits, ascending
    """

    parts: dict[str, tuple]
    hparams: dict[str, tuple]
    only_a: tuple[Fact, ...]
    only_b: tuple[Fact, ...]
    layers: tuple[LayerDifference, ...]


def compare(a: Edit, b: Edit) -> EditDifference:
    """How two edits differ. Low-rank deltas are compared by their factors, never multiplied out.

    Raises ValueError where they change weights of different shapes.
    """
    of_a, of_b = ({_written(fact): fact for fact in edit.facts} for edit in (a, b))
    return EditDifference(
        parts=_differing(*map(_parts, (a, b))),
        hparams=_differing(a.hparams, b.hparams),
        only_a=tuple(fact for written, fact in of_a.items() if written not in of_b),
        only_b=tuple(fact for written, fact in of_b.items() if written not in of_a),
        layers=tuple(_at(*place, a, b) for place in sorted({*a.weights, *b.weights})),
    )


def _parts(edit: Edit) -> dict:
    others = [part for part in edit.parts if not isinstance(part, WeightChange)]
    return {
        "method": edit.method, "fingerprint": edit.fingerprint,
        "besides weights": [f"{c.kind} {digest(c.record(), *c.tensors().values())}" for c in others],
    }  # fmt: skip


def _differing(a: dict, b: dict) -> dict[str, tuple]:
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def _written(fact: Fact) -> tuple:
    return fact.prompt, fact.subject, fact.chat, (fact.target_new or "").strip()


def _at(layer: int, role: str, a: Edit, b: Edit) -> LayerDifference:
    delta_a, delta_b = (edit.weights.get((layer, role)) for edit in (a, b))
    norm_a, norm_b = (0.0 if delta is None else delta.norm() for delta in (delta_a, delta_b))
    if delta_a is None or delta_b is None:
        return LayerDifference(layer, role, norm_a, norm_b, norm_a + norm_b, math.nan)
    if delta_a.shape != delta_b.shape:
        raise ValueError(
            f"layer {layer}: deltas of {list(delta_a.shape)} and {list(delta_b.shape)}; these are edits of models of "
            "different widths, and cannot be compared"
        )
    size = norm_a * norm_b
    cosine = _inner(delta_a, delta_b) / size if size else math.nan
    return LayerDifference(layer, role, norm_a, norm_b, _distance(delta_a, delta_b), cosine)


def _inner(a: Delta, b: Delta) -> float:
    """⟨ΔA, ΔB⟩ = Σ (uAᵀ uB) ∘ (vAᵀ vB), fp64."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return float(((a.u.double().T @ b.u.double()) * (a.v.double().T @ b.v.double())).sum())
    if isinstance(a, Dense) and isinstance(b, Dense):
        return float((a.delta.double() * b.delta.double()).sum())
    dense, factors = (a, b) if isinstance(a, Dense) else (b, a)
    return float(((dense.delta.double() @ factors.v.double()) * factors.u.double()).sum())


def _distance(a: Delta, b: Delta) -> float:
    """‖ΔA - ΔB‖, fp64. Not ‖ΔA‖² + ‖ΔB‖² - 2⟨ΔA, ΔB⟩, in which edits that nearly agree cancel: with
    [uA, uB] = Q S and [vA, -vB] = P T (QR), it is ‖S Tᵀ‖. Exactly 0 for the same tensors."""
    if type(a) is type(b) and all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)):
        return 0.0
    if isinstance(a, Dense) or isinstance(b, Dense):
        rows = slice(None)
        return float((a.part(rows) - b.part(rows)).norm())
    s = torch.linalg.qr(torch.cat([a.u.double(), b.u.double()], 1), mode="r").R
    t = torch.linalg.qr(torch.cat([a.v.double(), -b.v.double()], 1), mode="r").R
    return float((s @ t.T).norm())
