"""Routes: which entry of an edit acts on a prompt, decided once, at the prompt, and kept for the whole sequence.

A routed edit's parts have owners, its *entries*; its route looks at each prompt by itself and names the entry that acts
on whatever follows, or none: then the base model answers, to the bit, but for other edits on the same view.

    NearestRoute(layer, keys, radius, entry)     # the entry whose key is nearest to the prompt's last row (GRACE)
    ActivationRoute(threshold, entry)            # the side memory that the prompt moves most (WISE)
    OverlapRoute(least, background, permutation, entry)  # the entry whose mask is most like the prompt's own (MEMOIR)

A route that chooses text is a route too: beside it stands a ``PromptChange`` without names whose texts have owners, and
an entry's text is put before the prompts that the route gives it (in-context editing, SERAC).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.state import wide
from kedit_fast.basics.words import counted
from kedit_fast.edits.deltas import FLOATS
from kedit_fast.facts.tokens import encode, spoken
from kedit_fast.model.family import check_layer
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.plan import PLACE
from kedit_fast.sweep.rows import Call, There
from kedit_fast.sweep.runs import NOBODY, RunList, padded, spans
from kedit_fast.sweep.sites import Site

Prompt = str | Sequence[int]  # as the model reads it: text (``tokens.asked``), or token ids


class Route(ABC):
    """Which of ``n_entries`` entries acts on a prompt.

    kind: as files call it; when: an entry acts, in words
    entry: [n_facts] int64, the entry that each fact of the edit is answered by
    """

    kind: ClassVar[str] = ""
    when: ClassVar[str] = ""
    entry: Tensor

    @property
    @abstractmethod
    def n_entries(self) -> int:
        """How many it chooses from."""

    def choose(self, lm, prompts: Sequence[Prompt]) -> Tensor:
        """[n] int64: the entry that acts on each prompt, -1 for none; lm: the model without the routed edit. What a
        prompt is given depends on no other one."""
        return self._choose(lm, prompts) if self.n_entries and len(prompts) else torch.full((len(prompts),), -1)

    @abstractmethod
    def _choose(self, lm, prompts: Sequence[Prompt]) -> Tensor:
        """``choose``, among some entries, for some prompts."""

    def owners(self, lm, prompts: Sequence[Prompt]) -> Tensor:
        """[n] int64: the owner (``Runs.owner``) of what is read behind each prompt."""
        entry = self.choose(lm, prompts)
        return torch.where(entry >= 0, entry, NOBODY if lm.edits else -1)

    @abstractmethod
    def take(self, entries: Tensor, entry: Tensor, facts: Tensor) -> "Route":
        """The route to some entries [m] alone, in their order; entry: as in ``Route``, of the facts that stay; facts:
        [m] the fact that each is of."""

    def bound(self, changes: Sequence) -> "Route":
        """The route as it chooses among an edit's changes, where it reads them."""
        return self

    def check(self, lm) -> None:  # noqa: B027 (a route that reads text fits every model)
        """Raises ValueError where the route does not fit a model."""

    def of_facts(self, facts: Tensor) -> "tuple[Route, Tensor]":
        """(the route to these facts' [k] entries alone, which entries those are, ascending [m]).

        Raises ValueError where another fact is answered by one of these entries."""
        made_for = self.entries_of
        mine = torch.isin(made_for, facts)
        mine[self.entry[facts]] = True
        entries = mine.nonzero()[:, 0]
        strange = set(torch.cat([made_for[entries], torch.isin(self.entry, entries).nonzero()[:, 0]]).tolist())
        if shared := sorted(strange - set(facts.tolist())):
            raise ValueError(
                f"fact {shared[0]} shares its entry with others, so they cannot be told apart; make the edit again "
                "with the facts that are to stay"
            )
        number = torch.full((len(self.entry),), -1).index_copy_(0, facts, torch.arange(len(facts)))
        entry = torch.searchsorted(entries, self.entry[facts])
        return self.take(entries, entry, number[made_for[entries]]), entries

    @property
    def entries_of(self) -> Tensor:
        """[n_entries] a fact that each entry is of."""
        return torch.zeros(self.n_entries, dtype=torch.int64).index_copy_(
            0, self.entry.flip(0), torch.arange(len(self.entry)).flip(0)
        )

    def record(self) -> dict:
        """What a file says of it, ready for JSON, beside ``tensors``."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {"entry": self.entry}

    @classmethod
    def of(cls, record: dict, tensors: dict[str, Tensor]) -> "Route":
        """The route of a file."""
        return cls(**record, **tensors)


@dataclass(frozen=True, eq=False)
class NearestRoute(Route):
    """The entry whose key is nearest to the row of a prompt's last token, where that lies within the key's radius.

    keys: [m, width] of rows at a site of a layer, one an entry; radius: [m], Euclidean; entry: as in ``Route``
    facts: [m] the fact that each key is of, where one has several (its phrasings); None: that whose entry it is
    Raises ValueError where these do not fit each other or are not finite. Cost: one sweep up to the layer.
    """

    layer: int
    keys: Tensor
    radius: Tensor
    entry: Tensor
    site: Site = Site.mlp_key
    facts: Tensor | None = None
    kind: ClassVar[str] = "nearest"
    when: ClassVar[str] = "behind a prompt that ends within its radius"

    def __post_init__(self):
        checks.whole("layer", self.layer, most=checks.MOST_LAYERS, like=5)
        object.__setattr__(self, "site", Site(self.site))
        if self.keys.ndim != 2 or self.radius.shape != (len(self.keys),):
            shapes = f"{list(self.keys.shape)} and {list(self.radius.shape)}"
            raise ValueError(f"a route's keys and radius: expected [m, width] and [m], got {shapes}")
        check_floats("keys", self.keys, 2)
        check_floats("radius", self.radius, 1)

    @property
    def n_entries(self) -> int:
        """As many as keys."""
        return len(self.keys)

    def check(self, lm) -> None:
        """Raises ValueError for a layer that the model does not have, and for another width than the site's."""
        check_layer(self.layer, lm.n_layers)
        check_width(self.keys.shape[1], self.site, self.layer, lm)

    def _choose(self, lm, prompts: Sequence[Prompt]) -> Tensor:
        """The nearest key's entry, within its radius."""
        rows = prompt_features(lm, prompts, self.layer, self.site)
        dtype = torch.promote_types(rows.dtype, self.keys.dtype)
        distance = distances(rows.to(dtype), self.keys.to(dtype))
        least, nearest = distance.min(1)
        return torch.where(least <= self.radius[nearest], nearest, -1)

    @property
    def entries_of(self) -> Tensor:
        """As it was told."""
        return super().entries_of if self.facts is None else self.facts

    def take(self, entries: Tensor, entry: Tensor, facts: Tensor) -> "NearestRoute":
        """Some keys and radii."""
        given = None if self.facts is None else facts
        return replace(self, keys=self.keys[entries], radius=self.radius[entries], entry=entry, facts=given)

    def record(self) -> dict:
        """Layer and site."""
        return {"layer": self.layer, "site": self.site.value}

    def tensors(self) -> dict[str, Tensor]:
        """Keys, radii, the facts' entries and the keys' facts."""
        told = {} if self.facts is None else {"facts": self.facts}
        return {"keys": self.keys, "radius": self.radius, "entry": self.entry} | told


