"""Optimizes the values v* (ROME) or z (MEMIT) of many facts at once.

For each fact a vector δ is added to one site of one layer at the lookup token of all its contexts, and moved by Adam to

    L = mean over prompts, target tokens of -log p(o*)  +  kl_factor KL(p_δ || p_0)  +  weight_decay ||δ|| / ||v_0||²

with ||δ|| <= clamp ||v_0|| by projection (Meng et al. 2022, ROME, eq. 4; Meng et al. 2023, MEMIT, eq. 16). KL is taken
at the subject's last token of "{subject} is a", and δ acts there too. What other prompts of the subject, its keeps, go
on with may be held as well: + keep_factor times the mean over them of KL(p_0 || p_δ) at their last token. Deltas of
facts are independent, so packing them is exact. Everything before the lookup token and below the layer is computed
once.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics import ranks
from kedit_fast.basics.parts import Keep, make_now
from kedit_fast.basics.progress import progress
from kedit_fast.basics.state import own_state, wide
from kedit_fast.jobs.collect import Collect, GraphRows
from kedit_fast.jobs.finite import check_answers, check_losses, not_finite
from kedit_fast.kernels.target_logprob import target_logprob
from kedit_fast.model.seam import prepared
from kedit_fast.sweep.ascent import Ascent, ascend, descend
from kedit_fast.sweep.engine import row_table
from kedit_fast.sweep.kept import in_groups
from kedit_fast.sweep.plan import graph_bytes, logit_bytes, logit_rows, together, too_large
from kedit_fast.sweep.rows import There
from kedit_fast.sweep.runs import NEVER, RunList, add_under, padded, spans
from kedit_fast.sweep.sites import Site
from kedit_fast.sweep.store import KVStore, on_host

LABEL = "optimizing values (steps)"
STOP_BELOW = 0.05  # nats: a fact is done once its whole loss is below this (published)
LOGITS, KL_LOGITS = 3, 6  # logits that a target row, and a fact's KL row and p_0, hold at the height of a step


@dataclass(frozen=True)
class ValueTask:
    """One fact: token sequences, where its value acts, and what is to come after.

    sequences: prompt tokens in each context, the bare one first, and of other prompts; lookups: index of the lookup
        token in each; targets: token ids behind each
    essence: tokens of "{subject} is a" up to its lookup token, its last one
    name: what errors call it, besides its number; owner: the fact whose independent edit acts on it, if any do
    keeps: prompts that are to go on as they did; keep_lookups: index of the lookup token in each
    """

    sequences: list[list[int]]
    lookups: list[int]
    targets: list[list[int]]
    essence: list[int]
    name: str = ""
    owner: int = 0
    keeps: Sequence[list[int]] = ()
    keep_lookups: Sequence[int] = ()


@dataclass(frozen=True)
class ValueSettings:
    """Where the values live and the hyper-parameters of their optimization, under the published names.

    loss_layer: the hidden state of this layer is what the target's loss reads through norm and head
    hits: a fact is done, too, once so many steps have found each of its target tokens the likeliest in every prompt;
        0: they are not counted
    keep_factor: of the mean over a task's keeps
    nll_factor: of the target's loss; after a step that found each of its tokens the likeliest in every prompt it weighs
        ``relaxed`` times as much, and the fact is done where its KL term, kl_factor KL, is less than ``calm`` (PMET)
    beside: another site of the layer, with a δ of its own, bounded and weighed as the first; its value is not given
    relative: whether lr is in units of each v_0: of the median of its entries' magnitudes, which a few large entries
        do not move (published: no)
    """

    layer: int
    site: Site
    lr: float
    steps: int
    weight_decay: float
    kl_factor: float
    clamp: float
    loss_layer: int
    hits: int = 0
    keep_factor: float = 0.0
    nll_factor: float = 1.0
    relaxed: float = 1.0
    calm: float = 0.0
    beside: Site | None = None
    relative: bool = False

    @property
    def counts(self) -> bool:
        """Whether it matters which tokens are the likeliest."""
        return self.hits > 0 or self.relaxed != 1


@dataclass(frozen=True)
class Values:
    """values, initial: [n, d]; steps: [n] forward passes taken; loss: [n] the last loss (nats); nll: [n] its first
    term, so exp(-nll) is the target's probability at the value."""

    values: Tensor
    initial: Tensor
    steps: Tensor
    loss: Tensor
    nll: Tensor


