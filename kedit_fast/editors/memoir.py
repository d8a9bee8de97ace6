"""MEMOIR: Lifelong Model Editing with Minimal Overwrite and Informed Retention for LLMs (Wang et al. 2025,
arXiv:2506.07899).

A residual memory W' beside one down projection W, of zeros to begin with, of which each fact sees some columns alone:

    y = W x + W' (x ∘ M)

M, a fact's mask, is made of its prompt: of the mean over tokens of x, the ``top_k`` features that stand farthest from
their usual value, each sent elsewhere by one permutation for all (TopHash, section 3.1). So facts overwrite each other
little. A prompt is answered through the mask of the fact whose mask shares most with its own, where that is a share of
``tau`` or more, and by W alone otherwise (section 3.2).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kedit_fast.basics import checks
from kedit_fast.editors.editor import Editor, Found, Work, Written
from kedit_fast.editors.memory import MEMORY_UNREAD, irrelevant, layers_of, one_layer, prompts_of
from kedit_fast.edits.memories import MaskedMemory
from kedit_fast.edits.memory_routes import OverlapRoute
from kedit_fast.edits.routes import prompt_features
from kedit_fast.jobs.finetune import TuneSettings, TuneTask, fine_tune
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.sweep.sites import Site


@dataclass(frozen=True)
class Memoir(Editor):
    """MEMOIR: a residual memory beside one down projection, of which each fact sees some columns alone.

    Hyper-parameters; ``edit`` does the work.

    layers: one; edit_lr, n_iter, clip: of gradient descent on a batch of ``batch_size`` facts, the norm of whose
    gradient is clipped; a batch whose loss is below 0.01 is done
    top_k: features of a mask; tau: the least share of a mask that a prompt has to have
    permutation_seed: of the permutation; source: where these settings come from, for whoever reads the edit

    Differs: facts of a batch are trained together (published: one after the other, ``batch_size`` 1); what features are
    usually is measured on the package's own facts, asked as the edited ones are.
    """

    layers: tuple[int, ...] = ()
    edit_lr: float = 1.0
    n_iter: int = 30
    clip: float = 1.0
    top_k: int = 4096
    tau: float = 0.4
    batch_size: int = 1
    permutation_seed: int = 0
    source: str = "given"

    METHOD: ClassVar = "memoir"
    ALG_NAMES: ClassVar = {"MEMOIR": {}}
    POSITIVE: ClassVar[tuple[str, ...]] = ("edit_lr", "n_iter", "clip", "top_k", "tau", "batch_size")
    IN_FILES: ClassVar = {"inner_params": layers_of}
    STAGES: ClassVar = ("fine-tuning",)
    NEEDS_SUBJECT: ClassVar = False
    NEEDS_CONTEXTS: ClassVar = False
    mom2_adjustment: ClassVar = False
    UNREAD: ClassVar = MEMORY_UNREAD

    def __post_init__(self):
        super().__post_init__()
        one_layer(self)
        if self.tau > 1:
            checks.refuse("tau", self.tau, "a share, above 0 and at most 1")

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Memoir":
        """Published: layer 27 of 32, 4,096 of 14,336 features, tau 0.4; derived: the same shares of this model's layers
        and features, and tau 0.5, for smaller masks share more by chance.

        On SmolLM2-135M masks of unrelated prompts share 0.33 to 0.39 of their features, those of paraphrases 0.43 to
        0.77, of neighbors 0.35 to 0.45. 100 facts, tau 0.4, 0.5 and 0.6: paraphrases 42, 28 and 15 %, neighbors 59, 78
        and 87 %, perplexity + 31, 0 and 0 %.
        """
        layer = min(round(0.84 * lm.n_layers), lm.n_layers - 1)
        of = f"{lm.n_layers} layers, d_ff {lm.d_ff}"
        return cls(layers=(layer,), top_k=max(1, round(lm.d_ff * 4096 / 14336)), tau=0.5, source=f"derived for {of}")

    def check(self, lm: LM) -> None:
        """Raises ValueError for masks of more features than there are."""
        super().check(lm)
        if self.top_k > lm.d_ff:
            raise ValueError(f"top_k {self.top_k}: this model's keys have {lm.d_ff} features")

    def write(self, work: Work) -> Written:
        """Masks of all facts in one sweep, then W' batch after batch."""
        lm, facts, (layer,) = work.lm, work.facts, self.layers
        random = torch.Generator().manual_seed(self.permutation_seed)
        background = prompt_features(lm, irrelevant(lm, facts), layer, Site.mlp_key, every=True).mean(0)
        permutation = torch.randperm(lm.d_ff, generator=random)
        route = OverlapRoute(self.tau, background, permutation, torch.arange(len(facts)))
        masks = route.masks_of(lm, [prompts_of(lm, fact)[0][0] for fact in facts], layer, self.top_k)
        start: dict[int, torch.Tensor] = {}
        steps: list[int] = []
        nll: list[torch.Tensor] = []
        for begin in range(0, len(facts), self.batch_size):
            some = range(begin, min(begin + self.batch_size, len(facts)))
            pairs = [(i, each) for i in some for each in prompts_of(lm, facts[i])]
            seen = torch.zeros(len(pairs), lm.d_ff, dtype=torch.bool)
            seen.scatter_(1, masks[[i for i, _ in pairs]], True)
            tasks = [TuneTask(*each, facts[i].label) for i, each in pairs]
            settings = TuneSettings(
                layers=self.layers, lr=self.edit_lr, steps=self.n_iter, sgd=True, clip=self.clip, batch_size=len(tasks)
            )
            tuned = fine_tune(lm, tasks, settings, start=start, masks=seen)
            start, steps = tuned.deltas, steps + [len(tuned.losses)] * len(some)
            nll += [tuned.nll[[j for j, _ in pairs].index(i)] for i in some]
        columns = masks.unique()
        weight = start[layer][:, columns.to(start[layer].device)].to(lm.dtype).cpu()
        last = torch.stack(nll)
        return Written(
            [MaskedMemory(layer, columns, weight, masks, torch.arange(len(facts)))],
            Found.of(steps, last, last),
            layers={layer: {"columns": len(columns)}},
            route=route,
        )
