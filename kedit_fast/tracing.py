"""Causal tracing: which hidden states bring a fact back once its subject is corrupted.

A prompt is run clean, then with its subject's embeddings corrupted, so that the answer is lost. In the corrupted run
one thing is put back to its clean value (the state of one token after one layer, or what the MLP or the attention
adds to it in a window of layers), and the answer's probability is read again. What brings it back carries the fact
(Meng et al. 2022, ROME, section 2).

All tokens, layers, noise draws and kinds of many facts go up the model in one sweep: a restored run shares everything
below and before its restoration with its corrupted run, which is exact in a causal model.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .facts import Fact, fact_tokens, target_tokens
from .jobs.restore import AddNoise, Restore
from .jobs.score import Score, next_token_probs
from .progress import progress
from .sites import Site
from .sweep.engine import sweep
from .sweep.plan import CALL_ROWS, RowCost
from .sweep.runs import RunList
from .traces import AverageTrace, TraceResult, average

__all__ = ["AverageTrace", "TraceResult", "average", "noise_level", "trace"]

KINDS = ("state", "mlp", "attn")
METRICS = ("prob", "logprob", "logit_diff")
_SITE = {"mlp": Site.mlp_out, "attn": Site.attn_out}


@dataclass(frozen=True)
class _Task:
    """One fact as it will be traced."""

    fact: Fact
    tokens: list[int]
    span: tuple[int, int]
    corrupted: list[int]  # the corrupted run's tokens: the same ones, unless another subject corrupts
    targets: list[int]  # the answer, then the foil of a logit difference


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
    log: a .jsonl path; each result is added to it as soon as its facts are done

    Raises ValueError for unknown choices, a subject of other length, a missing foil; before any work. One weight pass
    for each pack of facts that ``lm.memory`` holds, and one for the answers.
    Differs: a severed trace uses one noise draw for both passes; the published code draws anew in the second.
    """
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    kinds = tuple(dict.fromkeys(kinds))
    _check(facts, kinds, window, samples, metric, sever)
    level = noise_level(lm, facts, noise) if corrupt == "noise" else None
    tasks = _tasks(lm, facts, answer, corrupt, metric)
    draws = 1 if corrupt != "noise" else samples
    options = {"kinds": kinds, "window": window, "metric": metric, "sever": sever}
    results: list[TraceResult] = []
    with progress("tracing facts", len(tasks)) as bar:
        for group in _groups(lm, tasks, draws, kinds):
            done = _trace_group(lm, group, draws, level, seed, options)
            results += done
            if log is not None:
                with open(log, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(r.to_record()) + "\n" for r in done)
            bar.advance(len(group))
    return results


def _check(facts, kinds, window, samples, metric, sever):
    unknown = set(kinds) - set(KINDS)
    if unknown or not kinds:
        raise ValueError(f"unknown trace kinds {sorted(unknown)}; expected some of {', '.join(KINDS)}")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; expected one of {', '.join(METRICS)}")
    if window < 1 or samples < 1 or not facts:
        raise ValueError(f"trace needs facts, window >= 1 and samples >= 1; got {len(facts)}, {window}, {samples}")
    if sever is not None and (sever not in _SITE or tuple(kinds) != ("state",)):
        raise ValueError(f'sever={sever!r} with kinds={tuple(kinds)}: expected "mlp" or "attn" with kinds=("state",)')


# ---- what is traced


def noise_level(lm, facts: Sequence[Fact], noise) -> tuple[str, float]:
    """("gaussian" or "uniform", level): a number as it is; "s3": 3 standard deviations (unbiased, over all tokens
    and features) of the embeddings of these facts' subjects, each tokenized alone; "u0.1": uniform half-width 0.1.
    """
    text = str(noise)
    try:
        if text[:1] not in ("s", "u"):
            return "gaussian", float(noise)
        factor = float(text[1:])
    except ValueError:
        raise ValueError(f'noise {noise!r}: expected a number, "s3" (times the standard deviation) or "u0.1"') from None
    if text[0] == "u":
        return "uniform", factor
    ids = [i for fact in facts for i in lm.encode(fact.subject)]
    with torch.no_grad():
        return "gaussian", factor * lm.embed(torch.tensor(ids)).float().std().item()


