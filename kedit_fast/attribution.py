"""Attribution: an estimate of every cell of a trace, from one backward pass for all noise draws.

    g(restored) ≈ g(corrupted) + mean over steps s of  ∇g(s) · (x_clean - x(s)) / (1 - s)

x is what a cell puts back (a hidden state, or the MLP's or the attention's output in each layer of a window). x(s) and
the gradient are those of a run whose subject embeddings stand at share s of the way from corrupted to clean; g is the
log-odds of the answer for metric "prob", so that no estimate leaves (0, 1), and the metric itself for the others.

At s = 0 alone this is attribution patching (Nanda 2023; Syed et al. 2023, arXiv:2310.10348). Strong noise saturates:
with 3 standard deviations, where p is near 0, its rank correlation with the exact states of 8 facts on SmolLM2-135M is
0.73, and 0.45 of the 20 strongest cells are among its 20. The three steps give 0.86 and 0.77 (two of them 0.85 and
0.76, eight 0.85 and 0.78): the idea of integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .jobs.attribute import Attribute, Toward
from .jobs.score import Score
from .sites import Site
from .sweep.engine import sweep
from .sweep.runs import RunList
from .trace_tasks import METRICS, SITE, Found, Settings, Task, add_runs, noise_job

STEPS = (0.0, 0.375, 0.75)  # shares of the way from corrupted to clean; the first one is the corrupted run itself
SAVED = 30  # numbers of the hidden size that autograd keeps of a row in a layer (measured in fp32 blocks)


def estimate(lm, tasks: Sequence[Task], how: Settings, advance: Callable[[float], None] | None = None) -> list[Found]:
    """The estimate of every cell of every fact. One weight pass forward and one back for facts that fit the memory."""
    found = []
    for group in _groups(lm, tasks, how.draws):
        share = len(group) / len(tasks)
        found += _estimate(lm, group, how, advance and (lambda part, share=share: advance(part * share)))
    return found


def most(effect: Tensor, n: int, among: Tensor) -> Tensor:
    """[T, L] bool: the n largest of ``effect`` where ``among`` is true."""
    ranked = torch.where(among, effect, -torch.inf).flatten()
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[ranked.topk(min(n, int(among.sum()))).indices] = True
    return chosen.view(effect.shape)


def _groups(lm, tasks, draws) -> Iterator[list[Task]]:
    a_row = SAVED * lm.d_model * lm.dtype.itemsize * lm.n_layers
    group, held = [], 0
    for task in tasks:
        rows = len(task.tokens) + len(STEPS) * draws * (len(task.tokens) - task.span[0])
        if group and (held + rows) * a_row > lm.memory:
            yield group
            group, held = [], 0
        group.append(task)
        held += rows
    yield group


def _estimate(lm, tasks, how: Settings, advance) -> list[Found]:
    runs, n = RunList(), len(STEPS) * how.draws
    clean, on_the_way = add_runs(runs, tasks, n)  # step by step, each with all draws
    sites = tuple(dict.fromkeys(SITE.get(kind, Site.layer_out) for kind in how.kinds))
    places = [_places(*each) for each in zip(tasks, clean, on_the_way, strict=True)]
    attribute = Attribute(sites, lm.n_layers, *(torch.cat(x) for x in zip(*places, strict=True)))
    last = [torch.full((1 + n,), len(task.tokens) - 1) for task in tasks]
    targets = [torch.tensor(task.targets).expand(1 + n, -1) for task in tasks]
    read = torch.cat([torch.cat(both) for both in zip(clean, on_the_way, strict=True)])
    score = Score(lm, read, torch.cat(last), torch.cat(targets))
    sweep(lm, runs.runs(), [*_embeddings(lm, tasks, on_the_way, how), attribute, score], grad=True, advance=advance)
    objective = (log_odds if how.metric == "prob" else METRICS[how.metric])(score.logprob).view(len(tasks), 1 + n)
    effects = attribute.effects(objective[:, 1:])
    value, cut = METRICS[how.metric](score.logprob.detach()).view(len(tasks), 1 + n), [len(run) for run, _, _ in places]
    by_fact = zip(*(effect.split(cut, 1) for effect in effects.values()), strict=True)
    return [
        _found(lm, task, how, of_fact[: 1 + how.draws], start[1 : 1 + how.draws], dict(zip(effects, mine, strict=True)))
        for task, of_fact, start, mine in zip(tasks, value, objective.detach(), by_fact, strict=True)
    ]


def _embeddings(lm, tasks, on_the_way: list[Tensor], how: Settings) -> list:
    """Jobs that make the runs' embeddings: the noise of all draws in each step, then that step's share of the way."""
    steps = [[runs.split(how.draws)[i] for runs in on_the_way] for i in range(len(STEPS))]
    noise = [] if how.level is None else [noise_job(lm, tasks, runs, how) for runs in steps]
    return noise + [_toward(lm, tasks, runs, share) for runs, share in zip(steps, STEPS, strict=True) if share]


def _toward(lm, tasks, runs: list[Tensor], share: float) -> Toward:
    """The subject's embeddings of ``runs`` at that share of the way to the clean run's."""
    run, pos, clean = [], [], []
    for task, mine in zip(tasks, runs, strict=True):
        subject = torch.arange(*task.span)
        run.append(mine.repeat_interleave(len(subject)))
        pos.append(subject.repeat(len(mine)))
        clean.append(torch.tensor(task.tokens)[pos[-1]])
    return Toward(lm, torch.cat(run), torch.cat(pos), torch.cat(clean), share)


def log_odds(logprob: Tensor) -> Tensor:
    """log p/(1 - p) [k] of the first of logprob [k, m]."""
    log_p = logprob[:, 0].clamp(max=-1e-6)  # fp32 rounds p to 1 not far above
    return log_p - torch.log(-torch.expm1(log_p))


def _places(task: Task, clean: Tensor, corrupted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(run, pos, from_run) of every position from the subject on, draw by draw."""
    pos = torch.arange(task.span[0], len(task.tokens))
    run = corrupted.repeat_interleave(len(pos))
    return run, pos.repeat(len(corrupted)), clean.expand(len(run))


