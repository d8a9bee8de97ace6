"""What ROME, MEMIT and AlphaEdit share: a fact is written at its subject's last token, the lookup token, by a value
optimized for it. Their hyper-parameters, and what is read at the lookup tokens of a fact in all its contexts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics import checks, ranks
from kedit_fast.editors.contexts import memit_contexts
from kedit_fast.editors.editor import Editor
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import fact_answer, fact_tokens
from kedit_fast.jobs.collect import Collect
from kedit_fast.jobs.finite import not_finite
from kedit_fast.jobs.values import ValueSettings, ValueTask
from kedit_fast.model.lm import LM
from kedit_fast.model.shape import Shape
from kedit_fast.sweep.engine import Job, sweep
from kedit_fast.sweep.plan import RowCost, together
from kedit_fast.sweep.runs import RunList, Runs, add_under, spans
from kedit_fast.sweep.sites import Site
from kedit_fast.sweep.store import on_host

ESSENCE = "{} is a"  # the prompt whose next-token distribution the KL term keeps
KEEPS = (  # prompts of a subject, whatever it is
    "{} is a", "{} was born in the year", "{} is best known for", "The location of {} is", "{} is usually described as",
    "People who know {} say that",
)  # fmt: skip


@dataclass(frozen=True)
class Located(Editor):
    """The hyper-parameters that they share, under their published names, and how they are read.

    layers: edited
    v_num_grad_steps, v_lr, v_weight_decay, kl_factor: of the optimization of a fact's value (jobs/values.py);
    v_lr_relative: whether v_lr is in units of the fact's own start, the median magnitude of its entries; published: no,
    a step is as long whatever the state's size
    clamp_norm_factor: ||value - start|| <= this times ||start||
    v_loss_layer: whose hidden state MEMIT's loss reads (None: the last); ROME's loss is of the model's own output, so
    there the field is only read
    context_template_length_params: (length, n) of generated contexts
    keep_factor: of one more KL term, the mean over ``keeps``, prompts with {} for the subject that are to go on as they
    did; 0 is the published form
    mom2_adjustment: whether second moments are used; regularizer: added to C's diagonal, relative to its mean; 0 is the
    published form
    source: where these settings come from, for whoever reads the edit
    """

    layers: tuple[int, ...] = ()
    fact_token: str = "subject_last"
    v_num_grad_steps: int = 20
    v_lr: float = 0.5
    v_loss_layer: int | None = None
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    mom2_adjustment: bool = True
    context_template_length_params: tuple[tuple[int, int], ...] = ((10, 5),)
    regularizer: float = 0.0
    source: str = "given"
    keep_factor: float = 0.0
    keeps: tuple[str, ...] = KEEPS
    v_lr_relative: bool = False

    GENTLER: ClassVar[str] = "edit fewer facts at once, or with a smaller clamp_norm_factor or fewer v_num_grad_steps"
    CONTEXTS: ClassVar[Callable] = staticmethod(memit_contexts)
    POSITIVE: ClassVar[tuple[str, ...]] = ("v_num_grad_steps", "v_lr", "clamp_norm_factor")

    def __post_init__(self):
        super().__post_init__()
        checks.choice("fact_token", self.fact_token, ["subject_last"])  # the only one that carries the fact
        if bad := [keep for keep in self.keeps if keep.count("{}") != 1]:
            raise ValueError(f"keeps: expected one {{}} for the subject in each, found {bad[0]!r}")
        if self.keep_factor and not self.keeps:
            raise ValueError(f"keep_factor {self.keep_factor} with no keeps: give prompts such as '{{}} is known for'")

    def check(self, lm: LM) -> None:
        """Raises ValueError for layers that the model does not have."""
        super().check(lm)
        if self.v_loss_layer is not None:
            checks.layers("v_loss_layer", [self.v_loss_layer], lm.n_layers)

    def besides(self, fact: Fact) -> list[Fact]:
        """Its phrasings, and what is kept of its subject."""
        return [*super().besides(fact), *(about(fact, keep) for keep in self.kept_prompts)]

    @property
    def kept_prompts(self) -> tuple[str, ...]:
        """``keeps``, where anything is to be kept."""
        return self.keeps if self.keep_factor else ()

    def sampled_contexts(self, lm: LM, seed: int) -> list[list[str]]:
        """Groups of templates, see contexts.py."""
        return type(self).CONTEXTS(lm, self.context_template_length_params, seed=seed)

    def v_settings(self, lm: LM, layer: int) -> ValueSettings:
        """How v* (ROME) is optimized: at a layer's mlp_out, for the loss of the model's own output."""
        return self._values_at(layer, Site.mlp_out, lm.n_layers - 1)

    def z_settings(self, lm: LM | Shape, top: int | None = None) -> ValueSettings:
        """How z (MEMIT) is optimized: at the output of a layer (default: the last edit layer), for the loss at
        ``v_loss_layer``."""
        top = self.layers[-1] if top is None else top
        last = lm.n_layers - 1 if self.v_loss_layer is None else self.v_loss_layer
        return self._values_at(top, Site.layer_out, max(last, top))

    def _values_at(self, layer: int, site: Site, loss_layer: int) -> ValueSettings:
        return ValueSettings(
            layer=layer, site=site, lr=self.v_lr, steps=self.v_num_grad_steps, weight_decay=self.v_weight_decay,
            kl_factor=self.kl_factor, clamp=self.clamp_norm_factor, loss_layer=loss_layer,
            keep_factor=self.keep_factor, relative=self.v_lr_relative,
        )  # fmt: skip


def early_middle(lm: LM | Shape) -> tuple[int, ...]:
    """The layers that derived settings edit: five from a tenth of the depth on."""
    first = round(0.1 * lm.n_layers)
    return tuple(range(first, min(first + 5, lm.n_layers)))


def single_layer(lm: LM) -> int:
    """The layer that derived settings of one layer edit: at a sixth of the depth; where a norm stands behind the MLP,
    at a tenth (of the neighborhood ROME on Gemma-3-270M loses 2 points there, 17 at a sixth)."""
    return early_middle(lm)[0] if lm.ends_in_norm else lm.n_layers // 6


def derived_descent(lm: LM | Shape) -> dict[str, Any]:
    """How derived settings go to z: the published steps of 0.5; where a norm stands behind the MLP, ``SHORT``.

    Such a norm lets states and what MLPs write be of any size. In Gemma-3-270M the median magnitude is 9.1 in the
    stream behind layer 6 and 0.11 at layer 3's MLP (SmolLM2-135M 2.2 and 0.9, so that 0.5 is 0.23 and 0.54 of it): with
    0.5 P(new) at z was 0.32 after 20 steps, and ROME lost 46 points of the neighborhood.

    A long way to z is not written in full through norms, and costs neighbors; short steps end nearer. Of facts that no
    table uses, ten at a time, MEMIT by layers 2 to 6 has

        steps        P(new)   neighborhood      P(new) of ten of zsRE, whose answers are longer
        20 of 0.25   0.985    79.5 -> 63.5 %    0.37
        40 of 0.12   0.974    79.5 -> 70.0 %    0.47

    Lower layers keep more and write less: 1 to 5 lose 8 points and have 0.31 of zsRE, 0 to 3 (20 of 0.35) 4 and 0.11.
    """
    return dict(SHORT) if lm.ends_in_norm else {}


def single_descent(lm: LM) -> dict[str, Any]:
    """How derived settings of one layer go to v*: the published steps; where a norm stands behind the MLP, ``LONG``.
    One layer takes all of it: ROME on Gemma-3-270M has P(new) 0.82, and writes 5 to 8 of ten longer answers."""
    return dict(LONG) if lm.ends_in_norm else {}


# Steps in shares of the median magnitude of a value's start.
SHORT = {"v_lr": 0.12, "v_lr_relative": True, "v_num_grad_steps": 40}
LONG = {"v_lr": 0.35, "v_lr_relative": True}
WAIT = 8  # the share of ``lm.memory`` in which rows may wait on the device for the next layer's reading


@dataclass(frozen=True)
class Prompts:
    """n facts in all contexts, as token sequences; what keys and values are read from.

    sequences: [n * m] prompts, fact by fact, in m contexts each (the bare one first); lookups: [n * m] positions;
    weights: [m] of each context in a key; entered: rows that wait for the next reading, if any do
    """

    facts: tuple[Fact, ...]
    sequences: list[list[int]]
    lookups: Tensor
    weights: Tensor
    entered: "Entered | None" = None

    @classmethod
    def of(cls, lm, facts: Sequence[Fact], groups: list[list[str]]) -> "Prompts":
        """Key weights: the mean within a group, then over groups."""
        templates = [t for group in groups for t in group]
        tokenized = [fact_tokens(lm.tokenizer, fact, template) for fact in facts for template in templates]
        weights = [1 / (len(groups) * len(group)) for group in groups for _ in group]
        return cls(
            tuple(facts), [list(t.ids) for t in tokenized], torch.tensor([t.lookup for t in tokenized]),
            torch.tensor(weights, dtype=torch.float64),
        )  # fmt: skip

    @property
    def n_contexts(self) -> int:
        return len(self.weights)

    def value_tasks(self, lm, keeps: Sequence[str] = ()) -> list[ValueTask]:
        """What the values of these facts are optimized on: their prompts in all contexts, and their phrasings bare.

        keeps: templates of prompts that are to go on as they did
        """
        tok, tasks = lm.tokenizer, []
        for i, fact in enumerate(self.facts):
            mine, more = slice(i * self.n_contexts, (i + 1) * self.n_contexts), fact.phrased()
            essence = fact_tokens(tok, about(fact, ESSENCE))
            phrased, kept = [fact_tokens(tok, one) for one in more], [fact_tokens(tok, about(fact, k)) for k in keeps]
            tasks.append(
                ValueTask(
                    [*self.sequences[mine], *(one.ids for one in phrased)],
                    [*self.lookups[mine].tolist(), *(one.lookup for one in phrased)],
                    [fact_answer(tok, fact)] * self.n_contexts + [fact_answer(tok, one) for one in more],
                    list(essence.ids)[: essence.lookup + 1], fact.label, i,
                    keeps=[one.ids for one in kept], keep_lookups=[one.lookup for one in kept],
                )
            )  # fmt: skip
        return tasks

    def read(self, lm, *, averaged: dict[Site, int], bare: dict[Site, int]) -> "Read":
        """What sites hold at the lookup tokens, at the layer given for each: averaged over contexts by their weights,
        and of the bare prompt. Under independent edits each fact is read under its own.

        One sweep for as many facts as a quarter of ``lm.memory`` holds rows of; facts are shared by ranks. It ends each
        text with its lookup token, behind which nobody looks.
        """
        held = self._fact_bytes(lm, averaged, bare)
        sizes = (self.lookups + 1).view(-1, self.n_contexts).sum(1) * self._row_bytes(lm) + held

        def read(facts: Sequence[int]) -> ranks.Part:
            groups = together(facts, lambda i: int(sizes[i]), lm.memory // 4)
            return ranks.joined([self._read(lm, range(some[0], some[-1] + 1), averaged, bare) for some in groups])

        found = ranks.joined(ranks.shared(range(len(self.facts)), read))
        named = (("averaged", averaged), ("bare", bare))
        return Read(*({site: found[f"{name} {site.value}"].to(lm.device) for site in sites} for name, sites in named))

    def _fact_bytes(self, lm, averaged: dict, bare: dict) -> int:
        """Bytes of the rows that are read of a fact."""
        of_all, of_bare = (sum(map(lm.width_of, sites)) for sites in (averaged, bare))
        return (of_all * self.n_contexts + of_bare) * lm.dtype.itemsize

    def _row_bytes(self, lm) -> int:
        """Bytes of a row where rows wait: its sweep is then one pack."""
        return 0 if self.entered is None else RowCost.of(lm).kept + lm.d_model * lm.dtype.itemsize

    def _read(self, lm, facts: range, averaged: dict, bare: dict) -> ranks.Part:
        """{"averaged SITE", "bare SITE": [n, width]} of some facts, by one sweep."""
        runs, m = RunList(), self.n_contexts
        every = torch.arange(facts.start * m, facts.stop * m)
        pos = self.lookups[every]
        texts = [self.sequences[i][: last + 1] for i, last in zip(every.tolist(), pos.tolist(), strict=True)]
        number = add_under(lm, runs, texts, every // m)
        of_all = {site: Collect(site, [layer], number, pos) for site, layer in averaged.items()}
        of_bare = {site: Collect(site, [layer], number[::m], pos[::m]) for site, layer in bare.items()}
        last = max([*averaged.values(), *bare.values()])
        jobs: list[Job] = [*of_all.values(), *of_bare.values()]
        if self.entered is None or lm.owned:
            sweep(lm, runs.runs(), jobs, last_layer=last, held=lm.memory // 4)
        else:
            self.entered.sweep(lm, facts, runs.runs(), jobs, last)
        means = {f"averaged {site.value}": self._mean(job.values[averaged[site]]) for site, job in of_all.items()}
        return means | {f"bare {site.value}": job.values[bare[site]].double() for site, job in of_bare.items()}

    def _mean(self, rows: Tensor) -> Tensor:
        grouped = rows.double().view(-1, self.n_contexts, rows.shape[1])
        return torch.einsum("m,nmw->nw", self.weights.to(grouped.device), grouped)


class Entered:
    """The rows of prompts as they enter a layer below which nothing is edited any more, so that the next reading goes
    on from there, and not from the embedding. ``layer``: the lowest that may still change; whoever reads sets it."""

    def __init__(self) -> None:
        self.layer = 0
        self._rows: dict[tuple[int, int], tuple[int, Tensor]] = {}  # {facts: (layer, rows in declared order)}

    def sweep(self, lm, facts: range, runs: Runs, jobs: list[Job], last_layer: int) -> None:
        """A reading of these facts; runs: the same each time, and all of them from the embedding on"""
        first, h = self._rows.get((facts.start, facts.stop), (0, None))
        behind, more = self.layer - 1, list[Collect]()
        if first <= behind < last_layer:
            places = spans(runs.first_pos, runs.first_pos + runs.n_rows)
            more = [Collect(Site.layer_out, [behind], *places)]
        h = None if h is None else h.to(lm.device)
        sweep(lm, runs, [*jobs, *more], first_layer=first, last_layer=last_layer, h=h, held=lm.memory // 4)
        for waiting in more:
            rows = waiting.values[behind]
            waits = sum(kept.nbytes for _, kept in self._rows.values() if kept.device == rows.device)
            stays = waits + rows.nbytes <= lm.memory // WAIT
            self._rows[facts.start, facts.stop] = self.layer, rows if stays else on_host(rows)


def about(fact: Fact, template: str) -> Fact:
    """Another prompt of a fact's subject, asked in the fact's form."""
    return Fact(prompt=template, subject=fact.subject, chat=fact.chat)


class Read(NamedTuple):
    """{site: [n, width] fp64}: means over contexts, and of the bare prompts."""

    averaged: dict[Site, Tensor]
    bare: dict[Site, Tensor]


def check_finite(lm, rows: Tensor, facts: Sequence[Fact], what: str) -> None:
    """Raises ValueError, naming the fact, where a fact's row of rows [n, width] holds NaN or infinity."""
    bad = (~torch.isfinite(rows)).any(1).nonzero()[:, 0].tolist()
    if bad:
        raise not_finite(
            lm,
            f"the {what} of fact {facts[bad[0]].label} holds NaN or infinity ({len(bad)} of {len(facts)} facts)",
            "v_lr or clamp_norm_factor that is too high (lower them)",
        )
