"""UltraEdit (Gu et al. 2025, arXiv:2505.14679), and StableEdit, which whitens its gradients (More Edits, More Stable:
Understanding the Lifelong Normalization in Sequential Model Editing, ICML 2026): an edit by one forward and one
backward pass, without a subject, statistics of text or values that are optimized.

At the tokens t where a target is read, each matrix has an input h_t and an output gradient g_t of the loss. Normalized
by what was seen so far, over all edits and over all matrices of one shape (n tokens, mean μ, covariance Σ),

    h~ = (h - μ_h) / σ_h          g~ = (g - μ_g) / σ_g,  StableEdit once n > d_out + 1:  (g - μ_g) Σ_g^(-1/2)
    v = -η |h~|² g~               Δᵀ = (Hᵀ H + α I)⁻¹ Hᵀ V = Hᵀ (H Hᵀ + α I)⁻¹ V

A step down the gradient, then, by which each h is asked to give v more: a ridge regression of V on H. The second form,
of the size of the tokens, is taken where these are fewer than H is wide.

What was seen stands in each edit as sums (``Edit.statistics``), and adds up: an edit on top of others (``previous=``)
normalizes by theirs and its own, the last of several turns by what all of them at once would. ``warm_up`` gives an
edit that changes nothing and holds sums alone: it is given as ``previous=``, before the others, each time (or composed
with them), and is not needed to use what was edited on top of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kedit_fast import __version__
from kedit_fast.editors.contexts import BARE
from kedit_fast.editors.editor import Editor, Found, Work, Written, check_lengths, checked_facts
from kedit_fast.editors.hyperparameters import published
from kedit_fast.edits.chain import chain, under
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.compose import summed_statistics
from kedit_fast.edits.deltas import Delta, Dense, LowRank, as_smallest, storable
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import fact_answer, fact_tokens
from kedit_fast.jobs.gradients import GradientTask, Place, gradient_factors, task_losses
from kedit_fast.model.lm import LM, takes_lm

EPSILON = torch.finfo(torch.float32).eps  # beside σ, as published
FLOOR = 1e-6  # of Σ_g's eigenvalues, as published


@dataclass(frozen=True)
class UltraEdit(Editor):
    """UltraEdit: one gradient of all facts, normalized feature by feature, and one ridge solve a matrix.

    Hyper-parameters under their published names, and where they act.

    layers; roles: which matrices of them, one name for all layers or one a layer; "gate+up" is both
    lr: η; alpha: α
    loss_batch: facts whose target tokens' mean is one loss, as published (dataset.batch_size): it weighs facts
    source: where these settings come from, for whoever reads the edit
    """

    layers: tuple[int, ...] = ()
    roles: tuple[str, ...] = ("down",)
    lr: float = 1e-6
    alpha: float = 1.0
    loss_batch: int = 10
    source: str = "given"

    METHOD: ClassVar = "ultraedit"
    POSITIVE: ClassVar[tuple[str, ...]] = ("lr", "alpha", "loss_batch")
    ALG_NAMES: ClassVar = {"ULTRAEDIT": {}}
    IN_FILES: ClassVar = {
        "token": lambda value: _only(value, "ans"),
        "RunningMeanStd_mode": lambda value: _only(value, "original"),
    } | dict.fromkeys(("name", "preheat_mode", "save_checkpoint", "load_checkpoint"), lambda value: {})
    STAGES: ClassVar = ("taking gradients",)
    NEEDS_SUBJECT: ClassVar = False  # it reads prompts and targets alone
    NEEDS_CONTEXTS: ClassVar = False
    WHITENS: ClassVar = False
    mom2_adjustment: ClassVar = False
    GENTLER: ClassVar[str] = "edit fewer facts at once, or with a smaller lr or a larger alpha"
    UNREAD: ClassVar = dict.fromkeys(
        ("moments", "corpus", "contexts"), "it reads prompts, targets and their gradients alone; leave it out"
    ) | {
        "independent": "facts are normalized and solved together; edit them one at a time, each as an edit of its own",
        "checkpoint": "it is one pass, which has no finished parts to keep; leave it out",
    }

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "UltraEdit":
        """Published matrices where there are some for this model, else derived ones; ``source`` says which.

        Derived: gate and up of the layers at 0.64 to 0.93 of the depth, Qwen's (the down projection where the MLP has
        no gate), and η in proportion to 1 / (h's width), as |h~|² is about that. On SmolLM2-135M, ten facts: all ten
        are said with η = 1e-4 (P(new) 0.88), nine with 3e-5 (0.42) and with 3e-4, none with 7e-6.
        """
        known = published(PUBLISHED, lm)
        if known is not None:
            alpha = known.alpha if cls.WHITENS else 1.0
            return cls(known.layers, known.roles, alpha=alpha, source=f"published for {known.name}")
        first, last = round(0.64 * lm.n_layers), round(0.93 * lm.n_layers)
        layers, role = tuple(range(first, max(last, first + 1))), _derived_role(lm)
        wide = lm.shape_of(role.split("+")[0])[1]
        return cls(layers, (role,), lr=PER_INPUT / wide, source=f"derived for {lm.n_layers} layers, inputs of {wide}")

    def check(self, lm: LM) -> None:
        """Raises ValueError for layers or matrices that the model does not have."""
        super().check(lm)
        if len(self.roles) not in (1, len(self.layers)):
            raise ValueError(f"roles {self.roles}: expected one for all {len(self.layers)} layers, or one for each")
        for _, role in self.places:
            lm.shape_of(role)

    @property
    def places(self) -> list[Place]:
        """The matrices."""
        roles = self.roles if len(self.roles) > 1 else self.roles * len(self.layers)
        return [(layer, one) for layer, role in zip(self.layers, roles, strict=True) for one in role.split("+")]

    def write(self, work: Work) -> Written:
        """One pass for the gradients, one for P(new) in the end; nothing is random.

        Differs: facts' sums are exact (the published UltraEdit merges variances that are off by n / (n - 1)); what is
        in sums of squares is fp64.
        """
        lm, n = work.lm, len(work.facts)
        before = summed_statistics(lm.edits)
        self._check_seen(lm, before)
        read = self.read(lm, work.facts)
        seen = _added(before, read.statistics)
        changes: list[WeightChange] = []
        notes: dict[int, dict] = {}
        for place, (h, g) in read.rows.items():
            delta = self._delta(h, g, Seen.of(self.METHOD, lm.shape_of(place[1]), seen))
            changes.append(WeightChange(place[0], _stored(delta, lm.dtype), place[1]))
            notes.setdefault(place[0], {})[place[1]] = {"norm": delta.norm(), "tokens": len(h)}
        made = Edit("in making", {}, "", (), tuple(changes))
        nll = task_losses(replace(lm, edits=(*lm.edits, made)), read.tasks)
        found = Found.of([1] * n, nll[:n], nll[:n])
        about: dict = {"loss_before": [round(x, 5) for x in read.losses[:n].tolist()]}
        about |= {"normalized_by": {name: float(seen[name]) for name in read.statistics if name.endswith(".n")}}
        return Written(
            changes, found, layers=dict(sorted(notes.items())), about=about, statistics=_kept(read.statistics, lm)
        )

    @takes_lm
    def warm_up(self, lm: LM, facts: Fact | Iterable[Fact], *, previous: Edit | Iterable[Edit] | None = None) -> Edit:
        """An edit that changes nothing and holds what was seen of these facts, for ``previous=``: what is edited then
        is normalized by more than itself. The published warm-up is 20 batches of other facts.

        Differs: the published one leaves the warm-up's own changes in the weights.
        """
        self.check(lm)
        facts, lm = checked_facts(facts, False, self.NEEDS_SUBJECT), under(lm, previous)
        check_lengths(lm, facts, [[BARE]])
        return Edit(
            method=self.METHOD, hparams=asdict(self), fingerprint=lm.fingerprint, facts=(), changes=(),
            provenance={"version": __version__, "warmed_up_on": len(facts)} | chain(lm),
            statistics=_kept(self.read(lm, facts).statistics, lm),
        )  # fmt: skip

    def read(self, lm: LM, facts: Sequence[Fact]) -> "Read":
        """h and g of each matrix where the targets of the facts, and of their phrasings, are read."""
        prompts = [*facts, *(one for fact in facts for one in fact.phrased())]
        tasks = [
            GradientTask(list(fact_tokens(lm.tokenizer, one).ids), fact_answer(lm.tokenizer, one), one.label)
            for one in prompts
        ]
        factors, losses = gradient_factors(lm, tasks, self.places)
        length = torch.tensor([len(task.target) for task in tasks], dtype=torch.float64)
        share = torch.cat([some / some.sum() for some in length.split(self.loss_batch)])
        rows: dict[Place, tuple[Tensor, Tensor]] = {}
        sums: dict[str, Tensor] = {}
        for place, made in factors.items():
            read = made.at_targets(tasks)
            h, g = read.x.double(), read.delta.double() * share[read.task, None]
            rows[place] = h, g
            sums = _added(sums, Seen.sums(self.METHOD, h, g, self.WHITENS))
        return Read(tasks, losses, rows, sums)

    def _check_seen(self, lm: LM, before: dict[str, Tensor]) -> None:
        """Raises ValueError where what the edits below hold is damaged, or less than one of them was normalized by."""
        for shape in {lm.shape_of(role) for _, role in self.places}:
            if any(name.startswith(f"{self.METHOD}.{shape[0]}x{shape[1]}.") for name in before):
                Seen.of(self.METHOD, shape, before)
        by = [edit.provenance.get("normalized_by", {}) for edit in lm.edits]
        for name, n in ((name, n) for each in by for name, n in each.items()):
            held = float(before.get(name, 0))
            if name.startswith(f"{self.METHOD}.") and held < n:
                raise ValueError(
                    f"an edit below was normalized by {n:.0f} tokens at matrices of one shape, and those below hold "
                    f"{held:.0f}; give its warm-up, too, before it (previous=[warm, first])"
                )

    def _delta(self, h: Tensor, g: Tensor, seen: "Seen") -> Delta:
        """Δ [out, in] fp64, low-rank where that is smaller."""
        h_normal, g_normal = seen.normalized(h, g)
        v = -self.lr * h_normal.square().sum(1, keepdim=True) * g_normal
        return ridge(h, v, self.alpha)


@dataclass(frozen=True)
class StableEdit(UltraEdit):
    """``UltraEdit`` whose gradients are whitened once enough of them were seen."""

    METHOD: ClassVar = "stableedit"
    ALG_NAMES: ClassVar = {"STABLEEDIT": {}}
    IN_FILES: ClassVar = UltraEdit.IN_FILES | {"RunningMeanStd_mode": lambda value: _only(value, "stable")}
    WHITENS: ClassVar = True


class Read(NamedTuple):
    """tasks: of the facts, then of their phrasings; losses: [tasks]; rows: {place: (h [t, in], g [t, out])} fp64;
    statistics: sums over them"""

    tasks: list[GradientTask]
    losses: Tensor
    rows: dict[Place, tuple[Tensor, Tensor]]
    statistics: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Seen:
    """Sums over all tokens at matrices of one shape, fp64: n; h, hh: [in] of h and of its squares; g: [out]; gg: [out]
    of squares, or [out, out] of g gᵀ."""

    n: Tensor
    h: Tensor
    hh: Tensor
    g: Tensor
    gg: Tensor

    @staticmethod
    def sums(method: str, h: Tensor, g: Tensor, whole: bool) -> dict[str, Tensor]:
        """Of tokens h [t, in], g [t, out], by the names that an edit keeps them under. whole: also g gᵀ"""
        n = torch.tensor(float(len(h)), dtype=torch.float64)
        found = Seen(n, h.sum(0), h.square().sum(0), g.sum(0), g.T @ g if whole else g.square().sum(0))
        head = f"{method}.{g.shape[1]}x{h.shape[1]}"
        return {f"{head}.{field.name}": getattr(found, field.name) for field in fields(Seen)}

    @classmethod
    def of(cls, method: str, shape: tuple[int, int], statistics: dict[str, Tensor]) -> "Seen":
        """Those of one shape [out, in] among an edit's. Raises ValueError where they are not what ``sums`` gives: of a
        file that somebody else wrote."""
        head, (out, width) = f"{method}.{shape[0]}x{shape[1]}", shape
        found = {field.name: statistics.get(f"{head}.{field.name}") for field in fields(cls)}
        wanted: dict[str, list[tuple[int, ...]]] = {
            "n": [()],
            "h": [(width,)],
            "hh": [(width,)],
            "g": [(out,)],
            "gg": [(out,), (out, out)],
        }
        for name, part in found.items():
            if part is None or tuple(part.shape) not in wanted[name] or not torch.isfinite(part).all():
                raise ValueError(f"the statistics {head} of the edits below are damaged ({name}); make them again")
        return cls(**{name: part.double() for name, part in found.items() if part is not None})

    def normalized(self, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """(h~, g~). Raises ValueError for a single token, which has no variance."""
        if self.n < 2:
            raise ValueError(
                "one token has no variance to be normalized by; edit several facts, or on top of a warm-up "
                "(previous=editor.warm_up(lm, other_facts))"
            )
        n, width = float(self.n), len(self.g)
        h = (h - self.h / n) / (_deviation(self.hh, self.h, n) + EPSILON)
        g = g - self.g / n
        if self.gg.ndim == 1 or n <= width + 1:
            return h, g / (_deviation(self.gg if self.gg.ndim == 1 else self.gg.diagonal(), self.g, n) + EPSILON)
        spread = (self.gg - torch.outer(self.g, self.g) / n) / (n - width - 1 + EPSILON)
        values, vectors = torch.linalg.eigh((spread + spread.T) / 2)
        return h, ((g @ vectors) * values.clamp(min=FLOOR).rsqrt()) @ vectors.T


def ridge(h: Tensor, v: Tensor, alpha: float) -> Delta:
    """Δ = Vᵀ H (Hᵀ H + α I)⁻¹ [out, in], which makes h Δᵀ close to v; through the tokens where these are fewer than h
    is wide. h: [t, in]; v: [t, out], fp64; α > 0"""
    t, width = h.shape
    if t < width:
        inner = h @ h.T
        inner.diagonal().add_(alpha)
        return as_smallest(LowRank(v.T.contiguous(), torch.cholesky_solve(h, torch.linalg.cholesky(inner)).T))
    inner = h.T @ h
    inner.diagonal().add_(alpha)
    return Dense(torch.cholesky_solve(h.T @ v, torch.linalg.cholesky(inner)).T)


def _deviation(squares: Tensor, sums: Tensor, n: float) -> Tensor:
    """The standard deviation, of n - 1 degrees of freedom, of what has these sums."""
    return ((squares - sums.square() / n).clamp(min=0) / (n - 1)).sqrt()


def _added(total: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    return total | {name: total[name] + part if name in total else part for name, part in more.items()}


def _kept(statistics: dict[str, Tensor], lm: LM) -> dict[str, Tensor]:
    """As an edit holds them: sums of vectors stay fp64, those of matrices are as wide as its changes."""
    return {name: storable(part, lm.dtype) if part.ndim == 2 else part for name, part in statistics.items()}


def _stored(delta: Delta, dtype: torch.dtype) -> Delta:
    return type(delta)(**{name: storable(part, dtype) for name, part in vars(delta).items()})


def _derived_role(lm: LM) -> str:
    roles = lm.family.roles
    return "gate+up" if "gate" in roles else "gate_up" if "gate_up" in roles else "down"


def _only(value: Any, wanted: str) -> dict:
    """Of a file's setting that is done in one way here: nothing, where it is that. Raises ValueError."""
    if value != wanted:
        raise ValueError(f"expected {wanted!r}; there is nothing else here")
    return {}


class _Known(NamedTuple):
    """What was published for a model. v_loss_layer: its last layer, by which ``published`` tells it from namesakes."""

    name: str
    v_loss_layer: int
    layers: tuple[int, ...]
    roles: tuple[str, ...]
    alpha: float = 1.0  # StableEdit's


PER_INPUT = 1e-4 * 576  # η times h's width, SmolLM2-135M's; published are 0.004 and chains of thousands of edits
PUBLISHED = {
    known.name: known
    for known in (
        _Known("Meta-Llama-3-8B-Instruct", 31, (*range(11, 16), *range(18, 25)), ("gate",) * 5 + ("up",) * 7),
        _Known("Qwen2.5-7B-Instruct", 27, tuple(range(18, 27)), ("gate+up",)),
        _Known("Mistral-7B-v0.3", 31, (28, 29, 30), ("down",), 10.0),
        _Known("gpt-j-6b", 27, tuple(range(18, 27)), ("down",)),
        _Known("phi-4", 39, tuple(range(30, 39)), ("down",)),
    )
}
