"""Changes that act beside the weights, on the prompts that a route gives them (``routes.py``).

MemoryChange(5, values, owners)            # the row of a prompt's last token becomes the entry's value (GRACE)
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.edits.changes import Change, acted, check_finite, check_owners_of
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
        check_owners_of(self, "value", len(self.values))
        if len(self.owners.unique()) < len(self.owners):
            raise ValueError(f"owners of a memory: expected an entry for each value, none twice; got {self.owners}")

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

    def parts(self, which: Tensor | None = None) -> dict:
        """values."""
        return {"values": self.values if which is None else self.values[which]}


class Remembering:
    """The job of a MemoryChange."""

    def __init__(self, change: MemoryChange):
        self.change = change

    def sites(self, layer: int) -> tuple[Site, ...]:
        return (self.change.site,) if layer == self.change.layer else ()

    def reads(self, layer: int) -> None:
        return None

    def at(self, site: Site, layer: int, x: Tensor, call: Call) -> Tensor | None:
        rows, owner = acted(call, x)
        if rows is None:
            return None
        ends = (call.pos == call.prompt_end)[rows.cpu()]
        row, value = ((owner[:, None] == self.change.owners) & ends[:, None]).nonzero(as_tuple=True)
        return x.index_copy(0, rows[row.to(rows.device)], self.change.values[value].to(x))
