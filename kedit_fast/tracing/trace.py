"""Causal tracing: which hidden states bring a fact back once its subject is corrupted.

A prompt is run clean, then with its subject's embeddings corrupted, so that the answer is lost. In the corrupted run
one thing is put back to its clean value (the state of one token after one layer, or what the MLP or the attention
adds to it in a window of layers), and the answer's probability is read again. What brings it back carries the fact
(Meng et al. 2022, ROME, section 2).

All tokens, layers, noise draws and kinds of many facts go up the model in one sweep: a restored run shares everything
below and before its restoration with its corrupted run, which is exact in a causal model.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.files import append_records, check_place
from kedit_fast.basics.progress import logger, progress, scaled
from kedit_fast.facts.fact import check_subject, fact_list
from kedit_fast.jobs.restore import Restore
from kedit_fast.jobs.score import Score
from kedit_fast.kernels.dispatch import backend_for
from kedit_fast.model.lm import takes_lm
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.plan import CALL_ROWS, TABLES, RowCost, free
from kedit_fast.sweep.runs import RunList
from kedit_fast.sweep.sites import Site
from kedit_fast.sweep.together import together
from kedit_fast.tracing.attribution import estimate, most
from kedit_fast.tracing.results import AverageTrace, TraceResult, average, read_log
from kedit_fast.tracing.tasks import (
    KINDS,
    METRICS,
    SITE,
    Found,
    Settings,
    Task,
    add_runs,
    check_draws,
    noise_job,
    noise_level,
    tasks_of,
)

__all__ = ["AverageTrace", "TraceResult", "average", "noise_level", "read_log", "trace"]

METHODS = ("exact", "attribution", "screen")
_OPS = ("attention", "linear", "rows", "target_logprob")  # kernels that a trace goes through
# Rows of facts traced together while the weights are in memory: more make the products no faster, and results come,
# and are safe in the log, later.
TOGETHER = 32 * CALL_ROWS
LONG = 100_000  # rows from which an exact trace says how many there are, before it begins: a minute on a small model


@takes_lm
def trace(
    lm,
    facts,
    *,
    kinds: Sequence[str] = KINDS,
    window: int = 10,
    samples: int = 10,
    noise="s3",
    seed: int = 1,
    answer: str | None = None,
    corrupt="noise",
    metric: str = "prob",
    sever: str | None = None,
    method: str = "exact",
    top: int = 20,
    log=None,
) -> list[TraceResult]:
    """Indirect effects of every (token, layer) for facts: a result for each fact and kind, facts in order.

    kinds: "state" (a hidden state), "mlp", "attn" (contributions in ``window`` layers around a layer)
    window: layers; [l - w//2, l + ceil(w/2)), clamped at the ends as published
    samples: noise draws, averaged; noise: standard deviation of the noise, or "s3" for 3 standard deviations of the
        subjects' embeddings over these facts, or "u0.1" for uniform noise in (-0.1, 0.1)
    seed: of numpy's RandomState, restarted for each fact as published, so that results compare with published ones
    answer: the text whose first token is traced; None: each prompt's own top token
    corrupt: "noise", or another subject with as many tokens (one for all facts, or a list with one for each)
    metric: "prob", "logprob", or "logit_diff" (answer minus foil; the foil is the top token of the corrupted run when
        another subject corrupts, else the fact's target_new)
    sever: "mlp" or "attn": restored states with that contribution of the token frozen at its corrupted value
    method: "exact"; "attribution", an estimate of every cell from one backward pass, several times cheaper; or
        "screen": the estimate ranks the cells of a result, and the ``top`` ones are exact. ``TraceResult.exact`` says
        which cells are
    log: a .jsonl path; each result is added to it as soon as its facts are done

    Raises ValueError, before any work, for unknown choices, a subject of other length, a missing foil, and OSError for
    a log that cannot be written; ValueError, before results are written, for a fact whose runs give NaN. One weight
    pass for each group of facts that ``lm.memory`` holds (two and a half with an estimate), and one for the answers.
    Differs: a severed trace uses one noise draw for both passes; the published code draws anew in the second.
    """
    facts, kinds = [check_subject(fact) for fact in fact_list(facts)], checks.choices("kinds", kinds, KINDS)
    window = checks.whole("window", window, least=1, most=checks.MOST_LAYERS, like=10)
    samples, top = (checks.whole(*each, least=1, like=10) for each in (("samples", samples), ("top", top)))
    metric, method = checks.choice("metric", metric, METRICS), checks.choice("method", method, METHODS)
    _check_severed(kinds, sever, method)
    seed, answer = checks.seed("seed", seed), checks.optional(checks.text, "answer", answer, like="Paris")
    log = None if log is None else check_place(log)
    noisy = isinstance(corrupt, str) and corrupt == "noise"
    level, draws = (noise_level(lm, facts, noise), check_draws(lm, facts, kinds, samples)) if noisy else (None, 1)
    how = Settings(kinds, window, metric, sever, draws, level, seed)
    backend = ", ".join(f"{op} {backend_for(op, lm.device, lm.dtype)}" for op in _OPS)
    tasks = tasks_of(lm, facts, answer, corrupt, metric)
    if method == "exact":
        _announce(lm, tasks, how)
    results: list[TraceResult] = []
    with progress("tracing facts", len(tasks)) as bar:
        for group in _groups(lm, tasks, how):
            done = _trace_group(lm, group, how, method, top, backend, scaled(bar.advance, len(group)))
            results += done
            append_records(log, (result.to_record() for result in done), allow_nan=True)
    return results


def _check_severed(kinds, sever, method):
    checks.optional(checks.choice, "sever", sever, SITE)
    if sever is not None and (kinds != ("state",) or method != "exact"):
        raise ValueError(
            f'sever={sever!r} with kinds={kinds}, method={method!r}: expected kinds=("state",), method="exact"'
        )


def _groups(lm, tasks: list[Task], how: Settings) -> Iterator[list[Task]]:
    """Consecutive facts whose runs fit the memory together; one that is too large is cut further."""
    budget = free(lm) // RowCost.of(lm).kept
    if not lm.source.pass_bytes:
        budget = min(budget, TOGETHER)
    return together(tasks, lambda task: n_rows(lm, task, how), budget)


def n_rows(lm, task: Task, how: Settings) -> int:
    """Rows of all cells of one fact, at the height of an exact trace."""
    n = len(task.tokens) - task.span[0]
    return len(task.tokens) + how.draws * n + len(how.kinds) * how.draws * lm.n_layers * n * (n + 1) // 2


def _announce(lm, tasks: list[Task], how: Settings) -> None:
    """How large an exact trace is, before it begins. How long it takes is said once its first layers are done."""
    rows = sum(n_rows(lm, task, how) for task in tasks)
    if rows >= LONG:
        longest = max(len(task.tokens) for task in tasks)
        n = f"{len(tasks):,} facts" if len(tasks) > 1 else "one fact"
        logger.info(
            "exact trace of %s, up to %d tokens: %s rows, each through half of the %d layers on average; "
            'method="screen" (--method screen) computes the strongest cells alone',
            n, longest, f"{rows:,}", lm.n_layers,
        )  # fmt: skip


def _trace_group(lm, tasks, how: Settings, method, top, backend, advance) -> list[TraceResult]:
    """Results of some facts: estimated, exact, or the one where the other says."""
    if method == "exact":
        found, exact = _in_parts(lm, tasks, how, advance), None
    else:
        found = estimate(lm, tasks, how, scaled(advance, 1 / 4 if method == "screen" else 1))
        exact = [{kind: _known(kind, effect) for kind, effect in each.restored.items()} for each in found]
        if method == "screen":
            for each, known in zip(found, exact, strict=True):
                for kind, cells in known.items():
                    cells |= most(each.restored[kind] - each.p_corrupted, top, ~cells)
            computed = _restored(lm, tasks, how, exact, scaled(advance, 3 / 4))
            for each, other, known in zip(found, computed, exact, strict=True):
                for kind, cells in known.items():
                    each.restored[kind][cells] = other.restored[kind][cells]
    results = []
    for i, (task, each) in enumerate(zip(tasks, found, strict=True)):
        each.check(lm, task)
        for kind, restored in each.restored.items():
            cells = None if exact is None else exact[i][kind].numpy()
            results.append(_result(lm, task, how, kind, each, restored, cells, backend))
    return results


def _known(kind: str, restored: Tensor) -> Tensor:
    """[T, L] which cells no sweep has to compute: the last layer's states, above which nothing stands."""
    known = torch.zeros(restored.shape, dtype=torch.bool)
    known[:, -1] = kind == "state"
    return known


# ---- restored runs of a group of facts


class _Cells:
    """Restored runs of one kind, fact by fact, and what has to be written into them."""

    def __init__(self, site: Site | None):
        self.site = site
        self.runs: list[Tensor] = []  # by fact: [cells, draws]
        self.places: list[tuple[Tensor, Tensor]] = []  # by fact: (position, layer) of each cell
        self.writes: list[tuple[Tensor, ...]] = []  # run, pos, from_run, begin, end

    def write(self, run, pos, from_run, begin, end):
        self.writes.append(tuple(x.flatten() for x in torch.broadcast_tensors(run, pos, from_run, begin, end)))

    def jobs(self) -> list[Restore]:
        return [Restore(self.site, *(torch.cat(c) for c in zip(*self.writes, strict=True)))] if self.writes else []


def _in_parts(lm, tasks, how: Settings, advance: Callable[[float], None]) -> list[Found]:
    """Every cell of every fact; a fact with many tokens takes several sweeps, of some positions each, for the tables of
    all its runs (tokens, and where each key lies) would not fit beside their rows."""
    task = tasks[0]
    length, first = len(task.tokens), task.span[0]
    of_a_position = len(how.kinds) * lm.n_layers * how.draws * length * TABLES
    parts = torch.arange(first, length).split(max(1, lm.memory // 4 // of_a_position))
    if len(tasks) > 1 or len(parts) == 1:
        return _restored(lm, tasks, how, None, advance)
    found, work = None, (length - first) * (length - first + 1) / 2
    for part in parts:
        cells = torch.zeros(length, lm.n_layers, dtype=torch.bool)
        cells[part] = True
        share = float((length - part).sum() / work)
        (made,) = _restored(lm, tasks, how, [dict.fromkeys(how.kinds, cells)], scaled(advance, share))
        found = found or made
        for kind, table in found.restored.items():
            table[part] = made.restored[kind][part]
    return [found]


def _restored(lm, tasks, how: Settings, only, advance: Callable[[float], None]) -> list[Found]:
    """Every cell of every fact by one sweep; ``only``: by fact {kind: [T, L] bool}, the cells to compute."""
    runs = RunList()
    clean, corrupted = add_runs(runs, tasks, how.draws)
    cells = {kind: _Cells(SITE.get(how.sever if kind == "state" else kind)) for kind in how.kinds}
    for i, task in enumerate(tasks):
        for kind, of_kind in cells.items():
            wanted = torch.ones(len(task.tokens), lm.n_layers, dtype=torch.bool) if only is None else only[i][kind]
            wanted = wanted[task.span[0] :]  # before the subject nothing differs
            add = _add_states if kind == "state" else _add_windows
            add(runs, of_kind, task, clean[i], corrupted[i], wanted, how)
    jobs = [job for c in cells.values() for job in c.jobs()]
    noise = [] if how.level is None else [noise_job(lm, tasks, corrupted, how)]
    score = _score(lm, tasks, clean, corrupted, cells)
    held = sum(job.noise.nbytes for job in noise)
    sweep(lm, runs.runs(), [*jobs, *noise, score], held=held, advance=advance)
    return _read(lm, tasks, how, METRICS[how.metric](score.logprob), cells)


def _add_states(runs, cells, task, clean, corrupted, wanted, how):
    """A restored state (layer l, position p): from layer l + 1 on, from position p on, beginning with the clean row.

    The last layer has no layer above it: its cells are the clean or the corrupted answer, see ``_read``.
    """
    n_layers, draws = wanted.shape[1], len(corrupted)
    layer, pos = wanted[:, :-1].T.nonzero().unbind(1)
    pos = pos + task.span[0]
    many_layers, many_pos, parent = (
        layer.repeat_interleave(draws),
        pos.repeat_interleave(draws),
        corrupted.repeat(len(pos)),
    )
    made = runs.add(
        task.corrupted, parent=parent, branch_layer=many_layers + 1, first_pos=many_pos, graft=clean.expand(len(parent))
    )
    cells.runs.append(made.view(-1, draws))
    cells.places.append((pos, layer))
    if how.sever is not None:
        cells.write(made, many_pos, parent, many_layers + 1, torch.tensor(n_layers))


def _add_windows(runs, cells, task, clean, corrupted, wanted, how):
    """Contributions restored at (p, layers [lo, hi)): the run branches at lo and owns one row there.

    Windows clamped at layer 0 share their start: each branches from the next shorter one at that one's end.
    """
    (n, n_layers), draws = wanted.shape, len(corrupted)
    shorter, shorter_end = corrupted.repeat(n, 1), torch.zeros(n, dtype=torch.int64)
    found, places = [], []
    for layer in range(n_layers):
        begin, end = max(0, layer - how.window // 2), min(n_layers, layer + (how.window + 1) // 2)
        cell = wanted[:, layer].nonzero()[:, 0]
        new = cell if begin else cell[shorter_end[cell] < end]  # else the same window as a layer below has
        start = shorter_end[new] if begin == 0 else torch.full((len(new),), begin)
        parent = shorter[new] if begin == 0 else corrupted.expand(len(new), draws)
        pos = (new + task.span[0]).repeat_interleave(draws)
        start = start.repeat_interleave(draws)
        made = runs.add(task.corrupted, parent=parent.flatten(), branch_layer=start, first_pos=pos, narrow=True)
        cells.write(made, pos, clean, start, torch.tensor(end))
        if begin == 0:
            shorter[new], shorter_end[new] = made.view(-1, draws), end
        found.append(shorter[cell] if begin == 0 else made.view(-1, draws))
        places.append((cell + task.span[0], torch.full_like(cell, layer)))
    cells.runs.append(torch.cat(found))
    cells.places.append(tuple(torch.cat(x) for x in zip(*places, strict=True)))


def _score(lm, tasks, clean, corrupted, cells) -> Score:
    """The answer read at the last token: fact by fact clean, corrupted, then every kind's cells."""
    run, pos, targets = [], [], []
    for i, task in enumerate(tasks):
        mine = torch.cat([clean[i], corrupted[i], *(c.runs[i].flatten() for c in cells.values())])
        run.append(mine)
        pos.append(torch.full_like(mine, len(task.tokens) - 1))
        targets.append(torch.tensor(task.targets).expand(len(mine), -1))
    return Score(lm, torch.cat(run), torch.cat(pos), torch.cat(targets))


# ---- results


def _read(lm, tasks, how: Settings, value: Tensor, cells) -> list[Found]:
    """By fact, from the answer's value [k] at the places of ``_score``."""
    found, at = [], 0
    for i, task in enumerate(tasks):
        p_clean, p_corrupted = value[at], value[at + 1 : at + 1 + how.draws].mean()
        at += 1 + how.draws
        restored = {}
        for kind, of_kind in cells.items():
            (pos, layer), count = of_kind.places[i], of_kind.runs[i].numel()
            table = p_corrupted.repeat(len(task.tokens), lm.n_layers)  # before the subject nothing differs
            table[pos, layer] = value[at : at + count].view(-1, how.draws).mean(1)
            at += count
            if kind == "state":  # nothing stands above the last layer: only the last token's state is read
                table[-1, -1] = p_clean
            restored[kind] = table
        found.append(Found(p_clean, p_corrupted, restored))
    return found


def _result(lm, task, how: Settings, kind, found: Found, restored, exact, backend) -> TraceResult:
    return TraceResult(
        fact=task.fact,
        tokens=tuple(lm.tokenizer.decode([i]) for i in task.tokens),
        subject_span=task.span,
        answer_id=task.targets[0],
        answer=lm.tokenizer.decode([task.targets[0]]),
        kind=kind,
        window=1 if kind == "state" else how.window,
        noise=None if how.level is None else how.level[1],
        metric=how.metric,
        sever=how.sever,
        p_clean=float(found.p_clean),
        p_corrupted=float(found.p_corrupted),
        p_restored=restored.float().numpy(),
        backend=backend,
        exact=exact,
    )
