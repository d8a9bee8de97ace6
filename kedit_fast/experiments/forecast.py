"""What a piece of work will cost, from a model's config alone: passes over its weights, bytes, FLOP, time.

The counts are those of the work itself: runs are declared and cut by the functions that the work goes through, of facts
on paper (``FACT``). A forward FLOP count has two for each multiply-add of a row with a layer's matrices; attention over
short texts, norms and noise are left out (under 3 % of a trace).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from kedit_fast.basics.printing import columns
from kedit_fast.basics.progress import duration
from kedit_fast.basics.words import sized
from kedit_fast.editors.located import derived_descent, early_middle
from kedit_fast.editors.memit import Memit
from kedit_fast.facts.fact import Fact
from kedit_fast.jobs.generate import batches
from kedit_fast.jobs.values import ValueSettings, ValueTask, groups, upper_rows
from kedit_fast.model.placement import Placement, place
from kedit_fast.model.shape import Shape
from kedit_fast.moments.corpus import LENGTH
from kedit_fast.moments.second_moment import TOKENS_PER_FEATURE, batch_tokens, layer_groups, sum_bytes
from kedit_fast.sweep.plan import RowCost, cut, free
from kedit_fast.sweep.runs import RunList, Runs, add_sequences
from kedit_fast.tracing import attribution, trace
from kedit_fast.tracing.exact import declared
from kedit_fast.tracing.tasks import KINDS, Task, TraceSettings

FACT = "a fact is taken as 12 tokens with its subject at tokens 2 to 4, and a new answer of two tokens"
TOKENS, SPAN, ANSWER, CONTEXT, N_CONTEXTS = 12, (2, 5), 2, 11, 5
HALF = 0.55  # of the time: what is offered as halving it


@dataclass(frozen=True)
class Step:
    """layers_read: how often one of the layers is gone through; flop: in the model's dtype; solves: FLOP in fp64; held:
    bytes at its height, beside the weights"""

    name: str
    layers_read: float
    flop: float
    solves: float = 0.0
    held: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: FLOP in the model's dtype, bytes that reach the device, FLOP in fp64."""

    flop: float
    bus: float
    solves: float


@dataclass(frozen=True)
class Forecast:
    """What the steps of a plan cost, where its weights are placed so."""

    what: str
    n_facts: int
    placement: Placement
    steps: tuple[Step, ...]

    def read(self, step: Step) -> float:
        """Bytes of weights that come to the device."""
        return step.layers_read / self.placement.shape.n_layers * self.placement.pass_bytes

    def seconds(self, step: Step, rates: Rates) -> float:
        """Reading hides behind computing, or computing behind reading."""
        return max(self.read(step) / rates.bus, step.flop / rates.flop) + step.solves / rates.solves

    def total(self, rates: Rates) -> float:
        """Seconds of all steps."""
        return sum(self.seconds(step, rates) for step in self.steps)

    def to_record(self, rates: Rates | None) -> dict:
        """Plain values, for a file of JSON."""
        steps = [
            asdict(step) | {"bytes_read": self.read(step), "seconds": self.seconds(step, rates) if rates else None}
            for step in self.steps
        ]
        placed = {name: getattr(self.placement, name) for name in ("source", "memory", "weights", "work", "keep")}
        return {"plan": self.what, "facts": self.n_facts, "placement": placed, "steps": steps}

    def bound(self, rates: Rates) -> str:
        """What most of the time goes into."""
        parts = {"reading weights": 0.0, "products": 0.0, "solves in fp64": 0.0}
        for step in self.steps:
            reading, products = self.read(step) / rates.bus, step.flop / rates.flop
            parts["reading weights" if reading > products else "products"] += max(reading, products)
            parts["solves in fp64"] += step.solves / rates.solves
        most = max(parts, key=parts.__getitem__)
        return f"{most} ({parts[most] / max(sum(parts.values()), 1e-30):.0%} of the time)"

    def table(self, rates: Rates | None) -> str:
        """A line a step, and one of all."""
        n_layers = self.placement.shape.n_layers
        rows = [("step", "weight passes", "weights read", "FLOP", "holds", "time")]
        for step in self.steps:
            told = duration(self.seconds(step, rates)) if rates else "-"
            passes, flop = f"{step.layers_read / n_layers:,.1f}", f"{step.flop + step.solves:.2g}"
            rows.append((step.name, passes, sized(self.read(step)), flop, sized(step.held), told))
        passes = f"{sum(step.layers_read for step in self.steps) / n_layers:,.1f}"
        read, flop = sized(sum(map(self.read, self.steps))), f"{sum(s.flop + s.solves for s in self.steps):.2g}"
        held = sized(max(step.held for step in self.steps))
        rows.append(("all", passes, read, flop, held, duration(self.total(rates)) if rates else "-"))
        return columns(rows, right=True)


