"""Attribution: a first-order estimate of every cell of a trace, from one backward pass for all noise draws.

    p(restored) ≈ p(corrupted) + ∇p · (x_clean - x_corrupted)

x is what a cell puts back (a hidden state, or the MLP's or the attention's output in each layer of a window), and the
gradient is taken in the corrupted run. (Attribution patching: Nanda 2023; Syed et al. 2023, arXiv:2310.10348. The
gradient in the clean run, where p is near its ceiling, does not rank cells.)
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .jobs.attribute import Attribute
from .jobs.score import Score
from .sites import Site
from .sweep.engine import sweep
from .sweep.runs import RunList
from .trace_tasks import METRICS, SITE, Found, Settings, Task, add_runs, noise_job

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
        rows = len(task.tokens) + draws * (len(task.tokens) - task.span[0])
        if group and (held + rows) * a_row > lm.memory:
            yield group
            group, held = [], 0
        group.append(task)
        held += rows
    yield group


def _estimate(lm, tasks, how: Settings, advance) -> list[Found]:
    runs = RunList()
    clean, corrupted = add_runs(runs, tasks, how.draws)
    sites = tuple(dict.fromkeys(SITE.get(kind, Site.layer_out) for kind in how.kinds))
    places = [_places(*each) for each in zip(tasks, clean, corrupted, strict=True)]
    attribute = Attribute(sites, lm.n_layers, *(torch.cat(x) for x in zip(*places, strict=True)))
    last = [torch.full((1 + how.draws,), len(task.tokens) - 1) for task in tasks]
    targets = [torch.tensor(task.targets).expand(1 + how.draws, -1) for task in tasks]
    read = torch.cat([torch.cat(both) for both in zip(clean, corrupted, strict=True)])
    score = Score(lm, read, torch.cat(last), torch.cat(targets))
    noise = [] if how.level is None else [noise_job(lm, tasks, corrupted, how)]
    sweep(lm, runs.runs(), [*noise, attribute, score], grad=True, advance=advance)
    value = METRICS[how.metric](score.logprob).view(len(tasks), 1 + how.draws)
    effects = attribute.effects(value[:, 1:])
    value, cut = value.detach(), [len(run) for run, _, _ in places]
    by_fact = zip(*(effect.split(cut, 1) for effect in effects.values()), strict=True)
    return [
        _found(lm, task, how, of_fact, dict(zip(effects, mine, strict=True)))
        for task, of_fact, mine in zip(tasks, value, by_fact, strict=True)
    ]


def _places(task: Task, clean: Tensor, corrupted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(run, pos, from_run) of every position from the subject on, draw by draw."""
    pos = torch.arange(task.span[0], len(task.tokens))
    run = corrupted.repeat_interleave(len(pos))
    return run, pos.repeat(len(corrupted)), clean.expand(len(run))


def _found(lm, task, how: Settings, value, effects: dict[Site, Tensor]) -> Found:
    """One fact's estimates; value: [1 + draws], effects: {site: [L, draws * positions]}."""
    p_clean, p_corrupted, first = value[0], value[1:].mean(), task.span[0]
    restored = {}
    for kind in how.kinds:
        effect = effects[SITE.get(kind, Site.layer_out)].view(lm.n_layers, how.draws, -1).mean(1)
        table = p_corrupted.repeat(len(task.tokens), lm.n_layers)
        table[first:] += (effect if kind == "state" else _windows(effect, how.window)).T
        if kind == "state":  # nothing stands above the last layer
            table[:, -1] = p_corrupted
            table[-1, -1] = p_clean
        restored[kind] = table
    return Found(p_clean, p_corrupted, restored)


def _windows(effect: Tensor, window: int) -> Tensor:
    """[L, n] summed over the window of layers around each layer, clamped at the ends."""
    below = torch.cat([torch.zeros_like(effect[:1]), effect.cumsum(0)])
    layer = torch.arange(len(effect))
    begin, end = (layer - window // 2).clamp(min=0), (layer + (window + 1) // 2).clamp(max=len(effect))
    return below[end] - below[begin]
