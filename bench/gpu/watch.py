"""Watching some work on a GPU: its profile, what it waits for, with calls of which size it goes up the model."""

import gzip
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, record_function

from bench.common import ROOT
from bench.gpu.readings import CALLS, ON_GPU, PHASE, Profile
from kedit_fast.jobs import below, values
from kedit_fast.jobs.score import Score
from kedit_fast.kernels import slots
from kedit_fast.sweep import engine, plan
from kedit_fast.sweep.rows import RowTable
from kedit_fast.tracing import exact
from kedit_fast.tracing import trace as tracing

LARGEST = 15_000_000  # bytes of a kept trace: what a visit brings back is limited
QUICKLY = 1  # level of gzip: a tenth of the time of the usual one
SYNCHRONIZES = "called a synchronizing CUDA operation"  # what torch warns of
PHASES = {  # (where a phase's work is called from, its name there): what it is called here
    (exact, "_add_states"): "runs declared",
    (engine, "cut"): "packs cut",
    (RowTable, "_plan"): "row table",
    (RowTable, "found"): "places found",
    (engine, "branch_rows"): "branch rows",
    (engine.Pack, "_block"): "block, all but attention",
    (slots, "attention"): "attention",
    (Score, "at"): "head",
    (values._Pack, "_declare"): "values: declared",
    (values, "ascend"): "values: way up",
    (values, "descend"): "values: way down",
    (values, "target_logprob"): "values: loss",
    (values._Pack, "_kl"): "values: KL",
    (torch.Tensor, "backward"): "values: backward",
    (torch.optim.Adam, "step"): "values: Adam",
}


@contextmanager
def call_rows(rows: int) -> Iterator[None]:
    """Sweeps send about so many rows through a block in one call."""
    with ExitStack() as stack:
        for module in (plan, engine, tracing, below):
            stack.enter_context(patch.object(module, "call_rows", lambda lm: rows))
        yield


def profiled(work: Callable[[], object], device: torch.device, wall: float, path: Path) -> Profile:
    """The profile of one call of ``work``, which took ``wall`` seconds without it; the trace is kept at ``path``."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _phases(), torch.profiler.profile(activities=activities, record_shapes=True) as made:
        work()
        wait_for(device)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "trace.json")
        made.export_chrome_trace(str(plain))
        text = plain.read_bytes()
    keep_trace(text, path)
    return Profile(json.loads(text)["traceEvents"], wall, set(PHASES.values()))


def keep_trace(text: bytes, path: Path) -> None:
    """Writes a trace that is small enough to bring back; a larger one without its operators, or not at all."""
    data = gzip.compress(text, QUICKLY)
    if len(data) > LARGEST:
        trace = json.loads(text)
        few = [event for event in trace["traceEvents"] if event.get("cat") in (*ON_GPU, *CALLS, PHASE)]
        data = gzip.compress(json.dumps(trace | {"traceEvents": few}).encode(), QUICKLY)
    if len(data) <= LARGEST:
        path.write_bytes(data)
    else:
        print(f"{path.name}: not kept, {len(data)} bytes", flush=True)


@contextmanager
def _phases() -> Iterator[None]:
    """Marks each phase's calls in the profile."""

    def marked(name: str, run: Callable) -> Callable:
        @wraps(run)
        def work(*args, **options):
            with record_function(name):
                return run(*args, **options)

        return work

    with ExitStack() as stack:
        for (where, attribute), name in PHASES.items():
            stack.enter_context(patch.object(where, attribute, marked(name, getattr(where, attribute))))
        yield


@contextmanager
def waits(device: torch.device, layer: int | None = None) -> Iterator[Counter]:
    """{"file:line function": times} of the package's lines that wait for the GPU while this is open.

    layer: only during that turn of the engine's loop (the rows that begin, then the block); None: all the time
    """
    found: Counter = Counter()

    def seen(message, category, filename, lineno, file=None, line=None):
        if SYNCHRONIZES in str(message):
            found[_place(sys._getframe(1))] += 1

    grow, watching = RowTable.grow, torch.cuda.set_sync_debug_mode if device.type == "cuda" else print_nothing

    def at_layer(table, at):
        watching("warn" if at == layer else "default")
        return grow(table, at)

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = seen
        stack.callback(watching, "default")
        if layer is None:
            watching("warn")
        else:
            stack.enter_context(patch.object(RowTable, "grow", at_layer))
        yield found


def print_nothing(*_) -> None:
    """Stands in for what only a GPU has."""


def _place(frame) -> str:
    """The innermost line of the package that a frame was called from; of whatever else, where none of it was."""
    first = frame
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "kedit_fast"):
            return f"{path.relative_to(ROOT / 'kedit_fast')}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return f"{Path(first.f_code.co_filename).name}:{first.f_lineno} {first.f_code.co_name}"


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
