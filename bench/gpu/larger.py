"""A model larger than the device may hold: layers of Llama-3-70B's shape from host memory, within 24 GiB.

MEMIT of 1,000 facts and the trace of 64, each against what its weights and products need at the rates that the bus and
the card were just measured at: reading hides behind computing, or computing behind reading.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

import kedit_fast as kf
from bench import flows
from bench.common import Peaks, Stopwatch, peak_memory, reset_peak_memory
from bench.gpu.session import Session
from bench.mass import random_edits
from bench.phases import phase_times
from kedit_fast.basics.words import sized
from kedit_fast.editors.contexts import memit_contexts
from kedit_fast.editors.located import Prompts, early_middle
from kedit_fast.experiments.forecast import Forecast, Rates, Step, edit_steps, trace_steps
from kedit_fast.model.disk import open_on_disk
from kedit_fast.model.host import Host
from kedit_fast.model.lm import LM
from kedit_fast.model.placement import place
from kedit_fast.model.shape import shape_of
from kedit_fast.model.streamed import aligned
from kedit_fast.tracing.tasks import Task, TraceSettings

FULL = dict(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
TINY = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300,
)  # fmt: skip
MEMORY = 24 * 2**30
EDITS, STEPS, TRACED, SAMPLES = 1000, 3, 64, 10
DRY_EDITS, DRY_TRACED, DRY_WORK = 3, 2, 64 * 10**6
TRACE_NEEDS = 35  # seconds
EDIT_SHARE, SLACK = 0.5, 1.5  # of the seconds that are left; how much longer than by the rates an edit may take
COPIES = 4  # of a layer over the bus, timed together
RATIO, GOAL = "time over max(bus, products)", "<= 1.2"


@dataclass(frozen=True)
class Drawn:
    """One tensor of random numbers, the same whenever it is read; a vector's are ones, as a norm's weights."""

    name: str
    shape: tuple[int, ...]
    kind: torch.dtype
    device: torch.device
    begin, is_aligned = 0, True

    def read(self) -> Tensor:
        """The tensor, on the device that draws it."""
        if len(self.shape) == 1:
            return torch.ones(self.shape, dtype=self.kind, device=self.device)
        draw = torch.Generator(self.device).manual_seed(crc32(self.name.encode()))
        made = torch.empty(self.shape, dtype=self.kind, device=self.device).normal_(generator=draw)
        return made.mul_(1 / math.sqrt(self.shape[1]))

    def read_into(self, held: Tensor) -> None:
        """Copies it to where it is wanted."""
        held.copy_(self.read())

    mapped = read

    def part(self, index: tuple) -> Tensor:
        """``tensor[index]``."""
        return self.read()[index]


class DrawnCheckpoint:
    """What layers are read from: as a ``Checkpoint``, of random weights that are on no disk."""

    folder = Path(os.devnull)

    def __init__(self, config, dtype: torch.dtype, device: torch.device):
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        self._drawn = {
            name: Drawn(name, tuple(parameter.shape), dtype, device) for name, parameter in model.named_parameters()
        }

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._drawn

    def stored(self, name: str) -> Drawn:
        """The tensor of that name."""
        return self._drawn[name]


def larger(session: Session) -> None:
    """MEMIT, then a trace."""
    watch = Stopwatch(session.device)
    made = watch.once(lambda: opened(session.device, session.dry))
    lm = made.result
    session.book.notes = [
        f"{lm.n_layers} layers of Llama-3-70B's shape, random weights, {sized(MEMORY)} of the device.",
        *str(lm.placement).splitlines(),
    ]
    rates = measured_rates(lm, watch, session.dry)
    rows = [("model made", made.wall, "s"), ("bus", 1e-9 * rates.bus, "GB/s")]
    session.book.tell("a model larger than its memory", rows)
    edit(session, lm, watch, rates)
    if session.has(TRACE_NEEDS, "the trace"):
        trace(session, lm, watch, rates)


def opened(device: torch.device, tiny: bool) -> LM:
    """As ``open_model(folder, memory=)`` opens a checkpoint on a GPU, of random weights that are on no disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(TINY if tiny else FULL), bos_token_id=0, eos_token_id=0)
    dtype = torch.float32 if tiny else torch.bfloat16
    shape = shape_of(config, dtype)
    placement = place(shape, shape.n_bytes if tiny else MEMORY, torch.device("cuda"))
    if tiny:  # beside such small weights a block call does not fit
        placement = replace(placement, work=DRY_WORK)
    model, drawn = open_on_disk(DrawnCheckpoint(config, dtype, device), config, LlamaForCausalLM, device, dtype)
    with torch.no_grad():
        model.model.norm.weight.fill_(flows.SHARPNESS)
    source = Host(drawn, placement.keep)
    return LM(model, flows.word_tokenizer(config.vocab_size), source, placement.work, placement=placement)