def _tasks(lm, facts, answer, corrupt, metric) -> list[_Task]:
    """Everything that can be wrong with the facts is found here, before the sweep."""
    prompts = [fact_tokens(lm.tokenizer, fact) for fact in facts]
    others = [None] * len(facts) if corrupt == "noise" else _corrupted(lm, facts, prompts, corrupt)
    texts = [list(p.ids) for p in prompts] + [o for o in others if o is not None]
    top = next_token_probs(lm, texts).argmax(-1).tolist()
    answers = top[: len(facts)] if answer is None else [target_tokens(lm.tokenizer, answer)[0]] * len(facts)
    tasks = []
    for i, (fact, prompt) in enumerate(zip(facts, prompts, strict=True)):
        targets = [answers[i]]
        if metric == "logit_diff":
            targets.append(top[len(facts) + i] if others[i] is not None else _foil(lm, fact))
        tasks.append(_Task(fact, list(prompt.ids), tuple(prompt.span), others[i] or list(prompt.ids), targets))
    return tasks


def _corrupted(lm, facts, prompts, corrupt) -> list[list[int]]:
    subjects = [corrupt] * len(facts) if isinstance(corrupt, str) else list(corrupt)
    if len(subjects) != len(facts):
        raise ValueError(
            f"corrupt names {len(subjects)} subjects for {len(facts)} facts; expected one, or one for each"
        )
    made = []
    for fact, prompt, subject in zip(facts, prompts, subjects, strict=True):
        other = fact_tokens(lm.tokenizer, Fact(prompt=fact.prompt, subject=subject))
        if len(other.ids) != len(prompt.ids) or tuple(other.span) != tuple(prompt.span):
            raise ValueError(
                f"subject {subject!r} takes {len(other.ids) - len(prompt.ids):+d} tokens against {fact.subject!r}; "
                "corrupting by another subject needs one of equal token count"
            )
        if other.ids[: other.span[0]] != prompt.ids[: prompt.span[0]]:
            raise ValueError(
                f"with subject {subject!r} the tokens before the subject differ from those with {fact.subject!r}"
            )
        made.append(list(other.ids))
    return made


def _foil(lm, fact) -> int:
    if fact.target_new is None:
        raise ValueError(f"metric 'logit_diff' needs a foil: fact {fact.label!r} has no target_new")
    return target_tokens(lm.tokenizer, fact.target_new)[0]


def _groups(lm, tasks, draws, kinds):
    """Consecutive facts whose runs fit the memory together; a fact that is too large is cut by the sweep's plan."""
    budget = (lm.memory - CALL_ROWS * RowCost.of(lm).passing) // RowCost.of(lm).kept
    group, held = [], 0
    for task in tasks:
        n = len(task.tokens) - task.span[0]
        rows = len(task.tokens) + draws * n + len(kinds) * draws * lm.n_layers * n * (n + 1) // 2
        if group and held + rows > budget:
            yield group
            group, held = [], 0
        group.append(task)
        held += rows
    yield group


# ---- the runs of a group of facts


class _Cells:
    """Restored runs of one kind, fact by fact, and what has to be written into them."""

    def __init__(self, site: Site | None):
        self.site = site
        self.runs: list[Tensor] = []  # by fact: [layers, positions from the subject on, draws]
        self.writes: list[tuple[Tensor, ...]] = []  # run, pos, from_run, begin, end

    def write(self, run, pos, from_run, begin, end):
        self.writes.append(tuple(x.flatten() for x in torch.broadcast_tensors(run, pos, from_run, begin, end)))

    def jobs(self) -> list[Restore]:
        return [Restore(self.site, *(torch.cat(c) for c in zip(*self.writes, strict=True)))] if self.writes else []


def _trace_group(lm, tasks, draws, level, seed, options) -> list[TraceResult]:
    runs = RunList()
    cells = {kind: _Cells(_SITE.get(options["sever"] if kind == "state" else kind)) for kind in options["kinds"]}
    clean, corrupted = [], []
    for task in tasks:
        clean.append(runs.add(task.tokens))
        first = torch.full((draws,), task.span[0])
        corrupted.append(runs.add(task.corrupted, parent=clean[-1], first_pos=first, source=-1))
        for kind in cells:
            if kind == "state":
                _add_states(lm, runs, cells[kind], task, clean[-1], corrupted[-1], options["sever"] is not None)
            else:
                _add_windows(lm, runs, cells[kind], task, clean[-1], corrupted[-1], options["window"])
    jobs = [job for c in cells.values() for job in c.jobs()]
    if level is not None:
        jobs.append(_noise(lm, tasks, corrupted, draws, level, seed))
    score = _score(lm, tasks, clean, corrupted, cells)
    sweep(lm, runs.runs(), [*jobs, score])
    return _results(lm, tasks, draws, score.logprob, level, options)


