"""What ROME and MEMIT share: settings files, the facts as token sequences, keys, statistics."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..edit import Edit
from ..facts import Fact, check_facts, fact_tokens, target_tokens
from ..jobs.collect import Collect
from ..jobs.values import ValueTask
from ..kernels.solve import MomentFactor, factor
from ..model.family import check_layer
from ..moments import SecondMoment, second_moments
from ..sites import Site
from ..sweep.engine import sweep
from ..sweep.runs import RunList, add_sequences
from .contexts import checked_contexts

ESSENCE = "{} is a"  # the prompt whose next-token distribution the KL term keeps
# Published settings files also hold these. Module paths follow from the model; statistics are handed to ``edit``.
IGNORED = {
    "rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module",
    "layer_selection", "mom2_dataset", "mom2_n_samples", "mom2_dtype", "model_name", "alg_name", "stats_dir", "device",
    "max_length", "model_parallel", "model_class", "tokenizer_class", "tokenizer_name",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters that ROME and MEMIT share, under their published names, and how they are read.

    layers: edited
    v_num_grad_steps, v_lr, v_weight_decay, kl_factor: of the optimization of a fact's value (jobs/values.py);
    clamp_norm_factor: ||value - start|| <= this times ||start||
    v_loss_layer: whose hidden state MEMIT's loss reads (None: the last); ROME's loss is of the model's own output, so
    there the field is only read
    context_template_length_params: (length, n) of generated contexts
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

    POSITIVE: ClassVar = ("v_num_grad_steps", "v_lr", "clamp_norm_factor")

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        pairs = tuple(tuple(pair) for pair in self.context_template_length_params)
        object.__setattr__(self, "context_template_length_params", pairs)

    @classmethod
    def from_json(cls, path):
        """The editor of a published hyper-parameter file (or one of the same form).

        Module paths and the statistics' data set are read over: they follow from the model and from ``edit``'s
        arguments. Raises ValueError for a field that no editor has, naming it.
        """
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); expected a hyper-parameter file") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path} holds a JSON {type(given).__name__}; expected an object of hyper-parameters")
        known = {f.name for f in fields(cls)}
        unknown = set(given) - known - IGNORED
        if unknown:
            raise ValueError(
                f"{path}: {cls.__name__} has no field {sorted(unknown)}; it has {', '.join(sorted(known))}"
            )
        return cls(**{name: value for name, value in given.items() if name in known})

    def _prepared(self, lm, facts, contexts, previous):
        """(model with ``previous`` on it, facts, groups of contexts or None), checked before any work."""
        self._check(lm)
        facts = checked_facts(lm, facts)
        groups = None if contexts is None else checked_contexts(contexts)
        return under(lm, previous), facts, groups

    def _check(self, lm) -> None:
        if not self.layers:
            raise ValueError(f"{type(self).__name__} needs layers; {type(self).__name__}.for_model(lm) derives them")
        for layer in (*self.layers, *([] if self.v_loss_layer is None else [self.v_loss_layer])):
            check_layer(layer, lm.n_layers)
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers {self.layers}: expected each layer once")
        if self.fact_token != "subject_last":
            raise ValueError(f'fact_token {self.fact_token!r}: only "subject_last" carries the fact; expected that')
        for name in self.POSITIVE:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} {value}: expected a number above 0")
        if not 0 <= self.regularizer < math.inf:
            raise ValueError(f"regularizer {self.regularizer}: expected 0 or a small positive number such as 1e-6")


def published(table: dict, lm):
    """The editor published for this very model, or None."""
    name = Path(str(lm.name)).name.lower()
    return next((editor for known, editor in table.items() if known.lower() == name), None)


@dataclass(frozen=True)
class Prompts:
    """n facts in all contexts, as token sequences; what keys and values are read from.

    sequences: [n * m] prompts, fact by fact, in m contexts each (the bare one first); lookups: [n * m] positions;
    weights: [m] of each context in a key
    """

    facts: tuple[Fact, ...]
    sequences: list[list[int]]
    lookups: Tensor
    weights: Tensor

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

    @property
    def bare(self) -> Tensor:
        """[n] index of each fact's bare prompt among the sequences."""
        return torch.arange(len(self.facts)) * self.n_contexts

    def value_tasks(self, lm) -> list[ValueTask]:
        """What the values of these facts are optimized on."""
        tasks = []
        for i, fact in enumerate(self.facts):
            mine = slice(i * self.n_contexts, (i + 1) * self.n_contexts)
            essence = fact_tokens(lm.tokenizer, Fact(prompt=ESSENCE, subject=fact.subject))
            target = target_tokens(lm.tokenizer, fact.target_new)
            ids = list(essence.ids)[: essence.lookup + 1]
            tasks.append(ValueTask(self.sequences[mine], self.lookups[mine].tolist(), target, ids))
        return tasks

    def collect(self, lm, reads: dict[Site, tuple[int, Tensor]]) -> dict[Site, Tensor]:
        """{site: rows [k, width]} at one layer each, at the lookup tokens of the sequences ``which`` [k]; one sweep."""
        runs = RunList()
        number = add_sequences(runs, self.sequences, owner=lm.run_owner)
        jobs = {
            site: Collect(site, [layer], number[which], self.lookups[which]) for site, (layer, which) in reads.items()
        }
        sweep(lm, runs.runs(), list(jobs.values()), last_layer=max(layer for layer, _ in reads.values()))
        return {site: job.values[reads[site][0]] for site, job in jobs.items()}

    def average(self, rows: Tensor) -> Tensor:
        """[n, width] fp64: rows [n * m, width] of all sequences, averaged over contexts by their weights."""
        grouped = rows.double().view(len(self.facts), self.n_contexts, -1)
        return torch.einsum("m,nmw->nw", self.weights.to(grouped.device), grouped)