def _found(lm, task, how: Settings, value, start, effects: dict[Site, Tensor]) -> Found:
    """One fact's estimates. value: [1 + draws] of the clean and the corrupted runs; start: [draws] what effects are
    added to; effects: {site: [L, steps * draws * positions]}."""
    p_clean, p_corrupted, first = value[0], value[1:].mean(), task.span[0]
    way_left = torch.tensor([1 - share for share in STEPS])[:, None, None]
    restored = {}
    for kind in how.kinds:
        effect = effects[SITE.get(kind, Site.layer_out)].view(lm.n_layers, len(STEPS), how.draws, -1)
        effect = (effect / way_left).mean(1)
        effect = effect if kind == "state" else _windows(effect, how.window)
        estimated = start.cpu()[:, None] + effect
        table = p_corrupted.repeat(len(task.tokens), lm.n_layers)
        table[first:] = (estimated.sigmoid() if how.metric == "prob" else estimated).mean(1).T
        if kind == "state":  # nothing stands above the last layer
            table[:, -1] = p_corrupted
            table[-1, -1] = p_clean
        restored[kind] = table
    return Found(p_clean, p_corrupted, restored)


def _windows(effect: Tensor, window: int) -> Tensor:
    """[L, ...] summed over the window of layers around each layer, clamped at the ends."""
    below = torch.cat([torch.zeros_like(effect[:1]), effect.cumsum(0)])
    layer = torch.arange(len(effect))
    begin, end = (layer - window // 2).clamp(min=0), (layer + (window + 1) // 2).clamp(max=len(effect))
    return below[end] - below[begin]
