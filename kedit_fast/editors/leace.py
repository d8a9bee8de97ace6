"""Concept scrubbing (Belrose et al. 2023, arXiv:2306.03819, section 5): a concept is erased from one layer after the
other, each fitted on rows that the layers below have lost it from. ``moments/leace.py`` has the eraser's formula.

    for layer, ascending:  r_layer = LEACE(rows at the site of the layer, labels);  the layers above read r_layer(rows)

The result acts on every row of every text. Where the site lies at a matrix it becomes one with it (``fold``), exactly:

    mlp_out   W, b of the down projection  ->  P W, P b + (I - P) μ            what it writes
    mlp_key   W, b of the down projection  ->  W P, b + W (I - P) μ            what it reads
    mlp_in    W, b of gate and up          ->  W P, b + W (I - P) μ            what they read
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kedit_fast import __version__
from kedit_fast.basics import checks
from kedit_fast.basics.progress import progress
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import counted
from kedit_fast.edits.chain import chain
from kedit_fast.edits.changes import Change, WeightChange
from kedit_fast.edits.deltas import LowRank, storable
from kedit_fast.edits.edit import Edit
from kedit_fast.edits.erasures import BiasChange, ErasureChange
from kedit_fast.facts.fact import Fact, check_subject
from kedit_fast.facts.tokens import encode, fact_tokens
from kedit_fast.jobs.collect import Collect
from kedit_fast.model.family import role_path
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.moments.leace import Eraser, LeaceFitter
from kedit_fast.sweep.engine import Job, sweep
from kedit_fast.sweep.plan import PLACE, RowCost, free, together
from kedit_fast.sweep.runs import RunList, add_sequences, spans
from kedit_fast.sweep.sites import IN, Site

SITES = (Site.layer_out, Site.attn_out, Site.mlp_out, Site.mlp_in, Site.mlp_key)
POSITIONS = ("last", "subject", "all")
METHOD = "leace"
FOLDED = {Site.mlp_out: ("down",), Site.mlp_key: ("down",), Site.mlp_in: ("up", "gate", "gate_up")}


@takes_lm
@torch.no_grad()
def leace(
    lm: LM,
    prompts: str | Fact | Iterable[str | Fact],
    labels: Tensor | Iterable[Hashable],
    layers: int | Iterable[int],
    *,
    site: str = "layer_out",
    positions: str = "last",
    **how: Any,
) -> Edit:
    """An Edit whose model's rows at ``site`` of each of ``layers`` tell no linear predictor the labels.

    prompts: texts, or Facts, of which the prompt is read (in a chat where the fact is asked there)
    labels: a class for each, anything that compares equal, or numbers [n, k]
    site: layer_out (the residual stream), attn_out, mlp_out, mlp_in or mlp_key
    positions: the rows that are fitted: of the "last" token, of the "subject"'s last one (Facts with subjects), or of
        "all" of a prompt's tokens; what is erased is erased from every row of every text
    how: as ``LeaceFitter`` takes it: method, affine, constrain_cov_trace, shrinkage, svd_tol

    Each layer is run once for all prompts, those of sites within a layer twice; the rows that enter a layer wait. The
    edit holds no facts: it writes no answer. ``provenance["layers"]``: the rank of each layer's eraser and the share of
    the variance that it takes. Raises ValueError, before any work, for labels of one class alone or of another number
    than the prompts, layers that the model lacks and texts that are too long.
    """
    where = Site(checks.choice("site", site, [each.value for each in SITES]))
    if where is Site.mlp_key and lm.family.experts:
        raise ValueError(f"site {site!r}: the keys of a mixture of experts are read and not written: choose mlp_out")
    positions = checks.choice("positions", positions, POSITIONS)
    layers = sorted(set(checks.layers("layers", [layers] if isinstance(layers, int) else layers, lm.n_layers)))
    texts = _texts(lm, prompts, positions)
    z, classes = _labels(labels, len(texts))
    lm.run_owner, lm.acting  # noqa: B018 (they raise for edits that nothing can stand on)
    LeaceFitter(1, 1, **how)
    packs = _packs(lm, texts, z, positions)
    changes: list[Change] = []
    notes = {}
    with progress("erasing (layers)", len(layers)) as bar:
        for layer in layers:
            fitter = LeaceFitter(lm.width_of(where), z.shape[1], **how)
            view = replace(lm, edits=(*lm.edits, Edit("in making", {}, "", (), tuple(changes))))
            for pack in packs:
                fitter.update(*pack.read(view, layer, where))
            eraser = fitter.eraser
            change = _change(lm, eraser, layer, where)
            changes.append(change)
            for pack in packs:
                pack.erase(change)
            notes[layer] = {"rank": eraser.rank, "removed": _removed(fitter, eraser)}
            bar.advance(1)
    if not any(note["rank"] for note in notes.values()):
        warn(
            f"no layer's rows tell the labels linearly at {where.value}, so this edit erases nothing; choose other "
            "layers, positions= or more prompts",
        )
    about = {"version": __version__, "n_rows": fitter.n, "classes": classes, "layers": notes}
    hparams = {"layers": layers, "site": where.value, "positions": positions} | how
    return Edit(METHOD, hparams, lm.fingerprint, (), tuple(changes), provenance=about | chain(lm))


def _change(lm, eraser: Eraser, layer: int, site: Site) -> ErasureChange:
    left, right, mu = (storable(part, lm.dtype) for part in (eraser.proj_left, eraser.proj_right, eraser.mu))
    return ErasureChange(layer, left, right, mu, site)


def _removed(fitter: LeaceFitter, eraser: Eraser) -> float:
    """The share of E‖x - μ‖² that is taken: E‖r(x) - x‖² over it."""
    taken = (eraser.proj_left.T @ eraser.proj_left) @ (eraser.proj_right @ fitter.sigma_xx @ eraser.proj_right.T)
    whole = float(fitter.sigma_xx.trace())
    return round(float(taken.trace()) / whole, 6) if whole else 0.0


# ---- what is read


def _texts(lm, prompts, positions: str) -> list[tuple[list[int], int]]:
    """(token ids, position of the row that is fitted; -1: all of them) of each prompt."""
    given = [prompts] if isinstance(prompts, str | Fact) else checks.items("prompts", prompts, "texts, or Facts")
    texts = []
    for one in given:
        if isinstance(one, Fact):
            said = fact_tokens(lm.tokenizer, check_subject(one) if positions == "subject" else one)
            ids, at = list(said.ids), said.lookup
        else:
            ids, at = encode(lm.tokenizer, checks.text("prompts", one)), -1
            if positions == "subject":
                raise ValueError(f"positions 'subject': {one!r} is a text; give Facts, whose subject is known")
        lm.check_length(len(ids), f"prompt {one.label if isinstance(one, Fact) else one!r}")
        texts.append((ids, {"last": len(ids) - 1, "subject": at, "all": -1}[positions]))
    if not texts:
        raise ValueError("prompts is empty; expected texts, or Facts, with a label for each")
    return texts


def _labels(labels, n: int) -> tuple[Tensor, list]:
    """([n, k] fp64, what its columns are; of numbers nothing)."""
    if isinstance(labels, Tensor) and labels.ndim == 2:
        z, classes = labels.double().cpu(), []
    else:
        if isinstance(labels, Tensor) and (labels.ndim != 1 or labels.is_floating_point()):
            raise ValueError(
                f"labels: {labels.dtype} {list(labels.shape)}; expected whole numbers [n], a class each, or numbers "
                "[n, k], a column for each that is to be erased"
            )
        given = labels.tolist() if isinstance(labels, Tensor) else list(checks.items("labels", labels, "a class each"))
        if odd := [each for each in given if not isinstance(each, Hashable)]:
            raise ValueError(f"labels: {odd[0]!r} is no class; expected texts or whole numbers, or a tensor [n, k]")
        classes = list(dict.fromkeys(given))
        number = {each: i for i, each in enumerate(classes)}
        z = torch.nn.functional.one_hot(torch.tensor([number[each] for each in given]), len(classes)).double()
    if len(z) != n:
        raise ValueError(f"labels: expected one for each of {counted(n, 'prompt')}, got {len(z)}")
    if not torch.isfinite(z).all() or not z.var(0, correction=0).any():
        raise ValueError(f"labels: {n} of one class, or not finite; expected two classes at least, to tell apart")
    return z, [str(each) for each in classes]


def _packs(lm, texts, z: Tensor, positions: str) -> list["_Pack"]:
    """The texts in order, as many together as the memory holds."""
    cost = RowCost.of(lm).kept + 2 * lm.d_ff * lm.dtype.itemsize + PLACE
    groups = list(together(range(len(texts)), lambda i: len(texts[i][0]) * cost, max(free(lm), 1)))
    return [_Pack(lm, [texts[i] for i in some], z[some], len(groups) > 1) for some in groups]


class _Pack:
    """Texts on their way up: their runs, the rows that enter the layer that comes next, the places that are fitted."""

    def __init__(self, lm, texts: Sequence[tuple[list[int], int]], z: Tensor, on_host: bool):
        length = torch.tensor([len(ids) for ids, _ in texts])
        at = torch.tensor([at for _, at in texts])
        which, self.pos = spans(torch.where(at < 0, 0, at), torch.where(at < 0, length, at + 1))
        runs = RunList()
        self.run = add_sequences(runs, [ids for ids, _ in texts], owner=0)[which]
        self.runs, self.z, self.on_host = runs.runs(), z[which], on_host
        self.every = spans(self.runs.first_pos, self.runs.first_pos + self.runs.n_rows)
        self.h: Tensor | None = None
        self.next = 0
        self.is_behind = False  # the rows that wait are those of the last site read, not erased yet

    def read(self, view, layer: int, site: Site) -> tuple[Tensor, Tensor]:
        """(rows [k, width] at the site, their labels [k, z]); what enters the next layer waits then."""
        behind = layer - (site is not Site.layer_out)
        seen = Collect(site, [layer], self.run, self.pos)
        kept = Collect(Site.layer_out, [behind], *self.every)
        jobs: list[Job] = [seen] if behind < self.next else [kept, seen]
        h = None if self.h is None else self.h.to(view.device)
        sweep(view, self.runs, jobs, first_layer=self.next, last_layer=layer, h=h)
        if kept in jobs:
            self.h, self.next = kept.values[behind].to("cpu" if self.on_host else view.device), behind + 1
            self.is_behind = site is Site.layer_out
        return seen.values[layer], self.z

    def erase(self, change: ErasureChange) -> None:
        """What waits behind the site goes on without the concept."""
        if self.is_behind and self.h is not None:
            self.h = change.erased(self.h)


# ---- folded into weights


@takes_lm
@torch.no_grad()
def fold(lm: LM, edit: Edit) -> Edit:
    """The same edit as changes of weights and biases: it costs nothing when the model runs, and ``apply`` writes it.

    lm: the model that it was made for, without edits. Equal to rounding. Raises ValueError, with the way out, for an
    edit that erases nothing, for sites that lie at no matrix, for a mean without a bias to hold it, for a mixture of
    experts, and for an edit on top of others.
    """
    edit = edit.acting_on(replace(lm, edits=()))
    if not any(isinstance(change, ErasureChange) for change in edit.changes):
        raise ValueError(f"{edit!r} holds no erasure, so there is nothing to fold; expected what kf.leace gives")
    if lm.edits or edit.provenance.get("on_top_of"):
        raise ValueError("the erasure stands on other edits, whose weights it would be folded into: merge those first")
    changes = [made for change in edit.changes for made in _folded(lm, change)]
    return replace(edit, method=f"{edit.method} (folded)", changes=tuple(changes))


def _folded(lm, change: Change) -> list[Change]:
    if not isinstance(change, ErasureChange):
        return [change]
    if change.site not in FOLDED:
        raise ValueError(
            f"layer {change.layer}: {change.site.value} is no input or output of a matrix of the MLP, so nothing takes "
            "the erasure in: erase at mlp_out, mlp_in or mlp_key, or serve it with lm.with_edit(edit)"
        )
    if lm.family.experts:  # the router reads what they read; biases and shared experts write beside their matrices
        raise ValueError(
            f"layer {change.layer} is a mixture of experts, whose matrices do not take all of an erasure in: serve it "
            "with lm.with_edit(edit)"
        )
    left, right, mu = (part.double().cpu() for part in change.parts().values())
    made: list[Change] = []
    for role in (role for role in FOLDED[change.site] if role in lm.family.roles):
        weight = lm.source.weight(change.layer, role).detach().double().cpu()
        bias = _bias(lm, change.layer, role)
        if change.site is IN[role]:  # what it reads
            u, v, shift = -weight @ left, right.T, weight @ (left @ (right @ mu))
        else:
            held = 0 if bias is None else bias.double().cpu()
            u, v, shift = -left, (right @ weight).T, left @ (right @ (mu - held))
        if left.shape[1]:
            delta = LowRank(storable(u, lm.dtype).contiguous(), storable(v, lm.dtype).contiguous())
            made.append(WeightChange(change.layer, delta, role))
        if bias is not None:
            made.append(BiasChange(change.layer, storable(shift, lm.dtype), role))
        elif shift.any():
            raise ValueError(
                f"layer {change.layer}: this model's {role} projection has no bias to hold the erasure's mean: fit it "
                "with affine=False, which erases as much and moves the mean, or serve it with lm.with_edit(edit)"
            )
    return made


def _bias(lm, layer: int, role: str) -> Tensor | None:
    """The bias [out] of a projection; None where it has none."""
    path = role_path(lm.model.config, role)
    if getattr(lm.source.layers[layer].get_submodule(path), "bias", None) is None:
        return None
    return lm.source.rows(layer, f"{path}.bias", (slice(None),)).detach()
