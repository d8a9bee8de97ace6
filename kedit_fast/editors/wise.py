"""WISE: Rethinking the Knowledge Memory for Lifelong Model Editing (Wang et al. 2024, arXiv:2405.14768).

A side memory W' = W + Δ beside one late layer's down projection. A prompt is answered through W' where it moves it far
enough, by the mean over its tokens x

    Δ_act = mean ‖x Δᵀ‖  >= ε,  else through W          eq. 4

Δ is trained by gradient descent on the new answers, in several contexts, and on margins of Δ_act between the facts'
prompts and irrelevant ones:

    L = NLL + max(0, D_irr - α) + max(0, β - D_edit) + max(0, γ - (D_edit - D_irr))          eq. 5

Facts come in shards, each with a random mask of Δ's entries that may move, from W again. WISE-Merge joins all shards
into one memory by TIES (Yadav et al. 2023); WISE-Retrieve keeps several, of which a prompt takes the one that it moves
most. ε is ``act_ratio`` times the least D_edit of a memory's facts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.editors.contexts import memit_contexts
from kedit_fast.editors.editor import Editor, Found, Work, Written
from kedit_fast.editors.hyperparameters import published
from kedit_fast.editors.memory import MEMORY_UNREAD, irrelevant, layers_of, one_layer, only, prompts_of
from kedit_fast.edits.memories import SideMemory
from kedit_fast.edits.memory_routes import ActivationRoute, activations
from kedit_fast.facts.fact import Fact
from kedit_fast.jobs.collect import collect
from kedit_fast.jobs.finetune import TuneSettings, TuneTask, fine_tune
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.sweep.runs import RunList, add_sequences, spans
from kedit_fast.sweep.sites import Site

GROUP = "expected three numbers, alpha, beta, gamma"


@dataclass(frozen=True)
class Wise(Editor):
    """WISE: a tuned copy of one matrix beside the model; prompts that it was tuned for are routed to it.

    Hyper-parameters under their published names; ``edit`` does the work.

    layers: one; edit_lr, n_iter: of gradient descent on a batch of ``batch_size`` facts (published: one); a batch whose
    loss is below 0.01 is done
    alpha, beta, gamma: the margins (act_margin of published files); act_ratio: ε over the least D_edit
    mask_ratio: share of Δ's entries that a shard may move; norm_constraint: the most that one may; mask_seed: of masks
    save_freq: facts of a shard; merge_freq: facts of a memory, with ``retrieve``; densities: share of a shard's entries
    that TIES keeps
    retrieve: several memories (WISE-Retrieve); else all shards are merged into one (WISE-Merge)
    source: where these settings come from, for whoever reads the edit

    Differs: prompts decide once, in a batch each for itself, where the published code decides again at each token of
    the only text; D is of the prompt alone, which is what is looked at later; ε is measured with the memory as it is
    stored, after merging; no weight decay, which would move what a mask leaves out; irrelevant prompts are the
    package's own facts. Shards are merged at once, not one after the other into what was merged before.
    """

    layers: tuple[int, ...] = ()
    edit_lr: float = 1.0
    n_iter: int = 70
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    act_ratio: float = 0.88
    mask_ratio: float = 0.2
    norm_constraint: float = 1.0
    save_freq: int = 500
    merge_freq: int = 1000
    densities: float = 0.53
    retrieve: bool = False
    batch_size: int = 1
    context_template_length_params: tuple[tuple[int, int], ...] = ((10, 10),)
    mask_seed: int = 0
    source: str = "given"

    METHOD: ClassVar = "wise"
    ALG_NAMES: ClassVar = {"WISE": {}}
    POSITIVE: ClassVar[tuple[str, ...]] = (
        "edit_lr", "n_iter", "mask_ratio", "norm_constraint", "save_freq", "merge_freq", "densities", "batch_size",
    )  # fmt: skip
    IN_FILES: ClassVar = {
        "inner_params": layers_of, "act_margin": lambda value: margins(value), "merge_alg": only("ties"),
        "objective_optimization": only("only_label"), "weights": only(1.0, 1), "replay": only(False),
    }  # fmt: skip
    STAGES: ClassVar = ("fine-tuning", "measuring activations")
    NEEDS_SUBJECT: ClassVar = False
    mom2_adjustment: ClassVar = False
    UNREAD: ClassVar = {name: why for name, why in MEMORY_UNREAD.items() if name != "contexts"}

    def __post_init__(self):
        super().__post_init__()
        one_layer(self)
        for name in ("mask_ratio", "densities", "act_ratio"):
            if not 0 < getattr(self, name) <= 1:
                checks.refuse(name, getattr(self, name), "a share, above 0 and at most 1")

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Wise":
        """Published settings where there are some for this model, else derived ones; ``source`` says which.

        Derived: the published share of the depth, two contexts, and margins of a quarter, once and half of what the
        projection gives (a norm of 95 at SmolLM2-135M's layer 25). There, three facts one after the other, 30
        iterations, one context: D of their prompts 90 to 122, of neighbors 44 to 57, of paraphrases 56 to 101. At the
        published margins and rate D overshoots (71 to 85 for all paraphrases and neighbors, ε at 80); at a tenth of the
        rate no answer is learned.
        """
        known = published(PUBLISHED, lm)
        if known is None:
            return derived(cls, lm)
        alpha, beta, gamma = known.margins
        return cls(
            layers=(known.layer,), edit_lr=known.lr, n_iter=known.n_iter, alpha=alpha, beta=beta, gamma=gamma,
            act_ratio=known.act_ratio, source=f"published for {known.name}",
        )  # fmt: skip

    def sampled_contexts(self, lm: LM, seed: int) -> list[list[str]]:
        """The bare prompt and templates that begin with sampled text."""
        return memit_contexts(lm, self.context_template_length_params, seed=seed)

    def write(self, work: Work) -> Written:
        """Shard after shard, each batch after batch; then the memories and their thresholds."""
        lm, facts, (layer,) = work.lm, work.facts, self.layers
        shards, found = [], []
        for number, some in enumerate(self._shards(facts)):
            delta, tuned = self._shard(work, some, number)
            shards.append(delta)
            found += tuned
        per = max(1, self.merge_freq // self.save_freq) if self.retrieve else len(shards)
        deltas = [ties(shards[i : i + per], self.densities) for i in range(0, len(shards), per)]
        entry = torch.tensor([min(i // self.save_freq // per, len(deltas) - 1) for i in range(len(facts))])
        memory = SideMemory.of_deltas(layer, deltas, lm.dtype)
        asked = [(i, prompt) for i, fact in enumerate(facts) for prompt, _ in prompts_of(lm, fact)]
        whose = torch.tensor([i for i, _ in asked])
        moved = activations(lm, [prompt for _, prompt in asked], memory)
        own = moved.gather(1, entry[whose][:, None])[:, 0]
        least = torch.full((len(deltas),), torch.inf, dtype=own.dtype).scatter_reduce(0, entry[whose], own, "amin")
        return Written(
            [memory],
            Found([one[0] for one in found], *([one[i] for one in found] for i in (1, 2))),
            layers={layer: {"memories": len(deltas), "shards": len(shards), "threshold": least.min().item()}},
            route=ActivationRoute(self.act_ratio * least, entry),
        )

    def _shards(self, facts: Sequence[Fact]) -> Iterator[Sequence[Fact]]:
        return (facts[i : i + self.save_freq] for i in range(0, len(facts), self.save_freq))

    def _shard(self, work: Work, facts: Sequence[Fact], number: int) -> tuple[Tensor, list[tuple]]:
        """(Δ [d, d_ff] of a shard, (steps, loss, P(new)) of each fact as its batch ended)."""
        lm, (layer,) = work.lm, self.layers
        random = torch.Generator().manual_seed(self.mask_seed + number)
        shape = lm.shape_of("down")
        mask = (torch.rand(shape, generator=random) < self.mask_ratio).to(lm.device)
        templates = [template for group in work.contexts for template in group]
        start: dict[int, Tensor] = {}
        found: list[tuple] = []
        strange = irrelevant(lm, work.facts)
        for begin in range(0, len(facts), self.batch_size):
            some = facts[begin : begin + self.batch_size]
            tasks = [TuneTask(*each, fact.label) for fact in some for each in prompts_of(lm, fact, templates)]
            whose = [i for i, fact in enumerate(some) for _ in prompts_of(lm, fact, templates)]
            others = [strange[(begin + i) % len(strange)] for i in range(len(some))]
            also = Margins(lm, layer, [task.prompt for task in tasks], whose, others, self)
            settings = TuneSettings(
                layers=self.layers, lr=self.edit_lr, steps=self.n_iter, limit=self.norm_constraint, sgd=True,
                batch_size=len(tasks),
            )  # fmt: skip
            tuned = fine_tune(lm, tasks, settings, lambda _, g: g * mask, start=start, also=also)
            start, steps = tuned.deltas, len(tuned.losses)
            nll = [float(tuned.nll[whose.index(i)]) for i in range(len(some))]
            found += [(steps, round(tuned.losses[-1], 5), round(float(torch.tensor(-x).exp()), 5)) for x in nll]
        return start[layer], found


class Margins:
    """The margin terms of a batch as a function of Δ: of keys that are read once, for they lie below it.

    prompts: token ids of the batch's prompts in their contexts; whose: the fact of each; others: an irrelevant prompt
    for each fact
    """

    def __init__(self, lm, layer: int, prompts: list[list[int]], whose: list[int], others: list[list[int]], editor):
        self.layer, self.editor, self.whose = layer, editor, torch.tensor(whose)
        length = torch.tensor([len(ids) for ids in (*prompts, *others)])
        runs = RunList()
        number = add_sequences(runs, [*prompts, *others], owner=lm.run_owner)
        self.which, pos = spans(torch.zeros_like(length), length)
        with torch.no_grad():
            self.keys = collect(lm, runs.runs(), Site.mlp_key, [layer], number[self.which], pos)[layer]
        self.length, self.n = length, len(prompts)

    def __call__(self, deltas: dict[int, Tensor]) -> Tensor:
        """Σ of the three terms, each the mean over those of its margins that are not kept."""
        delta, editor = deltas[self.layer], self.editor
        moved = (self.keys.to(delta) @ delta.T).norm(dim=1)
        summed = moved.new_zeros(len(self.length)).index_add(0, self.which.to(moved.device), moved)
        mean = summed / self.length.to(summed)
        own, strange = mean[: self.n], mean[self.n :]
        terms = (strange - editor.alpha, editor.beta - own, editor.gamma - (own - strange[self.whose.to(own.device)]))
        return torch.stack([_over(term) for term in terms]).sum()


def _over(term: Tensor) -> Tensor:
    """The mean of what is above 0; 0 where nothing is."""
    return term.clamp(min=0).sum() / (term > 0).sum().clamp(min=1)


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Δs [d, d_ff] merged into one: each is cut to the share ``density`` of its entries that are largest; the sign of
    an entry is that of their sum; its value the mean of those of that sign (Yadav et al. 2023, arXiv:2306.01708)."""
    if len(deltas) == 1:
        return deltas[0]
    cut = torch.stack([_largest(delta, density) for delta in deltas])
    sign = torch.where(cut.sum(0) >= 0, 1.0, -1.0).to(cut)
    agree = cut.sign() == sign
    return (cut * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(delta: Tensor, density: float) -> Tensor:
    k = int(density * delta.numel())
    kept = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
    kept[delta.flatten().abs().topk(k).indices] = True
    return torch.where(kept.view_as(delta), delta, 0.0)


def margins(value: Any) -> dict:
    """alpha, beta and gamma of a file's ``act_margin``. Raises ValueError."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(GROUP)
    return dict(zip(("alpha", "beta", "gamma"), value, strict=True))


def derived(cls, lm: LM) -> Wise:
    """Of a model for which nothing was published."""
    return cls(
        layers=(min(round(0.84 * lm.n_layers), lm.n_layers - 1),), edit_lr=0.5, alpha=25.0, beta=100.0, gamma=50.0,
        context_template_length_params=((10, 2),), source=f"derived for {lm.n_layers} layers",
    )  # fmt: skip


class _Known(NamedTuple):
    """What was published for a model. v_loss_layer: its last layer, by which ``published`` tells it from namesakes."""

    name: str
    v_loss_layer: int
    layer: int
    margins: tuple[float, float, float] = (5.0, 20.0, 10.0)
    act_ratio: float = 0.88
    lr: float = 1.0
    n_iter: int = 70


PUBLISHED = {
    known.name: known
    for known in (
        _Known("Llama-2-7b-hf", 31, 27), _Known("Mistral-7B-v0.1", 31, 27),
        _Known("Meta-Llama-3-8B-Instruct", 31, 29, (2.0, 20.0, 10.0), 0.5, 0.9, 30), _Known("Qwen2.5-7B", 27, 23),
        _Known("gpt-j-6B", 27, 21, (15.0, 40.0, 20.0)),
    )
}  # fmt: skip
