"""Gradients of block matrices for many tasks at once, as factors: one way up and one down, whatever their number.

For the input x_t and the output y_t of a matrix W [out, in] at the tokens t of a task, with δ_t = dL/dy_t,

    dL/dW = Σ_t δ_t x_tᵀ

so x and δ say everything, and no gradient of a weight is formed. A task owns all its rows: rows that two tasks shared
would sum their δ. What lies below the lowest matrix is computed once, without a graph.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics.progress import progress
from kedit_fast.basics.state import wide
from kedit_fast.jobs.below import Below
from kedit_fast.jobs.collect import GraphRows, entering
from kedit_fast.jobs.finite import not_finite
from kedit_fast.jobs.score import Score, continuation_places
from kedit_fast.kernels.target_logprob import target_logprob
from kedit_fast.model.family import check_layer
from kedit_fast.model.lm import takes_lm
from kedit_fast.model.seam import frozen
from kedit_fast.sweep.ascent import Ascent, ascend, descend
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.plan import PLACE, graph_bytes, logit_bytes, logit_rows, together, too_large
from kedit_fast.sweep.runs import RunList, add_under, padded, spans
from kedit_fast.sweep.sites import IN, OUT

LOGITS = 4  # logits that a row holds, with what its loss keeps of them
Place = tuple[int, str]  # layer, and role of the matrix (``Family.roles``)
Loss = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class GradientTask:
    """What a loss is taken of: prompt and target are token ids; it is read after the prompt, and after each target
    token but the last.

    name: what errors call the task, besides its number; owner: the fact whose independent edit acts on it
    """

    prompt: list[int]
    target: list[int]
    name: str = ""
    owner: int = 0

    @property
    def ids(self) -> list[int]:
        """The tokens that are read."""
        return self.prompt + self.target[:-1]

    @property
    def n_rows(self) -> int:
        """Tokens that are read."""
        return len(self.prompt) + len(self.target) - 1


@dataclass(frozen=True, eq=False)
class Factors:
    """Of one matrix, at each token that the loss depends on there, ordered by task and position.

    x: [t, in] its input; delta: [t, out] the gradient of its output; task, pos: [t] int64, on the CPU
    """

    x: Tensor
    delta: Tensor
    task: Tensor
    pos: Tensor

    def dense(self, which: int) -> Tensor:
        """dL/dW [out, in] of one task."""
        mine = self.task == which
        return self.delta[mine].T @ self.x[mine]

    def at_targets(self, tasks: Sequence[GradientTask]) -> "Factors":
        """Those of the tokens that a target token follows. tasks: all that ``task`` counts"""
        start = torch.tensor([len(task.prompt) - 1 for task in tasks], dtype=torch.int64)
        mine = self.pos >= start[self.task]
        return Factors(self.x[mine], self.delta[mine], self.task[mine], self.pos[mine])

    def joined_to(self, others: Iterable["Factors"]) -> "Factors":
        """With those of others behind, on the device of its x."""
        every, device = [self, *others], self.x.device
        every = [one for one in every if len(one.task)] or every[:1]
        parts = ([getattr(one, f.name).to(device) for one in every] for f in fields(self))
        return Factors(*(torch.cat(some) if len(some) > 1 else some[0] for some in parts))


class Gradients(NamedTuple):
    """factors: {place: Factors}; losses: [n] of each task, fp32 (fp64 for an fp64 model)"""

    factors: dict[Place, Factors]
    losses: Tensor


@takes_lm
def gradient_factors(
    lm, tasks: Sequence[GradientTask], places: Sequence[Place], loss: Loss | None = None, below: Below | None = None
) -> Gradients:
    """The gradient of each task's loss with respect to each matrix, at the weights with the edits that ``lm`` carries;
    on the CPU, in the model's dtype.

    below: rows that enter the lowest place, where they are kept for many calls; of a model without edits below it
    loss: (which task, log-probabilities of all tokens [len(target), V] where it is read, fp32 or fp64, with their
        graph) -> its loss, a scalar. None: the mean over its target tokens of -log p, in nats

    A forward and a backward sweep; where layers come in turns two weight passes up and one down for all tasks that may
    wait. Tasks are cut into packs that fit ``lm.memory``: the same to rounding.

    Raises ValueError for a place that the model does not have, and, with the bytes needed, for what does not fit; with
    the task's name where a loss or a gradient is not finite.
    """
    places = checked_places(lm, places)
    held = sum(task.n_rows for task in tasks) * _widths(lm, places) * lm.dtype.itemsize
    if held > lm.memory // 2:
        raise too_large(f"the factors of {len(tasks)} gradients", 2 * held, lm.memory)
    packs = list(gradient_packs(lm, tasks, places, loss, held, below))
    factors = {}
    for place in places:
        out, width = lm.shape_of(place[1])
        none = torch.empty(0, dtype=torch.int64)
        begin = Factors(torch.empty(0, width, dtype=lm.dtype), torch.empty(0, out, dtype=lm.dtype), none, none)
        factors[place] = begin.joined_to(pack.factors[place] for pack in packs)
    return Gradients(factors, torch.cat([torch.empty(0, dtype=wide(lm.dtype)), *(pack.losses for pack in packs)]))


def gradient_packs(
    lm,
    tasks: Sequence[GradientTask],
    places: Sequence[Place],
    loss: Loss | None = None,
    held: int = 0,
    below: Below | None = None,
) -> Iterator[Gradients]:
    """The same in parts, on the model's device, for whoever sums something up over more tasks than fit: consecutive
    tasks, whose numbers in ``Factors.task`` are those of ``tasks``. held: bytes of the memory that the caller holds."""
    places = checked_places(lm, places)
    packs = [_Pack(lm, tasks, which, places, alone) for which, alone in _cut(lm, tasks, places, held)]
    side = lm.source.beside or (lm.memory - held) // 2
    with progress("gradients (tasks)", len(tasks)) as bar:
        for some in together(packs, lambda pack: pack.waiting_bytes, 0 if lm.source.in_memory else side):
            ascents = _going_up(lm, some, below)
            ascend(lm, ascents)
            losses = [pack.lose(loss) for pack in some]
            descend(lm, ascents)
            for pack, found in zip(some, losses, strict=True):
                yield Gradients(pack.factors(), found)
                bar.advance(len(pack.which))


def task_losses(lm, tasks: Sequence[GradientTask]) -> Tensor:
    """[n] nats: the mean over each task's target tokens of -log p, with the edits that ``lm`` carries; fp32 (fp64), on
    the CPU. One sweep, without gradients."""
    at, runs = continuation_places([(task.prompt, task.target) for task in tasks]), RunList()
    number = add_under(lm, runs, at.sequences, torch.tensor([task.owner for task in tasks]))
    job = Score(lm, number[at.pair], at.pos, at.targets)
    sweep(lm, runs.runs(), [job], held=PLACE * len(at.pos))
    return torch.stack([-part.mean() for part in job.logprob.split(at.lengths)])


def checked_places(lm, places: Sequence[Place]) -> list[Place]:
    """Each place once, lowest layer first. Raises ValueError for none, and for one that the model does not have."""
    for layer, role in places:
        check_layer(layer, lm.n_layers)
        lm.shape_of(role)
    if not places:
        raise ValueError("places: expected at least one (layer, role), such as (5, 'down')")
    return sorted(set(places), key=lambda place: (place[0], list(IN).index(place[1])))


class Backward:
    """Keeps a matrix's input and, on the way back, the gradient of its output, at each place."""

    def __init__(self, places: Sequence[Place]):
        self._leaving = {(layer, OUT[role]): (layer, role) for layer, role in places}
        self._entering: dict[tuple, list[Place]] = {}
        for layer, role in places:
            self._entering.setdefault((layer, IN[role]), []).append((layer, role))
        self._x: dict[Place, Tensor] = {}  # from a matrix's input to its output, in the same call
        self._found: dict[Place, list[tuple[Tensor, Tensor, Tensor]]] = {place: [] for place in places}

    def sites(self, layer):
        return tuple({site for at, site in (*self._entering, *self._leaving) if at == layer})

    def reads(self, layer):
        return None  # a row of the last layer that no loss reads has no gradient

    def at(self, site, layer, x, call):
        if not torch.is_grad_enabled():
            return None  # on a way whose layers run again, with a graph, on the way down
        for place in self._entering.get((layer, site), ()):
            self._x[place] = x.detach()
        place = self._leaving.get((layer, site))
        if place is None:
            return None
        if not x.requires_grad:  # below all other places nothing has a graph: it begins here
            x = x.detach().requires_grad_()
        key, index, found = self._x.pop(place), call.index, self._found[place]
        # of a layer that runs again for autograd alone the gradient goes through the first run's output, and only there
        x.register_hook(lambda delta: found.append((index, key, delta.detach())))
        return x

    def take(self, place: Place, like: Factors) -> Factors:
        """The factors, given away; like: those of no row. Rows without a gradient are left out."""
        found = self._found.pop(place)
        if not found:
            return like
        index, x, delta = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
        if len(found) > 1:
            order = index.argsort()
            index, order = index[order], order.to(delta.device)
            x, delta = x[order], delta[order]
        some = largest(delta) != 0
        if not some.all():
            index, x, delta = index[some.cpu()], x[some], delta[some]
        return Factors(x, delta, like.task[index], like.pos[index])