# ---- the plans


def forecast(
    what: str, shape: Shape, n_facts: int, memory: int | None, device: torch.device, host=None, **how
) -> Forecast:
    """What a plan ("trace", "edit", "stats") costs; how: see ``VARIATIONS``. Raises ValueError as ``place``."""
    placement = place(shape, memory, device, host)
    steps = STEPS[what](placement.on_paper(), n_facts, **how)
    return Forecast(what, n_facts, placement, tuple(steps))


# By plan: what changes, in words, and as arguments of ``forecast`` (memory: times).
VARIATIONS: dict[str, tuple[tuple[str, dict], ...]] = {
    "trace": (
        ("twice the memory", {"memory": 2}),
        ('the strongest cells alone (method="screen")', {"method": "screen"}),
        (f'each noise draw at one layer in {trace.STRIDE} (method="strided")', {"method": "strided"}),
        ("states alone (kinds=state)", {"kinds": ("state",)}),
        ("half the noise draws (samples=5)", {"samples": 5}),
    ),
    "stats": (
        ("twice the memory", {"memory": 2}),
        ("a text of your own (corpus=FILE) in place of sampled text", {"sampled": False}),
        ("half the tokens", {"share": 0.5}),
    ),
    "edit": (
        ("twice the memory", {"memory": 2}),
        ("statistics that are there (a model's first edit measures them)", {"measured": True}),
        ("a text of your own (corpus=FILE) in place of sampled text", {"sampled": False}),
        ("half the steps (v_num_grad_steps)", {"v_share": 0.5}),
    ),
}


def halving(base: Forecast, rates: Rates, device: torch.device, host=None) -> list[str]:
    """What would halve the time, by trying; the most that one thing saves, where none halves it."""
    memory, found = base.placement.memory, []
    for words, change in VARIATIONS[base.what]:
        change = dict(change)
        if "memory" in change and memory is None:
            continue
        given = memory * change.pop("memory", 1) if memory is not None else None
        other = forecast(base.what, base.placement.shape, base.n_facts, given, device, host, **change)
        found.append((other.total(rates) / base.total(rates), words))
    found.sort(key=lambda each: each[0])
    return [f"{words}: {share:.0%} of the time" for share, words in found if share <= HALF or share == found[0][0]]


# ---- tracing


def _trace(lm: Shape, n_facts: int, kinds=KINDS, samples: int = 10, method: str = "exact") -> Iterator[Step]:
    stride = trace.STRIDE if method == "strided" else 1
    how = TraceSettings(tuple(kinds), 10, "prob", None, samples, ("gaussian", 1.0), 1, stride)
    task = Task(Fact("{} is", "It"), [0] * TOKENS, SPAN, [0] * TOKENS, [0])
    return trace_steps(lm, [task] * n_facts, how, method)


