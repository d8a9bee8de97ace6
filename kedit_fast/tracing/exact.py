"""The exact way: every cell a run of its own, all of them in one sweep."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from kedit_fast.basics.progress import scaled
from kedit_fast.facts.fact import Fact
from kedit_fast.jobs.score import Score
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.plan import TABLES
from kedit_fast.sweep.rows import There
from kedit_fast.sweep.runs import RunList
from kedit_fast.sweep.sites import Site
from kedit_fast.tracing.draws import anchors
from kedit_fast.tracing.tasks import METRICS, SITE, Drawn, Task, TraceSettings, add_runs, noise_job


class Restore:
    """Replaces a site's value at places by another run's value at the same site, layer and position.

    ``site``: attn_out or mlp_out; for write i: in layers [begin[i], end[i]), at (run[i], pos[i]), the value of
    ``from_run[i]``. From the clean run this restores a window; from the corrupted run it freezes (severed traces).
    """

    def __init__(self, site: Site, run: Tensor, pos: Tensor, from_run: Tensor, begin: Tensor, end: Tensor):
        self.site, self.run, self.pos, self.from_run = site, run, pos, from_run
        self.begin, self.end = begin, end
        places, source = torch.stack([from_run, pos], 1).unique(dim=0, return_inverse=True)
        self._source = source  # [writes] which of the values each takes
        self._source_run, self._source_pos = places.unbind(1)
        self._layer, self._values = -1, None
        self._first, self._stop = (int(begin.min()), int(end.max())) if len(run) else (0, 0)

    def sites(self, layer):
        return (self.site,) if self._first <= layer < self._stop else ()

    def reads(self, layer):
        return (self._source_run, self._source_pos) if self.sites(layer) else None

    def at(self, site, layer, x, call):
        if layer != self._layer or self._values is None:
            self._layer = layer
            self._values = x.new_zeros(len(self._source_run), x.shape[1])
            active = ((self.begin <= layer) & (layer < self.end)).nonzero()[:, 0]
            self._run, self._pos, self._takes = self.run[active], self.pos[active], There(self._source[active])
        which, row = call.find(self._source_run, self._source_pos)
        if len(which):
            self._values[which] = x[row]
        which, row = call.find(self._run, self._pos)
        if not len(which):
            return None
        return x.index_copy(0, row, self._values[self._takes.on(x.device)[which]])


class _Cells:
    """Restored runs of one kind, fact by fact, and what has to be written into them."""

    def __init__(self, site: Site | None):
        self.site = site
        self.runs: list[Tensor] = []  # by fact: [k], a run of each cell and draw
        self.places: list[tuple[Tensor, ...]] = []  # by fact: (position, layer, draw) of each
        self.writes: list[tuple[Tensor, ...]] = []  # run, pos, from_run, begin, end

    def write(self, run, pos, from_run, begin, end):
        self.writes.append(tuple(x.flatten() for x in torch.broadcast_tensors(run, pos, from_run, begin, end)))

    def jobs(self) -> list[Restore]:
        return [Restore(self.site, *(torch.cat(c) for c in zip(*self.writes, strict=True)))] if self.writes else []


def all_cells(lm, tasks, how: TraceSettings, advance: Callable[[float], None] | None) -> list[Drawn]:
    """Every cell of every fact, at the layers that ``how.stride`` leaves of each draw; a fact with many tokens takes
    several sweeps, of some positions each, for the tables of all its runs (tokens, and where each key lies) would not
    fit beside their rows."""
    task = tasks[0]
    length, first = len(task.tokens), task.span[0]
    of_a_position = len(how.kinds) * int(anchors(lm.n_layers, how.draws, how.stride).sum()) * length * TABLES
    parts = torch.arange(first, length).split(max(1, lm.memory // 4 // of_a_position))
    if len(tasks) > 1 or len(parts) == 1:
        return restored_cells(lm, tasks, how, None, advance)
    found, work = None, (length - first) * (length - first + 1) / 2
    for part in parts:
        cells = torch.zeros(length, lm.n_layers, dtype=torch.bool)
        cells[part] = True
        share = float((length - part).sum() / work)
        (made,) = restored_cells(lm, tasks, how, [dict.fromkeys(how.kinds, cells)], scaled(advance, share))
        found = found or made
        for kind, table in found.restored.items():
            table[part] = made.restored[kind][part]
    return [found]


def restored_cells(lm, tasks, how: TraceSettings, only, advance: Callable[[float], None] | None) -> list[Drawn]:
    """Every cell of every fact by one sweep; ``only``: by fact {kind: [T, L] bool}, the cells to compute."""
    runs, clean, corrupted, cells = declared(lm.n_layers, tasks, how, only)
    jobs = [job for c in cells.values() for job in c.jobs()]
    noise = [] if how.level is None else [noise_job(lm, tasks, corrupted, how)]
    score = _score(lm, tasks, clean, corrupted, cells)
    held = sum(job.noise.nbytes for job in noise)
    sweep(lm, runs.runs(), [*jobs, *noise, score], held=held, advance=advance)
    return _read(lm, tasks, how, METRICS[how.metric](score.logprob), cells)


def declared(n_layers: int, tasks, how: TraceSettings, only) -> tuple[RunList, list, list, dict[str, _Cells]]:
    """(all runs, by fact the clean one and the corrupted ones, {kind: restored ones}) of the cells to compute."""
    runs = RunList()
    clean, corrupted = add_runs(runs, tasks, how.draws)
    cells = {kind: _Cells(SITE.get(how.sever if kind == "state" else kind)) for kind in how.kinds}
    by_draw = anchors(n_layers, how.draws, how.stride)
    for i, task in enumerate(tasks):
        for kind, of_kind in cells.items():
            wanted = by_draw.expand(len(task.tokens), -1, -1)
            wanted = wanted if only is None else wanted & only[i][kind][:, :, None]
            wanted = wanted[task.span[0] :]  # before the subject nothing differs
            add = _add_states if kind == "state" else _add_windows
            add(runs, of_kind, task, clean[i], corrupted[i], wanted, how)
    return runs, clean, corrupted, cells


def row_layers(n_layers: int, task: Task, how: TraceSettings) -> int:
    """Rows that go through layers, summed over the layers, of all cells of one fact: what its trace costs."""
    length, n = len(task.tokens), len(task.tokens) - task.span[0]
    of_first, of_each_other = _of_a_position(n_layers, how)
    return (length + how.draws * n) * n_layers + n * of_first + n * (n - 1) // 2 * of_each_other


@lru_cache
def _of_a_position(n_layers: int, how: TraceSettings) -> tuple[int, int]:
    """(layers that the first rows of a position's restored runs go through, layers that each further row adds). The
    runs of a position are those of any other, with another number of rows."""
    runs = declared(n_layers, [Task(Fact("{}", "it"), [0], (0, 1), [0], [0])], how, None)[0].runs()
    layers, narrow = n_layers - runs.branch_layer[1 + how.draws :], runs.narrow[1 + how.draws :].long()
    return int(layers.sum()), int((layers - narrow).sum())


def _add_states(runs, cells, task, clean, corrupted, wanted, how):
    """A restored state (layer l, position p): from layer l + 1 on, from position p on, beginning with the clean row.

    wanted: [positions, L, draws] bool. The last layer has no layer above it: its cells are the clean or the corrupted
    answer, see ``_read``.
    """
    layer, pos, draw = wanted[:, :-1].transpose(0, 1).nonzero().unbind(1)
    pos, parent = pos + task.span[0], corrupted[draw]
    made = runs.add(
        task.corrupted, parent=parent, branch_layer=layer + 1, first_pos=pos, graft=clean.expand(len(parent))
    )
    cells.runs.append(made)
    cells.places.append((pos, layer, draw))
    if how.sever is not None:
        cells.write(made, pos, parent, layer + 1, torch.tensor(wanted.shape[1]))


def _add_windows(runs, cells, task, clean, corrupted, wanted, how):
    """Contributions restored at (p, layers [lo, hi)): the run branches at lo and owns one row there.

    wanted: [positions, L, draws] bool. Windows clamped at layer 0 share their start: each branches from the next
    shorter one of its draw at that one's end.
    """
    (n, n_layers, draws), first = wanted.shape, task.span[0]
    shorter, shorter_end = corrupted.repeat(n, 1), torch.zeros(n, draws, dtype=torch.int64)
    found, places = [], []
    for layer in range(n_layers):
        begin, end = max(0, layer - how.window // 2), min(n_layers, layer + (how.window + 1) // 2)
        cell = wanted[:, layer].nonzero().unbind(1)
        pos, draw = cell
        if begin == 0:  # else the same window as a layer below has
            new = shorter_end[cell] < end
            pos, draw = pos[new], draw[new]
        start = shorter_end[pos, draw] if begin == 0 else torch.full_like(pos, begin)
        parent = shorter[pos, draw] if begin == 0 else corrupted[draw]
        made = runs.add(task.corrupted, parent=parent, branch_layer=start, first_pos=pos + first, narrow=True)
        cells.write(made, pos + first, clean, start, torch.tensor(end))
        if begin == 0:
            shorter[pos, draw], shorter_end[pos, draw] = made, end
        found.append(shorter[cell] if begin == 0 else made)
        places.append((cell[0] + first, torch.full_like(cell[0], layer), cell[1]))
    cells.runs.append(torch.cat(found))
    cells.places.append(tuple(torch.cat(x) for x in zip(*places, strict=True)))


def _score(lm, tasks, clean, corrupted, cells) -> Score:
    """The answer read at the last token: fact by fact clean, corrupted, then every kind's cells."""
    run, pos, targets = [], [], []
    for i, task in enumerate(tasks):
        mine = torch.cat([clean[i], corrupted[i], *(c.runs[i] for c in cells.values())])
        run.append(mine)
        pos.append(torch.full_like(mine, len(task.tokens) - 1))
        targets.append(torch.tensor(task.targets).expand(len(mine), -1))
    return Score(lm, torch.cat(run), torch.cat(pos), torch.cat(targets))


def _read(lm, tasks, how: TraceSettings, value: Tensor, cells) -> list[Drawn]:
    """By fact, from the answer's value [k] at the places of ``_score``."""
    found, at = [], 0
    for i, task in enumerate(tasks):
        p_clean, p_corrupted = value[at], value[at + 1 : at + 1 + how.draws]
        at += 1 + how.draws
        restored = {}
        for kind, of_kind in cells.items():
            table = p_corrupted.repeat(len(task.tokens), lm.n_layers, 1)  # before the subject nothing differs
            count = len(of_kind.runs[i])
            table[of_kind.places[i]] = value[at : at + count]
            at += count
            if kind == "state":  # nothing stands above the last layer: only the last token's state is read
                table[-1, -1] = p_clean
            restored[kind] = table
        found.append(Drawn(p_clean, p_corrupted, restored))
    return found
