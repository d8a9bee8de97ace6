"""Estimates of a trace under subject replacement and logit difference, against the exact one.

Facts that SmolLM2 knows, each with another subject of its relation and of as many tokens. Beside the package's estimate
(``method="attribution"``, seven steps) and its strided traces, one backward pass through Hugging Face's own forward,
without and with what the field corrects it by:

    plain      ∇p · (x_clean - x), at the corrupted run (Nanda 2023; Syed et al. 2023, arXiv:2310.10348)
    RelP       the same, ∇ by LRP's rules: norms divide by constants, attention weights are constants, an activation is
               its argument times a constant, each factor of a gate gets half (Jafari et al. 2025, arXiv:2508.21258)
    GradDrop   the sum over layers of the same with a layer's contributions left out of ∇, by L - 1; signs are kept, the
               paper adds up sizes (Kramár et al. 2024, AtP*, arXiv:2403.00745)
    straight   the mean over seven steps of ∇p · (x_clean - x_corrupted)
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import kedit_fast as kf
from bench import edit as edit_bench
from bench.attribution import TOP, cells, recall
from bench.common import DATA, CheckFailed, Figure, Measured, peak_matmul
from kedit_fast.basics.correlation import spearman
from kedit_fast.tracing.attribution import STEPS
from kedit_fast.tracing.exact import row_layers
from kedit_fast.tracing.tasks import KINDS, Task, TraceSettings, tasks_of
from tests.oracle.access import changing, changing_input, embedding, frozen, layers, paths, site_module
from tests.oracle.tracing import SITES, restored_layers

LONGEST, SHORTEST, OF_A_RELATION, TRIED = 11, 4, 2, 60  # tokens; tokens from the subject on; facts; other subjects
WINDOWS, STRIDES = (1, 10), (2, 3)
TOLERANCE = 1e-3  # nats, between seven steps by hooks and by a sweep
AGREES, LEAST = "mean rank correlation", "least rank correlation"
COST = "rows x layers, forth and back, share of the exact trace's"


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped without the data sets."""
    edit_bench.check_data()
    lm = kf.open_model("smollm2")
    return measure(lm, replaced(lm, 2 if options.quick else 20))


def replaced(lm, n: int) -> list[tuple[kf.Fact, str]]:
    """n known facts, each with the first subject of its relation after which the model says something else."""
    everything, found, count = kf.load_facts(DATA / edit_bench.COUNTERFACT), [], Counter()
    for fact in edit_bench.draw():
        relation = fact.provenance.get("relation_id")
        if len(found) < n and relation is not None and count[relation] < OF_A_RELATION:
            others = (o.subject for o in everything if o.provenance.get("relation_id") == relation)
            fitting = (other for other, _ in zip(others, range(TRIED), strict=False) if _fits(lm, fact, other))
            if (other := next(fitting, None)) is not None:
                found.append((fact, other))
                count[relation] += 1
    return found


def _fits(lm, fact: kf.Fact, other: str) -> bool:
    try:
        (task,) = tasks_of(lm, [fact], None, other, "logit_diff")
    except ValueError:  # of another number of tokens
        return False
    length = len(task.tokens)
    return length <= LONGEST and length - task.span[0] >= SHORTEST and task.targets[0] != task.targets[1]


def measure(lm, pairs: Sequence[tuple[kf.Fact, str]]) -> Measured:
    """Each fact in every way, one after the other. Raises CheckFailed where hooks and sweeps estimate differently."""
    peak, found, figures = peak_matmul(), {}, []
    for i, (fact, other) in enumerate(pairs):
        for case, method, *scores in _scores(lm, fact, other):
            found.setdefault((case, method), []).append(scores)
        print(f"{i + 1} of {len(pairs)}: {fact.text!r}, {other}", flush=True)
    for (case, method), scores in found.items():
        agrees, tops, cost = np.array(scores).T
        lines = {AGREES: agrees.mean(), LEAST: agrees.min(), f"mean top-{TOP} recall": tops.mean(), COST: cost.mean()}
        for metric, value in lines.items():
            unit, mark = ("correlation", ">= 0.95" * (metric == AGREES)) if metric in (AGREES, LEAST) else ("share", "")
            figures.append(Figure(case, f"{method}: {metric}", float(value), unit, n=len(scores), mark=mark))
    return Measured(figures, max(peak, peak_matmul()), [f"{len(pairs)} facts of up to {LONGEST} tokens."])


