"""The network of a trained editor: it turns the gradient of an edit, as factors, into the update of a weight.

For the input x_t and the output's gradient δ_t of a matrix at the tokens t of an edit (``jobs/gradients.py``)

    ΔW = Σ_r out_r into_rᵀ,   (out, into) = network({(x_t, δ_t)})

so neither the gradient nor ΔW is formed, and what a loss at W + ΔW has for a gradient of the network is that of
<G, ΔW> = Σ_{s,r} (δ'_s · out_r)(x'_s · into_r), where G = Σ_s δ'_s x'_sᵀ is the loss's gradient at W + ΔW (``pull``).

A network is a file of its own: its tensors, which model it is for, how it was made and trained.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kedit_fast.basics import catalog, checks
from kedit_fast.basics.bits import digest, json_of, json_tensor
from kedit_fast.basics.files import check_format, existing_file, reading, replace_file
from kedit_fast.edits.deltas import Delta, Dense, LowRank, as_smallest
from kedit_fast.edits.format import sha256_of
from kedit_fast.jobs.gradients import Factors, Place

FORMAT, VERSION = "kedit_fast.network", 1
LEAST = 1e-3  # of the mean standard deviation, what an entry's counts as at least: one that never moved is no signal
_Own = TypeVar("_Own", bound="Network")


class Update(NamedTuple):
    """The rows of ΔW = Σ_r out_r into_rᵀ: out [r, out], into [r, in]; task [r]: the fact that each is of"""

    out: Tensor
    into: Tensor
    task: Tensor


class Standard(nn.Module):
    """Mean and variance [width] of the rows seen, in fp64, merged exactly (Welford; Chan et al. 1979); no gradient."""

    n: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int):
        super().__init__()
        for name in ("n", "mean", "squares"):
            self.register_buffer(name, torch.zeros(() if name == "n" else width, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, rows: Tensor) -> None:
        """Counts rows [n, width] in."""
        rows = rows.to(self.mean.device).double()
        if not len(rows):
            return
        n, mean = self.n + len(rows), rows.mean(0)
        apart = mean - self.mean
        self.squares += (rows - mean).square().sum(0) + apart.square() * self.n * len(rows) / n
        self.mean += apart * len(rows) / n
        self.n.copy_(n)

    @property
    def std(self) -> Tensor:
        """[width] the standard deviation, at least ``LEAST`` of its mean."""
        std = (self.squares / (self.n - 1)).sqrt()
        return std.clamp(min=LEAST * std.mean())

    @property
    def size(self) -> Tensor:
        """The root mean square of all entries."""
        return (self.squares / self.n + self.mean.square()).mean().sqrt()

    def forward(self, rows: Tensor) -> Tensor:
        """(rows - mean) / std, in their dtype."""
        return (rows - self.mean.to(rows.dtype)) / self.std.to(rows.dtype)


class Network(nn.Module):
    """What all trained editors' networks are: places, statistics of their factors, a file. A method's own is its
    ``transformed``.

    fingerprint: of the model it is for; shapes: {(layer, role): (out, in)} of the matrices it changes
    settings: the hyper-parameters it was made and trained with; provenance: of its training; JSON values
    """

    METHOD: ClassVar[str] = ""
    provenance: dict[str, Any]

    def __init__(self, fingerprint: str, shapes: Mapping[Place, tuple[int, int]], settings: dict) -> None:
        super().__init__()
        self.fingerprint, self.shapes, self.settings = fingerprint, dict(shapes), dict(settings)
        self.provenance = {}
        self.of_x = nn.ModuleDict({_name(place): Standard(shape[1]) for place, shape in self.shapes.items()})
        self.of_delta = nn.ModuleDict({_name(place): Standard(shape[0]) for place, shape in self.shapes.items()})

    # ---- what a method says

    def transformed(self, factors: Mapping[Place, Factors], alone: bool) -> dict[Place, Update]:
        """The update of each matrix, with its graph. alone: each fact as an edit that sees no other"""
        raise NotImplementedError

    def groups(self) -> list[tuple[list[nn.Parameter], str]]:
        """Its parameters, and which learning rate of the settings moves them."""
        scales = [parameter for name, parameter in self.named_parameters() if name.startswith("scales.")]
        nets = [parameter for name, parameter in self.named_parameters() if not name.startswith("scales.")]
        return [(nets, "lr"), (scales, "lr_lr")]

    # ---- what is the same for all

    @property
    def places(self) -> list[Place]:
        """The matrices that it changes, (layer, role)."""
        return list(self.shapes)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self.shapes}))

    @property
    def digest(self) -> str:
        """16 hex digits of all that its updates depend on, bit for bit."""
        state = self.state_dict()
        told = self.METHOD, self.fingerprint, self.settings
        return digest(*told, *(x for name in sorted(state) for x in (name, state[name])))

    def observe(self, factors: Mapping[Place, Factors]) -> None:
        """Counts factors into the statistics; only before training."""
        for place, found in factors.items():
            of_x, of_delta = self.statistics(place)
            of_x.observe(found.x)
            of_delta.observe(found.delta)

    def standardized(self, place: Place, found: Factors) -> tuple[Tensor, Tensor]:
        """x [t, in] and δ [t, out] of a place, with mean 0 and deviation 1 over the training facts."""
        x, delta = self.taken(found.x), self.taken(found.delta)
        return self.of_x[_name(place)](x), self.of_delta[_name(place)](delta)

    def taken(self, rows: Tensor) -> Tensor:
        """Rows as it computes with them: its parameters need not be where the model is."""
        return rows.to(next(self.parameters()))

    def sized(self, place: Place, found: Factors) -> tuple[Tensor, Tensor]:
        """x [t, in] and δ [t, out] of a place, relative to their usual size."""
        x, delta = self.taken(found.x), self.taken(found.delta)
        return x / self.statistics(place)[0].size.to(x), delta / self.statistics(place)[1].size.to(delta)

    def statistics(self, place: Place) -> "tuple[Standard, Standard]":
        """Of a matrix's x and δ."""
        return cast(Standard, self.of_x[_name(place)]), cast(Standard, self.of_delta[_name(place)])

    def deltas(self, packs: Iterable[Mapping[Place, Factors]], alone: bool) -> dict[Place, tuple[Delta, Tensor | None]]:
        """{place: (ΔW, the fact of each factor where each is an edit of its own)} for the factors of all facts, pack by
        pack."""
        sums = {place: self.total(place, alone) for place in self.places}
        for factors in packs:
            with torch.no_grad():  # here alone: what gives the packs needs a graph
                self.add(sums, factors, alone)
        return {place: of_place.made() for place, of_place in sums.items()}

    def total(self, place: Place, alone: bool) -> "Total":
        """What the updates of a place are summed up in."""
        return Total(self.shapes[place], keeps_rows=alone)

    def add(self, sums: Mapping[Place, "Total"], factors: Mapping[Place, Factors], alone: bool) -> None:
        """Sums a pack up."""
        for place, update in self.transformed(factors, alone).items():
            sums[place].add(update)

    # ---- its file

    def save(self, path: checks.AnyPath) -> None:
        """Write one safetensors file, whole or not at all; see ``load``. Equal networks make equal files."""
        tensors = {name: x.detach().cpu().contiguous().clone() for name, x in self.state_dict().items()}
        shapes = [[layer, role, *shape] for (layer, role), shape in self.shapes.items()]
        record = {"method": self.METHOD, "fingerprint": self.fingerprint, "shapes": shapes, "settings": self.settings}
        tensors["record"] = json_tensor(record | {"provenance": self.provenance})
        tensors["sha256"] = sha256_of(tensors)
        with replace_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={"format": f"{FORMAT} {VERSION}"})

    @classmethod
    def load(cls: type[_Own], path: checks.AnyPath) -> _Own:
        """The network that ``save`` wrote, bit for bit, on the CPU; of ``Network`` itself, of whatever method it is.

        Raises ValueError, naming the file, for anything else, and for a network of another method.
        """
        path = existing_file(path, "a network, as `kedit-fast train` writes it")
        tensors = _read(path)
        with reading(path, "train it again, or take another file", "is a damaged network"):
            if not torch.equal(tensors.pop("sha256"), sha256_of(tensors)):
                raise ValueError("its contents are not those that were saved: their digest is another")
            record = json_of(tensors.pop("record"))
            method = checks.choice("method", record["method"], catalog.TRAINED)
        of_method = catalog.loaded({method: catalog.TRAINED[method]})[method].NETWORK
        if not issubclass(of_method, cls):
            raise ValueError(f"{path} is a network of {method}, and {cls.METHOD} needs its own; give --method {method}")
        with reading(path, "train it again, or take another file", "is a damaged network"):
            shapes = {(int(layer), str(role)): (int(out), int(width)) for layer, role, out, width in record["shapes"]}
            made = of_method(record["fingerprint"], shapes, record["settings"])
            # copies: in a file tensors lie as they come, and a product's last bits depend on that
            made.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
            made.requires_grad_(False)
            made.provenance = dict(record["provenance"])
            if not all(torch.isfinite(x).all() for x in tensors.values()):
                raise ValueError("it holds NaN or infinity")
        return made

    def __repr__(self) -> str:
        n = sum(parameter.numel() for parameter in self.parameters())
        layers = ", ".join(map(str, self.layers))
        return f"Network({self.METHOD}, {n:,} parameters, layers {layers}, model {self.fingerprint[:12]})"