def distances(rows: Tensor, keys: Tensor) -> Tensor:
    """[n, m] Euclidean distances; not by ‖a‖² + ‖b‖² - 2ab, in which near rows cancel."""
    return torch.cdist(rows, keys, compute_mode="donot_use_mm_for_euclid_dist")


def text_of(lm, prompt: Prompt) -> str:
    """A prompt as text: of a chat the question."""
    return spoken(prompt) if isinstance(prompt, str) else lm.tokenizer.decode(prompt, skip_special_tokens=True)


def ids_of(lm, prompt: Prompt) -> list[int]:
    """A prompt's token ids."""
    return encode(lm.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)


# ---- what a route sees of a prompt


@torch.no_grad()
def prompt_features(
    lm,
    prompts: Sequence[Prompt],
    layer: int,
    site: Site,
    every: bool = False,
    measure: Callable[[Tensor], Tensor] | None = None,
    skip: int = 0,
) -> Tensor:
    """[n, width] of each prompt, wide, on the CPU: the row of its last token at a site of a layer; or, ``every``, the
    mean over its tokens. measure: rows [k, d] -> [k, width], of which the mean is taken, in place of the rows.
    skip: first tokens that the mean leaves out, of longer prompts

    One sweep up to the layer for all prompts, equal ones once; no text that edits put before prompts is read.
    Raises ValueError for a prompt of no tokens.
    """
    ids = [tuple(ids_of(lm, prompt)) for prompt in prompts]
    distinct = list(dict.fromkeys(ids))
    if not distinct:
        return torch.empty(0, lm.width_of(site))
    if not all(distinct):
        raise ValueError("a prompt of no tokens: a route reads what a prompt ends with; give it a text")
    runs, tokens = RunList(), padded(list(map(list, distinct)))
    number = runs.add(tokens[0], length=tokens[1], owner=lm.run_owner)
    begin = tokens[1] - 1 if not every else torch.where(tokens[1] > skip, skip, 0)
    job = _Reading(layer, site, number, (begin, tokens[1]), measure)
    held = len(distinct) * lm.width_of(site) * 8 + PLACE * len(job.run)
    sweep(replace(lm, prompted=True), runs.runs(), [job], last_layer=layer, held=held)
    place = {each: i for i, each in enumerate(distinct)}
    return job.features()[[place[each] for each in ids]]


