"""KE, KnowledgeEditor: a network that reads the edit says how its gradient is to be rescaled (De Cao et al. 2021,
arXiv:2104.08164).

Of a vector c that stands for the edit, each matrix W [out, in] has (section 3.3 of the paper)

    r_a, r_b [out],  c_a, c_b [in],  η = MLP(c)
    a = softmax(r_a) c_aᵀ,   b = softmax(r_b) c_bᵀ,   ΔW = -max_scale σ(η) (G ∘ a + b)

G ∘ (r cᵀ) = Σ_t (δ_t ∘ r)(x_t ∘ c)ᵀ for the gradient's factors, so ΔW is their rescaling and one row more. Trained on

    min NLL(y | x', W + ΔW)   such that   KL(p_W || p_{W+ΔW}) <= m   on what must not change

by dual ascent on a multiplier >= 0; m falls by ``margin_decay`` while the facts held out are written.

Differs: the edit's vector is an attention pool over the factors of the lowest matrix, in the place of a BiLSTM over an
embedding of the vocabulary: they hold the model's own reading of the prompt, and, in δ, the answer asked for. G is
taken relative to its usual size, c_a and c_b to ``edit_lr``, and the MLP's last layer is 0 before training: KE then
begins as a step down the gradient. The paper adds ΔW; here G is what is descended, so it is subtracted. Adam in the
place of RMSprop, without warm-up and label smoothing; ΔW is made once, not again until the answer flips.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from kedit_fast.editors.networks import Network, Update
from kedit_fast.editors.trained import Trained
from kedit_fast.editors.training_settings import Training
from kedit_fast.editors.training_step import Weights
from kedit_fast.jobs.gradients import Factors, Place
from kedit_fast.model.lm import LM, takes_lm


class Rescaling(nn.Module):
    """r_a, r_b, c_a, c_b and η of one matrix, for each of n edits."""

    def __init__(self, shape: tuple[int, int], condition: int, hidden: int):
        super().__init__()
        self.sizes = [shape[0], shape[0], shape[1], shape[1], 1]
        self.first = weight_norm(nn.Linear(condition, hidden))
        self.last = weight_norm(nn.Linear(hidden, sum(self.sizes)))
        nn.init.zeros_(self.last.parametrizations.weight.original0)  # the lengths of the weight's rows
        nn.init.zeros_(self.last.bias)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """(softmax(r_a), softmax(r_b), c_a / c_a at the start - 1, c_b, σ(η)): [n, out] twice, [n, in] twice, [n, 1]"""
        r_a, r_b, c_a, c_b, eta = self.last(self.first(c).tanh()).split(self.sizes, 1)
        return r_a.softmax(1), r_b.softmax(1), c_a, c_b, eta.sigmoid()


class KeNetwork(Network):
    """The pool that reads an edit, and a ``Rescaling`` for each matrix."""

    METHOD: ClassVar = "ke"

    def __init__(self, fingerprint: str, shapes: Mapping[Place, tuple[int, int]], settings: dict):
        super().__init__(fingerprint, shapes, settings)
        condition, hidden = settings["condition_dim"], settings["hidden_dim"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings["seed"])
            width = sum(self.shapes[self.read])
            self.query = nn.Parameter(torch.zeros(width))
            self.pool = nn.Linear(width, condition)
            self.matrices = nn.ModuleDict(
                {f"{role}-{layer}": Rescaling(shape, condition, hidden) for (layer, role), shape in self.shapes.items()}
            )

    @property
    def read(self) -> Place:
        """The matrix whose factors stand for the edit: of the lowest layer, where every token has some."""
        return self.places[0]

    def transformed(self, factors: Mapping[Place, Factors], alone: bool) -> dict[Place, Update]:
        """ΔW = -max_scale σ(η) (G ∘ a + b) of each fact; of several the sum of theirs."""
        facts, c = self.conditions(factors[self.read])
        made = {}
        for (layer, role), found in factors.items():
            r_a, r_b, c_a, c_b, share = self.matrices[f"{role}-{layer}"](c)
            start = self.settings["edit_lr"] * self.shapes[layer, role][0]
            which = torch.searchsorted(facts, found.task)
            x, delta = self.sized((layer, role), found)
            step = -self.settings["max_scale"] * share
            rescaled = step[which] * delta * r_a[which], x * start * (1 + c_a[which])
            made[layer, role] = Update(
                torch.cat([rescaled[0], step * r_b]),
                torch.cat([rescaled[1], start * c_b]),
                torch.cat([found.task, facts]),
            )
        return made

    def conditions(self, found: Factors) -> tuple[Tensor, Tensor]:
        """(the facts [n], ascending, c [n, condition_dim]) of those that have a gradient at all."""
        z = torch.cat(self.standardized(self.read, found), 1)
        facts, sizes = found.task.unique_consecutive(return_counts=True)
        weight = z @ self.query / len(self.query) ** 0.5
        parts = zip(weight.split(sizes.tolist()), z.split(sizes.tolist()), strict=True)
        pooled = [w.softmax(0) @ rows for w, rows in parts]
        return facts, self.pool(torch.stack(pooled) if pooled else z.new_zeros(0, len(self.query))).tanh()


@dataclass(frozen=True)
class KeTraining(Training):
    """``Training``'s hyper-parameters, but the weights of the two losses are 1 and the multiplier; and

    condition_dim: of c (published for GPT: 768; BERT: 1,024); hidden_dim: of the MLPs; max_scale: as in the formula
    edit_lr: the step before training, relative to the usual size of x and δ
    kl_margin, least_margin: m in nats, at first and at least; margin_decay: what it is multiplied by when more than
        ``flipped`` of the facts held out are written; dual_lr: of the multiplier, in Adam's place plain ascent
    """

    condition_dim: int = 768
    hidden_dim: int = 512
    max_scale: float = 1.0
    edit_lr: float = 1e-4
    lr: float = 3e-4
    cedit: float = 1.0
    kl_margin: float = 1e-3
    least_margin: float = 1e-5
    margin_decay: float = 0.8
    flipped: float = 0.9
    dual_lr: float = 0.1

    METHOD: ClassVar = "ke"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"KE": {}}
    NETWORK: ClassVar = KeNetwork
    POSITIVE: ClassVar[tuple[str, ...]] = (
        *Training.POSITIVE, "condition_dim", "hidden_dim", "max_scale", "edit_lr", "kl_margin",
    )  # fmt: skip

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "KeTraining":
        """For a training of minutes instead of the published days: m as wide as MEND's KL is then. On SmolLM2 the step
        before training with edit_lr 1e-4 writes nothing at 0.26 nats, with 3e-4 25 % at 2.3 nats."""
        minutes = cls.derived(lm) | {"edit_lr": 1e-4, "kl_margin": 0.1}
        return cls(**minutes, condition_dim=min(256, lm.d_model), hidden_dim=128)

    def begin(self) -> dict[str, float]:
        return {"multiplier": self.cloc, "margin": self.kl_margin}

    def weights(self, dual: Mapping[str, float]) -> Weights:
        return Weights(self.cedit, dual["multiplier"])

    def after_step(self, dual: dict[str, float], kl: float) -> None:
        """Dual ascent: up where the constraint is broken, down to 0 where it holds."""
        dual["multiplier"] = max(0.0, dual["multiplier"] + self.dual_lr * (kl - dual["margin"]))

    def after_validation(self, dual: dict[str, float], success: float) -> None:
        if success > self.flipped:
            dual["margin"] = max(self.least_margin, dual["margin"] * self.margin_decay)


@dataclass(frozen=True)
class Ke(Trained):
    """KnowledgeEditor: a trained network rescales the gradient of a fact, and adds a rank-one term.

    The editor: its one setting is the network, see ``Trained``.
    """

    METHOD: ClassVar = "ke"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"KE": {}}
    NETWORK: ClassVar = KeNetwork