def trace_steps(lm: Shape, tasks: list[Task], how: TraceSettings, method: str, top: int = 20) -> Iterator[Step]:
    """Facts are taken to be alike: the first stands for all."""
    n_layers, found = lm.n_layers, list(trace.groups(lm, tasks, how))
    yield _asking(lm, "answers", sum(len(task.tokens) for task in tasks), len(tasks))
    if method == "screen":
        yield _estimating(lm, tasks, how)
    cells = None if method in trace.BY_RUNS else [dict.fromkeys(how.kinds, _some_cells(lm, tasks[0], top))]
    runs = declared(n_layers, tasks[:1], how, cells)[0].runs()
    rows, read = runs.row_layers(0, n_layers - 1), len(runs)
    packs = sum(_packs(lm, runs, size) * n for size, n in Counter(map(len, found)).items())
    held = _held(lm, len(found[0]) * int(runs.n_rows.sum()))
    flop = len(tasks) * (rows * lm.layer_flop + read * lm.head_flop)
    yield Step("cells" if method in trace.BY_RUNS else f"the {top} strongest cells", packs * n_layers, flop, held=held)


def _packs(lm: Shape, runs: Runs, n_facts: int) -> int:
    """Packs that so many facts of one sweep are cut into."""
    of_one = len(cut(runs, RowCost.of(lm), lm.memory, runs.nbytes))
    if of_one > 1:
        return of_one * n_facts
    cost = RowCost.of(lm)
    rows = int(runs.n_rows.sum()) * cost.kept + runs.tokens.numel() * cost.position + runs.nbytes
    return max(1, -(-n_facts * rows // free(lm)))


def _estimating(lm: Shape, tasks: list[Task], how: TraceSettings) -> Step:
    n = len(attribution.STEPS) * how.draws
    size = attribution.held_bytes(lm, tasks[0], n, how.kinds)
    passes = max(1.0, len(tasks) * size / lm.memory)
    rows = len(tasks) * n * (len(tasks[0].tokens) - tasks[0].span[0])
    return Step(
        "estimate", passes * (2 * lm.n_layers - 1), 3 * rows * lm.n_layers * lm.layer_flop, held=min(size, lm.memory)
    )


def _some_cells(lm: Shape, task: Task, top: int) -> torch.Tensor:
    """[T, L] ``top`` cells spread over the layers, at the last subject token."""
    cells = torch.zeros(len(task.tokens), lm.n_layers, dtype=torch.bool)
    cells[task.span[1] - 1, torch.linspace(0, lm.n_layers - 1, min(top, lm.n_layers)).long()] = True
    return cells


# ---- editing


def _edit(lm: Shape, n_facts: int, measured: bool = False, sampled: bool = True, v_share: float = 1) -> Iterator[Step]:
    """MEMIT, as ``Memit.for_model`` derives it, or with a share of the steps to z."""
    editor = Memit(layers=early_middle(lm), **derived_descent(lm))
    editor = replace(editor, v_num_grad_steps=round(v_share * editor.v_num_grad_steps))
    if not measured:
        yield from _stats(lm, n_facts, sampled)
        yield _generating(lm, "contexts", N_CONTEXTS, CONTEXT - 2)
    yield from edit_steps(lm, value_tasks(n_facts), editor.z_settings(lm), editor.layers)


def edit_steps(lm: Shape, tasks: list[ValueTask], settings: ValueSettings, layers: tuple[int, ...]) -> Iterator[Step]:
    """Values, then layer by layer keys and a solve, then the question whether facts are written."""
    yield _values(lm, tasks, settings)
    read = (s[: k + 1] for task in tasks for s, k in zip(task.sequences, task.lookups, strict=True))
    rows, top, n = _rows(read), layers[-1] + 1, len(tasks)
    passed = top + sum(top - below for below in layers[:-1])  # each reading goes on where the one below it began
    yield Step("keys", passed, passed * rows * lm.layer_flop)
    size, width = math.prod(lm.moment_shape), lm.moment_shape[-1]
    wide = 8 * size
    by_layer = size * width / 3 + (4 * n * size if n >= lm.d_ff else 2 * n * size + 4 * n**2 * lm.d_ff)
    yield Step("solving layers", 0, 0, solves=len(layers) * by_layer, held=wide)
    rows = sum(len(task.sequences[0]) + len(task.targets[0]) - 1 for task in tasks)
    yield _asking(lm, "asking for the new answers", rows, n)


def _values(lm: Shape, tasks: list[ValueTask], settings: ValueSettings) -> Step:
    """A pass for each group of facts, then two of the upper layers a step: forth, and back but for the highest; none
    where values live in the last layer."""
    n_groups, upper = len(list(groups(lm, tasks, settings))), lm.n_layers - settings.layer - 1
    both = ((s, target[:-1]) for task in tasks for s, target in zip(task.sequences, task.targets, strict=True))
    base = _rows([*(s + target for s, target in both), *(task.essence for task in tasks)])
    rows = sum(map(upper_rows, tasks))
    read = sum(sum(map(len, task.targets)) + 1 for task in tasks)
    times = 2 if lm.source.in_memory else 3  # forth, perhaps again, and back
    flop = base * lm.n_layers * lm.layer_flop + settings.steps * (
        times * rows * upper * lm.layer_flop + 2 * read * lm.head_flop
    )
    return Step("values", n_groups * (lm.n_layers + settings.steps * max(2 * upper - 1, 0)), flop, held=lm.memory)


def value_tasks(n_facts: int) -> list[ValueTask]:
    """Facts on paper: subjects that differ, contexts that all share."""
    contexts = [[], *([10 * i + j for j in range(CONTEXT)] for i in range(1, N_CONTEXTS + 1))]
    tasks = []
    for i in range(n_facts):
        prompt = [1, 2, *(1000 + TOKENS * i + j for j in range(TOKENS - 2))]
        lookups = [len(context) + SPAN[1] - 1 for context in contexts]
        sequences, targets = [context + prompt for context in contexts], [[0] * ANSWER for _ in contexts]
        tasks.append(ValueTask(sequences, lookups, targets, prompt[2 : SPAN[1]]))
    return tasks


# ---- statistics


def _stats(lm: Shape, n_facts: int, sampled: bool = True, share: float = 1.0) -> Iterator[Step]:
    n_tokens = round(share * TOKENS_PER_FEATURE * lm.d_ff)
    if sampled:
        yield _generating(lm, "sampling text", -(-n_tokens // LENGTH), LENGTH - 1)
    layers = early_middle(lm)
    parts, last = list(layer_groups(lm, layers)), layers[-1] + 1
    passes = len(parts) * -(-n_tokens // batch_tokens(n_tokens))
    flop = len(parts) * n_tokens * last * lm.layer_flop + len(layers) * n_tokens * math.prod(lm.moment_shape)
    yield Step("second moments", passes * last, flop, held=max(map(len, parts)) * sum_bytes(lm))


# ---- what several have


def _asking(lm: Shape, name: str, rows: int, read: int) -> Step:
    """Rows that go up once."""
    packs = max(1, -(-rows * RowCost.of(lm).kept // free(lm)))
    flop = rows * lm.n_layers * lm.layer_flop + read * lm.head_flop
    return Step(name, packs * lm.n_layers, flop, held=_held(lm, rows))


def _held(lm: Shape, rows: int) -> int:
    """Bytes of so many rows of a sweep, in packs where they are too many."""
    return min(rows * RowCost.of(lm).kept + RowCost.of(lm).call, lm.memory)


def _generating(lm: Shape, name: str, n_texts: int, n_tokens: int) -> Step:
    """A pass over the weights for each token, of all texts that fit together."""
    n_batches = len(list(batches(lm, [1] * n_texts, n_tokens)))
    rows = n_texts * n_tokens
    flop = rows * (lm.n_layers * lm.layer_flop + lm.head_flop)
    return Step(name, n_batches * n_tokens * lm.n_layers, flop, held=lm.memory)


STEPS: dict[str, Callable[..., Iterator[Step]]] = {"trace": _trace, "edit": _edit, "stats": _stats}


def _rows(sequences) -> int:
    """Rows of sequences that go up together, equal beginnings once."""
    runs = RunList()
    add_sequences(runs, list(sequences))
    return int(runs.runs().n_rows.sum())