def checked_facts(lm, facts) -> list[Fact]:
    """Facts an editor can write, before any work: targets present, no contradictions, all of it in the tokenizer's
    reach and short enough for the model."""
    facts = check_facts([facts] if isinstance(facts, Fact) else list(facts), need_new=True)
    for fact in facts:
        prompt, target = fact_tokens(lm.tokenizer, fact), target_tokens(lm.tokenizer, fact.target_new)
        lm.check_length(len(prompt.ids) + len(target) - 1)
    return facts


def under(lm, previous):
    """The model with an earlier edit, for an edit made on top of it. Raises ValueError for independent edits."""
    if previous is not None and not isinstance(previous, Edit):
        raise TypeError(f"previous: expected an Edit, got {type(previous).__name__}; Edit.load reads a file")
    lm = lm if previous is None else lm.with_edit(previous)
    lm.run_owner  # noqa: B018 (raises for independent edits, now and not in the first sweep)
    return lm


def moments_for(lm, layers, moments, corpus, regularizer: float) -> dict[int, SecondMoment]:
    """The statistics of each layer: those given, checked, or measured over ``corpus``.

    Raises ValueError where there are neither, or they are another model's or layer's, of too few tokens, or not finite.
    """
    if moments is None:
        if corpus is None:
            raise ValueError(
                "an edit needs second moments of the keys: give moments=kedit_fast.second_moments(...), or corpus= "
                '("self" samples text from the model), or mom2_adjustment=False to go without'
            )
        moments = second_moments(lm, layers, corpus)
    for layer in layers:
        if layer not in moments:
            raise ValueError(f"no second moment for layer {layer}; given for {sorted(moments)}")
        m = moments[layer]
        if m.fingerprint is not None and m.fingerprint != lm.fingerprint:
            raise ValueError(
                f"the second moment of layer {layer} is of {m.fingerprint}, this model is {lm.fingerprint}"
            )
        if m.layer != layer:
            raise ValueError(f"the second moment given for layer {layer} is of layer {m.layer}")
        if tuple(m.matrix.shape) != (lm.d_ff, lm.d_ff):
            raise ValueError(
                f"the second moment of layer {layer} is {list(m.matrix.shape)}; this model's d_ff is {lm.d_ff}"
            )
        if m.n_tokens < lm.d_ff and not regularizer:
            raise ValueError(
                f"the second moment of layer {layer} is of {m.n_tokens} tokens, fewer than d_ff = {lm.d_ff}, so it has "
                "no inverse; collect more tokens, or give the editor a regularizer such as 1e-6"
            )
        if not torch.isfinite(m.matrix).all():
            raise ValueError(f"the second moment of layer {layer} holds NaN or infinity; collect it again")
    return moments


def factored(lm, moment: SecondMoment, weight: float, regularizer: float) -> MomentFactor:
    """Cholesky factor of weight * C on the model's device."""
    return factor(moment.matrix.to(lm.device), weight, regularizer=regularizer, n_tokens=moment.n_tokens)


def fit(factor_of_c: MomentFactor, keys: Tensor) -> tuple[float, float]:
    """(g, g / (g + weight)): g = mean of kᵀ C⁻¹ k over the facts, and the share of a residual one layer can reach."""
    half = torch.linalg.solve_triangular(factor_of_c.lower, keys.double().T, upper=False)
    weighted = half.square().sum(0).mean().item()  # kᵀ (weight C)⁻¹ k
    return weighted * factor_of_c.weight, weighted / (weighted + 1)


def storable(lm, factors: Tensor) -> Tensor:
    """Factors as an Edit keeps them: fp32, or fp64 for an fp64 model."""
    return factors.to(torch.promote_types(lm.dtype, torch.float32)).cpu()
