"""Results of causal tracing: one fact's table of effects, and the average over facts by the role of the token."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from kedit_fast.basics import checks
from kedit_fast.basics.files import existing_file, reading, replace_file
from kedit_fast.basics.packed import read_arrays
from kedit_fast.basics.words import not_text
from kedit_fast.facts.fact import Fact
from kedit_fast.pictures.labels import ROLES, reliable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE = 3  # standard errors: the largest of some hundred places is often two from nothing by chance
LEAST = 0.05  # of the total effect: what a place gives back that carries anything to speak of


@dataclass(frozen=True, eq=False)
class TraceResult:
    """The trace of one fact and one kind. Values are in ``metric`` (prob: 0 to 1; logprob, logit_diff: nats).

    tokens: T strings; subject_span: half-open (b, e); answer: the traced token, with its leading space
    kind: state, mlp or attn; window: layers restored together; noise: level, None when another subject corrupted
    sever: None, or the contribution that stayed frozen at its corrupted values
    p_clean, p_corrupted: of the two runs; p_restored: [T, L] fp32
    backend: which implementation of each op ran, "attention reference, linear native, ..."; "" in files of before
    exact: [T, L] bool, which cells of p_restored were computed; the others are estimates. None: all were
    reliability: rank correlation over cells that is to be expected with a trace by as many other noise draws
        (``tracing.draws.reliability_of``); NaN for one draw, another subject, an estimate, and in files of before
    stride: each draw was computed at every which layer; cost: of a strided trace, its rows times layers as a share of
        the exact one's, else None
    """

    fact: Fact
    tokens: tuple[str, ...]
    subject_span: tuple[int, int]
    answer_id: int
    answer: str
    kind: str
    window: int
    noise: float | None
    metric: str
    sever: str | None
    p_clean: float
    p_corrupted: float
    p_restored: np.ndarray
    backend: str = ""
    exact: np.ndarray | None = None
    reliability: float = math.nan
    stride: int = 1
    cost: float | None = None

    def __post_init__(self):
        checks.instance("fact", self.fact, Fact, "a Fact")
        checks.instance("p_restored", self.p_restored, np.ndarray, "an array [tokens, layers]")
        if self.p_restored.ndim != 2 or len(self.p_restored) != len(self.tokens):
            raise ValueError(
                f"p_restored: expected [tokens, layers], {len(self.tokens)} tokens; found {list(self.p_restored.shape)}"
            )
        if self.exact is not None and self.exact.shape != self.p_restored.shape:
            raise ValueError(f"exact: expected {list(self.p_restored.shape)}, found {list(self.exact.shape)}")
        b, e = self.subject_span
        if not 0 <= checks.whole("subject_span", b) < checks.whole("subject_span", e) <= len(self.tokens):
            raise ValueError(f"subject_span = {(b, e)}: expected a part of {len(self.tokens)} tokens")
        _check_numbers("p_restored", self.p_restored)
        for name in ("p_clean", "p_corrupted", "reliability"):
            _check_number(name, getattr(self, name))
        checks.whole("stride", self.stride, least=1)
        checks.optional(_check_number, "cost", self.cost)
        for name in ("answer", "kind", "metric"):
            checks.text(name, getattr(self, name), blank=True)

    @property
    def indirect_effect(self) -> np.ndarray:
        """[T, L] p_restored - p_corrupted."""
        return self.p_restored - np.float32(self.p_corrupted)

    @property
    def normalized_effect(self) -> np.ndarray:
        """[T, L] (p_restored - p_corrupted) / (p_clean - p_corrupted); NaN where corruption changed nothing."""
        total = self.p_clean - self.p_corrupted
        return self.indirect_effect / np.float32(total if total else np.nan)

    def in_words(self) -> str:
        """The cell of the largest indirect effect, and where that is behind the subject, the largest within it."""
        begin, end = self.subject_span
        n_layers = self.p_restored.shape[1]
        token, layer = divmod(int(self.p_restored.argmax()), n_layers)
        inside, within = divmod(int(self.p_restored[begin:end].argmax()), n_layers)
        said = f"indirect effect strongest at {self._cell(token, layer)}"
        return said if begin <= token < end else f"{said}; within the subject at {self._cell(begin + inside, within)}"

    def _cell(self, token: int, layer: int) -> str:
        return f"token {token} ({self.tokens[token]!r}), layer {layer}: {self.indirect_effect[token, layer]:.3f}"

    def plot(self, path: checks.AnyPath | None = None) -> "Figure":
        """Heat map in the published conventions; writes a PNG where ``path`` is given. Gives the figure."""
        from kedit_fast.pictures.traces import plot_trace

        return plot_trace(self, path)

    def to_html(self, path: checks.AnyPath | None = None) -> str:
        """One page without scripts or outside files: the heat map, whose cells say their token, layer, value and
        reliability; with ``path`` also a file, whole or not at all. Of several traces: ``trace_page``."""
        from kedit_fast.pictures.trace_page import page_of_traces
        from kedit_fast.tracing.doubts import doubts

        return page_of_traces([self], average([self]), doubts([self]), path)

    def to_record(self) -> dict:
        """Plain values, for a line of JSON."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        return record | {
            "fact": self.fact.to_record(),
            "p_restored": [[float(str(x)) for x in row] for row in self.p_restored],  # fp32's shortest exact form
            "exact": None if self.exact is None else self.exact.tolist(),
            "reliability": None if math.isnan(self.reliability) else self.reliability,  # NaN is no JSON
        }

    @classmethod
    def from_record(cls, record: dict) -> "TraceResult":
        """The result that ``to_record`` gave."""
        return cls(**record | {
            "fact": Fact.from_record(record["fact"]),
            "tokens": tuple(record["tokens"]),
            "subject_span": tuple(record["subject_span"]),
            "p_restored": np.array(record["p_restored"], dtype=np.float32),
            "exact": None if record.get("exact") is None else np.array(record["exact"], dtype=bool),
            "reliability": _or_nan(record.get("reliability")),
        })  # fmt: skip

    def save(self, path: checks.AnyPath) -> None:
        """Writes an .npz file without pickle; ``load`` gives it back. One of that name is replaced, folders made."""
        record = self.to_record()
        del record["p_restored"]
        write_npz(path, p_restored=self.p_restored, record=json.dumps(record))

    @classmethod
    def load(cls, path: checks.AnyPath) -> "TraceResult":
        """Raises ValueError for a file that ``save`` did not write."""
        return read_npz(path, "a saved trace", cls._of_arrays, "p_restored", "record")

    @classmethod
    def _of_arrays(cls, p_restored, record) -> "TraceResult":
        return cls.from_record(json.loads(str(record)) | {"p_restored": p_restored})

    def __repr__(self) -> str:
        n_tokens, n_layers = self.p_restored.shape
        return (
            f"TraceResult({self.fact.text!r} -> {self.answer!r}, {self.kind}, {self.metric} {self.p_clean:.3g}, "
            f"corrupted {self.p_corrupted:.3g}, {n_tokens} tokens x {n_layers} layers{reliable(self.reliability)})"
        )

    def _repr_html_(self) -> str:
        from kedit_fast.pictures.figure import figure_html

        return figure_html(self.plot())


