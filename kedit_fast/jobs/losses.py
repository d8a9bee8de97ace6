"""What fine-tuning lowers: a number for each task, of the rows that the model has at the task's places.

``Loss`` itself is -log p of a task's target. Those of unlearning raise what a task that is not kept loses, and leave
the others as they were. p is that of a whole target, log p = Σ over its tokens, and L = -log p / its tokens:

    Bounded       -log(1 - p)                                bounded from below: 0 once the target is not said
    Ascent        -L                                         gradient ascent, without a bound; with kept tasks GradDiff
    Preference    2/β log(1 + (p / p_0)^β)                   Zhang et al. 2024 (NPO), arXiv:2404.05868
    Entropy       mean over layers of log V - H(lens of h)   Patil et al. 2024 (max-entropy), arXiv:2309.17410
    Misdirection  mean (h - c u)²; kept: α mean (h - h_0)²   Li et al. 2024 (RMU), arXiv:2403.03218

p_0 and h_0 are of the model before the first step. All but Misdirection keep a kept task by its L.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_fast.jobs.score import Places
from kedit_fast.kernels.target_logprob import target_logprob
from kedit_fast.model.seam import frozen
from kedit_fast.sweep.plan import logit_bytes
from kedit_fast.sweep.runs import spans

LOGITS = 3  # logits that a row holds at the height of a step


class Read(NamedTuple):
    """What the model has at the k places of n tasks.

    rows: {layer: [k, d]} layer_out; task: [k] whose each place is; targets: [k] the token that follows there
    keeps: [n] bool, the tasks whose target is to be said
    """

    lm: object
    rows: dict[int, Tensor]
    task: Tensor
    targets: Tensor
    keeps: Tensor

    def log_p(self) -> Tensor:
        """[k] nats: log-probability of the token that follows."""
        with frozen(self.lm.model):
            return target_logprob(self.rows[self.lm.n_layers - 1], self.lm.fusable_head, self.targets, self.lm.n_vocab)

    def summed(self, x: Tensor) -> Tensor:
        """[n] of each task's places; x: [k]"""
        return x.new_zeros(len(self.keeps)).index_add(0, self.task.to(x.device), x)

    def mean(self, x: Tensor) -> Tensor:
        """[n] over each task's places; x: [k]"""
        share = 1 / torch.bincount(self.task, minlength=len(self.keeps)).double()
        return self.summed(x * share[self.task].to(x))

    def chosen(self, kept: Tensor, others: Tensor) -> Tensor:
        """[n]: of tasks that are kept the first, of the others the second."""
        return torch.where(self.keeps.to(kept.device), kept, others)


@dataclass(frozen=True)
class Loss:
    """L of a task's target: the mean over its tokens of -log p, in nats.

    stops: whether a loss near 0 ends the work; compares: whether ``before`` is asked, of the untouched model
    """

    stops = True
    compares = False

    def layers(self, lm) -> tuple[int, ...]:
        """Whose layer_out it reads."""
        return (lm.n_layers - 1,)

    def places(self, places: Places) -> tuple[Tensor, Tensor]:
        """(task, position) [k] of the rows that it reads: those that a target token follows."""
        return places.pair, places.pos

    def held_bytes(self, lm, n_targets: int) -> int:
        """Of one task at the height of a step, beside the rows: logits of its target's tokens."""
        return logit_bytes(lm, LOGITS * n_targets)

    def kept_bytes(self, lm, n_rows: int) -> int:
        """That it holds of the untouched model all the while, of tasks of so many tokens."""
        return 0

    def before(self, read: Read) -> Tensor:
        """What it compares with, of the untouched model."""
        raise NotImplementedError

    def of(self, read: Read, before: Tensor | None) -> Tensor:
        """[n] the loss of each task."""
        return read.mean(-read.log_p())


class Bounded(Loss):
    """-log(1 - p): its gradient fades once p is small. Of p that rounds to 1 there is no gradient in any form."""

    def of(self, read, before):
        log_p = read.log_p()
        p = read.summed(log_p).clamp(max=-torch.finfo(log_p.dtype).eps)
        return read.chosen(read.mean(-log_p), -torch.log(-torch.expm1(p)))


class Ascent(Loss):
    """-L: the further, the steeper; steps and rate are what ends it."""

    stops = False

    def of(self, read, before):
        nll = super().of(read, before)
        return read.chosen(nll, -nll)


@dataclass(frozen=True)
class Preference(Loss):
    """2/β log(1 + (p / p_0)^β): of p_0 it is 2/β log 2, and falls to 0; β -> 0 is gradient ascent."""

    beta: float = 0.1

    stops = False
    compares = True

    def before(self, read):
        return read.summed(read.log_p())

    def of(self, read, before):
        log_p = read.log_p()
        ratio = self.beta * (read.summed(log_p) - before)
        return read.chosen(read.mean(-log_p), torch.nn.functional.softplus(ratio) * (2 / self.beta))


@dataclass(frozen=True)
class Entropy(Loss):
    """log V - H of what each of ``lens`` layers says of the next token, their mean: 0 where all of it is uniform."""

    lens: tuple[int, ...] = ()

    stops = False

    def layers(self, lm):
        return tuple(sorted({*self.lens, lm.n_layers - 1}))

    def held_bytes(self, lm, n_targets):
        return super().held_bytes(lm, n_targets * (1 + len(self.lens)))

    def of(self, read, before):
        known = sum(self._missing(read, layer) for layer in self.lens) / len(self.lens)
        return read.chosen(read.mean(-read.log_p()), read.mean(known))

    def _missing(self, read: Read, layer: int) -> Tensor:
        """[k] nats that the layer's entropy lacks of the most there can be."""
        with frozen(read.lm.model):
            log_p = read.lm.head(read.rows[layer]).to(torch.promote_types(read.lm.dtype, torch.float32)).log_softmax(-1)
        return math.log(read.lm.n_vocab) + (log_p.exp() * log_p).sum(-1)


@dataclass(frozen=True)
class Misdirection(Loss):
    """The rows of a task, in one layer, are drawn to c u, u a random direction of length 1; those of kept ones stay.

    layer: whose layer_out is read, at every token of prompt and target but the target's last
    c: the length of what rows are drawn to; alpha: what kept rows weigh
    seed: of u, uniform in [0, 1) before it is brought to length 1
    """

    layer: int = 0
    c: float = 6.5
    alpha: float = 1200.0
    seed: int = 0

    stops = False
    compares = True

    def layers(self, lm):
        return (self.layer,)

    def places(self, places):
        length = torch.tensor([len(ids) for ids in places.sequences])
        return spans(torch.zeros_like(length), length)

    def held_bytes(self, lm, n_targets):
        return 0

    def kept_bytes(self, lm, n_rows):
        return n_rows * lm.d_model * lm.dtype.itemsize

    def before(self, read):
        return read.rows[self.layer].detach()

    def of(self, read, before):
        h = read.rows[self.layer]
        u = torch.rand(h.shape[1], generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        goal = (self.c * u / u.norm()).to(h)
        wide = torch.promote_types(h.dtype, torch.float32)
        drawn, moved = ((h - to).to(wide).square().mean(-1) for to in (goal, before))
        return read.chosen(self.alpha * read.mean(moved), read.mean(drawn))
