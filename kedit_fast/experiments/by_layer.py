"""A study of the layers: how well editing works at each layer, beside the causal trace of the same facts.

Causal tracing says at which layers a fact passes through; one would think that these are the layers to edit. Hase et
al. 2023 ("Does localization inform editing?", arXiv:2301.04213) found that it does not follow: where a fact is traced
says little of where an edit of it succeeds. This experiment shows both for one's own facts and model, so that layers
are chosen by editing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from kedit_fast.basics import checks, ranks
from kedit_fast.basics.bits import json_of, json_tensor
from kedit_fast.basics.correlation import spearman
from kedit_fast.basics.files import check_format, check_place, read_object, reading, write_text
from kedit_fast.basics.intervals import SCORE, Interval
from kedit_fast.basics.log import Log
from kedit_fast.basics.parts import Inside, keep_whole
from kedit_fast.basics.progress import progress, stages
from kedit_fast.editors import Rome
from kedit_fast.editors.contexts import BARE, AnyContexts, checked_contexts
from kedit_fast.editors.editor import check_lengths, checked_facts
from kedit_fast.editors.located import Located
from kedit_fast.editors.written import counted_elsewhere
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT
from kedit_fast.evaluation.evaluate import evaluate
from kedit_fast.evaluation.stored import as_float, finite, summary_of_record
from kedit_fast.facts.fact import Fact
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.moments.corpus import AnyCorpus
from kedit_fast.moments.given import digests
from kedit_fast.moments.second_moment import SecondMoment
from kedit_fast.pictures.labels import LOCALIZATION_WARNING, ROLES
from kedit_fast.sweep.kept import Checkpoint, asked_of, begun, check_run
from kedit_fast.tracing.results import AverageTrace, TraceResult
from kedit_fast.tracing.results import average as average_of
from kedit_fast.tracing.tasks import KINDS as ALL_KINDS
from kedit_fast.tracing.trace import trace as trace_facts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT, VERSION = "kedit_fast.layer_study", 1
BEFORE = "kedit_fast.layer_sweep"  # the format's name in older files
KINDS = ("state", "mlp")  # traced, unless told otherwise
LAST = ROLES.index("last subject token")
COMPARED = ("efficacy", "p_new", "paraphrase", "neighborhood", SCORE)  # with the trace

Summary = dict[str, Interval]


@dataclass(frozen=True, eq=False)
class LayerStudy:
    """Edit success by layer, and the causal trace of the same facts.

    edited: {layer: {metric: Interval}}, each fact under its own edit at that layer; base: {metric: Interval} of the
        model without edits; metrics as in ``evaluation.benchmarks.counterfact.METRICS``, and "score"
    traces: {kind: AverageTrace}; method, n_facts: of the edits; model: its name

    Localization does not by itself predict edit success (Hase et al. 2023); ``rank_correlation`` says how far it does
    here.
    """

    edited: dict[int, Summary]
    base: Summary
    traces: dict[str, AverageTrace]
    method: str
    n_facts: int
    model: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that were edited, ascending."""
        return tuple(sorted(self.edited))

    def effect(self, kind: str) -> np.ndarray:
        """[layers] average indirect effect at the subject's last token, at the edited layers."""
        return self.traces[kind].mean[LAST, list(self.layers)]

    def rank_correlation(self, kind: str, metric: str = "efficacy") -> float:
        """Spearman's ρ over the edited layers, between a metric's mean and the trace's ``effect``.

        NaN for fewer than three layers, or where either is the same at all of them.
        """
        return spearman(self.effect(kind), [self.edited[layer][metric].mean for layer in self.layers])

    def correlations(self) -> dict[str, dict[str, float]]:
        """{metric: {kind: ρ}} of the metrics of ``COMPARED``."""
        return {metric: {kind: self.rank_correlation(kind, metric) for kind in self.traces} for metric in COMPARED}

    def plot(self, path: checks.AnyPath | None = None) -> "Figure":
        """Picture of both over the same layers; writes a PNG where ``path`` is given. Gives the figure."""
        from kedit_fast.pictures.by_layer import plot_layers

        return plot_layers(self, path)

    def to_record(self) -> dict:
        """Plain values, for JSON; NaN is None."""
        return {
            "method": self.method,
            "model": self.model,
            "n_facts": self.n_facts,
            "base": finite(self.base),
            "edited": {str(layer): finite(self.edited[layer]) for layer in self.layers},
            "traces": {kind: _trace_record(average) for kind, average in self.traces.items()},
            "rank_correlation": finite(self.correlations()),
            "note": LOCALIZATION_WARNING,
        }

    def save(self, path: checks.AnyPath) -> None:
        """Writes one JSON file, whole or not at all; ``load`` gives it back. One of that name is replaced, folders
        are made."""
        record = {"format": FORMAT, "version": VERSION} | self.to_record()
        write_text(path, json.dumps(record, allow_nan=False))

    @classmethod
    def load(cls, path: checks.AnyPath) -> "LayerStudy":
        """What ``save`` wrote. Raises ValueError for any other file."""
        record = read_object(path, "a saved study of layers")
        with reading(path, f"expected {FORMAT}, version {VERSION}, by save", "is no study of layers"):
            check_format(record, FORMAT, BEFORE, version=VERSION)
            traces = {kind: _average_trace(one) for kind, one in record["traces"].items()}
            depth = min((average.mean.shape[1] for average in traces.values()), default=checks.MOST_LAYERS)
            return cls(
                edited={
                    checks.whole("layer", int(layer), most=depth - 1): _summary(listed)
                    for layer, listed in record["edited"].items()
                },
                base=_summary(record["base"]),
                traces=traces,
                method=record["method"],
                n_facts=record["n_facts"],
                model=record["model"],
            )

    def __repr__(self) -> str:
        n = self.n_facts
        return f"LayerStudy({self.method}, {n} fact{'s' * (n != 1)}, {len(self.edited)} layers, model {self.model})"

    def _repr_html_(self) -> str:
        from kedit_fast.pictures.figure import figure_html

        return figure_html(self.plot())