def measured_rates(lm: LM, watch: Stopwatch, dry: bool) -> Rates:
    """What the card multiplies and the bus carries a second, a layer at a time."""
    products = Peaks.measure(watch, [lm.dtype, torch.float64], dry).products
    there = aligned(lm.source.layer_bytes(0), pinned=lm.device.type == "cuda")
    here = torch.empty_like(there, device=lm.device)
    copy = lambda: [here.copy_(there, non_blocking=True) for _ in range(COPIES)]  # noqa: E731
    copy()
    return Rates(products[lm.dtype], COPIES * len(there) / watch.once(copy).wall, products[torch.float64])


def edit(session: Session, lm: LM, watch: Stopwatch, rates: Rates) -> None:
    """MEMIT of as many of the facts as there is time for, without statistics of their own (C = 1)."""
    editor = kf.Memit(layers=early_middle(lm), v_num_grad_steps=STEPS, mom2_adjustment=False)
    contexts = watch.once(lambda: memit_contexts(lm))
    facts = random_edits(DRY_EDITS if session.dry else EDITS, lm.n_vocab)

    def steps(some: list[kf.Fact]) -> list[Step]:
        tasks = Prompts.of(lm, some, contexts.result).value_tasks(lm)
        return list(edit_steps(lm.placement.on_paper(), tasks, editor.z_settings(lm), editor.layers))

    expected = ideal(lm, steps(facts), rates)
    n = min(len(facts), max(2, int(EDIT_SHARE * session.left / (SLACK * expected) * len(facts))))
    if n < len(facts):
        session.left_out.append(f"{len(facts)} facts (it took {n})")
    facts = facts[:n]
    watch.once(lambda: editor.edit(lm, facts[:2], contexts=contexts.result))  # compiles
    wanted = steps(facts)
    with phase_times(lambda work, *args, **options: watch.once(lambda: work(*args, **options))) as phases:
        rows = timed_against(lm, watch, lambda: editor.edit(lm, facts, contexts=contexts.result), wanted, rates)
    rows += [
        ("contexts", contexts.wall, "s"),
        *((phase, timing.wall, "s") for phase, timing in phases.items()),
        *against(phases["z"].wall, ideal(lm, wanted[:1], rates), "of the values"),
    ]
    session.book.tell(f"MEMIT, larger than memory, {n} facts, {STEPS} steps", rows, n=n, marks=marks(session))


def trace(session: Session, lm: LM, watch: Stopwatch, rates: Rates) -> None:
    """States of all layers and tokens."""
    facts = flows.random_facts(DRY_TRACED if session.dry else TRACED, lm.n_vocab)
    span = (flows.SUBJECT_AT, flows.SUBJECT_AT + flows.SUBJECT)
    words = [0] * flows.TOKENS
    tasks = [Task(fact, words, span, words, [0]) for fact in facts]
    how = TraceSettings(("state",), 10, "prob", None, SAMPLES, ("gaussian", 1.0), 1)
    steps = list(trace_steps(lm.placement.on_paper(), tasks, how, "exact"))
    rows = timed_against(lm, watch, lambda: kf.trace(lm, facts, kinds="state", samples=SAMPLES), steps, rates)
    session.book.tell(f"trace, larger than memory, {len(facts)} facts", rows, n=len(facts), marks=marks(session))


def timed_against(lm: LM, watch: Stopwatch, work: Callable[[], object], steps: list[Step], rates: Rates) -> list[tuple]:
    """Rows of some work: its time, also as it would be at the measured rates, and the memory that it took."""
    reset_peak_memory(lm.device)
    before = lm.source.waited
    wall = watch.once(work).wall
    rows = [("wall time", wall, "s"), ("waiting for a layer", lm.source.waited - before, "s")]
    return [*rows, *against(wall, ideal(lm, steps, rates), "of all"), *peak_memory(lm.device)]


def ideal(lm: LM, steps: list[Step], rates: Rates) -> float:
    """Seconds of the steps where reading hides behind computing, or computing behind reading, at these rates."""
    return Forecast("", 0, lm.placement, tuple(steps)).total(rates)


def against(wall: float, least: float, what: str) -> list[tuple]:
    """Rows that set a time against what it would be at the measured rates."""
    return [(f"max(bus, products) {what}", least, "s"), (f"{RATIO} {what}", wall / least, "x")]


def marks(session: Session) -> dict[str, str]:
    """What a GPU has to reach."""
    if session.device.type != "cuda":
        return {}
    return {f"{RATIO} of all": GOAL, f"{RATIO} of the values": GOAL, "peak GPU memory": f"<= {1e-9 * MEMORY:.2f}"}
