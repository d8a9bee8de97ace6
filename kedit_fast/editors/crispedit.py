"""CrispEdit: fine-tuning in the directions of low curvature (Ikram et al. 2026, Low-Curvature Projections for Scalable
Non-Destructive LLM Editing, arXiv:2602.15823).

Moving W by Δ changes the loss on text by about ½ vec(Δ)ᵀ (C ⊗ B) vec(Δ), with the second moments C = E[x xᵀ] of W's
inputs and B = E[g gᵀ] of its outputs' gradients (K-FAC). In their eigenvectors U_A, U_B that is a sum over entries,
weighted by products of eigenvalues; those that make up a share of the whole are closed to the gradient G:

    M_ij = 1[λᴮ_i λᴬ_j < τ],  τ: the least of the largest products whose sum is ``energy_threshold`` of all
    G  <-  U_B ((U_Bᵀ G U_A) ∘ M) U_Aᵀ,  then Adam

AlphaEdit's projection is about the case B = I. Facts that edits below wrote are text, too: C and B are theirs as well,
by the number of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.state import wide
from kedit_fast.editors.editor import Work
from kedit_fast.editors.finetune import Ft, derived, rate
from kedit_fast.editors.hyperparameters import published
from kedit_fast.edits.chain import facts_in_force
from kedit_fast.jobs.finetune import TuneSettings
from kedit_fast.jobs.gradients import GradientTask, gradient_factors
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.moments.corpus import SELF
from kedit_fast.moments.gradient_moment import gradient_moments


@dataclass(frozen=True)
class CrispEdit(Ft):
    """CrispEdit: fine-tuning whose steps are kept out of the directions that text needs, by K-FAC.

    ``Ft``'s hyper-parameters, and

    energy_threshold: the share of text's curvature that is closed (published settings 0.99)
    gradient_tokens: of the text that B is measured over; 0: 8 for each of the d features
    gradient_corpus: that text: "self" (sampled from the model), a text file or "hf:NAME" (published: Wikipedia)
    shuffle_seed: of the order of the facts in each pass
    """

    batch_size: int = 32
    energy_threshold: float = 0.99
    gradient_tokens: int = 0
    gradient_corpus: str = SELF
    shuffle_seed: int = 0

    METHOD: ClassVar = "crispedit"
    ALG_NAMES: ClassVar = {"CrispEdit": {}}
    STAGES: ClassVar = ("sampling text for statistics", "gradients", "fine-tuning")
    mom2_adjustment: ClassVar = True
    UNREAD: ClassVar = {name: why for name, why in Ft.UNREAD.items() if name not in ("moments", "corpus")}

    def __post_init__(self):
        super().__post_init__()
        checks.number("energy_threshold", self.energy_threshold, above=0, most=1, like=0.99)
        if self.energy_threshold == 1:
            raise ValueError(
                "energy_threshold 1 closes all directions, and nothing would change; expected less, e.g. 0.99"
            )

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "CrispEdit":
        """Published layers where there are some for this model, else derived settings; ``source`` says which.

        Derived: five layers from 0.58 of the depth on, as the published ones, and ``Ft``'s rate.
        """
        known = published(PUBLISHED, lm)
        if known is not None:
            return cls(layers=known.layers, source=f"published for {known.name}")
        first = round(0.58 * lm.n_layers)
        layers = tuple(range(first, min(first + 5, lm.n_layers)))
        return cls(layers=layers, lr=rate(lm), source=derived(lm))

    @property
    def method(self) -> str:
        """Its own name, whatever else is set."""
        return self.METHOD

    def is_regularized(self) -> bool:
        """C needs no inverse."""
        return True

    def _tune_settings(self) -> TuneSettings:
        return replace(super()._tune_settings(), shuffle=self.shuffle_seed, by_token=True)

    def projection(self, work: Work) -> Callable[[int, Tensor], Tensor]:
        """The gradient's projection at each layer.

        Differs: C and B are not taken anew while a weight moves, which is an option of the published code (at ‖Δ‖ =
        0.25 ‖W‖); a next edit takes those of the facts below anew, at the weights as they are then.
        """
        lm, moments = work.lm, work.moments
        n_tokens = self.gradient_tokens or TOKENS_PER_FEATURE * lm.d_model
        b = gradient_moments(replace(lm, edits=()), self.layers, self.gradient_corpus, n_tokens=n_tokens)
        below = self._below(lm)
        kept: dict[int, Projection] = {}
        for layer in self.layers:
            (a_below, b_below, n), moment = below[layer], moments[layer]
            whole = moment.n_tokens + n
            merged = (b[layer].double() * moment.n_tokens + b_below) / whole
            if n:
                a_spectrum = torch.linalg.eigh((moment.matrix.double() * moment.n_tokens + a_below) / whole)
            else:
                a_spectrum = moment.spectrum
            made = Projection.of(a_spectrum, torch.linalg.eigh(merged), self.energy_threshold)
            kept[layer] = Projection(*(part.to(lm.device, wide(lm.dtype)) for part in made))
        return lambda layer, gradient: kept[layer](gradient)

    def _below(self, lm: LM) -> dict[int, tuple[Tensor, Tensor, int]]:
        """{layer: (Σ x xᵀ, Σ g gᵀ, tokens)} where the targets of the facts that edits below wrote are read, fp64."""
        tuned = [self.task(lm, fact) for fact in facts_in_force(lm.edits) if fact.target_new]
        tasks = [GradientTask(task.prompt, task.target, task.name) for task in tuned]
        length = torch.tensor([len(task.target) for task in tasks], dtype=torch.int64)
        found = {}
        for (layer, _), made in gradient_factors(lm, tasks, [(i, "down") for i in self.layers]).factors.items():
            made = made.at_targets(tasks)
            x, g = made.x.double(), made.delta.double() * length[made.task, None]  # of the sum over a target's tokens
            found[layer] = x.T @ x, g.T @ g, int(length.sum())
        return found


class Projection(NamedTuple):
    """u_a [in, in], u_b [out, out]: eigenvectors as columns; mask [out, in]: 1 where the gradient may go."""

    u_a: Tensor
    u_b: Tensor
    mask: Tensor

    @classmethod
    def of(cls, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], energy: float) -> "Projection":
        """Of the spectra (eigenvalues, eigenvectors) of C and B; energy: the share of all products that is closed."""
        product = torch.outer(b[0].clamp(min=0), a[0].clamp(min=0))
        largest = product.flatten().sort(descending=True).values
        share = largest.cumsum(0) / largest.sum()
        last = min(int(torch.searchsorted(share, energy)), len(share) - 1)
        return cls(a[1], b[1], (product < largest[last]).to(product.dtype))

    def __call__(self, gradient: Tensor) -> Tensor:
        return self.u_b @ ((self.u_b.T @ gradient @ self.u_a) * self.mask) @ self.u_a.T


class _Known(NamedTuple):
    """What was published for a model. v_loss_layer: its last layer, by which ``published`` tells it from namesakes."""

    name: str
    v_loss_layer: int
    layers: tuple[int, ...]


TOKENS_PER_FEATURE = 8
# lr 5e-4, batches of 32, 25 passes, energy 0.99 for both.
PUBLISHED = {
    known.name: known
    for known in (
        _Known("Meta-Llama-3-8B-Instruct", 31, tuple(range(19, 24))),
        _Known("Qwen2.5-7B-Instruct", 27, tuple(range(15, 20))),
    )
}
