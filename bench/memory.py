"""Scoring memory editors, all facts in shared sweeps, against one prompt at a time: GRACE, WISE and MEMOIR.

The rival is what published code does with a memory: every prompt and answer is a forward of its own, without the memory
and with it, because the memory decides for the whole batch; a hook on the projection looks at the prompt's rows, and
adds or replaces. It is run on the first facts between ours, and what it would take for all follows from its own seconds
a token. What was timed is also what is compared, or nothing is reported. The edits are hardly trained (one step): what
an evaluation costs does not depend on what a memory says. Ratios are of CPU time on one thread.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import CheckFailed, Figure, Measured, peak_matmul, timed
from bench.published import scaled
from kedit_fast.editors.written import counted_elsewhere
from kedit_fast.evaluation.benchmark import Case
from kedit_fast.evaluation.benchmarks.counterfact import probes
from kedit_fast.evaluation.probes import Probe, read_probes
from kedit_fast.facts.fact import Fact
from tests.oracle.access import site_module

N, MEASURED = 100, 2  # facts; those that the loop is run on
MARK, TOLERANCE = ">= 5", 1e-3  # of probabilities, relative
CONTEXTS = [["{}"]]
Memory = Callable[[Tensor, Tensor, int], Tensor]  # (its input x [T, d_ff], its output y [T, d], T of the prompt) -> y


def run(options) -> Iterator[Measured]:
    """A part for each editor, as soon as it is done. Raises Skipped without the data sets."""
    edit_bench.check_data()
    lm = kf.open_model("smollm2")
    n, measured = (4, 1) if options.quick else (N, MEASURED)
    facts = [dataclasses.replace(fact, same_subject=()) for fact in edit_bench.draw()[:n]]
    for name, memory in MEMORIES.items():
        yield compare(lm, name, facts, measured, memory)


def compare(lm, name: str, facts: Sequence[Fact], measured: int, memory: Callable[[kf.Edit], Memory]) -> Measured:
    """One editor's edit of all facts, scored both ways."""
    edit = hardly_trained(lm, name, facts)
    asked = [probes(lm, Case((fact,), number=i)) for i, fact in enumerate(facts)]
    view, theirs = lm.with_edit(edit), memory(edit)
    before = [timed(loop, lm, edit.layers[0], one, theirs) for one in asked[: -(-measured // 2)]]
    ours = timed(read_probes, view, [probe for one in asked for probe in one])
    after = [timed(loop, lm, edit.layers[0], one, theirs) for one in asked[len(before) : measured]]
    loops = before + after
    said = list(zip(*ours.result, strict=True))
    difference = max(_apart(said, [p for one in loops for p in one.result]))
    if not difference <= TOLERANCE:
        raise CheckFailed(f"{name}: a probability differs by {difference:.1e} of itself, allowed {TOLERANCE:g}")
    rival = scaled(loops, lambda i: sum(sum(probe.lengths) for probe in asked[i]), len(facts))
    owners = view.owners([probe.prompt for one in asked for probe in one])
    case = f"{name}, {len(facts)} facts"
    return Measured(
        [
            Figure(case, "kedit_fast", ours.cpu, "s"),
            Figure(case, "one prompt at a time", rival.cpu, "s", n=len(loops)),
            Figure(case, "ratio", rival.cpu / ours.cpu, "x", mark=MARK),
            Figure(case, "largest difference of p, relative", difference, "difference"),
            Figure(case, "prompts that the memory answers", 100 * float((owners >= 0).double().mean()), "%"),
        ],
        peak_matmul(),
        [f"{sum(map(len, asked))} prompts; the loop run on {len(loops)} facts, and scaled by tokens"],
    )


def hardly_trained(lm, name: str, facts: Sequence[Fact]) -> kf.Edit:
    """An edit of all facts after one step."""
    editor = kf.EDITORS[name].for_model(lm)
    together = {"batch_size": len(facts)} if hasattr(editor, "batch_size") else {}
    reads = {} if "contexts" in editor.UNREAD else {"contexts": CONTEXTS}
    with counted_elsewhere():
        return dataclasses.replace(editor, n_iter=1, **together).edit(lm, facts, **reads)


def _apart(said, found: Sequence[tuple[list[float], list[float]]]) -> Iterator[float]:
    """Relative differences of base and edited probabilities."""
    for answers, theirs in zip(said, found, strict=False):
        for answer, each in zip(answers, theirs, strict=True):
            yield from (abs(p - q) / q for p, q in zip(answer.p, each, strict=True) if q == q)


# ---- one prompt at a time


@torch.no_grad()
def loop(lm, layer: int, asked: Sequence[Probe], memory: Memory) -> list[tuple[list[float], list[float]]]:
    """(P of each answer by the base model, with the memory) of each probe: a forward for each."""
    module, found = site_module(lm.model, layer, "mlp_out"), []
    for probe in asked:
        sides = []
        for made in (None, memory):
            sides.append([_p(lm, module, probe.prompt, answer or [], made) for answer in probe.answers])
        found.append((sides[0], sides[1]))
    return found


def _p(lm, module, prompt: list[int], answer: list[int], memory: Memory | None) -> float:
    if not answer:
        return float("nan")
    hooks = []
    if memory is not None:
        hooks.append(module.register_forward_hook(lambda m, x, y: memory(x[0][0], y[0], len(prompt))[None]))
    logits = lm.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    for hook in hooks:
        hook.remove()
    return float(logits.log_softmax(-1)[range(len(answer)), answer].mean().exp())


def _grace(edit: kf.Edit) -> Memory:
    route, values = edit.route, edit.changes[0].values

    def answer(x: Tensor, y: Tensor, n: int) -> Tensor:
        least, nearest = (route.keys - x[n - 1]).norm(dim=1).min(0)
        if least.item() <= route.radius[nearest].item():
            y = y.clone()
            y[n - 1] = values[nearest]
        return y

    return answer


def _wise(edit: kf.Edit) -> Memory:
    delta, threshold = edit.changes[0].dense(0), edit.route.threshold[0].item()

    def answer(x: Tensor, y: Tensor, n: int) -> Tensor:
        moved = x @ delta.T
        return y + moved if moved[:n].norm(dim=1).mean().item() >= threshold else y

    return answer


def _memoir(edit: kf.Edit) -> Memory:
    route, memory = edit.route, edit.changes[0]
    weight = torch.zeros(len(memory.weight), len(route.background))
    weight[:, memory.columns] = memory.weight
    stored = torch.zeros(len(memory.masks), len(route.background)).scatter_(1, memory.masks, 1.0)

    def answer(x: Tensor, y: Tensor, n: int) -> Tensor:
        k = memory.masks.shape[1]
        own = torch.zeros(len(route.background))
        own[route.permutation[(x[:n].mean(0) - route.background).abs().topk(k).indices]] = 1.0
        most, entry = (stored @ own / k).max(0)
        return y + (x * stored[entry]) @ weight.T if most.item() >= route.least else y

    return answer


MEMORIES = {"grace": _grace, "wise": _wise, "memoir": _memoir}
