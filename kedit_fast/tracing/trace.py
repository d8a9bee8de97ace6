"""Causal tracing: which hidden states bring a fact back once its subject is corrupted.

A prompt is run clean, then with its subject's embeddings corrupted, so that the answer is lost. In the corrupted run
one thing is put back to its clean value (the state of one token after one layer, or what the MLP or the attention
adds to it in a window of layers), and the answer's probability is read again. What brings it back carries the fact
(Meng et al. 2022, ROME, section 2).

All tokens, layers, noise draws and kinds of many facts go up the model in one sweep: a restored run shares everything
below and before its restoration with its corrupted run, which is exact in a causal model.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kedit_fast.basics import checks, ranks
from kedit_fast.basics.bits import json_of, json_tensor
from kedit_fast.basics.files import check_place
from kedit_fast.basics.log import Log
from kedit_fast.basics.parts import Keep
from kedit_fast.basics.progress import logger, progress, scaled
from kedit_fast.facts.fact import Fact, check_subject, fact_list
from kedit_fast.kernels.dispatch import backend_for
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.sweep.kept import Checkpoint, asked_of, begun, check_run, fitting, in_groups
from kedit_fast.sweep.plan import RowCost, call_rows, free, together
from kedit_fast.tracing.attribution import estimate, most
from kedit_fast.tracing.draws import anchors, averaged
from kedit_fast.tracing.exact import all_cells, restored_cells, row_layers
from kedit_fast.tracing.results import AverageTrace, TraceResult, average, read_log
from kedit_fast.tracing.tasks import (
    KINDS,
    METRICS,
    SITE,
    Task,
    Traced,
    TraceSettings,
    check_draws,
    noise_level,
    tasks_of,
)

__all__ = ["AverageTrace", "TraceResult", "average", "noise_level", "read_log", "trace"]

METHODS = ("exact", "attribution", "screen", "strided")
STRIDE = 5  # ranks cells about as well as an exact trace by other draws, at 0.23 of the cost (``draws``)
BY_RUNS = ("exact", "strided")  # of which every value is of a run
_OPS = ("attention", "linear", "rows", "target_logprob")  # kernels that a trace goes through
# Rows of facts traced together while the weights are in memory: more make the products no faster, and results come,
# and are safe in the log, later.
TOGETHER = 32  # block calls
CELLS = ("p_restored", "exact")  # fields of a result that are tables [T, L]
LONG = 100_000  # rows from which an exact trace says how many there are, before it begins: a minute on a small model


@takes_lm
def trace(
    lm: LM,
    facts: Fact | Iterable[Fact],
    *,
    kinds: Sequence[str] = KINDS,
    window: int = 10,
    samples: int = 10,
    noise: float | str = "s3",
    seed: int = 1,
    answer: str | None = None,
    corrupt: str | Sequence[str] = "noise",
    metric: str = "prob",
    sever: str | None = None,
    method: str = "exact",
    top: int = 20,
    stride: int = STRIDE,
    log: checks.AnyPath | None = None,
    checkpoint: Checkpoint = None,
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
    method: "exact"; "strided": each noise draw at one layer in ``stride``, the rest filled in (``draws``);
        "attribution", an estimate of every cell from one backward pass, several times cheaper; or "screen": the
        estimate ranks the cells of a result, and the ``top`` ones are exact. ``TraceResult.exact`` says which cells are
    log: a .jsonl path; each result is added to it as soon as its facts are done
    checkpoint: a folder that keeps finished parts; a run that was killed goes on there when called again with the same
        arguments, and ends with the same bits. To be deleted once the result is saved

    Raises ValueError, before any work, for unknown choices, a subject of other length, a missing foil, a checkpoint of
    other work, and OSError for a log that cannot be written; ValueError, before results are written, for a fact whose
    runs give NaN; MemoryError where memory runs out however the work is cut. One weight
    pass for each group of facts that ``lm.memory`` holds (two and a half with an estimate), and one for the answers.
    Differs: a severed trace uses one noise draw for both passes; the published code draws anew in the second.
    """
    lm.run_owner  # noqa: B018 (raises for edits of which each acts on some prompts alone)
    facts, kinds = [check_subject(fact) for fact in fact_list(facts)], checks.choices("kinds", kinds, KINDS)
    window = checks.whole("window", window, least=1, most=checks.MOST_LAYERS, like=10)
    samples, top = (checks.whole(*each, least=1, like=10) for each in (("samples", samples), ("top", top)))
    metric, method = checks.choice("metric", metric, METRICS), checks.choice("method", method, METHODS)
    stride = checks.whole("stride", stride, least=1, most=lm.n_layers if method == "strided" else None, like=3)
    _check_severed(kinds, sever, method)
    seed, answer = checks.seed("seed", seed), checks.optional(checks.text, "answer", answer, like="Paris")
    log, checkpoint = None if log is None else check_place(log), check_run(checkpoint)
    level, draws, answers = None, 1, (answer, corrupt, metric)
    if isinstance(corrupt, str) and corrupt == "noise":
        kind, amount = ranks.json_from_first(lambda: noise_level(lm, facts, noise))
        level, draws = (kind, amount), check_draws(lm, facts, kinds, samples)
    how = TraceSettings(kinds, window, metric, sever, draws, level, seed, stride if method == "strided" else 1)
    with begun(checkpoint, partial(_asked_for, lm, facts, how, answers, method, top)) as keep:
        return fitting(lm, keep, lambda lm: _traced(lm, facts, how, answers, method, top, log, keep))