@takes_lm
def edit_by_layer(
    lm: LM,
    facts: Fact | Iterable[Fact],
    editor: Located | None = None,
    layers: Sequence[int] | None = None,
    *,
    moments: Mapping[int, SecondMoment] | None = None,
    corpus: AnyCorpus | None = None,
    contexts: AnyContexts | None = None,
    trace: Sequence[TraceResult] | Mapping[str, AverageTrace] | None = None,
    kinds: Sequence[str] = KINDS,
    samples: int = 10,
    seed: int = 0,
    log: checks.AnyPath | None = None,
    checkpoint: Checkpoint = None,
) -> LayerStudy:
    """Edits the facts at each layer, every fact as an edit of its own, and traces them.

    editor: one that edits at one layer and knows ``independent=True``: Rome (default: its settings for this model),
        Memit, AlphaEdit. Its ``layers`` are replaced by one after the other
    layers: to edit at (default: all)
    moments: {layer: SecondMoment} of all these layers, or corpus: what they are measured over, in one pass for all;
        contexts: as in ``Rome.edit``; None samples them once, from ``seed``
    trace: results of ``trace`` or of ``average`` for these facts; None traces them: kinds, with ``samples`` noise draws
    log: a .jsonl path; a line is added for each layer as soon as it is done
    checkpoint: a folder that keeps finished parts; a run that was killed goes on there when called again with the same
        arguments, and ends with the same bits. To be deleted once the study is saved

    Localization does not by itself predict edit success (Hase et al. 2023): the result says how the two rank together.

    Raises ValueError, before any work, for layers out of range, a trace of another model's depth, a checkpoint of other
    work, and for what ``edit`` and ``evaluate`` refuse; OSError for a log that cannot be written. Cost: an independent
    edit of all facts and an evaluation for each layer; the trace.
    """
    kinds = checks.choices("kinds", kinds, ALL_KINDS)
    samples, seed = checks.whole("samples", samples, least=1, like=10), checks.seed("seed", seed)
    checks.optional(lambda _, path: check_place(path), "log", log)
    checkpoint = check_run(checkpoint)
    editor, layers, facts, traces = check_study(lm, facts, editor, layers, contexts=contexts, trace=trace)
    if editor.mom2_adjustment:
        moments = replace(editor, layers=layers).moments_of(lm, moments, corpus)
    of_facts = partial(_edited_at, lm, facts, editor, moments, seed)
    asked = partial(_asked, lm, facts, editor, layers, contexts, moments, seed, traces is None and (kinds, samples))
    with (
        stages("editing at each layer", *(["tracing facts"] if traces is None else [])),
        begun(checkpoint, asked) as keep,
    ):
        base, edited = _edited(of_facts, layers, contexts, Log(log if ranks.first() else None), keep)
        if traces is None:
            traces = average_of(
                trace_facts(lm, facts, kinds=tuple(kinds), samples=samples, checkpoint=Inside(keep, "trace"))
            )
    return LayerStudy(edited, base, traces, editor.method, len(facts), lm.name)


def _asked(lm, facts, editor, layers, contexts, moments, seed, traced) -> dict:
    """What a study depends on, for the manifest of its checkpoint. traced: (kinds, samples), False where traces are
    given"""
    return asked_of(
        lm, "edit by layer", facts, method=editor.method, hparams=editor.record, layers=layers, seed=seed,
        contexts=contexts and checked_contexts(contexts), statistics=digests(moments), traced=traced,
    )  # fmt: skip


