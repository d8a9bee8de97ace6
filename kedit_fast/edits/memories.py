"""Changes that act beside the weights, on the prompts that a route gives them (``routes.py``).

    MemoryChange(5, values, owners)            # the row of a prompt's last token becomes the entry's value (GRACE)
    SideMemory.of_deltas(5, deltas, dtype)     # y + x Δᵀ of the entry's Δ, which is sparse (WISE)
    MaskedMemory(5, columns, weight, masks, owners)  # y + (x ∘ mask) Wᵀ of the entry's mask (MEMOIR)

Each is one part for each entry that it has, none twice.
"""

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.edits.changes import Acting, Change, acted, check_finite, check_owners_of
from kedit_fast.edits.deltas import FLOATS
from kedit_fast.edits.routes import check_width
from kedit_fast.model.family import check_layer
from kedit_fast.sweep.rows import Call
from kedit_fast.sweep.sites import Site


class Beside(Change):
    """A change of one layer that has owners, the entries of a routed edit: without a route it acts on nothing."""

    ROUTED: ClassVar[bool] = True
    layer: int

    def _check_layer(self) -> None:
        checks.whole("layer", self.layer, most=checks.MOST_LAYERS, like=5)

    def check(self, lm) -> None:
        """Raises ValueError for a layer that the model does not have."""
        check_layer(self.layer, lm.n_layers)


@dataclass(frozen=True, eq=False)
class MemoryChange(Beside):
    """The row of a prompt's last token, at a site, becomes the value of the entry that acts on the prompt.

    values: [n, width] of the site; owners: [n], the entry of each, none twice. Raises ValueError where these do not fit
    each other or are not finite.
    """

    layer: int
    values: Tensor
    owners: Tensor
    site: Site = Site.layer_out
    kind: ClassVar[str] = "memory"

    def __post_init__(self):
        self._check_layer()
        object.__setattr__(self, "site", Site(self.site))
        if self.values.ndim != 2 or self.values.dtype not in FLOATS:
            raise ValueError(
                f"a memory's values: expected floats [n, width], got {self.values.dtype} {list(self.values.shape)}"
            )
        check_finite(f"the memory at layer {self.layer}", [self.values])
        check_owners_of(self, "value")
        check_once_each(self.owners)

    def job(self) -> "Remembering":
        """Puts values in the place of rows."""
        return Remembering(self)

    def check(self, lm) -> None:
        """Raises ValueError for a layer that the model does not have, and for another width than the site's."""
        super().check(lm)
        check_width(self.values.shape[1], self.site, self.layer, lm)

    def record(self) -> dict:
        """Layer and site."""
        return {"layer": self.layer, "site": self.site.value}

    @property
    def n_parts(self) -> int:
        """Its rows."""
        return len(self.values)

    def parts(self, which: Tensor | None = None) -> dict:
        """values."""
        return {"values": self.values if which is None else self.values[which]}


class Remembering(Acting):
    """The job of a MemoryChange."""

    def __init__(self, change: MemoryChange):
        super().__init__(change.layer, change.site)
        self.change = change

    def at(self, site: Site, layer: int, x: Tensor, call: Call) -> Tensor | None:
        rows, owner = acted(call, x)
        if rows is None:
            return None
        ends = (call.pos == call.prompt_end)[rows.cpu()]
        row, value = ((owner[:, None] == self.change.owners) & ends[:, None]).nonzero(as_tuple=True)
        return x.index_copy(0, rows[row.to(rows.device)], self.change.values[value].to(x))


