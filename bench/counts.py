"""What a flow asks of a GPU, counted where there is none: launches, bytes, uploads, waits; and what follows from them.

Models of their real shapes, in bf16, on the tests' pretended device, which holds no numbers but counts what it is asked
for; prompts of random words as in ``bench.flows`` and ``bench.mass``. MEMIT's layers are counted without their solves.

The prediction is a model, which a card has to correct: the device is busy with each launch for the largest of bytes
over 3.0 TB/s, FLOP over 798 TFLOP/s (an H100's best, as measured) and 2 µs; the host with its own Python, as it
took here, and ``LAUNCH`` for each launch; the two overlap, but at each point where the host waits ``WAIT`` is lost.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch

import kedit_fast as kf
from bench.common import Figure, Measured, peak_matmul
from bench.flows import Plan, random_facts, random_model, word_tokenizer
from bench.mass import editor_for, random_edits
from kedit_fast.editors.located import Prompts
from kedit_fast.editors.written import counted_elsewhere
from kedit_fast.jobs.values import Values, optimize_values
from kedit_fast.sweep.engine import Pack
from tests.pretend_cuda import PRODUCTS, Counts, on_device, pretended_cuda

LAUNCH, WAIT = 5e-6, 20e-6  # s
ABOUT = (
    "Counted on a pretended device. Predicted: launch by launch the largest of bytes over 3.0 TB/s, FLOP over 798 "
    "TFLOP/s and 2 µs, or the host's time where that is longer (its Python on this CPU, 5 µs a launch), and 20 µs for "
    "each wait."
)
MEMORY, STEPS = "60GB", 3
CONTEXTS = [["{}"], ["w5 w6 w7. {}", "w8 w9 w10. {}"]]


@dataclass(frozen=True)
class Flow:
    """What is counted, on which model, and the share of the products' peak that is to be reached (%)."""

    name: str
    model: str
    n: int
    run: Callable[[kf.LM, int], object]
    mark: str = ""


def run(options) -> Iterator[Measured]:
    """A part for each flow, as soon as it is counted."""
    for flow in FLOWS:
        yield measure(replace(flow, n=1) if options.quick else flow, layers=4 if options.quick else None)


def measure(flow: Flow, layers: int | None = None) -> Measured:
    """One flow, on a model of so many layers (None: all)."""
    model = random_model(Plan(flow.model, torch.device("meta"), layers=layers))
    tokenizer = word_tokenizer(model.config.vocab_size)
    with pretended_cuda(hollow=True) as counts, blocks() as passed, counted_elsewhere():
        lm = kf.open_model(on_device(model), tokenizer=tokenizer, memory=MEMORY)
        flow.run(lm, 1)  # whatever is made once
        counts.clear()
        passed.clear()
        began = time.thread_time()
        flow.run(lm, flow.n)
        host = time.thread_time() - began - counts.spent
    host += LAUNCH * counts.launches.total() - overhead() * counts.ops
    return Measured(figures(flow, counts, passed, host), peak_matmul(), [ABOUT])


def figures(flow: Flow, counts: Counts, passed: Sequence[int], host: float) -> list[Figure]:
    """passed: rows of each block call; host: seconds"""
    n_calls, rows, device = len(passed), sum(passed), sum(counts.busy.values())
    seconds = max(device, host) + WAIT * counts.waits.total()
    products = counts.flop / PRODUCTS
    lines = [
        ("block calls", n_calls, "times", ""),
        ("rows of a call", rows / n_calls, "mean", ""),
        ("launches of a call", counts.launches.total() / n_calls, "mean", ""),
        ("waits of a call", counts.waits.total() / n_calls, "mean", ""),
        ("uploads of a call", counts.uploads.total() / n_calls, "mean", ""),
        ("moved by a row in a layer", 1e-3 * sum(counts.moved.values()) / rows, "kB", ""),
        ("products", products, "s", ""),
        ("device, at least", device, "s", ""),
        ("host", host, "s", ""),
        ("share of peak, device alone", 100 * products / device, "%", ""),
        ("share of peak, predicted", 100 * products / seconds, "%", flow.mark),
    ]
    return [
        Figure(f"{flow.name}, {flow.n} facts", metric, value, unit, n=flow.n, mark=mark)
        for metric, value, unit, mark in lines
    ]


def overhead(n: int = 3000) -> float:
    """Seconds that an op takes longer for being looked at, beside what ``Counts.spent`` has: measured on small ones."""
    x = torch.zeros(1)

    def seconds() -> float:
        began = time.thread_time()
        for _ in range(n):
            x + x
        return (time.thread_time() - began) / n

    with pretended_cuda() as counts:
        seconds()  # whatever is made once
        counts.clear()
        looked_at = seconds() - counts.spent / n
    return max(0.0, looked_at - seconds())


@contextmanager
def blocks() -> Iterator[list[int]]:
    """Inside, the rows of every block call."""
    passed: list[int] = []
    right = Pack._block

    def block(self, layer, h, call, *args, **options):
        passed.append(len(call.index))
        return right(self, layer, h, call, *args, **options)

    with patch.object(Pack, "_block", block):
        yield passed


# ---- flows


def trace(lm, n: int):
    """States, MLP and attention windows of n facts."""
    return kf.trace(lm, random_facts(n, lm.n_vocab), noise=0.1, answer="w1")


def values(lm, n: int):
    """``STEPS`` steps of z for n facts."""
    tasks = Prompts.of(lm, random_edits(n, lm.n_vocab), CONTEXTS).value_tasks(lm)
    return optimize_values(lm, tasks, replace(editor_for(lm), v_num_grad_steps=STEPS).z_settings(lm))


def layers(lm, n: int):
    """MEMIT's edit of n facts without its values and its solves."""

    def given(self, lm, prompts, top, work, name):
        z, none = torch.zeros(n, lm.d_model, device=lm.device), torch.zeros(n)
        return Values(z, z, torch.ones(n, dtype=torch.int64), none, none), {}

    def unsolved(self, work, layer, k, residual, earlier):
        return residual.T, k.T, {}

    with patch.object(kf.Memit, "values", given), patch.object(kf.Memit, "update", unsolved):
        return replace(editor_for(lm), mom2_adjustment=False).edit(lm, random_edits(n, lm.n_vocab), contexts=CONTEXTS)


FLOWS = (
    Flow("trace, llama-3-8b", "llama-3-8b", 4, trace, ">= 60"),
    Flow("trace, gpt2-xl", "gpt2-xl", 4, trace, ">= 60"),
    Flow("z, gpt-j", "gpt-j", 64, values, ">= 50"),
    Flow("MEMIT's layers, gpt-j", "gpt-j", 64, layers),
)
