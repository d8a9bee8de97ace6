"""What an edit changes: each kind of change says where it acts, and gives the job that acts in a sweep.

    WeightChange(5, LowRank(u, v))                        # Δ of a down projection, what ROME and MEMIT make
    WeightChange(5, Dense(delta), role="up")              # of another matrix of the MLP (Family.roles)
    PromptChange(texts, routes)                           # text put before prompts that name a subject (IKE, SERAC)

The engine knows jobs only, and an edit's file names the kinds only: a new kind is a class and its entry in
``format.KINDS``. memories.py has those that act where a route says so, erasures.py those that erase a concept.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.state import upload
from kedit_fast.basics.words import counted
from kedit_fast.edits.deltas import Delta, Dense, Halves, LowRank, check_fits, for_products
from kedit_fast.facts.tokens import spoken
from kedit_fast.model.family import check_layer
from kedit_fast.sweep.rows import Call
from kedit_fast.sweep.sites import IN, OUT, Site


class Change(ABC):
    """One thing that an edit changes. Acts on rows of edited runs alone, those whose owner is 0 or more.

    kind: as files call it; ROUTED: whether it acts through a route alone; WAY_OUT: how it becomes one of weights
    layer: the first whose rows it changes, None where it changes the prompt
    owners: None, or [r] int64: the fact that each of its r parts belongs to (independent edits), or the entry (a
        routed edit)
    """

    kind: ClassVar[str] = ""
    ROUTED: ClassVar[bool] = False
    WAY_OUT: ClassVar[str] = ""
    layer: int | None
    owners: Tensor | None

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(part.nbytes for part in self.parts().values() if isinstance(part, Tensor))

    def job(self):
        """The job that makes the change in a sweep; None for what ``before`` says of prompts."""
        return None

    def before(self, prompt: str, owner: int) -> str:
        """What stands before a prompt; owner: whose parts act on it, as in ``Runs``."""
        return ""

    def check(self, lm) -> None:
        """Raises ValueError where the change does not fit a model: for a layer that it does not have."""
        if self.layer is not None:
            check_layer(self.layer, lm.n_layers)

    def record(self) -> dict:
        """What a file says of it, ready for JSON, beside ``tensors``."""
        return {}

    @property
    def n_parts(self) -> int:
        """How many parts it has that facts or entries can own."""
        return 0

    @abstractmethod
    def parts(self, which: Tensor | None = None) -> dict:
        """Its fields that have parts; which: [r] bool, some of these."""

    def only(self, fact: int) -> "Change | None":
        """What belongs to one fact, which nobody owns any more; None where nothing does."""
        mine = self.owners == fact
        return replace(self, **self.parts(mine), owners=None) if mine.any() else None

    def owned(self) -> "Change":
        """As it is; of one fact alone as that fact's own. Raises ValueError for what no fact can own a part of."""
        if self.owners is not None:
            return self
        if not self.n_parts:
            raise ValueError(
                f"this edit holds {named(self)} no part of which belongs to a fact: make it with independent=True "
                "(--independent), by an editor that makes such edits"
            )
        return replace(self, owners=torch.zeros(self.n_parts, dtype=torch.int64))

    def of_entries(self, entries: Tensor) -> "Change | None":
        """What belongs to some entries [m], ascending, of a routed edit, numbered anew; None where nothing does."""
        mine = torch.isin(self.owners, entries)
        owners = torch.searchsorted(entries, self.owners[mine])
        return replace(self, **self.parts(mine), owners=owners) if mine.any() else None

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        tensors = {name: part for name, part in self.parts().items() if isinstance(part, Tensor)}
        return tensors | ({} if self.owners is None else {"owners": self.owners})

    @classmethod
    def of(cls, record: dict, tensors: dict[str, Tensor]) -> "Change":
        """The change of a file."""
        return cls(**record, **tensors)