class _Reading:
    """The job that sums rows of each prompt as they pass. number: its run; read: from and to which position"""

    def __init__(self, layer: int, site: Site, number: Tensor, read: tuple[Tensor, Tensor], measure):
        self.layer, self.site, self.measure, self.n = layer, site, measure, len(number)
        prompt, self.pos = spans(*read)
        self.run, self.count, self._prompt = number[prompt], read[1] - read[0], There(prompt)
        self._sums: Tensor | None = None

    def sites(self, layer: int) -> tuple[Site, ...]:
        return (self.site,) if layer == self.layer else ()

    def reads(self, layer: int):
        return (self.run, self.pos) if layer == self.layer else None

    def at(self, site: Site, layer: int, x: Tensor, call: Call) -> None:
        which, row = call.find(self.run, self.pos)
        rows = x[row].to(wide(x.dtype))
        rows = rows if self.measure is None else self.measure(rows)
        if self._sums is None:
            self._sums = rows.new_zeros(self.n, rows.shape[1])
        self._sums.index_add_(0, self._prompt.on(rows.device)[which], rows)

    def features(self) -> Tensor:
        """[n, width] the means."""
        return self._sums.cpu() / self.count[:, None]


# ---- checks


def check_floats(name: str, tensor: Tensor, ndim: int) -> None:
    if tensor.ndim != ndim or tensor.dtype not in FLOATS or not torch.isfinite(tensor).all():
        raise ValueError(f"a route's {name}: expected finite floats of {ndim} dimension{'s' * (ndim > 1)}")


def check_width(width: int, site: Site, layer: int, lm) -> None:
    """Raises ValueError where keys are not as wide as a model's site."""
    wanted = lm.width_of(site)
    if width != wanted:
        raise ValueError(
            f"layer {layer}: keys of width {width}, this model's {site.value} has {wanted}; they were made for another "
            "model"
        )


def check_route(route: Route | None, n_facts: int, changes: Sequence) -> None:
    """Raises ValueError unless a route names an entry of it for each fact of its edit, and fits what it reads of the
    changes."""
    if route is None:
        return
    checks.instance("route", route, Route, "a Route (edits/routes.py), or None")
    entry = route.entry
    if entry.dtype != torch.int64 or entry.shape != (n_facts,):
        found = f"{entry.dtype} {list(entry.shape)}"
        raise ValueError(f"a route's entry: expected int64, one for each of {counted(n_facts, 'fact')}; got {found}")
    check_numbers("entry", entry, route.n_entries)
    facts = route.entries_of
    if facts.dtype != torch.int64 or facts.shape != (route.n_entries,):
        raise ValueError(f"a route's facts: expected int64 [{route.n_entries}], got {facts.dtype} {list(facts.shape)}")
    check_numbers("facts", facts, n_facts)
    route.bound(changes)


def check_numbers(what: str, numbers: Tensor, n: int) -> None:
    """Raises ValueError unless all are from 0 to n - 1."""
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < n:
        raise ValueError(f"a route's {what}: expected 0 to {n - 1}, got {numbers.tolist()}")