def _add_states(lm, runs, cells, task, clean, corrupted, severed):
    """A restored state (layer l, position p): from layer l + 1 on, from position p on, beginning with the clean row.

    The last layer has no layer above it: its cells are the clean or the corrupted answer, see ``_results``.
    """
    n, first = len(task.tokens), task.span[0]
    layer, pos, draw = _grid(lm.n_layers - 1, n - first, len(corrupted))
    pos = pos + first
    made = runs.add(
        task.corrupted, parent=corrupted[draw], branch_layer=layer + 1, first_pos=pos, graft=clean.expand(len(pos))
    )
    cells.runs.append(made.view(lm.n_layers - 1, n - first, len(corrupted)))
    if severed:
        cells.write(made, pos, corrupted[draw], layer + 1, torch.tensor(lm.n_layers))


def _add_windows(lm, runs, cells, task, clean, corrupted, window):
    """Contributions restored at (p, layers [lo, hi)): the run branches at lo and owns one row there.

    Windows clamped at layer 0 share their start: each branches from the next shorter one at that one's end.
    """
    n, first, n_layers = len(task.tokens), task.span[0], lm.n_layers
    pos, draw = (
        x.flatten() for x in torch.meshgrid(torch.arange(first, n), torch.arange(len(corrupted)), indexing="ij")
    )
    by_layer, shorter, shorter_end = [], corrupted[draw], 0
    for layer in range(n_layers):
        begin, end = max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2)
        if begin == 0 and end == shorter_end:  # the same window as the layer below (window longer than the model)
            by_layer.append(by_layer[-1])
            continue
        parent, start = (shorter, shorter_end) if begin == 0 else (corrupted[draw], begin)
        made = runs.add(task.corrupted, parent=parent, branch_layer=start, first_pos=pos, narrow=True)
        cells.write(made, pos, clean, torch.tensor(start), torch.tensor(end))
        by_layer.append(made)
        if begin == 0:
            shorter, shorter_end = made, end
    cells.runs.append(torch.stack(by_layer).view(n_layers, n - first, len(corrupted)))


def _grid(*sizes: int) -> tuple[Tensor, ...]:
    return tuple(x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij"))


def _noise(lm, tasks, corrupted, draws, level, seed) -> AddNoise:
    """Published noise: one fp64 draw [draws, subject tokens, d] a fact, the generator restarted for each fact."""
    run, pos, noise = [], [], []
    for task, runs in zip(tasks, corrupted, strict=True):
        b, e = task.span
        generator = np.random.RandomState(seed)
        size = (draws, e - b, lm.d_model)
        drawn = generator.randn(*size) if level[0] == "gaussian" else generator.uniform(-1, 1, size=size)
        noise.append(torch.from_numpy(level[1] * drawn).flatten(0, 1))
        run.append(runs.repeat_interleave(e - b))
        pos.append(torch.arange(b, e).repeat(draws))
    return AddNoise(torch.cat(run), torch.cat(pos), torch.cat(noise))


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


def _results(lm, tasks, draws, logprob, level, options) -> list[TraceResult]:
    value = {
        "prob": lambda x: x[:, 0].exp(),
        "logprob": lambda x: x[:, 0],
        "logit_diff": lambda x: x[:, 0] - x[:, 1],
    }[options["metric"]](logprob)
    results, at = [], 0
    for task in tasks:
        n, first = len(task.tokens), task.span[0]
        p_clean, p_corrupted = value[at], value[at + 1 : at + 1 + draws].mean()
        at += 1 + draws
        for kind in options["kinds"]:
            n_layers = lm.n_layers - (kind == "state")
            cells = value[at : at + n_layers * (n - first) * draws].view(n_layers, n - first, draws)
            at += cells.numel()
            restored = p_corrupted.repeat(n, lm.n_layers)  # before the subject nothing differs
            restored[first:, :n_layers] = cells.mean(-1).T
            if kind == "state":  # nothing stands above the last layer: only the last token's state is read
                restored[-1, -1] = p_clean
            results.append(_result(lm, task, kind, p_clean, p_corrupted, restored, level, options))
    return results


def _result(lm, task, kind, p_clean, p_corrupted, restored, level, options) -> TraceResult:
    return TraceResult(
        fact=task.fact,
        tokens=tuple(lm.tokenizer.decode([i]) for i in task.tokens),
        subject_span=task.span,
        answer_id=task.targets[0],
        answer=lm.tokenizer.decode([task.targets[0]]),
        kind=kind,
        window=1 if kind == "state" else options["window"],
        noise=None if level is None else level[1],
        metric=options["metric"],
        sever=options["sever"],
        p_clean=float(p_clean),
        p_corrupted=float(p_corrupted),
        p_restored=restored.float().numpy(),
    )


def read_log(path) -> list[TraceResult]:
    """The results that a ``log=`` file holds so far."""
    return [TraceResult.from_record(json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]