@dataclass(frozen=True, eq=False)
class WeightChange(Change):
    """Δ [out, in] of one matrix of a layer's MLP: y + x Δᵀ for its input x and output y.

    role: which matrix, a name of ``Family.roles``; owners: [r] of a low-rank Δ's factors. Raises ValueError where these
    do not fit each other or Δ is not finite.
    """

    layer: int
    delta: Delta
    role: str = "down"
    owners: Tensor | None = None
    kind: ClassVar[str] = "weight"

    def __post_init__(self):
        checks.whole("layer", self.layer, most=checks.MOST_LAYERS, like=5)
        if not isinstance(self.delta, LowRank | Dense) or self.role not in OUT:
            raise ValueError(
                f"layer {self.layer}: expected a LowRank or Dense and one of the roles {', '.join(OUT)}, got "
                f"{self.delta!r} and {self.role!r}"
            )
        check_finite(f"deltas of layer {self.layer}", vars(self.delta).values())
        if self.owners is not None and not isinstance(self.delta, LowRank):
            raise ValueError(f"owners of layer {self.layer}: a LowRank has factors to own; delta is {self.delta!r}")
        check_owners_of(self, "factor")

    def on(self, device: torch.device, dtype: torch.dtype) -> Delta | Halves:
        """Δ where rows of this dtype are multiplied, taken there where that is first asked for."""
        held = self.__dict__.get("_there")
        if held is None or held[0] != (device, dtype):
            held = (device, dtype), for_products(self.delta, self.owners is not None, device, dtype)
            object.__setattr__(self, "_there", held)
        return held[1]

    @property
    def n_parts(self) -> int:
        """The factors of a low-rank Δ."""
        return self.delta.rank if isinstance(self.delta, LowRank) else 0

    def job(self) -> "Adding":
        """Adds x Δᵀ to the matrix's output."""
        return Adding(self)

    def check(self, lm) -> None:
        """Raises ValueError for a layer or a role that the model does not have, and for another shape."""
        super().check(lm)
        check_fits(self.delta, lm.shape_of(self.role), f"layer {self.layer}")

    def record(self) -> dict:
        """Layer and role."""
        return {"layer": self.layer, "role": self.role}

    def parts(self, which: Tensor | None = None) -> dict:
        """u and v, or delta, as files have them; of some factors the Δ."""
        if which is None:
            return vars(self.delta)
        return {"delta": LowRank(self.delta.u[:, which], self.delta.v[:, which])}

    @classmethod
    def of(cls, record: dict, tensors: dict[str, Tensor]) -> "WeightChange":
        """The change of a file."""
        owners = tensors.pop("owners", None)
        return cls(**record, delta=(Dense if "delta" in tensors else LowRank)(**tensors), owners=owners)


class Acting:
    """What jobs of changes have in common: they act at sites of one layer, and need no row of the last one for it."""

    def __init__(self, layer: int, *sites: Site):
        self._layer, self._sites = layer, sites

    def sites(self, layer: int) -> tuple[Site, ...]:
        return self._sites if layer == self._layer else ()

    def reads(self, layer: int) -> None:
        return None


class Adding(Acting):
    """The job of a WeightChange: keeps the matrix's input, and adds x Δᵀ to its output in the same call."""

    def __init__(self, change: WeightChange):
        self.change, self.enter = change, IN[change.role]
        super().__init__(change.layer, self.enter, OUT[change.role])
        self._x: Tensor | None = None

    def at(self, site: Site, layer: int, x: Tensor, call: Call) -> Tensor | None:
        if site is self.enter:
            self._x = x
            return None
        x, self._x, y = self._x, None, x
        rows, owner = acted(call, y)
        if rows is None:
            return None
        delta, owners = self.change.on(y.device, y.dtype), self.change.owners
        every = len(rows) == len(y)
        chosen = (y, x) if every else (y[rows], x[rows])
        changed = delta.add_to(*chosen, None if owners is None else owner, owners)
        return changed if every else y.index_copy(0, rows, changed)


@dataclass(frozen=True, eq=False)
class PromptChange(Change):
    """Text put before a prompt, inside a chat's last turn, where the prompt names what the text is about.

    texts: [n], put as they are, all that are chosen, in their order; routes: [n] names of each (a subject and its
    aliases), any of which chooses it, whatever the case; no names: it stands before every prompt. owners: [n]; with a
    route (``routes.py``) texts without names stand before the prompts of their entries
    Nothing is shared between a prompt with such a text and the same one without: the model reads another text.
    """

    texts: tuple[str, ...]
    routes: tuple[tuple[str, ...], ...]
    owners: Tensor | None = None
    kind: ClassVar[str] = "prompt"
    layer: ClassVar[None] = None

    def __post_init__(self):
        texts = checks.listed("texts", self.texts, str, "a list of texts", alone=False)
        routes = [checks.listed("routes", route, str, "a list of names", empty=True) for route in self.routes]
        if len(routes) != len(texts) or not all(name.strip() for route in routes for name in route):
            raise ValueError(
                f"routes: expected names for each of {counted(len(texts), 'text')}, none blank; got {routes}"
            )
        object.__setattr__(self, "texts", tuple(texts))
        object.__setattr__(self, "routes", tuple(map(tuple, routes)))
        check_owners_of(self, "text")

    @property
    def n_parts(self) -> int:
        """Its texts."""
        return len(self.texts)

    @property
    def nbytes(self) -> int:
        """Of its texts."""
        return sum(len(text.encode()) for text in self.texts)

    def before(self, prompt: str, owner: int) -> str:
        """The texts that are chosen, one behind the other."""
        prompt = spoken(prompt).casefold()
        named = [not route or any(name.casefold() in prompt for name in route) for route in self.routes]
        mine = [True] * len(self.texts) if self.owners is None else (self.owners == owner).tolist()
        return "".join(text for text, *chosen in zip(self.texts, named, mine, strict=True) if all(chosen))

    def record(self) -> dict:
        """Texts and routes."""
        return {"texts": list(self.texts), "routes": [list(route) for route in self.routes]}

    def parts(self, which: Tensor | None = None) -> dict:
        """texts and routes."""
        chosen = range(len(self.texts)) if which is None else which.nonzero()[:, 0].tolist()
        return {name: tuple(getattr(self, name)[i] for i in chosen) for name in ("texts", "routes")}