@own_state()
def optimize_values(
    lm, tasks: list[ValueTask], settings: ValueSettings, keep: Keep = make_now, name: str = "values"
) -> Values:
    """Values of all facts; facts are cut into groups by ``lm.memory``, which ranks share. One base sweep and up to
    ``steps`` sweeps of the upper layers a group. A fact too large for the memory takes as many sweeps a step as its
    contexts have to be cut into. No randomness.

    Where layers come in turns, the packs of a group go up and down side by side: a step is two passes over the weights
    of the upper layers, for as many facts as there is room for rows that wait.

    keep, name: each group is a part of the work kept under that name (``in_groups``)
    Raises ValueError where the model or a loss gives NaN or infinity; for a loss with the fact's number and name and
    the step; and, with the bytes needed, where a fact does not fit however it is cut.
    """
    parts = []
    with progress(LABEL, settings.steps * len(tasks)) as bar, prepared(lm.model, lm.family):

        def size(task: ValueTask) -> int:
            return held_bytes(lm, task, settings)

        def make(group: Sequence[ValueTask], first: int) -> dict[str, Tensor]:
            return _side_by_side(lm, list(group), settings, first, bar)

        for group in in_groups(keep, name, tasks, lambda rest: groups(lm, rest, settings), make, size=size):
            parts.append(group.part)
            n_done = group.first + len(group.items)
            bar.resume(n_done * settings.steps - bar.done)  # where the group had been kept
    found = ranks.joined(parts)
    return Values(**found | {key: found[key].to(lm.device) for key in ("values", "initial")})


