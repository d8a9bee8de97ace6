"""Fine-tunes down projections: one dense Δ a layer, moved by Adam until the model continues many prompts as it should.

    L = mean over tasks of the mean over target tokens of -log p(token | prompt, target tokens before it)

or of another loss (``losses.py``).

Δ acts as x Δᵀ on every row that passes its layer, so a run owns all its rows from the first tuned layer on. What lies
below does not change: it is computed once. After each step every entry of Δ may be clamped to ± a limit (Zhu et al.
2020, arXiv:2012.00363: fine-tuning with ||W - W_0||_inf bounded).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_fast.basics.progress import progress
from kedit_fast.basics.state import own_state, wide
from kedit_fast.edits.deltas import Dense, weight_under
from kedit_fast.jobs.collect import GraphRows, collect, entering
from kedit_fast.jobs.finite import check_losses
from kedit_fast.jobs.losses import Loss, Read
from kedit_fast.jobs.score import continuation_places
from kedit_fast.model.seam import prepared
from kedit_fast.sweep.ascent import Ascent, ascend, descend
from kedit_fast.sweep.engine import row_table
from kedit_fast.sweep.plan import graph_bytes, together, too_large
from kedit_fast.sweep.rows import RowTable
from kedit_fast.sweep.runs import RunList, add_sequences, spans
from kedit_fast.sweep.sites import Site

STOP_BELOW = 1e-2  # nats: a batch below this moves nothing, and all tasks below it end the work (published)
SAYING = Loss()


@dataclass(frozen=True)
class TuneTask:
    """What is to be said: prompt and target are token ids; name: what errors call the task, besides its number.

    keep: False where the target is not to be said, with a loss that knows of such tasks; factor: of its loss
    """

    prompt: list[int]
    target: list[int]
    name: str = ""
    keep: bool = True
    factor: float = 1.0


@dataclass(frozen=True)
class TuneSettings:
    """Where Δ lives and how it is moved.

    steps: passes over all batches, an Adam step for each batch in each; batch_size: tasks in a batch
    weight_decay: times the whole weight W + Δ, added to the gradient (Adam's L2 term)
    limit: the most that an entry of Δ may be, in absolute value; None: no limit
    teacher_forced: False reads all target tokens after the prompt's last token, none of them in the text
    by_token: a batch's loss is the mean over its target tokens, not over its tasks
    shuffle: a seed; each pass then has the tasks in another order. None: as they are given
    sgd: plain gradient descent in Adam's place; clip: the most that the norm of all gradients of a step may be
    loss: what is lowered
    """

    layers: tuple[int, ...]
    lr: float
    steps: int
    weight_decay: float = 0.0
    limit: float | None = None
    batch_size: int = 128
    teacher_forced: bool = True
    by_token: bool = False
    shuffle: int | None = None
    sgd: bool = False
    clip: float | None = None
    loss: Loss = SAYING


@dataclass(frozen=True)
class Tuned:
    """deltas: {layer: Δ [d, d_ff]} fp32 (fp64 for an fp64 model), on the model's device

    losses: nats, the mean over tasks in each step taken, before the step's updates; nll: [n] each task's at the end,
    of another loss its value there
    """

    deltas: dict[int, Tensor]
    losses: list[float]
    nll: Tensor


@own_state()
def fine_tune(
    lm,
    tasks: list[TuneTask],
    settings: TuneSettings,
    project: Callable[[int, Tensor], Tensor] | None = None,
    *,
    start: dict[int, Tensor] | None = None,
    also: Callable[[dict[int, Tensor]], Tensor] | None = None,
    masks: Tensor | None = None,
) -> Tuned:
    """Δ of each layer, on top of the model and the edits it carries. Random is the tasks' order, where it is shuffled.

    project: (layer, gradient of Δ [d, d_ff]) -> what Adam takes for it; start: {layer: Δ} to begin with, not 0
    also: {layer: Δ} -> a further term of each step's loss; masks: [n, d_ff] bool, what of its keys Δ sees of each task

    One sweep below the first tuned layer, then up to ``steps`` sweeps forth and back through the layers from there on.
    A batch that does not fit ``lm.memory`` is cut into packs whose gradients are added up: the same to rounding. Held
    besides: four tensors [d, d_ff] a layer (Δ, its gradient, Adam's two), and the row [d] of each prompt token that
    enters the first tuned layer, where half the memory holds them all; else they are made anew in each step.

    Raises ValueError where a loss turns NaN or infinite, with the task's name or number and the step; and, with the
    bytes needed, where a task does not fit.
    """
    if settings.shuffle is not None and settings.loss.compares:
        raise ValueError("a loss that compares with the model of before keeps its tasks' order: leave shuffle out")
    return _Tuning(lm, tasks, settings, project, start, also, masks).run()


def held_bytes(lm, task: TuneTask, layers: tuple[int, ...], recompute: bool = False, loss: Loss = SAYING) -> int:
    """Bytes that one task holds at the height of a step, from above: prefixes that tasks share count for each.

    By layer: what autograd keeps of a row, its attention weights, keys and values as attention gathers them. Once: the
    rows that enter the first layer, and logits of target rows.
    """
    rows = len(task.prompt) + len(task.target) - 1
    by_layer = graph_bytes(
        lm, rows, rows, rows**2, lm.n_layers - min(layers), recomputes=recompute or not lm.source.in_memory
    )
    tuned = len(layers) * rows * (lm.d_ff + lm.d_model) * wide(lm.dtype).itemsize  # keys and what Δ makes of them
    return by_layer + tuned + lm.d_model * lm.dtype.itemsize * rows + loss.held_bytes(lm, len(task.target))


class _Tuning:
    """The loop: batches of packs, Adam, the limit."""

    def __init__(self, lm, tasks: list[TuneTask], settings: TuneSettings, project, start, also, masks):
        self.lm, self.settings, self.tasks, self.project = lm, settings, tasks, project
        self.also, self.masks = also, masks
        budget, rows = _budget(lm, tasks, settings)
        waiting = len(tasks) > 1 and not (lm.source.in_memory or lm.source.beside)
        self.side, self.budget = budget // 2, budget // 2 if waiting else budget  # the other half: packs that wait
        self.order = torch.arange(len(tasks))
        self.random = torch.Generator().manual_seed(settings.shuffle or 0)
        cuts = self._cuts()
        device = lm.device if sum(map(len, cuts)) == 1 else torch.device("cpu")
        self.rows = Rows(lm, tasks, settings, device) if rows else None
        self.batches = self._packed(cuts)
        begun = start or {}
        self.deltas = {i: (begun[i].clone() if i in begun else _zeros(lm)).requires_grad_() for i in settings.layers}
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD if settings.sgd else torch.optim.Adam
        self.optimizer = optimizer(self.deltas.values(), lr=settings.lr)  # type: ignore[call-arg]
        self.start = {layer: _weight(lm, layer) for layer in settings.layers} if settings.weight_decay else {}

    def _cuts(self) -> list[list[list[int]]]:
        """The tasks of each pack of each batch, in the order that tasks have now."""
        batches = self.order.split(self.settings.batch_size)
        return [list(_cut(self.lm, self.tasks, some.tolist(), self.settings, self.budget)) for some in batches]

    def _packed(self, cuts: list[list[list[int]]]) -> list[list["_Pack"]]:
        given = self.settings, self.budget, self.rows, self.masks
        return [[_Pack(self.lm, self.tasks, which, *given) for which in packs] for packs in cuts]

    def _shuffle(self) -> None:
        """Another order of the tasks; of a single batch it makes no difference."""
        if self.settings.shuffle is not None and len(self.tasks) > self.settings.batch_size:
            self.order = torch.randperm(len(self.tasks), generator=self.random)
            self.batches = self._packed(self._cuts())

    def run(self) -> Tuned:
        losses, goal = [], self._goal
        if self.settings.loss.compares:
            with torch.no_grad():
                for batch in self.batches:
                    list(self._read(batch, 1))  # what a pack compares with it keeps of its first look
        with progress("fine-tuning (steps)", self.settings.steps) as bar, prepared(self.lm.model, self.lm.family):
            while len(losses) < self.settings.steps and not (losses and losses[-1] < goal):
                self._shuffle()
                step = len(losses) + 1
                weights = [sum(float(pack.weights.sum()) for pack in batch) for batch in self.batches]
                losses.append(sum(self._step(batch, step) for batch in self.batches) / sum(weights))
                bar.advance(1, f"loss {losses[-1]:.3f}")
        with torch.no_grad():
            nll = torch.cat([nll.cpu() for batch in self.batches for _, found in self._read(batch) for nll in found])
        nll = nll[self.order.argsort()]
        return Tuned({layer: delta.detach() for layer, delta in self.deltas.items()}, losses, nll)

    @property
    def _goal(self) -> float:
        return STOP_BELOW if self.settings.loss.stops else -math.inf

    def _step(self, batch: list["_Pack"], step: int) -> float:
        """One step on a batch; gives its summed loss before it, in nats."""
        n = sum(float(pack.weights.sum()) for pack in batch)
        total, packs = 0.0, iter(batch)
        self.optimizer.zero_grad()
        if self.also is not None:
            more = self.also(self.deltas)
            more.backward()
            total += n * float(more.detach())
        for ascents, found in self._read(batch, step):
            found = [nll * next(packs).weights.to(nll) for nll in found]
            total += float(sum(nll.detach().double().sum() for nll in found))
            # of several packs, whether the batch is done is known after the last: its gradients are then left unused
            if len(batch) > 1 or total / n >= self._goal:
                for nll in found:
                    (nll.sum() / n).backward()
                descend(self.lm, ascents)
        if total / n >= self._goal:
            self._update()
        return total

    def _read(self, batch: list["_Pack"], step: int | None = None) -> Iterator[tuple[list[Ascent], list[Tensor]]]:
        """The losses [tasks] of a batch's packs, with their graph where autograd is on: pack by pack, or of as many
        side by side as may wait where layers come in turns. step: None in the end"""
        side = self.lm.source.beside or self.side
        for some in together(batch, lambda pack: pack.waiting_bytes, 0 if self.lm.source.in_memory else side):
            going = [pack.going_up(self.deltas) for pack in some]
            ascents = [ascent for ascent, _ in going]
            ascend(self.lm, ascents)
            found = [pack.losses(rows) for pack, (_, rows) in zip(some, going, strict=True)]
            for pack, nll in zip(some, found, strict=True):
                pack.check(nll.detach(), step)
            yield ascents, found

    @torch.no_grad()
    def _update(self) -> None:
        for layer, delta in self.deltas.items() if self.project is not None else ():
            delta.grad = self.project(layer, delta.grad)
        for layer, weight in self.start.items():
            self.deltas[layer].grad += self.settings.weight_decay * (weight + self.deltas[layer])
        if self.settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.deltas.values(), self.settings.clip)
        self.optimizer.step()
        if self.settings.limit is not None:
            for delta in self.deltas.values():
                delta.clamp_(-self.settings.limit, self.settings.limit)


class _Pack:
    """Tasks that go up together: their runs, where their targets are read, and the rows that enter the first tuned
    layer. Equal prefixes are one row: they stay equal, since Δ is the same for all.

    budget: bytes it may hold; rows: those that enter the first tuned layer (None: made anew each time)
    masks: as in ``fine_tune``; tasks then share no rows, and a run's owner is its task
    """

    def __init__(
        self, lm, tasks: list[TuneTask], which: list[int], settings: TuneSettings, budget: int, rows, masks=None
    ):
        alone = len(which) == 1
        self.recompute = alone and held_bytes(lm, tasks[which[0]], settings.layers, loss=settings.loss) > budget
        self.lm, self.settings, self.which, self.masks = lm, settings, which, masks
        self.tasks = [tasks[i] for i in which]
        places = continuation_places([(task.prompt, task.target) for task in self.tasks])
        sequences = places.sequences
        self.task, self.pos = settings.loss.places(places)
        if not settings.teacher_forced:
            sequences = [task.prompt for task in self.tasks]
            self.pos = torch.tensor([len(task.prompt) - 1 for task in self.tasks])[places.pair]
        runs = RunList()
        if masks is None:
            number = add_sequences(runs, sequences, owner=lm.run_owner)
        else:
            each = zip(sequences, which, strict=True)
            number = torch.cat([add_sequences(runs, [sequence], owner=task) for sequence, task in each])
        self.run, self.runs, self.targets = number[self.task], runs.runs(), places.targets
        self.keeps = torch.tensor([task.keep for task in self.tasks])
        self.factor = torch.tensor([task.factor for task in self.tasks], dtype=torch.float64)
        self.before: Tensor | None = None  # what its loss compares with
        self.table: RowTable | None = None  # of its rows, once it has gone up
        self.weights = torch.tensor(places.lengths if settings.by_token else [1] * len(which), dtype=torch.float64)
        self.rows = rows
        if rows is not None:
            task = torch.empty(len(runs), dtype=torch.int64).index_copy_(0, number, torch.tensor(which))
            run, pos = spans(self.runs.first_pos, self.runs.first_pos + self.runs.n_rows)
            self.places = rows.start[task[run]] + pos

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def waiting_bytes(self) -> float:
        """Of rows that wait while other packs are on a layer; infinite for a pack that has to be alone."""
        if self.recompute:
            return math.inf
        rows, n_layers = int(self.runs.n_rows.sum()), self.lm.n_layers - min(self.settings.layers)
        return rows * n_layers * self.lm.d_model * self.lm.dtype.itemsize

    def going_up(self, deltas: dict[int, Tensor]) -> tuple[Ascent, list[GraphRows]]:
        """Its way up, and the rows that are read there, by layer."""
        lm, layers = self.lm, self.settings.loss.layers(self.lm)
        read = [GraphRows(layer, self.run, self.pos) for layer in layers]
        h = entering(lm, [self.runs], min(deltas))[0] if self.rows is None else self.rows.of(self.places)
        ends = {"first_layer": min(deltas), "last_layer": max(layers)}
        if self.table is None:
            self.table = row_table(lm, self.runs, *ends.values(), None)
        how = ends | {"h": h, "recompute": self.recompute, "table": self.table}
        return Ascent(self.runs, [_Tune(deltas, self.masks), *read], grad=torch.is_grad_enabled(), **how), read

    def losses(self, rows: list[GraphRows]) -> Tensor:
        """[tasks] the loss of each, times its factor."""
        loss, lm = self.settings.loss, self.lm
        read = Read(lm, {one.layer: one.take() for one in rows}, self.task, self.targets, self.keeps)
        if loss.compares and self.before is None:
            waits = lm.device if self.rows is None else self.rows.device
            self.before = loss.before(read).detach().to(waits)
        found = loss.of(read, None if self.before is None else self.before.to(lm.device))
        return found * self.factor.to(found)

    def check(self, nll: Tensor, step: int | None = None) -> None:
        """Raises ValueError for a loss that is not finite: it would go into Δ, and from there into every row.

        step: None for the loss at the end
        """
        when = f"at step {step} of {self.settings.steps}" if step else f"after {self.settings.steps} steps"
        names = [task.name or which for task, which in zip(self.tasks, self.which, strict=True)]
        check_losses(self.lm, nll, names, when)


class Rows:
    """The rows that enter the first tuned layer, of every task at each of its positions: computed once, equal prefixes
    together. start: [n] the row of each task's first token"""

    def __init__(self, lm, tasks: list[TuneTask], settings: TuneSettings, device: torch.device):
        self.lm, self.h, self.device, below = lm, None, device, min(settings.layers) - 1
        sequences = [task.prompt + task.target[:-1] for task in tasks]
        length = torch.tensor([len(sequence) for sequence in sequences])
        self.start = length.cumsum(0) - length
        if below >= 0:
            runs = RunList()
            number = add_sequences(runs, sequences, owner=lm.run_owner)
            which, pos = spans(torch.zeros_like(length), length)
            self.h = collect(lm, runs.runs(), Site.layer_out, [below], number[which], pos)[below].to(device)

    def of(self, places: Tensor) -> Tensor | None:
        """[k, d] on the model's device; None: they are the embedding."""
        return None if self.h is None else self.h[places.to(self.h.device)].to(self.lm.device)


class _Tune:
    """Adds x Δᵀ at the tuned down projections, out of place. masks: as in ``fine_tune``, by the runs' owners"""

    def __init__(self, deltas: dict[int, Tensor], masks: Tensor | None = None):
        self._deltas, self._masks = deltas, masks
        self._keys: Tensor | None = None  # x [rows, d_ff], from its site to the next one of the same call

    def sites(self, layer):
        return (Site.mlp_key, Site.mlp_out) if layer in self._deltas else ()

    def reads(self, layer):
        return None

    def at(self, site, layer, x, call):
        if site is Site.mlp_key:
            self._keys = x if self._masks is None else x * self._masks[call.owner].to(x)
            return None
        keys, self._keys = self._keys, None
        return Dense(self._deltas[layer]).add_to(x, keys)


def _budget(lm, tasks: list[TuneTask], settings: TuneSettings) -> tuple[int, int]:
    """(bytes that a pack may hold, bytes of the rows that enter the first tuned layer, kept for all steps: 0 where they
    are too many). Raises ValueError where the largest task does not fit, its layers computed again."""
    state = 4 * len(settings.layers) * lm.d_model * lm.d_ff * wide(lm.dtype).itemsize
    n_rows = sum(len(task.prompt) + len(task.target) - 1 for task in tasks)
    state += settings.loss.kept_bytes(lm, n_rows)
    left = lm.memory - state
    rows = n_rows * lm.d_model * lm.dtype.itemsize
    rows = rows if rows <= left // 2 else 0
    worst = max(tasks, key=lambda task: len(task.prompt) + len(task.target))
    need = held_bytes(lm, worst, settings.layers, recompute=True, loss=settings.loss)
    if need > left - rows:
        raise too_large(f"fine-tuning on fact {worst.name}", need + state + rows, lm.memory)
    return left - rows, rows


def _cut(lm, tasks: list[TuneTask], batch: Iterable[int], settings: TuneSettings, budget: int) -> Iterator[list[int]]:
    """The tasks of a batch in consecutive packs that fit; one that is too large stands alone."""
    return together(batch, lambda i: held_bytes(lm, tasks[i], settings.layers, loss=settings.loss), budget)


def _zeros(lm) -> Tensor:
    return torch.zeros(lm.d_model, lm.d_ff, dtype=wide(lm.dtype), device=lm.device)


def _weight(lm, layer: int) -> Tensor:
    """The down projection's weight [d, d_ff] with the edits that the model carries, wide."""
    return weight_under(lm.source.weight(layer, "down").detach().to(wide(lm.dtype)), lm.edits, (layer, "down"))