@dataclass(frozen=True, eq=False)
class AverageTrace:
    """Average indirect effect by the role of the token (``ROLES``) and layer.

    mean, stderr: [6, L] fp32, NaN for a role that no fact has; each token of a role counts once, as published, so
        stderr pools tokens of one fact (one-token subjects count as first and as last subject token, a single token
        behind the subject as first subsequent and as last token)
    counts: [6] tokens of each role; n_facts; kind; total_effect: mean of p_clean - p_corrupted
    reliability: mean of the facts' own, where it is known of any; of one fact's trace, not of the average
    """

    mean: np.ndarray
    stderr: np.ndarray
    counts: np.ndarray
    n_facts: int
    kind: str
    metric: str
    total_effect: float
    reliability: float = math.nan

    def __post_init__(self):
        shapes = [np.shape(x) for x in (self.mean, self.stderr, self.counts)]
        if len(shapes[0]) != 2 or shapes != [(len(ROLES), shapes[0][1])] * 2 + [(len(ROLES),)]:
            raise ValueError(
                f"mean, stderr, counts: expected [{len(ROLES)}, layers] twice and [{len(ROLES)}]: {shapes}"
            )
        for name in ("mean", "stderr", "counts"):
            _check_numbers(name, getattr(self, name))
        checks.whole("n_facts", self.n_facts)
        for name in ("total_effect", "reliability"):
            _check_number(name, getattr(self, name))
        for name in ("kind", "metric"):
            checks.text(name, getattr(self, name), blank=True)

    def recommend_layers(self, n: int = 5) -> tuple[int, ...]:
        """The n consecutive layers with the largest mean effect at the last subject token, where facts are edited.

        A hint, not a proof: see ``labels.LOCALIZATION_WARNING``. Raises ValueError when n is not within the layers.
        """
        effect = self.mean[ROLES.index("last subject token")]
        n = checks.whole("n", n, least=1, most=len(effect))
        sums = np.convolve(effect, np.ones(n), mode="valid")
        first = int(sums.argmax())
        return tuple(range(first, first + n))

    @property
    def stands_out(self) -> np.ndarray:
        """[6, L] bool: where the mean effect is above ``NOISE`` of its standard errors and ``LEAST`` of the total."""
        noise = np.nan_to_num(NOISE * self.stderr)  # of one token nothing is known
        return self.mean > np.maximum(noise, LEAST * max(self.total_effect, 0))

    def in_words(self, n: int = 5) -> str:
        """Where the effect is: at which n layers of the last subject token, and the strongest place where that is
        another; or that nothing stands out."""
        found = np.where(self.stands_out, self.mean, -np.inf)
        role, layer = divmod(int(found.argmax()), found.shape[1])
        if not self.stands_out.any():
            role, layer = divmod(int(np.nanargmax(self.mean)), found.shape[1])
            largest = f"the largest mean indirect effect is {self.mean[role, layer]:.2g}, at the {ROLES[role]}"
            return f"no token and layer stands out ({largest}, layer {layer})"
        layers, last = self.recommend_layers(n), ROLES.index("last subject token")
        effect = f"{self.mean[last, list(layers)].mean():.3f}"
        carrying = f"layers {layers[0]}-{layers[-1]} carry most"
        if role == last:
            return f"{carrying} at the last subject token (mean indirect effect {effect})"
        at_subject = f"{carrying} ({effect})" if self.stands_out[last, list(layers)].any() else "nothing stands out"
        strongest = f"strongest at the {ROLES[role]}, layer {layer} (mean indirect effect {found[role, layer]:.3f})"
        return f"{strongest}; at the last subject token {at_subject}"

    def where(self, results: Iterable[TraceResult], n: int) -> str:
        """``in_words`` of at most n layers; of one result of the kind its own, for a role's mean may hide a token."""
        mine = [result for result in results if result.kind == self.kind]
        return mine[0].in_words() if len(mine) == 1 else self.in_words(min(n, self.mean.shape[1]))

    def plot(self, path: checks.AnyPath | None = None) -> "Figure":
        """Heat map of the six roles; writes a PNG where ``path`` is given. Gives the figure."""
        from kedit_fast.pictures.traces import plot_average

        return plot_average(self, path)

    def save(self, path: checks.AnyPath) -> None:
        """Writes an .npz file without pickle; ``load`` gives it back. One of that name is replaced, folders made."""
        record = {k: v for k, v in asdict(self).items() if not isinstance(v, np.ndarray)}
        record["reliability"] = None if math.isnan(self.reliability) else self.reliability
        write_npz(path, mean=self.mean, stderr=self.stderr, counts=self.counts, record=json.dumps(record))

    @classmethod
    def load(cls, path: checks.AnyPath) -> "AverageTrace":
        """Raises ValueError for a file that ``save`` did not write."""
        return read_npz(path, "a saved trace", cls._of_arrays, "mean", "stderr", "counts", "record")

    @classmethod
    def _of_arrays(cls, mean, stderr, counts, record) -> "AverageTrace":
        record = json.loads(str(record))
        return cls(mean, stderr, counts, **record | {"reliability": _or_nan(record.get("reliability"))})

    def __repr__(self) -> str:
        facts, n_layers = f"{self.n_facts} fact{'s' * (self.n_facts != 1)}", self.mean.shape[1]
        effect = f"total effect {self.total_effect:.3g} in {self.metric}"
        return f"AverageTrace({self.kind}, {facts}, {n_layers} layers, {effect}{reliable(self.reliability)})"

    def _repr_html_(self) -> str:
        from kedit_fast.pictures.figure import figure_html

        return figure_html(self.plot())


