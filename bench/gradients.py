"""Gradient factors of many facts at once against a loop of one forward and one backward a fact, in the same run.

The loop is what published gradient editors do: the matrices ask for gradients, the text of a fact goes through Hugging
Face's own forward, and autograd forms dL/dW of each matrix. Ours gives x and δ of each, from which dL/dW follows; both
are compared on every fact, or nothing is reported. Facts as in ``bench.edit``; ratios are of CPU time on one thread.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import CheckFailed, Figure, Measured, Timing, peak_matmul, timed
from kedit_fast.facts.tokens import fact_answer, fact_tokens
from kedit_fast.jobs.gradients import Gradients, GradientTask, Place, gradient_factors
from kedit_fast.model.family import projection

FACTS, QUICK = 100, 4
LAST = 3  # layers whose MLP MEND edits
TOLERANCE = 1e-3  # of dL/dW, relative to its norm, in fp32
MARK = ">= 5"


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped without the data sets."""
    edit_bench.check_data()
    lm = kf.open_model("smollm2")
    return measure(lm, edit_bench.draw()[: QUICK if options.quick else options.facts or FACTS])


def measure(lm, facts: Sequence[kf.Fact]) -> Measured:
    """MEND's matrices, and every matrix of every MLP; ours and the loop's one after the other."""
    peak, tasks = peak_matmul(), [_task(lm, fact) for fact in facts]
    gradient_factors(lm, tasks[:1], _places(lm, range(lm.n_layers - LAST, lm.n_layers)))  # whatever is made once
    figures = []
    for name, first in (("last three layers", lm.n_layers - LAST), ("all layers", 0)):
        places = _places(lm, range(first, lm.n_layers))
        ours = timed(gradient_factors, lm, tasks, places)
        theirs = _Loop(lm, places, ours.result)
        spent = timed(theirs.run, tasks)
        figures += _figures(f"{name}, {len(tasks)} facts", len(tasks), ours, spent, theirs)
    rows = sum(task.n_rows for task in tasks)
    return Measured(figures, max(peak, peak_matmul()), [f"{rows} tokens; gate, up and down of each layer."])


class _Loop:
    """One fact after the other; compares each with ours, which is not in its time."""

    def __init__(self, lm, places: list[Place], ours: Gradients):
        self.lm, self.places, self.ours, self.worst, self.comparing = lm, places, ours, 0.0, 0.0
        self.weights = [projection(lm.model, layer, role).weight for layer, role in places]

    def run(self, tasks: list[GradientTask]) -> None:
        """dL/dW of each matrix for each fact."""
        others = [parameter for parameter in self.lm.model.parameters() if parameter.requires_grad]
        self.lm.model.requires_grad_(False)
        for weight in self.weights:
            weight.requires_grad_()
        try:
            for i, task in enumerate(tasks):
                self._check(i, self._one(task))
        finally:
            self.lm.model.requires_grad_(False)
            for parameter in others:
                parameter.requires_grad_()
            for weight in self.weights:
                weight.grad = None

    def _one(self, task: GradientTask) -> list[Tensor]:
        for weight in self.weights:
            weight.grad = None
        with torch.enable_grad():
            logits = self.lm.model(torch.tensor([task.prompt + task.target[:-1]])).logits[0, len(task.prompt) - 1 :]
            cross_entropy(logits.float(), torch.tensor(task.target)).backward()
        return [weight.grad for weight in self.weights]

    def _check(self, i: int, found: list[Tensor]) -> None:
        def compare() -> None:
            for place, gradient in zip(self.places, found, strict=True):
                apart = (self.ours.factors[place].dense(i) - gradient).norm() / gradient.norm()
                self.worst = max(self.worst, apart.item())
            if not self.worst <= TOLERANCE:
                raise CheckFailed(f"gradients of fact {i} differ by {self.worst:.1g}, more than {TOLERANCE:g}")

        self.comparing += timed(compare).seconds


def _figures(case: str, n: int, ours: Timing, loop: Timing, theirs: _Loop) -> list[Figure]:
    spent = loop.seconds - theirs.comparing
    rows = [
        ("ratio to the loop", spent / ours.seconds, "x"),
        ("gradient factors, CPU time a fact", ours.seconds / n, "s"),
        ("loop, CPU time a fact", spent / n, "s"),
        ("largest difference of dL/dW, relative", theirs.worst, "difference"),
    ]
    return [Figure(case, what, value, unit, n=n, mark=MARK * what.startswith("ratio")) for what, value, unit in rows]


def _task(lm, fact: kf.Fact) -> GradientTask:
    return GradientTask(list(fact_tokens(lm.tokenizer, fact).ids), fact_answer(lm.tokenizer, fact), fact.label)


def _places(lm, layers) -> list[Place]:
    return [(layer, role) for layer in layers for role in lm.family.roles]