def largest(x: Tensor) -> Tensor:
    """[n] the largest |entry| of each row [n, d], NaN where there is one: in a tenth of the time of torch's norm."""
    return x.abs().amax(1)


class _Pack:
    """Tasks that go up and down together, each a run that owns all its rows.

    alone: one task too large for its layers' graph, which are then computed again
    """

    def __init__(self, lm, tasks: Sequence[GradientTask], which: list[int], places: list[Place], alone: bool):
        self.lm, self.which, self.places, self.recompute = lm, which, places, alone
        self.tasks = [tasks[i] for i in which]
        self.at = continuation_places([(task.prompt, task.target) for task in self.tasks])
        self.job = Backward(places)
        self.top = GraphRows(lm.n_layers - 1, self.at.pair, self.at.pos)
        tokens, length = padded(self.at.sequences)
        owner = torch.tensor([task.owner for task in self.tasks]) if lm.independent else lm.run_owner
        runs = RunList()
        runs.add(tokens, length=length, owner=owner)  # no trie: each task's own rows
        self.runs = runs.runs()

    @property
    def waiting_bytes(self) -> float:
        """Of rows that wait while other packs are on a layer; infinite for a pack that has to be alone."""
        if self.recompute:
            return math.inf
        n_layers = self.lm.n_layers - self.places[0][0]
        return int(self.runs.n_rows.sum()) * n_layers * self.lm.d_model * self.lm.dtype.itemsize

    def lose(self, loss: Loss | None) -> Tensor:
        """[tasks] the losses, whose gradients the rows that were read get. Logits are made of a few tasks at a time."""
        lm, found = self.lm, []
        rows = self.top.take()
        leaf, first = rows.detach().requires_grad_(), 0
        for some in together(range(len(self.tasks)), lambda i: self.at.lengths[i], logit_rows(lm)):
            stop = first + sum(self.at.lengths[i] for i in some)
            with frozen(lm.model):
                losses = self._losses(leaf[first:stop], self.at.targets[first:stop], some, loss)
            found += losses.detach().to("cpu", wide(lm.dtype)).unbind()
            self._check(torch.isfinite(losses.detach()).cpu(), [self.which[i] for i in some], "loss")
            losses.sum().backward()
            first = stop
        rows.backward(leaf.grad)
        return torch.stack(found)

    def _losses(self, h: Tensor, targets: Tensor, some: list[int], loss: Loss | None) -> Tensor:
        """[some] with their graph; h: [target tokens, d]."""
        lm, lengths = self.lm, [self.at.lengths[i] for i in some]
        if loss is None:
            log_p = target_logprob(h, lm.fusable_head, targets, lm.n_vocab)
            return torch.stack([-part.mean() for part in log_p.split(lengths)])
        log_p = lm.head(h).to(wide(lm.dtype)).log_softmax(-1)
        return torch.stack([loss(self.which[i], part) for i, part in zip(some, log_p.split(lengths), strict=True)])

    def factors(self) -> dict[Place, Factors]:
        """What came down, of each place."""
        lm, made = self.lm, {}
        run, pos = spans(self.runs.first_pos, self.runs.length)
        task = torch.tensor(self.which)[run]
        for place in self.places:
            x, delta = (torch.empty(0, n, dtype=lm.dtype, device=lm.device) for n in reversed(lm.shape_of(place[1])))
            made[place] = self.job.take(place, Factors(x, delta, task, pos))
            fine = largest(made[place].delta).isfinite().cpu()
            self._check(fine, made[place].task.tolist(), f"gradient at layer {place[0]} ({place[1]})")
        return made

    def _check(self, fine: Tensor, which: list[int], what: str) -> None:
        """Raises ValueError, naming the task, where something is not finite. fine: [k] bool; which: whose, [k]"""
        if not fine.all():
            i = which[int((~fine).nonzero()[0])]
            name = self.tasks[self.which.index(i)].name or i
            raise not_finite(self.lm, f"the {what} of {name} is NaN or infinite")