def groups(lm, tasks: Sequence[ValueTask], settings: ValueSettings) -> Iterator[list[ValueTask]]:
    """Consecutive facts that are held together; one that is too large stands alone."""
    if lm.source.in_memory:
        return together(tasks, lambda task: held_bytes(lm, task, settings), lm.memory)
    return together(tasks, lambda task: _waiting_bytes(lm, task, settings), lm.source.beside or lm.memory // 2)


def packs(lm, tasks: Sequence[ValueTask], settings: ValueSettings) -> Iterator[list[ValueTask]]:
    """The facts of a group in packs that are on a layer together; all of them where layers are in memory."""
    if lm.source.in_memory or len(tasks) == 1:
        return iter([list(tasks)])
    room = lm.memory if lm.source.beside else lm.memory // 2
    return together(tasks, lambda task: _passing_bytes(lm, task, settings), room)


def _side_by_side(lm, tasks: list[ValueTask], settings: ValueSettings, first: int, bar) -> dict[str, Tensor]:
    """The values of a group, as a part of the work: its packs take each way up and each way down together."""
    cut, at = list(packs(lm, tasks, settings)), first
    work = {}
    for number, some in enumerate(cut):
        work[number] = _Pack(lm, some, settings, at).work(bar)
        at += len(some)
    found: dict[int, dict[str, Tensor]] = {}
    asked = {number: next(each) for number, each in work.items()}
    while asked:
        ascend(lm, [one for one in asked.values() if not one.is_up])
        descend(lm, [one for one in asked.values() if one.goes_down])
        for number in list(asked):
            try:
                asked[number] = next(work[number])
            except StopIteration as done:
                found[number] = vars(done.value)
                del asked[number]
    return {key: torch.cat([found[number][key] for number in sorted(found)]) for key in found[0]}


class _AddValue:
    """Adds each fact's δ at a site of one layer, at places (run, pos) of ``fact``; out of place, for autograd."""

    def __init__(self, layer: int, site: Site, run: Tensor, pos: Tensor, fact: There, delta: Tensor):
        self._layer, self._site, self.run, self.pos, self.delta = layer, site, run, pos, delta
        self._fact = fact

    def sites(self, layer):
        return (self._site,) if layer == self._layer else ()

    def reads(self, layer):
        return None

    def at(self, site, layer, x, call):
        which, row = call.find(self.run, self.pos)
        return x.index_add(0, row, self.delta[self._fact.on(x.device)[which]].to(x.dtype))


class _Pack:
    """The facts of one pack, from the base sweep to their values. first: the number of the first of them.

    ``work`` gives each sweep that it wants next, so that packs can be swept side by side.
    """

    def __init__(self, lm, tasks: list[ValueTask], settings: ValueSettings, first: int = 0):
        self.lm, self.tasks, self.settings, self.first = lm, tasks, settings, first
        # Where nothing stands between the site and the residual stream, δ goes to the rows that enter the next layer.
        into_stream = settings.site is Site.layer_out or lm.family.adds_as_is
        self.above = into_stream and settings.beside is None and settings.layer < settings.loss_layer
        self.sites = [settings.site, *([settings.beside] if settings.beside else [])]
        self.emphasis = There(torch.full((len(tasks),), settings.nll_factor))  # of each fact's target loss, next step
        self.asked: dict[range, _Asked] = {}  # by part, as long as the same facts are active
        self.begin = settings.layer + self.above
        self.store = KVStore(from_layer=self.begin, on_host=lm.source.beside > 0)
        self.parts, self.recompute = parts(lm, tasks, settings)
        self._declare()

    def _declare(self) -> None:
        """Every (fact, prompt), then every KL prompt and every keep, as one list of sequences, with what is read of
        each. The rows whose distribution is compared with p_0 are m: one a fact, then those of the keeps.

        kl_index: [m] the sequence that holds each of them: its own, but for a fact's KL prompt the bare prompt where
            that begins with it (as in "{} is in the city of"), for then the lookup token's row is the same
        """
        tasks = self.tasks
        prompts = [(prompt, target) for t in tasks for prompt, target in zip(t.sequences, t.targets, strict=True)]
        keeps = [keep for t in tasks for keep in t.keeps]
        self.sequences = [s + target[:-1] for s, target in prompts] + [t.essence for t in tasks] + keeps
        n_prompts, n_keeps = (torch.tensor([len(getattr(t, x)) for t in tasks]) for x in ("sequences", "keeps"))
        every, fact = torch.arange(len(self.sequences)), torch.arange(len(tasks))
        self.kl_fact = torch.cat([fact, fact.repeat_interleave(n_keeps)])
        self.fact = torch.cat([fact.repeat_interleave(n_prompts), self.kl_fact])
        self.has_target = every < len(prompts)
        self.length = torch.tensor([len(sequence) for sequence in self.sequences])
        lookups = [k for t in tasks for k in t.lookups] + [len(t.essence) - 1 for t in tasks]
        self.lookup = torch.tensor(lookups + [k for t in tasks for k in t.keep_lookups])
        self.prompt_length = torch.tensor([len(prompt) for prompt, _ in prompts])
        self.owner = torch.tensor([t.owner for t in tasks])[self.fact]
        self.targets, self.target_length = padded([target for _, target in prompts])
        self.weight = 1 / (n_prompts[self.fact[self.has_target]] * self.target_length).double()
        self.bare = n_prompts.cumsum(0) - n_prompts
        own = every[~self.has_target]
        self.kl_pos = self.length[own] - 1
        of_keeps = torch.full((len(keeps),), self.settings.keep_factor) / n_keeps[self.kl_fact[len(tasks) :]]
        self.kl_weight = torch.cat([torch.full((len(tasks),), self.settings.kl_factor), of_keeps]).double()
        inside = torch.tensor([t.sequences[0][: t.lookups[0] + 1] == t.essence for t in tasks])
        self.kl_index = torch.cat([torch.where(inside, self.bare, own[: len(tasks)]), own[len(tasks) :]])
        self.has_rows = torch.ones(len(self.sequences), dtype=torch.bool)
        self.has_rows[own[: len(tasks)][inside]] = False

    def _base_sweep(self) -> Iterator[Ascent]:
        """Keys, values and rows of every sequence from the layer on; the initial values; p_0 of the compared rows."""
        lm, settings = self.lm, self.settings
        runs = RunList()
        self.number = add_under(lm, runs, self.sequences, self.owner)
        self.base = runs.runs()
        at = self.number[self.bare], self.lookup[self.bare]
        initial = [Collect(site, [settings.layer], *at) for site in self.sites]
        compared = Collect(Site.layer_out, [lm.n_layers - 1], self.number[~self.has_target], self.kl_pos)
        yield Ascent(self.base, [*initial, compared], keep=self.store)
        self.initial = torch.stack([job.values[settings.layer] for job in initial]).to(wide(lm.dtype))  # [sites, n, d]
        compared_h = compared.values[lm.n_layers - 1]
        with torch.no_grad():
            self.log_p0 = lm.head(compared_h).to(wide(lm.dtype)).log_softmax(-1)  # [m, V]
        if not (torch.isfinite(self.initial).all() and torch.isfinite(compared_h).all()):
            raise not_finite(lm, f"the hidden states of {lm.name} hold NaN or infinity at the facts' prompts")
        check_answers(lm, self.log_p0.amax(-1), lambda i: self.sequences[len(self.prompt_length) + i])
        if self.store.on_host:
            self.log_p0 = on_host(self.log_p0)

    def work(self, bar) -> Generator[Ascent, None, Values]:
        """Its sweeps, one after the other; the values in the end."""
        yield from self._base_sweep()
        settings, n = self.settings, len(self.tasks)
        delta = torch.zeros_like(self.initial, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=settings.lr)
        longest = settings.clamp * self.initial.norm(dim=-1, keepdim=True)
        size = self.initial.abs().median(dim=-1, keepdim=True).values
        pace = size if settings.relative else torch.ones_like(size)
        steps = torch.zeros(n, dtype=torch.int64)
        loss, nll, hits = torch.zeros(n), torch.zeros(n), torch.zeros(n)
        active, still = torch.ones(n, dtype=torch.bool), There(torch.zeros(n, dtype=torch.bool))
        for step in range(settings.steps):
            adam.zero_grad()
            is_last = step + 1 == settings.steps
            losses, ascent = yield from self._all_losses(active, delta, is_last)
            # the one point of a step where a GPU is waited for
            part_nll, part_loss, kl, missed = (each[active] for each in losses.detach().cpu())
            # a value that is NaN would go into the edit, and from there into every row
            names = [self.tasks[i].name or self.first + i for i in active.nonzero()[:, 0].tolist()]
            check_losses(self.lm, part_loss, names, f"at step {step + 1} of {settings.steps}")
            steps[active] += 1
            loss[active], nll[active] = part_loss.float(), part_nll.float()
            hits[active] += (missed == 0).float()
            reached = (loss < STOP_BELOW) | (hits >= (settings.hits or math.inf))
            if settings.relaxed != 1:
                emphasis = settings.nll_factor * torch.where(missed == 0, settings.relaxed, 1.0)
                self.emphasis = There(self.emphasis.here.index_put((active,), emphasis))  # the graph holds the old one
                reached[active] |= (missed == 0) & (settings.kl_factor * kl < settings.calm)
            done = active if is_last else active & reached
            left = settings.steps - step - 1  # of each fact that is done
            bar.advance(int(active.sum() + left * done.sum()), f"loss {loss[active].mean():.3f}")
            if done.any():
                active, still = active & ~done, There(~active | done)
                self.asked.clear()
            if not active.any():
                break
            kept = delta.detach().clone()
            if ascent is not None:
                yield from _back(losses[1].sum(), ascent)
            adam.step()
            with torch.no_grad():
                # done: Adam's momentum must not move it
                delta.copy_(kept.lerp(delta, pace.masked_fill(still.on(delta.device)[:, None], 0.0)))
                delta *= (longest / delta.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
        return Values((self.initial + delta.detach())[0], self.initial[0], steps, loss, nll)

    def _all_losses(self, active: Tensor, delta: Tensor, is_last: bool) -> Generator[Ascent, None, "_Losses"]:
        """The losses: with their graph, or, where the sequences are cut into parts, with δ's gradient from all of them
        (in the last step nobody needs it) and no ascent."""
        if len(self.parts) == 1:
            return (yield from self._losses(active, delta, self.parts[0]))
        total: Tensor | int = 0
        for part in self.parts:
            if not self.has_rows[part.start : part.stop].any():
                continue
            losses, ascent = yield from self._losses(active, delta, part)
            if not is_last:
                yield from _back(losses[1].sum(), ascent)
            total = total + losses.detach()
        return _Losses(total, None)

    def _losses(self, active: Tensor, delta: Tensor, part: range) -> Generator[Ascent, None, "_Losses"]:
        """The losses with their graph, as far as these sequences make them."""
        lm, settings = self.lm, self.settings
        if part not in self.asked:
            self.asked[part] = _Asked(self, active, part)
        asked = self.asked[part]
        h, adding = self.store.h[asked.began.on(self.store.h.device)].detach().to(lm.device), []
        if self.above:
            h = h.index_add(0, asked.first.on(h.device), delta[0, asked.fact.on(h.device)].to(h.dtype))
        else:
            both = zip(self.sites, delta, strict=True)
            adding = [_AddValue(settings.layer, site, *asked.lookups, asked.fact, own) for site, own in both]
        jobs = [*adding, top := GraphRows(settings.loss_layer, *asked.places)]
        if asked.has_kl:
            jobs.append(kl_top := GraphRows(lm.n_layers - 1, *asked.kl_places))
        how = {"h": h, "store": self.store, "recompute": self.recompute, "table": asked.table}
        yield (ascent := Ascent(asked.runs, jobs, grad=True, first_layer=self.begin, last_layer=asked.last, **how))
        rows, fact = top.take(), asked.target_fact.on(h.device)
        with torch.enable_grad():
            log_p = target_logprob(rows, lm.fusable_head, asked.target.on(h.device), lm.n_vocab)
            nll = log_p.new_zeros(len(active)).index_add(0, fact, -log_p * asked.weight.on(h.device).to(log_p))
            missed = torch.zeros_like(nll).index_add(0, fact, self._missed(rows, asked.target).to(nll))
            total, own = nll * self.emphasis.on(h.device).to(nll), torch.zeros_like(nll)
            if asked.has_kl:
                kl = self._kl(kl_top.take(), asked)
                weighed = asked.kl_weight.on(h.device).to(kl) * kl
                total = total.index_add(0, asked.kl_fact.on(h.device), weighed)
                once = asked.once.on(h.device)
                decay = (delta.norm(dim=-1) / self.initial.norm(dim=-1).square()).sum(0)[once]
                total = total.index_add(0, once, settings.weight_decay * decay)
                own = own.index_add(0, once, kl[: len(asked.once)])
            return _Losses(torch.stack([nll, total, own, missed]), ascent)

    @torch.no_grad()
    def _missed(self, rows: Tensor, target: There) -> Tensor:
        """[n] whether a row's target token is not the likeliest; no for all of them where nobody counts."""
        if not self.settings.counts:
            return torch.zeros(len(target), dtype=torch.bool, device=rows.device)
        said = [self.lm.head(some.detach()).argmax(-1) for some in rows.split(logit_rows(self.lm))]
        return torch.cat(said) != target.on(rows.device)

    def _kl(self, h: Tensor, asked: "_Asked") -> Tensor:
        """KL(p_δ || p_0) in nats for each compared row that is asked for, and KL(p_0 || p_δ) for those of keeps."""
        log_p = self.lm.head(h).to(self.log_p0.dtype).log_softmax(-1)
        log_p0 = self.log_p0[asked.compared.on(self.log_p0.device)].to(h.device)
        n = len(asked.once)
        own = (log_p[:n].exp() * (log_p[:n] - log_p0[:n])).sum(-1)
        return torch.cat([own, (log_p0[n:].exp() * (log_p0[n:] - log_p[n:])).sum(-1)])


class _Asked:
    """What a step asks of a part of the sequences, for as long as the same facts are active.

    runs: own the rows from each lookup token on, over the stored ones; table: their rows, once they have gone up
    began: of each row the stored one that it begins as; first: which of them are lookup tokens; fact: of each
    lookups, places, kl_places: (run, pos) of lookup tokens, of what predicts targets, and of compared rows
    target, weight, target_fact: the tokens that are predicted, each one's weight in its fact's mean, the fact
    compared: which rows of p_0; kl_weight, kl_fact: of each; once: the facts whose KL prompt is here, those rows first
    """

    def __init__(self, pack: _Pack, active: Tensor, part: range):
        here = torch.zeros(len(pack.sequences), dtype=torch.bool)
        here[part.start : part.stop] = True
        chosen = (active[pack.fact] & pack.has_rows & here).nonzero()[:, 0]
        number = self._declare_runs(pack, chosen)
        self.lookups = number[chosen], pack.lookup[chosen]
        self.fact = There(pack.fact[chosen])
        prompts = chosen[pack.has_target[chosen]]
        self._find_targets(pack, prompts, number[prompts])
        compared = here[pack.kl_index] & active[pack.kl_fact]
        self.kl_places = number[pack.kl_index[compared]], pack.kl_pos[compared]
        self.compared = There(compared.nonzero()[:, 0])
        self.kl_weight, self.kl_fact = There(pack.kl_weight[compared]), There(pack.kl_fact[compared])
        self.once = There(compared[: len(active)].nonzero()[:, 0])
        self.has_kl = bool(compared.any())
        self.last = pack.lm.n_layers - 1 if self.has_kl else pack.settings.loss_layer
        self.table = row_table(pack.lm, self.runs, pack.begin, self.last, pack.store)

    def _declare_runs(self, pack: _Pack, chosen: Tensor) -> Tensor:
        """Gives the runs' numbers, [sequences], -1 for those not chosen."""
        base, length, first = pack.number[chosen], pack.length[chosen], pack.lookup[chosen]
        runs = RunList()
        runs.add(pack.base.tokens, length=pack.base.length, branch_layer=torch.full((len(pack.base),), NEVER))
        number = runs.add(
            pack.base.tokens[base], length=length, parent=base, first_pos=first, branch_layer=pack.begin,
            owner=pack.base.owner[base],
        )  # fmt: skip
        self.runs = runs.runs()
        which, pos = spans(first, length)
        self.began = There(pack.store.table[base[which], pos])
        count = length - first
        self.first = There(count.cumsum(0) - count)
        return torch.full((len(pack.sequences),), -1).index_copy_(0, chosen, number)

    def _find_targets(self, pack: _Pack, prompts: Tensor, number: Tensor) -> None:
        """Places whose next token is a target token."""
        start = pack.prompt_length[prompts] - 1
        which, pos = spans(start, start + pack.target_length[prompts])
        sequence = prompts[which]
        self.places = number[which], pos
        self.target = There(pack.targets[sequence, pos - start[which]])
        self.weight, self.target_fact = There(pack.weight[sequence]), There(pack.fact[sequence])


class _Losses(NamedTuple):
    """losses: [4, facts]: -log p of the target, whole loss and KL at the subject's last token, in nats, and target
    tokens in any prompt that were not the likeliest; ascent: that they were read of."""

    losses: Tensor
    ascent: Ascent | None


def _back(loss: Tensor, ascent: Ascent) -> Iterator[Ascent]:
    """Gradients of δ: by autograd, and then down the layers where these come in turns."""
    if loss.requires_grad:
        loss.backward()
        ascent.goes_down = True
        yield ascent


# ---- what fits the memory


def held_bytes(lm, task: ValueTask, settings: ValueSettings) -> int:
    """Bytes that one fact holds at the height of a step, from above: prefixes that facts share count for each.

    Keys and values in the store, and what autograd keeps: rows from the lookup token on, their attention weights, keys
    and values as attention gathers them, wide and as long as the longest. Once: the store's rows, and logits of target
    rows and of the KL row.
    """
    return _stored_bytes(lm, task, settings) + _step_bytes(lm, task, settings, range(len(_rows(task))))


def _waiting_bytes(lm, task: ValueTask, settings: ValueSettings) -> float:
    """Of one fact where layers come in turns: what waits while other packs are on a layer. Infinite for a fact that is
    too large to share the memory: it stands alone."""
    alone = _passing_bytes(lm, task, settings) > lm.memory // 2
    return math.inf if alone else _stored_bytes(lm, task, settings) + _entering_bytes(lm, task, settings)


def _passing_bytes(lm, task: ValueTask, settings: ValueSettings) -> int:
    """Of one fact where layers come in turns: what its pack holds while it is on a layer, or reads its losses."""
    everything = range(len(_rows(task)))
    return _step_bytes(lm, task, settings, everything) - _entering_bytes(lm, task, settings)


def _entering_bytes(lm, task: ValueTask, settings: ValueSettings) -> int:
    """Of one fact's rows as they enter each layer of a step."""
    return (lm.n_layers - settings.layer) * upper_rows(task) * lm.d_model * lm.dtype.itemsize


def upper_rows(task: ValueTask) -> int:
    """Rows of one fact in a layer of a step."""
    return sum(length - first for length, first in _rows(task))


def _rows(task: ValueTask) -> list[tuple[int, int]]:
    """(length, first row of a step) of each of a fact's sequences: prompts, from the lookup token on, with their
    targets, whose last token is predicted, not read; the KL prompt, one row; keeps, from the lookup token on."""
    prompts = zip(task.sequences, task.targets, task.lookups, strict=True)
    n = len(task.essence)
    keeps = zip(map(len, task.keeps), task.keep_lookups, strict=True)
    return [*((len(s) + len(target) - 1, k) for s, target, k in prompts), (n, n - 1), *keeps]


def _stored_bytes(lm, task: ValueTask, settings: ValueSettings) -> int:
    """Of one fact's prefixes, for all steps; and p_0."""
    itemsize = lm.dtype.itemsize
    rows = sum(length for length, _ in _rows(task))
    by_layer = 2 * lm.n_key_heads * lm.head_dim * itemsize
    p_0 = logit_bytes(lm, 2 * (1 + len(task.keeps)))
    return ((lm.n_layers - settings.layer) * by_layer + lm.d_model * itemsize) * rows + p_0


def _step_bytes(lm, task: ValueTask, settings: ValueSettings, some: Sequence[int], recompute: bool = False) -> int:
    """Of ``some`` of one fact's sequences (as ``_rows`` has them), at the height of a step."""
    every, n = _rows(task), len(task.sequences)
    rows, longest = sum(every[i][0] - every[i][1] for i in some), max(every[i][0] for i in some)
    targets = sum(len(task.targets[min(i, n - 1)]) for i in some if i <= n)
    kept = sum(i > n for i in some)
    layers = graph_bytes(
        lm, rows, len(some) * longest, rows * longest, lm.n_layers - settings.layer,
        recomputes=recompute or not lm.source.in_memory,
    )  # fmt: skip
    return layers + logit_bytes(lm, LOGITS * targets + KL_LOGITS * (1 + kept))


def parts(lm, tasks: list[ValueTask], settings: ValueSettings) -> tuple[list[range], bool]:
    """The sequences of a group in parts whose gradients are added up, so that each fits the memory; and whether layers
    have to be computed again for that. Facts that fit together are one part."""
    n = sum(len(_rows(task)) for task in tasks)
    if len(tasks) > 1:
        return [range(n)], False
    task, room = tasks[0], lm.memory - _stored_bytes(lm, tasks[0], settings)
    for recompute in (False, True):
        need = max(_step_bytes(lm, task, settings, [i], recompute) for i in range(n))
        if need <= room:
            size = next(s for s in range(n, 0, -1) if _largest(lm, task, settings, s, recompute) <= room)
            return [range(i, min(i + size, n)) for i in range(0, n, size)], recompute
    what = f"fact {task.name}, one context at a time,"
    raise too_large(what, need + lm.memory - room, lm.memory)


def _largest(lm, task: ValueTask, settings: ValueSettings, size: int, recompute: bool) -> int:
    """Bytes of the largest part, where a fact's sequences are cut into parts of that size."""
    n = len(_rows(task))
    cut = (range(i, min(i + size, n)) for i in range(0, n, size))
    return max(_step_bytes(lm, task, settings, some, recompute) for some in cut)