def _or_nan(value: float | None) -> float:
    """What files have for NaN, which is no JSON."""
    return math.nan if value is None else value


def _check_number(name: str, value) -> None:
    """NaN and infinity are numbers of a metric; a whole number that no float can hold is none."""
    checks.instance(name, value, Real, "a number")
    if isinstance(value, int):
        checks.number(name, value)


def _check_numbers(name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "fiu":
        checks.refuse(name, array.dtype, "an array of numbers")


def write_npz(path, **arrays) -> None:
    """An npz file of these arrays, whole or not at all."""
    # opened: np.savez would put another suffix behind a path that has none
    with replace_file(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **arrays)


def read_npz(path, what: str, made: Callable, *names: str):
    """What ``made`` makes of the arrays of these names in a file; what: it is, "a saved trace"."""
    path = existing_file(path, what)
    with reading(path, f"expected the arrays {', '.join(names)}", f"is not {what}"):
        return made(*read_arrays(path, names).values())


def read_log(path) -> list[TraceResult]:
    """The results that a ``log=`` file of ``trace`` holds so far. Raises ValueError for a line that is none."""
    path, results = existing_file(path, "a trace log"), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no trace log: {not_text(error)}") from error
    for number, line in enumerate(lines, 1):
        with reading(f"{path}: line {number}", "cut short by an interrupt?", "is no trace"):
            results.append(TraceResult.from_record(json.loads(line)))
    return results


def average(results: Iterable[TraceResult]) -> dict[str, AverageTrace]:
    """Average trace of each kind over facts. Raises ValueError for none, or for results that cannot be averaged."""
    results = checks.listed("results", results, TraceResult, "TraceResults, as trace gives them")
    if len({(r.metric, r.sever, r.p_restored.shape[1]) for r in results}) > 1:
        raise ValueError("these traces differ in metric, severing or number of layers; average them apart")
    kinds = dict.fromkeys(r.kind for r in results)
    return {kind: _average([r for r in results if r.kind == kind]) for kind in kinds}


def _average(results: list[TraceResult]) -> AverageTrace:
    n_layers = results[0].p_restored.shape[1]
    pooled: list[list[np.ndarray]] = [[] for _ in ROLES]
    for result in results:
        for role, tokens in enumerate(_tokens_by_role(len(result.tokens), *result.subject_span)):
            pooled[role].extend(result.indirect_effect[t] for t in tokens)
    counts = np.array([len(rows) for rows in pooled])
    mean, stderr = (np.full((len(ROLES), n_layers), np.nan, dtype=np.float32) for _ in range(2))
    for role, rows in enumerate(pooled):
        if rows:
            mean[role] = np.mean(rows, axis=0)
        if len(rows) > 1:
            stderr[role] = np.std(rows, axis=0, ddof=1) / np.sqrt(len(rows))
    total = float(np.mean([r.p_clean - r.p_corrupted for r in results]))
    known = [r.reliability for r in results if not math.isnan(r.reliability)]
    reliability = float(np.mean(known)) if known else math.nan
    return AverageTrace(mean, stderr, counts, len(results), results[0].kind, results[0].metric, total, reliability)


def _tokens_by_role(n: int, b: int, e: int) -> tuple[list[int], ...]:
    """Positions of each of ``ROLES`` in a prompt of n tokens with the subject at [b, e)."""
    after = list(range(e, n))
    return [b], list(range(b + 1, e - 1)), [e - 1], after[:1], after[1:-1], after[-1:]