def _edited(of_facts, layers, contexts, log: Log, keep) -> tuple[Summary, dict[int, Summary]]:
    """(what the model says without edits, {layer: with those at that layer}). of_facts: ``_edited_at``"""
    edited: dict[int, Summary] = {}
    with progress("editing at each layer", len(layers)) as bar:
        for layer in layers:
            with bar.inside(f"layer {layer}"):
                part, is_found = keep_whole(keep, f"layer-{layer:04d}", partial(of_facts, layer, contexts))
            contexts, *both = json_of(part["json"])  # sampled once
            base, edited[layer] = ({name: Interval(*one) for name, one in side.items()} for side in both)
            log.add([{"layer": layer, "edited": finite(edited[layer])}], again=is_found)
            (bar.resume if is_found else bar.advance)(1)
    return base, edited


def _edited_at(lm, facts, editor, moments, seed, layer, contexts, keep) -> dict[str, Tensor]:
    """A layer's part: the contexts, and what the model says without and with the edits there."""
    with counted_elsewhere():
        edit = replace(editor, layers=(layer,)).edit(
            lm, facts, moments=moments, contexts=contexts, independent=True, seed=seed, checkpoint=keep
        )
    found = evaluate(lm, facts, edit, both_forms=False, checkpoint=keep).summary()
    sides = (
        {name: both[side] for name, both in found.items() if both[side] is not None} for side in ("base", "edited")
    )
    return {"json": json_tensor([edit.contexts, *sides])}


# ---- what is checked, and files


def check_study(
    lm, facts, editor, layers, *, contexts=None, trace=None
) -> tuple[Located, tuple[int, ...], list[Fact], dict[str, AverageTrace] | None]:
    """What ``edit_by_layer`` refuses but for statistics, which take time to measure; gives (editor, layers, facts,
    averages of the traces that are given)."""
    layers = tuple(sorted(set(range(lm.n_layers) if layers is None else checks.layers("layers", layers, lm.n_layers))))
    facts = checked_facts(facts, independent=True)
    wanted = "an editor of one layer, e.g. kf.Rome.for_model(lm)"
    editor = Rome.for_model(lm) if editor is None else checks.instance("editor", editor, Located, wanted)
    if "independent" in editor.UNREAD:
        raise ValueError(f"each fact is an edit of its own here: {editor.UNREAD['independent']}")
    for layer in layers:
        replace(editor, layers=(layer,)).check(lm)
    check_lengths(lm, facts, [[BARE]] if contexts is None else checked_contexts(contexts))
    COUNTERFACT.check_fit(lm, facts)
    return editor, layers, facts, None if trace is None else _averaged(lm, trace)


def _averaged(lm, trace) -> dict[str, AverageTrace]:
    wanted = "TraceResults or {kind: AverageTrace}"
    given = isinstance(trace, Mapping)
    traces = dict(trace) if given else average_of(checks.listed("trace", trace, TraceResult, wanted))
    if not traces:
        checks.refuse("trace", trace, wanted)
    for kind, average in traces.items():
        checks.instance("trace", average, AverageTrace, wanted)
        if average.mean.shape[1] != lm.n_layers:
            raise ValueError(
                f"the trace of {kind} has {average.mean.shape[1]} layers, this model {lm.n_layers}; trace these facts "
                "in this model, or leave trace out"
            )
    return traces


def _summary(listed: dict[str, list]) -> Summary:
    unknown = set(listed) - {*COUNTERFACT.metrics, SCORE}
    if unknown:
        raise ValueError(f"unknown metrics {sorted(unknown)}")
    if missing := set(COMPARED) - set(listed):
        raise ValueError(f"it lacks the metrics {sorted(missing)}")
    return summary_of_record(listed)


def _trace_record(average: AverageTrace) -> dict:
    arrays = {name: getattr(average, name).tolist() for name in ("mean", "stderr", "counts")}
    single = {name: getattr(average, name) for name in ("n_facts", "kind", "metric", "total_effect", "reliability")}
    return finite(arrays | single)


def _average_trace(record: dict) -> AverageTrace:
    mean, stderr = (
        np.array([[as_float(x) for x in row] for row in record[name]], dtype=np.float32) for name in ("mean", "stderr")
    )
    return AverageTrace(
        mean, stderr, np.array(record["counts"]), record["n_facts"], record["kind"], record["metric"],
        as_float(record["total_effect"]), as_float(record.get("reliability")),
    )  # fmt: skip