def _scores(lm, fact: kf.Fact, other: str) -> Iterator[tuple]:
    """(kind and window, method, rank correlation, recall, cost) of one fact."""
    (task,) = tasks_of(lm, [fact], None, other, "logit_diff")
    hooked = by_hooks(lm.model, task)
    for window in WINDOWS:
        how = {"corrupt": other, "metric": "logit_diff", "window": window, "kinds": KINDS[window > 1 :]}
        swept = {"seven steps": kf.trace(lm, fact, method="attribution", **how)}
        swept |= {f"one layer in {n}": kf.trace(lm, fact, method="strided", stride=n, **how) for n in STRIDES}
        for i, exact in enumerate(kf.trace(lm, fact, **how)):
            case = exact.kind if exact.kind == "state" else f"{exact.kind}, window of {window}"
            alone = TraceSettings((exact.kind,), window, "logit_diff", None, 1, None, 1)
            all_rows = row_layers(lm.n_layers, task, alone)
            made = {name: (_cells(exact, effect), n / all_rows) for name, (effect, n) in hooked.items()}
            steps, of_steps = made.pop("by hooks")
            made |= {name: (cells(each[i]), each[i].cost or of_steps) for name, each in swept.items()}
            if not (apart := np.abs(steps - made["seven steps"][0]).max()) <= TOLERANCE:
                raise CheckFailed(f"{case} estimate of {fact.label}: hooks and sweep are {apart:.1e} apart")
            for name, (found, cost) in made.items():
                yield case, name, spearman(found, cells(exact)), recall(found, cells(exact)), cost


def _cells(exact: kf.TraceResult, effects: dict[str, Tensor]) -> np.ndarray:
    """What ``cells`` gives of a result with these effects."""
    effect = effects[exact.kind]
    windows = [restored_layers(exact.kind, layer, exact.window, len(effect)) for layer in range(len(effect))]
    table = torch.stack([effect[list(window)].sum(0) for window in windows], 1).numpy()
    return cells(replace(exact, p_restored=exact.p_corrupted + table))


def by_hooks(model, task: Task) -> dict[str, tuple[dict[str, Tensor], int]]:
    """{method: ({kind: effects [L, T], a layer at a time}, rows times layers, forth and back)}."""
    n, after = len(layers(model)), len(task.tokens) - task.span[0]
    one, seven, many = (n * (len(task.tokens) + k * after) for k in (2, 2 * len(STEPS), 1 + n))
    dropped = [effects(model, task, [0.0], without=layer) for layer in range(n)]
    made = {
        "plain": (effects(model, task, [0.0]), one),
        "GradDrop": ({kind: sum(each[kind] for each in dropped) / (n - 1) for kind in KINDS}, many),
        "straight": (effects(model, task, STEPS, straight=True), seven),
        "by hooks": (effects(model, task, STEPS), seven),
    }  # fmt: skip
    with relp(model):
        return {"RelP": (effects(model, task, [0.0]), one), **made}


def effects(model, task: Task, shares, *, without: int = -1, straight: bool = False) -> dict[str, Tensor]:
    """{kind: [L, T]} the mean over shares of the way of ∇p · (x_clean - x) / (1 - share); straight: x at the corrupted
    run. without: a layer whose contributions have no gradient."""
    kept = {kind: [] for kind in KINDS}
    share = torch.tensor([1.0, *shares])[:, None, None]

    def keep(kind: str, layer: int):
        def see(hidden: Tensor) -> Tensor:
            kept[kind].append(hidden)
            return hidden.detach() + 0 * hidden if layer == without and kind != "state" else hidden

        return see

    at = [
        (site_module(model, layer, SITES[kind]), keep(kind, layer))
        for layer in range(len(layers(model)))
        for kind in KINDS
    ]
    way = (embedding(model), lambda hidden: hidden.lerp(hidden[:1].expand_as(hidden), share).requires_grad_())
    with torch.enable_grad(), frozen(model), changing([way, *at]):
        logits = model(torch.tensor([task.tokens, *[task.corrupted] * len(shares)]), use_cache=False).logits[1:, -1]
    value = logits[:, task.targets[0]] - logits[:, task.targets[1]]
    gradients = torch.autograd.grad(value.sum(), [x for kind in KINDS for x in kept[kind]])
    found = {}
    for kind, gradient in zip(KINDS, torch.stack(gradients)[:, 1:].split(len(layers(model))), strict=True):
        x = torch.stack(kept[kind]).detach()
        apart = x[:, :1] - x[:, 1:2] if straight else (x[:, :1] - x[:, 1:]) / (1 - share[1:])
        found[kind] = (gradient * apart).sum(-1).mean(1)
    return found


@contextmanager
def relp(model):
    """A Llama whose gradients are by RelP's rules; its values stay as they are."""

    def norm(module, args, out):
        scale = (args[0].pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
        return module.weight * args[0] * scale.detach()

    def activation(module, args, out):
        return args[0] * args[0].sigmoid().detach()

    blocks, constant = layers(model), torch.Tensor.detach
    rules = [(model.get_submodule(paths(model).norm), norm), *((block.mlp.act_fn, activation) for block in blocks)]
    rules += [(each, norm) for block in blocks for each in (block.input_layernorm, block.post_attention_layernorm)]
    scores = [(each, constant) for block in blocks for each in (block.self_attn.q_proj, block.self_attn.k_proj)]
    with ExitStack() as stack:
        for module, rule in rules:
            stack.callback(module.register_forward_hook(rule).remove)
        for block in blocks:
            stack.enter_context(changing_input(block.mlp.down_proj, lambda x: (x + x.detach()) / 2))
        stack.enter_context(changing(scores))
        yield