@dataclass(frozen=True, eq=False)
class SideMemory(Beside):
    """y + x Δ_mᵀ at a layer's down projection, of the memory m that acts on the prompt; each Δ_m is sparse.

    mask: [m, ceil(d d_ff / 8)] uint8, a bit for each entry of Δ_m that is kept, the first in the highest; values: those
    entries, memory after memory; shape: (d, d_ff); owners: [m], the entry of each, none twice.
    Raises ValueError where these do not fit each other or are not finite.
    """

    layer: int
    shape: tuple[int, int]
    mask: Tensor
    values: Tensor
    owners: Tensor
    kind: ClassVar[str] = "side"

    def __post_init__(self):
        self._check_layer()
        object.__setattr__(self, "shape", tuple(checks.whole("shape", n, least=1, like=576) for n in self.shape))
        if len(self.shape) != 2:
            raise ValueError(f"a side memory's shape: expected (d, d_ff), got {self.shape}")
        size = math.prod(self.shape)
        if self.mask.dtype != torch.uint8 or self.mask.shape[1:] != (-(-size // 8),) or self.values.ndim != 1:
            raise ValueError(
                f"a side memory's mask: expected uint8 [m, {-(-size // 8)}], bits of {self.shape}; got "
                f"{self.mask.dtype} {list(self.mask.shape)}"
            )
        if int(self._counts.sum()) != len(self.values):
            raise ValueError(f"a side memory's mask keeps {int(self._counts.sum())} entries, values {len(self.values)}")
        check_finite(f"the side memory at layer {self.layer}", [self.values])
        check_owners_of(self, "memory")
        check_once_each(self.owners)

    @classmethod
    def of_deltas(cls, layer: int, deltas: Sequence[Tensor], dtype: torch.dtype) -> "SideMemory":
        """Of dense Δs [d, d_ff], whose zeros are left out; values are kept in a dtype."""
        flat = [delta.to(dtype).flatten().cpu() for delta in deltas]
        kept = torch.stack([delta != 0 for delta in flat]).numpy()
        mask = torch.from_numpy(np.packbits(kept, axis=1))
        values = torch.cat([delta[delta != 0] for delta in flat])
        return cls(layer, tuple(deltas[0].shape), mask, values, torch.arange(len(flat)))

    @cached_property
    def _bits(self) -> Tensor:
        """[m, d d_ff] bool."""
        size = math.prod(self.shape)
        return torch.from_numpy(np.unpackbits(self.mask.numpy(), axis=1, count=size)).bool()

    @cached_property
    def _counts(self) -> Tensor:
        """[m] entries that each memory keeps."""
        return self._bits.sum(1)

    @cached_property
    def _dense(self) -> dict[int, Tensor]:
        return {}

    def dense(self, number: int) -> Tensor:
        """Δ [d, d_ff] of one memory; made once, since every token that is written asks for it again."""
        if number not in self._dense:
            self._dense[number] = self._spread(number)
        return self._dense[number]

    def _spread(self, number: int) -> Tensor:
        begin = int(self._counts[:number].sum())
        made = self.values.new_zeros(math.prod(self.shape))
        made[self._bits[number]] = self.values[begin : begin + int(self._counts[number])]
        return made.view(self.shape)

    def job(self) -> "AddingBeside":
        """Adds what the memory of each row's entry makes of the projection's input."""
        number = {int(owner): i for i, owner in enumerate(self.owners)}
        return AddingBeside(self.layer, lambda x, owner: x @ self.dense(number[owner]).to(x).T, number)

    def check(self, lm) -> None:
        """Raises ValueError for a layer that the model does not have, and for another width than its own."""
        super().check(lm)
        if self.shape != lm.shape_of("down"):
            raise ValueError(
                f"layer {self.layer}: a side memory of {self.shape}, this model's is {lm.shape_of('down')}"
            )

    def record(self) -> dict:
        """Layer and shape."""
        return {"layer": self.layer, "shape": list(self.shape)}

    @property
    def n_parts(self) -> int:
        """Its memories."""
        return len(self.mask)

    def parts(self, which: Tensor | None = None) -> dict:
        """mask and values."""
        if which is None:
            return {"mask": self.mask, "values": self.values}
        return {"mask": self.mask[which], "values": self.values[which.repeat_interleave(self._counts)]}


@dataclass(frozen=True, eq=False)
class MaskedMemory(Beside):
    """y + (x ∘ mask_e) Wᵀ at a layer's down projection, of the entry e that acts on the prompt: all entries share W, of
    which each sees some columns.

    columns: [c] int64, ascending, those of W that any entry sees; weight: [d, c], W there; masks: [n, k] int64, the
    columns (of d_ff) that each entry sees; owners: [n]. Raises ValueError where these do not fit each other.
    """

    layer: int
    columns: Tensor
    weight: Tensor
    masks: Tensor
    owners: Tensor
    kind: ClassVar[str] = "masked"

    def __post_init__(self):
        self._check_layer()
        if self.weight.ndim != 2 or self.columns.shape != self.weight.shape[1:] or self.masks.ndim != 2:
            shapes = ", ".join(str(list(x.shape)) for x in (self.columns, self.weight, self.masks))
            raise ValueError(f"a masked memory's columns, weight, masks: expected [c], [d, c], [n, k]; got {shapes}")
        if (self.columns < 0).any() or not torch.isin(self.masks, self.columns).all():
            raise ValueError("a masked memory's masks name columns that it does not hold")
        check_finite(f"the masked memory at layer {self.layer}", [self.weight])
        check_owners_of(self, "mask")
        check_once_each(self.owners)

    def job(self) -> "AddingBeside":
        """Adds what W makes of the columns that each row's entry sees."""
        seen = {int(owner): mask for owner, mask in zip(self.owners, self.masks, strict=True)}

        def made(x: Tensor, owner: int) -> Tensor:
            at = torch.searchsorted(self.columns, seen[owner])
            return x[:, seen[owner].to(x.device)] @ self.weight[:, at].to(x).T

        return AddingBeside(self.layer, made, seen)

    def check(self, lm) -> None:
        """Raises ValueError for a layer that the model does not have, and for another width than its own."""
        super().check(lm)
        d, d_ff = lm.shape_of("down")
        if len(self.weight) != d or (len(self.columns) and int(self.columns[-1]) >= d_ff):
            raise ValueError(f"layer {self.layer}: a masked memory for another model than one of ({d}, {d_ff})")

    def record(self) -> dict:
        """Layer."""
        return {"layer": self.layer}

    @property
    def n_parts(self) -> int:
        """Its masks."""
        return len(self.masks)

    def parts(self, which: Tensor | None = None) -> dict:
        """columns, weight and masks; of some entries their columns."""
        if which is None:
            return {"columns": self.columns, "weight": self.weight, "masks": self.masks}
        masks = self.masks[which]
        kept = torch.isin(self.columns, masks)
        return {"columns": self.columns[kept], "weight": self.weight[:, kept], "masks": masks}


class AddingBeside(Acting):
    """Adds to the down projection's output what ``made`` makes of its input x [k, d_ff], for the rows of each owner."""

    def __init__(self, layer: int, made: Callable[[Tensor, int], Tensor], owners: Container[int]):
        super().__init__(layer, Site.mlp_key, Site.mlp_out)
        self.made, self.owners = made, owners
        self._x: Tensor | None = None

    def at(self, site: Site, layer: int, x: Tensor, call: Call) -> Tensor | None:
        if site is Site.mlp_key:
            self._x = x
            return None
        keys, self._x = self._x, None
        rows, owner = acted(call, x)
        if rows is None or keys is None:
            return None
        for each in owner.unique().tolist():
            if each in self.owners:
                mine = rows[(owner == each).to(rows.device)]
                x = x.index_add(0, mine, self.made(keys[mine], each).to(x.dtype))
        return x


def check_once_each(owners: Tensor) -> None:
    """Raises ValueError where an entry owns several parts."""
    if len(owners.unique()) < len(owners):
        raise ValueError(f"owners: expected an entry for each part, none twice; got {owners.tolist()}")
