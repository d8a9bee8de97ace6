"""Changes that erase a concept, and what they become once they are folded into weights.

ErasureChange(5, left, right, mu)                     # rows at a site lose what they have of a few directions
BiasChange(5, delta)                                  # a matrix's bias gains this
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.state import wide
from kedit_fast.edits.changes import Acting, Change, acted, check_finite
from kedit_fast.edits.deltas import FLOATS
from kedit_fast.sweep.rows import Call
from kedit_fast.sweep.sites import OUT, Site


@dataclass(frozen=True, eq=False)
class ErasureChange(Change):
    """Every row at a site loses what it has of a few directions: x - (x - mu) rightᵀ leftᵀ.

    left: [width, k]; right: [k, width]; mu: [width]. Raises ValueError where these do not fit each other or are not
    finite. ``editors.leace.fold`` writes those around one matrix into its weights.
    """

    layer: int
    left: Tensor
    right: Tensor
    mu: Tensor
    site: Site = Site.layer_out
    kind: ClassVar[str] = "erasure"
    WAY_OUT: ClassVar[str] = "; of sites mlp_out, mlp_key and mlp_in kf.fold(lm, edit) makes a change of weights"
    owners: ClassVar[None] = None  # type: ignore[misc]  # acts on every text

    def __post_init__(self):
        checks.whole("layer", self.layer, most=checks.MOST_LAYERS, like=5)
        object.__setattr__(self, "site", Site(self.site))
        tensors = self.parts().values()
        if self.left.ndim != 2 or self.right.shape != self.left.T.shape or self.mu.shape != self.left.shape[:1]:
            shapes = ", ".join(str(list(part.shape)) for part in tensors)
            raise ValueError(f"an erasure's left, right, mu: expected [width, k], [k, width] and [width], got {shapes}")
        if not all(part.dtype in FLOATS for part in tensors):
            raise ValueError(f"an erasure holds floats, got {', '.join(str(part.dtype) for part in tensors)}")
        check_finite(f"the erasure at layer {self.layer}", tensors)

    def job(self) -> "Erasing":
        """Takes the directions out of rows."""
        return Erasing(self)

    def check(self, lm) -> None:
        """Raises ValueError for a layer that the model does not have, and for another width than the site's."""
        super().check(lm)
        width = lm.width_of(self.site)
        if len(self.mu) != width:
            raise ValueError(
                f"layer {self.layer}: the erasure is of rows {len(self.mu)} wide, this model's {self.site.value} is "
                f"{width}; it was made for another model"
            )

    def record(self) -> dict:
        """Layer and site."""
        return {"layer": self.layer, "site": self.site.value}

    def parts(self, which: Tensor | None = None) -> dict:
        """left, right and mu."""
        return {"left": self.left, "right": self.right, "mu": self.mu}

    def erased(self, x: Tensor) -> Tensor:
        """Rows x [n, width] without it, of their dtype; computed in fp32, in fp64 for fp64 rows."""
        left, right, mu = (part.to(x.device, wide(x.dtype)) for part in self.parts().values())
        return (x - ((x - mu) @ right.T) @ left.T).to(x.dtype)


class Erasing(Acting):
    """The job of an ErasureChange."""

    def __init__(self, change: ErasureChange):
        super().__init__(change.layer, change.site)
        self.change = change

    def at(self, site: Site, layer: int, x: Tensor, call: Call) -> Tensor | None:
        rows, _ = acted(call, x)
        return None if rows is None else x.index_copy(0, rows, self.change.erased(x[rows]))


@dataclass(frozen=True, eq=False)
class BiasChange(Change):
    """What one matrix's bias gains: y + delta, of its output y. ``Edit.apply`` writes it where there is a bias.

    delta: [out]; role: which matrix, a name of ``Family.roles``. Raises ValueError where delta is not finite.
    """

    layer: int
    delta: Tensor
    role: str = "down"
    kind: ClassVar[str] = "bias"
    owners: ClassVar[None] = None  # type: ignore[misc]  # acts on every text

    def __post_init__(self):
        checks.whole("layer", self.layer, most=checks.MOST_LAYERS, like=5)
        if self.delta.ndim != 1 or self.delta.dtype not in FLOATS or self.role not in OUT:
            raise ValueError(
                f"layer {self.layer}: expected floats [out] and one of the roles {', '.join(OUT)}, got "
                f"{self.delta.dtype} {list(self.delta.shape)} and {self.role!r}"
            )
        check_finite(f"the bias of layer {self.layer}", [self.delta])

    def job(self) -> "Shifting":
        """Adds it to the matrix's output."""
        return Shifting(self)

    def check(self, lm) -> None:
        """Raises ValueError for a layer or a role that the model does not have, and for another width."""
        super().check(lm)
        width = lm.shape_of(self.role)[0]
        if len(self.delta) != width:
            raise ValueError(
                f"layer {self.layer}: the bias is {len(self.delta)} wide, and this model's {self.role} projection "
                f"gives {width}; it was made for another model"
            )

    def record(self) -> dict:
        """Layer and role."""
        return {"layer": self.layer, "role": self.role}

    def parts(self, which: Tensor | None = None) -> dict:
        """delta."""
        return {"delta": self.delta}


class Shifting(Acting):
    """The job of a BiasChange."""

    def __init__(self, change: BiasChange):
        super().__init__(change.layer, OUT[change.role])
        self.change = change

    def at(self, site: Site, layer: int, x: Tensor, call: Call) -> Tensor | None:
        rows, _ = acted(call, x)
        return None if rows is None else x.index_add(0, rows, self.change.delta.to(x).expand(len(rows), -1))