def weight_changes(deltas: dict[int, Delta], owner: Tensor | None = None) -> tuple[WeightChange, ...]:
    """Changes of down projections, a layer each, ascending; owner: [r], whose factors these are, the same for all."""
    return tuple(WeightChange(layer, delta, owners=owner) for layer, delta in sorted(deltas.items()))


SERVE = "serve it with lm.with_edit(edit) (kedit-fast generate), which acts whenever the model is asked"


def only_weights(edit, what: str, instead: str = SERVE, beside: tuple[type[Change], ...] = ()) -> list[WeightChange]:
    """The changes of an edit, where each is one of weights and acts on every text; beside: kinds that may be there too.

    what: is done with them, for the refusal: "a checkpoint answers for all facts"; instead: what to do with others.
    Raises ValueError, with the way out, for independent edits, for routed ones, and for changes of other kinds.
    """
    refuse_independent(edit, what)
    if edit.route is not None:
        raise ValueError(
            f"this edit is routed, its route ({edit.route.kind}) says on which prompts it acts, and {what}: {instead}"
        )
    other = next((change for change in edit.changes if not isinstance(change, (WeightChange, *beside))), None)
    if other is not None:
        raise ValueError(
            f"this edit holds {named(other)}, which is no change of weights, and {what}: {instead}{other.WAY_OUT}"
        )
    return [change for change in edit.changes if isinstance(change, WeightChange)]


TAKE_ONE = "take one, edit.only(i) (kedit-fast edit only EDIT N)"


def refuse_independent(edit, what: str) -> None:
    """Raises ValueError, with the way out, for independent edits; what: as in ``only_weights``."""
    if edit.independent:
        raise ValueError(
            f"this edit holds {counted(len(edit.facts), 'independent edit')}, each for its own fact, and {what}: "
            f"{TAKE_ONE}, or make the edit without independent=True (--independent)"
        )


def acted(call: Call, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(rows [k] of a call that edits act on, whose each is [k]); None where there is none."""

    def find() -> tuple[Tensor | None, Tensor | None]:
        owner = call.owner
        acted = (owner >= 0).nonzero()[:, 0]
        return (upload(x.device, acted)[0], owner[acted]) if len(acted) else (None, None)

    return call.once("acted", find)


def named(change: Change) -> str:
    where = f" at layer {change.layer}" if change.layer is not None else ""
    return f"a{'n' * (change.kind[0] in 'aeiou')} {change.kind}{where}"


# ---- checks


def check_finite(what: str, tensors) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError(f"{what} hold NaN or infinity; such an edit would spoil every answer")


def check_owners_of(change: Change, what: str) -> None:
    owners, n = change.owners, change.n_parts
    if owners is not None and (owners.dtype != torch.int64 or owners.shape != (n,)):
        raise ValueError(
            f"owners of {named(change)}: expected int64, one for each of {n} {what}s; got {owners.dtype} "
            f"{list(owners.shape)}"
        )


def check_owners(changes: Sequence[Change], n: int, routed: bool) -> None:
    """Raises ValueError where only some of an edit's changes have owners, or one is none of its n facts or entries;
    where a routed edit's have none, and where a change needs a route."""
    if routed and not all(change.owners is not None for change in changes):
        raise ValueError("a routed edit's changes have owners, its entries: expected owners= of each")
    alone = [change for change in changes if change.ROUTED and not routed]
    if alone:
        raise ValueError(f"{named(alone[0])} acts on prompts that a route gives it: expected route= (edits/routes.py)")
    owned = [change.owners for change in changes if change.owners is not None]
    if owned and len(owned) < len(changes):
        raise ValueError(f"{len(owned)} of {len(changes)} changes have owners; expected all of them, or none")
    for change in changes:
        owners = change.owners
        if owners is not None and owners.numel() and not 0 <= int(owners.min()) <= int(owners.max()) < n:
            raise ValueError(f"owners of {named(change)}: expected fact indices 0 to {n - 1}")