def _asked_for(lm, facts, how: TraceSettings, answers, method, top) -> dict:
    """What a trace depends on, for the manifest of its checkpoint; answers: as in ``_traced``."""
    answer, corrupt, _ = answers
    settings = {"answer": answer, "corrupt": corrupt if isinstance(corrupt, str) else list(corrupt), "method": method}
    return asked_of(lm, "trace", facts, **asdict(how), **settings, top=top if method == "screen" else None)


def _traced(lm, facts, how: TraceSettings, answers, method, top, log, keep: Keep) -> list[TraceResult]:
    """The results of checked facts; answers: answer, corrupt and metric of ``tasks_of``."""
    backend = ", ".join(f"{op} {backend_for(op, lm.device, lm.dtype)}" for op in _OPS)
    tasks = tasks_of(lm, facts, *answers)
    if method in BY_RUNS:
        _announce(lm, tasks, how)
    results: list[TraceResult] = []
    lines = Log(log if ranks.first() else None, allow_nan=True)
    with progress("tracing facts", len(tasks)) as bar:

        def rows(task: Task) -> int:
            return n_rows(lm, task, how)

        def make(group: Sequence[Task], first: int) -> dict[str, Tensor]:
            made = _trace_group(lm, list(group), how, method, top, backend, scaled(bar.advance, len(group)))
            return _as_part(made)

        for group in in_groups(keep, "traces", tasks, lambda rest: groups(lm, rest, how), make, size=rows):
            new = _of_part(group.part, [task.fact for task in group.items for _ in how.kinds])
            results += new
            lines.add((result.to_record() for result in new), again=group.found)
            bar.resume(len(group.items) * group.found)
    return results


def _as_part(results: Sequence[TraceResult]) -> dict[str, Tensor]:
    """Results as tensors, which take less than their lines of JSON; ``_of_part`` gives them back."""
    # The records are of results without a layer: of the cells, tensors are kept.
    bare = (replace(result, p_restored=result.p_restored[:, :0], exact=None) for result in results)
    part = {"records": json_tensor([result.to_record() for result in bare])}
    for name in CELLS:
        cells = ((i, getattr(result, name)) for i, result in enumerate(results))
        part |= {f"{name}-{i}": torch.from_numpy(table) for i, table in cells if table is not None}
    return part


def _of_part(part: dict[str, Tensor], facts: Sequence[Fact]) -> list[TraceResult]:
    """The results that a part holds; facts: of each."""
    results = []
    for i, (record, fact) in enumerate(zip(json_of(part["records"]), facts, strict=True)):
        cells: dict[str, Any] = {name: part[key].numpy() for name in CELLS if (key := f"{name}-{i}") in part}
        results.append(replace(TraceResult.from_record(record), fact=fact, **cells))
    return results