class Total:
    """A sum of updates of one matrix: their rows, or, once these are larger than ΔW itself, ΔW."""

    def __init__(self, shape: tuple[int, int], keeps_rows: bool):
        self.shape, self.keeps_rows = shape, keeps_rows
        self.dense: Tensor | None = None
        self.rows: list[Update] = []

    def add(self, update: Update) -> None:
        """Counts one in."""
        self.rows.append(Update(*(part.detach().cpu() for part in update)))
        n, (out, width) = sum(len(each.out) for each in self.rows), self.shape
        if not self.keeps_rows and n * (out + width) > out * width:
            summed = torch.stack([each.out.T @ each.into for each in self.rows]).sum(0)
            self.dense = summed if self.dense is None else self.dense + summed
            self.rows = []

    def made(self) -> tuple[Delta, Tensor | None]:
        """ΔW, and the fact of each of its factors where these are kept apart."""
        out, into, task = joined(self.rows, self.shape)
        if self.dense is not None:
            return Dense(self.dense + out.T @ into), None
        delta = LowRank(out.T.contiguous(), into.T.contiguous())
        return (delta, task) if self.keeps_rows else (as_smallest(delta), None)


def joined(rows: list[Update], shape: tuple[int, int]) -> Update:
    """Updates of one matrix [out, in] as one."""
    if not rows:
        return Update(torch.zeros(0, shape[0]), torch.zeros(0, shape[1]), torch.zeros(0, dtype=torch.int64))
    return Update(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


def pull(updates: Mapping[Place, Update], outer: Mapping[Place, Factors], alone: bool) -> Tensor:
    """<G, ΔW>, summed over the matrices: its gradient of the network is that of the loss whose factors ``outer`` are.

    alone: each fact's ΔW acts on that fact's tasks alone; ``outer.task`` are then facts too
    """
    total = torch.zeros(())
    for place, update in updates.items():
        x, delta = outer[place].x.to(update.out), outer[place].delta.to(update.out)
        both = (delta @ update.out.T) * (x @ update.into.T)
        if alone:
            both = both * (outer[place].task[:, None] == update.task).to(both)
        total = total.to(both) + both.sum()
    return total


class Residual(nn.Module):
    """y = z + max(s_m ∘ (U V z + b) + t_m, 0), shared by matrices of one shape; s_m and t_m are matrix m's own.

    Begins as the identity: U, b and t_m are 0. So max(·, 0) has to have a gradient at 0, as torch's clamp has.
    late: s_m and t_m stand behind the maximum, as MALMEN has them; there t_m, 0 too, may turn negative
    """

    def __init__(self, width: int, rank: int, n_matrices: int, generator: torch.Generator, late: bool = False):
        super().__init__()
        self.late = late
        self.u = nn.Parameter(torch.zeros(width, rank))
        # Differs: deviation 1 / sqrt(width), for the published 1 makes the first steps as many times larger
        self.v = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(n_matrices, width))
        self.shift = nn.Parameter(torch.zeros(n_matrices, width))

    def forward(self, z: Tensor, matrix: int) -> Tensor:
        inner = (z @ self.v.T) @ self.u.T + self.bias
        scale, shift = self.scale[matrix], self.shift[matrix]
        return z + (inner.clamp(min=0) * scale + shift if self.late else (inner * scale + shift).clamp(min=0))


def _name(place: Place) -> str:
    """A place as the names of modules have it, which take no dots."""
    return f"{place[1]}-{place[0]}"


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a network's file. Raises ValueError where it is none."""
    expected = "expected a network, as `kedit-fast train` and Network.save write it"
    try:
        with safe_open(path, "pt") as file:
            name, _, version = (file.metadata() or {}).get("format", "").partition(" ")
            if name != FORMAT:
                raise ValueError(f"{path} is a safetensors file but no network; {expected}")
            with reading(path, expected, "cannot be read"):
                check_format({"format": name, "version": version}, FORMAT, version=VERSION)
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or no safetensors file ({error}); {expected}") from error
