"""What a flow asks of a GPU, counted where there is none: launches, bytes, uploads, waits; and what follows from them.

Models of their real shapes, in bf16, on the tests' pretended device, which holds no numbers but counts what it is asked
for; prompts of random words as in ``bench.flows`` and ``bench.mass``. MEMIT's layers are counted without their solves.

The prediction is a model, which a card has to correct: the device is busy with each launch for the largest of bytes
over 3.0 TB/s, FLOP over 798 TFLOP/s (an H100's best, as measured) and 2 µs; the host with its Python and torch's own
work for each op, ``DRIVER`` more for each launch, ``TRITON`` for one of Triton's and ``UPLOAD`` for a table; the two
overlap, but at each point where the host waits ``WAIT`` is lost.

The pretended device makes the host's work longer than it is: an op costs it tens of microseconds. How much is measured
with a twin: little of the same kind, on the CPU as it is, on a model as deep whose rows are 48 numbers wide. What the
pretended run took longer, by op, is taken off; what is left is no less than the twin's time by block call.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch

import kedit_fast as kf
from bench.common import Figure, Measured, peak_matmul
from bench.flows import Plan, random_facts, random_model, word_tokenizer
from bench.mass import VALUES, editor_for, random_edits
from kedit_fast.editors.located import Prompts
from kedit_fast.editors.written import counted_elsewhere
from kedit_fast.jobs import values as jobs
from kedit_fast.jobs.score import next_tokens
from kedit_fast.jobs.values import Values, optimize_values
from kedit_fast.kernels import slots
from kedit_fast.sweep import plan
from kedit_fast.sweep.engine import Pack
from tests.pretend_cuda import CPU, META, PRODUCTS, Counts, on_device, pretended_cuda

DRIVER, TRITON, UPLOAD, WAIT = 3e-6, 15e-6, 15e-6, 20e-6  # s
ABOUT = (
    "Counted on a pretended device. Predicted: launch by launch the largest of bytes over 3.0 TB/s, FLOP over 798 "
    "TFLOP/s and 2 µs, or the host's time where that is longer (Python and torch on this CPU, 3 µs a launch, 15 µs one "
    "of Triton's or an upload), and 20 µs for each wait."
)
MEMORY, TIMES = "60GB", 3
CONTEXTS = [["{}"], ["w5 w6 w7. {}", "w8 w9 w10. {}"]]


@dataclass(frozen=True)
class Flow:
    """What is counted, on which model, and the share of the products' peak that is to be reached (%).

    run: on so many facts; 0: so little of its kind that the twin's arithmetic is nothing
    """

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
    model = random_model(Plan(flow.model, META, layers=layers))
    tokenizer = word_tokenizer(model.config.vocab_size)
    with pretended_cuda(hollow=True) as counts, blocks() as passed, counted_elsewhere():
        lm = kf.open_model(on_device(model), tokenizer=tokenizer, memory=MEMORY)
        flow.run(lm, 0)  # whatever is made once
        least = min(host_of(flow, lm, 0, counts) for _ in range(TIMES))
        there, calls = counts.ops_there, len(passed) / (1 + TIMES)
        passed.clear()
        host = host_of(flow, lm, flow.n, counts)
    of_least = twin(flow, lm.n_layers)
    too_long = counts.ops_there * (least - of_least) / there
    host = max(host - too_long, of_least * len(passed) / calls)
    host += DRIVER * counts.launches.total() + UPLOAD * counts.uploads.total()
    host += TRITON * sum(n for op, n in counts.launches.items() if op.startswith("triton"))
    return Measured(figures(flow, counts, passed, host), peak_matmul(), [ABOUT])


def host_of(flow: Flow, lm: kf.LM, n: int, counts: Counts) -> float:
    """Seconds that the host takes beside its counting."""
    counts.clear()
    return taken(flow, lm, n) - counts.spent


def twin(flow: Flow, n_layers: int) -> float:
    """Seconds that the host takes for the flow's least on the CPU as it is, with the device's calls and nothing done
    where Triton's kernels would run."""
    model = random_model(Plan(flow.model, CPU, torch.float32, layers=n_layers, tiny=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or waiting threads count
    try:
        with no_kernels(), counted_elsewhere():
            lm = kf.open_model(model, tokenizer=word_tokenizer(model.config.vocab_size), memory=MEMORY)
            flow.run(lm, 0)
            return min(taken(flow, lm, 0) for _ in range(TIMES))
    finally:
        torch.set_num_threads(threads)


def taken(flow: Flow, lm: kf.LM, n: int) -> float:
    """Seconds of this thread."""
    began = time.thread_time()
    flow.run(lm, n)
    return time.thread_time() - began


@contextmanager
def no_kernels() -> Iterator[None]:
    """Inside, attention is cut as for Triton's kernel, and gives zeros."""

    def zeros(query, *rows, cut=None, **how):
        cut(1, 64)
        return torch.zeros_like(query)

    def no_gradients(grad, out, lse, query, *rows, cut=None, **how):
        return zeros(query, cut=cut)

    made = {"attention": zeros, "attention_backward": no_gradients, "runs_on_triton": lambda query: True}
    with ExitStack() as stack:
        stack.enter_context(patch.object(plan, "CALL_ROWS", 1 << 20))
        for name, stands in made.items():
            stack.enter_context(patch.object(slots, name, stands))
        yield


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
    """States, MLP and attention windows of n facts; of none a few sweeps of one text."""
    if not n:
        return [next_tokens(lm, [[1, 2, 3, 4, 5]]) for _ in range(4)]
    return kf.trace(lm, random_facts(n, lm.n_vocab), noise=0.1, answer="w1")


def values(lm, n: int):
    """z for n facts, all steps of each."""
    tasks = Prompts.of(lm, random_edits(n or 1, lm.n_vocab), CONTEXTS).value_tasks(lm)
    with patch.object(jobs, "STOP_BELOW", -1.0):  # losses read 0 on a hollow device, and none is to be done by that
        return optimize_values(lm, tasks, editor_for(lm).z_settings(lm))


def layers(lm, n: int):
    """MEMIT's edit of n facts without its values and its solves."""
    n = n or 1

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
    Flow("z, gpt-j", "gpt-j", VALUES, values, ">= 50"),
    Flow("MEMIT's layers, gpt-j", "gpt-j", 64, layers),
    Flow("MEMIT's layers, gpt-j", "gpt-j", VALUES, layers),
)