def _check_severed(kinds, sever, method):
    checks.optional(checks.choice, "sever", sever, SITE)
    if sever is not None and (kinds != ("state",) or method not in BY_RUNS):
        raise ValueError(
            f'sever={sever!r} with kinds={kinds}, method={method!r}: expected kinds=("state",), method="exact" or '
            f'"strided"'
        )


def groups(lm, tasks: Sequence[Task], how: TraceSettings) -> Iterator[list[Task]]:
    """Consecutive facts whose runs fit the memory together; one that is too large is cut further."""
    budget = free(lm) // RowCost.of(lm).kept
    if not lm.source.pass_bytes:
        budget = min(budget, TOGETHER * call_rows(lm))
    return together(tasks, lambda task: n_rows(lm, task, how), budget)


def n_rows(lm, task: Task, how: TraceSettings) -> int:
    """Rows of all cells of one fact, at the height of an exact or a strided trace."""
    n, cells = len(task.tokens) - task.span[0], int(anchors(lm.n_layers, how.draws, how.stride).sum())
    return len(task.tokens) + how.draws * n + len(how.kinds) * cells * n * (n + 1) // 2


def _announce(lm, tasks: list[Task], how: TraceSettings) -> None:
    """How large an exact trace is, before it begins. How long it takes is said once its first layers are done."""
    rows = sum(n_rows(lm, task, how) for task in tasks)
    if rows >= LONG:
        longest = max(len(task.tokens) for task in tasks)
        n = f"{len(tasks):,} facts" if len(tasks) > 1 else "one fact"
        logger.info(
            "%s trace of %s, up to %d tokens: %s rows, each through half of the %d layers on average; "
            'method="screen" (--method screen) computes the strongest cells alone, "strided" every few layers',
            "exact" if how.stride == 1 else "strided", n, longest, f"{rows:,}", lm.n_layers,
        )  # fmt: skip


def _trace_group(lm, tasks, how: TraceSettings, method, top, backend, advance) -> list[TraceResult]:
    """Results of some facts: estimated, exact, or the one where the other says."""
    exact: list[dict[str, Tensor]] | None = None
    if method in BY_RUNS:
        drawn = all_cells(lm, tasks, how, advance)
        found = [averaged(each, task, how) for each, task in zip(drawn, tasks, strict=True)]
        if how.stride > 1:
            exact = [{kind: _computed(kind, table, how) for kind, table in each.restored.items()} for each in found]
    else:
        found = estimate(lm, tasks, how, scaled(advance, 1 / 4 if method == "screen" else 1))
        exact = [{kind: _known(kind, effect) for kind, effect in each.restored.items()} for each in found]
        if method == "screen":
            for each, known in zip(found, exact, strict=True):
                for kind, cells in known.items():
                    cells |= most(each.restored[kind] - each.p_corrupted, top, ~cells)
            computed = restored_cells(lm, tasks, how, exact, scaled(advance, 3 / 4))
            for each, other, known in zip(found, computed, exact, strict=True):
                for kind, cells in known.items():
                    each.restored[kind][cells] = other.restored[kind][cells].mean(-1)
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


def _computed(kind: str, restored: Tensor, how: TraceSettings) -> Tensor:
    """[T, L] which cells of a strided trace every draw was computed at."""
    return _known(kind, restored) | anchors(restored.shape[1], how.draws, how.stride).all(1)


def _result(lm, task, how: TraceSettings, kind, found: Traced, restored, exact, backend) -> TraceResult:
    cost = None
    if how.stride > 1:
        alone = replace(how, kinds=(kind,))
        cost = row_layers(lm.n_layers, task, alone) / row_layers(lm.n_layers, task, replace(alone, stride=1))
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
        reliability=found.reliability.get(kind, math.nan),
        stride=how.stride,
        cost=cost,
    )