def _going_up(lm, packs: list[_Pack], below: Below | None) -> list[Ascent]:
    """Their ways up, from the lowest place on; the layers below it are swept first."""
    lowest, runs = packs[0].places[0][0], [pack.runs for pack in packs]
    return [
        Ascent(pack.runs, [pack.job, pack.top], grad=True, first_layer=lowest, h=h, recompute=pack.recompute)
        for pack, h in zip(packs, (below or entering)(lm, runs, lowest), strict=True)
    ]


def held_bytes(lm, task: GradientTask, places: Sequence[Place], recompute: bool = False) -> int:
    """Bytes that one task holds at the height of its way, from above: what autograd keeps, the rows that enter the
    lowest place, and the factors twice, in calls and joined."""
    n, n_layers = task.n_rows, lm.n_layers - min(layer for layer, _ in places)
    by_layer = graph_bytes(lm, n, n, n**2, n_layers, recomputes=recompute or not lm.source.in_memory)
    return by_layer + n * lm.dtype.itemsize * (lm.d_model + 2 * _widths(lm, places))


def _widths(lm, places: Sequence[Place]) -> int:
    """Numbers of a token's factors."""
    return sum(sum(lm.shape_of(role)) for _, role in places)


def _cut(lm, tasks: Sequence[GradientTask], places: list[Place], held: int) -> Iterator[tuple[list[int], bool]]:
    """The tasks in consecutive packs that fit, and whether a pack is one whose layers have to be computed again.

    Raises ValueError where one does not fit even so.
    """
    longest = max((len(task.target) for task in tasks), default=0)
    budget = lm.memory - held - logit_bytes(lm, LOGITS * max(longest, logit_rows(lm)))
    if len(tasks) > 1 and not (lm.source.in_memory or lm.source.beside):
        budget //= 2  # the other half is of packs that wait
    for which in together(range(len(tasks)), lambda i: held_bytes(lm, tasks[i], places), budget):
        task = tasks[which[0]]
        alone = len(which) == 1 and held_bytes(lm, task, places) > budget
        if alone and (need := held_bytes(lm, task, places, recompute=True)) > budget:
            raise too_large(f"the gradient of {task.name or which[0]}", need + lm.memory - budget, lm.memory)
        yield which, alone
