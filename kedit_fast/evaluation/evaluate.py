"""Evaluation of an edit: did it take, does it generalize, and what did it change that it should not have.

The model without and with the edit goes through the same sweeps; below the first edited layer they share every row.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kedit_fast import __version__
from kedit_fast.basics import checks, ranks
from kedit_fast.basics.bits import digest, json_of, json_tensor
from kedit_fast.basics.files import check_place
from kedit_fast.basics.log import Log
from kedit_fast.basics.parts import Keep, keep_json
from kedit_fast.basics.progress import progress, scaled, stages
from kedit_fast.edits.chain import with_edits
from kedit_fast.edits.changes import TAKE_ONE
from kedit_fast.edits.edit import Edit
from kedit_fast.edits.held_out import check_held_out
from kedit_fast.evaluation.benchmark import Benchmark, Case, Writing, case_list, check_lengths
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT
from kedit_fast.evaluation.known import Known
from kedit_fast.evaluation.perplexity import MAX_TOKENS, n_predicted, perplexity, text_windows
from kedit_fast.evaluation.probes import Probe, read_probes
from kedit_fast.evaluation.readings import Judge, check_judge, known_as
from kedit_fast.evaluation.report import EvalReport, case_record
from kedit_fast.evaluation.written import write_probes
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.subjects import Names
from kedit_fast.facts.tokens import has_template
from kedit_fast.kernels.dispatch import backend_for
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.sweep.kept import Checkpoint, asked_of, begun, check_run, fitting, in_groups
from kedit_fast.sweep.plan import RowCost, free, together

OPS = ("attention", "linear", "lowrank", "target_logprob")  # that an evaluation runs
CHUNK = 64  # cases a sweep when the weights are in memory: progress moves and the log grows


@takes_lm
def evaluate(
    lm: LM,
    facts: Fact | Case | Iterable[Fact] | Iterable[Case],
    edit: Edit | Iterable[Edit] | None = None,
    *,
    benchmark: Benchmark = COUNTERFACT,
    text: str | Iterable[str] | None = None,
    generate: int | None = None,
    judge: Judge | None = None,
    max_tokens: int = MAX_TOKENS,
    log: checks.AnyPath | None = None,
    both_forms: bool = True,
    known: Known | None = None,
    checkpoint: Checkpoint = None,
) -> EvalReport:
    """What facts are worth by a benchmark, for the model and, in the same sweeps, for the model with its edits.

    facts: Facts, or the cases of a benchmark's own file with their questions, ``benchmark.load(path)``
    edit: an Edit, or several in their order, on top of those that ``lm`` carries; base is the model without any of
        them. To judge an edit as it will be once written in some dtype: ``evaluate(lm.with_edit(edit,
        written=torch.bfloat16), facts)``. Under independent edits each fact is asked under its own.
    benchmark: what is asked of a case and how its answers become metrics: CounterFact's unless told otherwise
    text: a string or several, for perplexity and its drift; of it max_tokens tokens at most
    generate: tokens to write behind prompts, greedily, without and with the edits; with a number given, behind each
        fact's own prompt besides, for ``EvalReport.generations``. None: the benchmark's own number; 0: nothing is
        written, and what would be read from it is NaN
    judge: ``judge(prompt (of a chat the question), accepted answers, what was written) -> 0 to 1``, for that mode
    log: a .jsonl path; each case's record is added to it as soon as its chunk is done
    both_forms: where the model has a chat template, ask each fact in the other form too: plain prompts as questions in
        a chat, questions in a chat plainly. ``EvalReport.other`` is what came of it
    known: ``Known()`` for several evaluations of the same facts: the base model is asked in the first of them alone
    checkpoint: a folder that keeps finished parts; a run that was killed goes on there when called again with the same
        arguments (a judge of the same code), and ends with the same bits. To be deleted once the report is saved

    CounterFact needs facts with target_new or target_true, same_subject prompts, or neighbors with answers of their
    own; a metric is NaN where a fact lacks what it compares. Neighborhood prompts that name a subject edited together
    with the fact (those of ``facts`` and of the edits' own facts; with independent edits only the fact's own) are left
    out and counted. A prompt whose answer is NaN (an edit that overflows) has probability 0 and is no success, and a
    text that is continued ends there; NaN of the base model is an error.

    Raises ValueError where the base model gives NaN, MemoryError where memory runs out however the work is cut; all
    else before the first sweep: ValueError for no facts, nothing to compare, text too short, a checkpoint of other
    work, a paraphrase that an edit was trained on, an edit for another model or without those that it stands on,
    independent edits that do not hold a fact, or text or cases of several facts together with them; TypeError for
    anything but Facts or an Edit; OSError for a log that cannot be written.
    One weight pass for each chunk of cases (64, or as many as memory holds when weights are streamed) and for the text.
    """
    given, checkpoint = _checked(benchmark, facts, generate, judge, max_tokens, known, log), check_run(checkpoint)
    lm = with_edits(lm, edit, "edit")
    cases = _cases(lm, given, text)
    check_held_out(lm.edits, ((fact, case.owner) for case in cases for fact in case.facts))
    windows = None if text is None else text_windows(lm, text, max_tokens)
    forms = _forms(lm, benchmark, cases, generate, both_forms)
    writing = ["generating"] * any(probe.n_written for form in forms for one in form for probe in one.everything)
    meta = _meta(lm, benchmark, cases, windows, max_tokens)
    with stages(*writing, "evaluating facts", *["measuring perplexity"][: windows is not None]):
        asked_for = partial(_asked_for, lm, benchmark, forms, generate, judge, windows)
        said, drift = _answered(lm, benchmark, forms, windows, log, known, (checkpoint, asked_for))
    other = _report(benchmark, forms[1], said[1], meta | {"note": ""}) if len(forms) > 1 else None
    return _report(benchmark, forms[0], said[0], meta, perplexity=drift, other=other)


# ---- what is asked


class Asked(NamedTuple):
    """A case in one form, and what is asked of it. own: its facts' prompts, where they are to be written on; texts:
    what base and edited model wrote behind each of ``everything``, None where they were not asked to"""

    case: Case
    own: list[Probe]
    probes: list[Probe]
    texts: list[tuple[Any, Any]] = []  # noqa: RUF012 (never changed)

    @property
    def everything(self) -> list[Probe]:
        return [*self.own, *self.probes]

    @property
    def n_rows(self) -> int:
        """Rows at most in a sweep: base and edited, nothing shared."""
        return 2 * sum(sum(probe.lengths) for probe in self.probes)


def _checked(benchmark, facts, generate, judge, max_tokens, known, log) -> list[Case]:
    """The cases that are asked, with how their answers are written."""
    checks.instance("benchmark", benchmark, Benchmark, "a Benchmark, e.g. kf.BENCHMARKS['counterfact']")
    checks.optional(lambda _, path: check_place(path), "log", log)
    checks.optional(checks.instance, "known", known, Known, "a Known()")
    checks.optional(checks.whole, "generate", generate, like=20)
    n = benchmark.n_written if generate is None else generate
    check_judge(judge, benchmark, n)
    checks.whole("max_tokens", max_tokens, least=2, like=5_120)
    writing = Writing(n, benchmark.until, judge)
    return [dataclasses.replace(case, writing=writing) for case in case_list(facts, benchmark.cases)]


def _cases(lm, given: list[Case], text) -> list[Case]:
    """The cases in their order, each with the subjects that are edited beside it."""
    owners = _owners(lm, [fact for case in given for fact in case.facts])
    shared = Names(fact.subject for edit in lm.edits if not edit.independent for fact in edit.facts)
    if owners is None:
        edited = (shared, Names(fact.subject for case in given for fact in case.facts))
        return [dataclasses.replace(case, number=i, edited=edited) for i, case in enumerate(given)]
    if text is not None:
        raise ValueError(
            "text= with independent edits: perplexity is of one model, and these are as many as facts; "
            f"{TAKE_ONE}, and evaluate it with the text"
        )
    if len(owners) > len(given):
        raise ValueError(
            "cases of several facts with independent edits, each of which knows of one fact alone; write the facts "
            "into one model (independent=False)"
        )
    own = [(shared, Names([case.facts[0].subject])) for case in given]
    each = enumerate(zip(given, own, owners, strict=True))
    return [dataclasses.replace(case, number=i, edited=names, owner=owner) for i, (case, names, owner) in each]


def _owners(lm, facts: Sequence[Fact]) -> list[int] | None:
    """For each fact its number in the model's independent edits; None where edits are shared."""
    owned = [edit for edit in lm.edits if edit.independent]
    if not owned:
        return None
    if len(owned) > 1:
        raise ValueError(f"the model carries {len(owned)} sets of independent edits; evaluate them one at a time")
    number = {_place(fact): i for i, fact in reversed(list(enumerate(owned[0].facts)))}
    for fact in facts:
        if _place(fact) not in number:
            raise ValueError(
                f"fact {fact.label} with target_new {fact.target_new!r} is not among the {len(number)} that these "
                "independent edits are for; evaluate the edit's own facts (edit.facts)"
            )
    return [number[_place(fact)] for fact in facts]


def _place(fact: Fact) -> tuple:
    return fact.prompt, fact.subject, fact.target_new


def _asked(lm, benchmark: Benchmark, case: Case, generate: int | None = 0) -> Asked:
    own = [case.probe(lm, fact, fact.text, n_written=generate) for fact in case.facts] if generate else []
    return Asked(case, own, benchmark.probes(lm, case))


def _forms(lm, benchmark: Benchmark, cases: list[Case], generate: int | None, both: bool) -> list[list[Asked]]:
    """What is asked of the cases, as their facts say, and in the other form."""
    forms = [[_asked(lm, benchmark, case, generate) for case in cases]]
    if checks.flag("both_forms", both) and has_template(lm.tokenizer):
        forms.append([_asked(lm, benchmark, case.in_other_form()) for case in cases])
    check_lengths(lm, [(one.case, one.everything) for form in forms for one in form])
    return forms


def _chunks(lm, cases: Iterable[tuple[Asked, ...]]) -> Iterator[list[tuple[Asked, ...]]]:
    """Consecutive cases, each in all its forms, for one sweep a form; one that is too large is cut by the plan."""
    kept = RowCost.of(lm).kept + lm.d_model * lm.dtype.itemsize  # the rows that are read
    most = CHUNK if not lm.source.pass_bytes else None
    return together(cases, lambda forms: forms[0].n_rows, free(lm) // kept, most)


# ---- what is answered


class Said(NamedTuple):
    """What came of a case in one form: {metric: value} by the base and by the edited model (None without an edit), and
    (prompt, before, after) of its facts where these are written on."""

    base: dict[str, float]
    edited: dict[str, float] | None
    generations: list[tuple[str, str, str | None]]

    @classmethod
    def of(cls, base, edited, generations) -> "Said":
        """What JSON gives back of one."""
        return cls(base, edited, [(prompt, before, after) for prompt, before, after in generations])


def _asked_for(lm, benchmark: Benchmark, forms: list[list[Asked]], generate: int | None, judge, windows) -> dict:
    """What an evaluation depends on, for the manifest of its checkpoint."""
    facts = [fact for one in forms[0] for fact in one.case.facts]
    asked = digest(*([len(one.case.facts), one.everything] for form in forms for one in form))
    settings = {"benchmark": benchmark.name, "metrics": list(benchmark.metrics), "generate": generate}
    settings |= {"judge": known_as(judge), "forms": len(forms), "questions": asked}
    return asked_of(lm, "evaluate", facts, **settings, text=None if windows is None else digest(windows))


def _answered(lm, benchmark: Benchmark, forms: list[list[Asked]], windows, log, known, run):
    """(what came of the cases, in each form; the perplexities of base and edited model). run: of ``begun``"""
    with begun(*run) as keep:
        return fitting(lm, keep, lambda lm: _all_read(lm, benchmark, forms, windows, log, known, keep))


def _all_read(lm, benchmark: Benchmark, forms: list[list[Asked]], windows, log, known, keep: Keep):
    """As ``_answered``, with so much memory."""
    written = keep_json(keep, "written", lambda: [_written(lm, form, known) for form in forms])
    both = zip(forms, written, strict=True)
    forms = [[one._replace(texts=texts) for one, texts in zip(*each, strict=True)] for each in both]
    said = _read_all(lm, benchmark, list(zip(*forms, strict=True)), log, known, keep)
    if windows is None:
        return said, None
    read = perplexity if known is None else known.perplexity
    base, edited = keep_json(keep, "perplexity", lambda: read(lm, windows))
    return said, (base, edited)


def _read_all(lm, benchmark: Benchmark, cases: list[tuple[Asked, ...]], log, known, keep: Keep) -> list[list[Said]]:
    """What came of the cases, each in all its forms, by form."""
    said: list[list[Said]] = [[] for _ in cases[0]]
    lines = Log(log if ranks.first() else None)
    with progress("evaluating facts", len(cases)) as bar:

        def rows(forms: tuple[Asked, ...]) -> int:
            return forms[0].n_rows

        def make(chunk: Sequence[tuple[Asked, ...]], first: int) -> dict[str, Tensor]:
            advance = scaled(bar.advance, len(chunk) / len(said))
            made = [_said(lm, benchmark, some, known, advance) for some in zip(*chunk, strict=True)]
            return {"said": json_tensor(made)}

        for chunk in in_groups(keep, "cases", cases, lambda rest: _chunks(lm, rest), make, "case", size=rows):
            new = [[Said.of(*one) for one in form] for form in json_of(chunk.part["said"])]
            both = zip(chunk.items, zip(*new, strict=True), strict=True)
            records = (case_record(one[0].case.facts, *row[0], *(r[:2] for r in row[1:])) for one, row in both)
            lines.add(records, again=chunk.found)
            for before, more in zip(said, new, strict=True):
                before += more
            bar.resume(len(chunk.items) * chunk.found)
    return said


def _written(lm, form: list[Asked], known: Known | None) -> list[list[tuple[str | None, str | None]]]:
    """What base and edited model write behind each probe of each case that asks for it."""
    probes = [probe for one in form for probe in one.everything]
    bare = dataclasses.replace(lm, edits=())
    before = write_probes(bare, probes) if known is None else known.written(bare, probes)
    both = iter(zip(before, write_probes(lm, probes) if lm.edits else [None] * len(probes), strict=True))
    return [list(islice(both, len(one.everything))) for one in form]


def _said(lm, benchmark: Benchmark, chunk: Sequence[Asked], known: Known | None, advance) -> list[Said]:
    written = [both for one in chunk for both in one.texts]
    asked = [probe for one in chunk for probe in one.everything]
    base, edited = read_probes(lm, asked, advance) if known is None else known.read(lm, asked, advance)
    base = [answer._replace(text=before) for answer, (before, _) in zip(base, written, strict=True)]
    if edited is not None:
        edited = [answer._replace(text=after) for answer, (_, after) in zip(edited, written, strict=True)]
    said, end = [], 0
    for one in chunk:
        own = slice(end, end := end + len(one.own))
        told = zip((fact.text for fact in one.case.facts), written[own], strict=False)
        mine = slice(end, end := end + len(one.probes))
        before = benchmark.values(one.case, one.probes, base[mine], base[mine])
        after = None if edited is None else benchmark.values(one.case, one.probes, edited[mine], base[mine])
        said.append(Said(before, after, [(prompt, *both) for prompt, both in told]))
    return said


# ---- what is reported


def _report(benchmark: Benchmark, form: list[Asked], said: list[Said], meta: dict, **rest) -> EvalReport:
    facts, sizes = [fact for one in form for fact in one.case.facts], [len(one.case.facts) for one in form]
    base, after = [one.base for one in said], [one.edited for one in said if one.edited is not None]
    edited = _columns(benchmark, after) if after else None
    rest |= {"generations": tuple(told for one in said for told in one.generations)}
    rest |= {"cases": tuple(sizes) if set(sizes) != {1} else ()}
    return EvalReport.of(benchmark, _columns(benchmark, base), edited, tuple(facts), meta, **rest)


def _columns(benchmark: Benchmark, values: list[dict[str, float]]) -> dict[str, Tensor]:
    """{metric: fp32 [n_cases]} of the cases' values."""
    return {name: torch.tensor([one[name] for one in values], dtype=torch.float32) for name in benchmark.metrics}


def about(lm) -> dict:
    """What a report says of its model, and which implementation ran."""
    return {
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "dtype": lm.dtype_name,
        "device": str(lm.device),
        "backend": {op: backend_for(op, lm.device, lm.dtype) for op in OPS},
        "note": lm.note,
    }


def _meta(lm, benchmark: Benchmark, cases: list[Case], windows, max_tokens) -> dict:
    meta = {
        **about(lm),
        "method": " + ".join(edit.method for edit in lm.edits) or None,
        "layers": sorted({layer for edit in lm.edits for layer in edit.layers}),
        "independent": lm.independent,
        "n": sum(len(case.facts) for case in cases),
        "benchmark": benchmark.name,
        "generate": cases[0].writing.n_tokens,
        "judge": known_as(cases[0].writing.judge),
        "version": __version__,
    }
    if windows is not None:
        meta["text"] = {"n_predicted": n_predicted(windows), "window": max(map(len, windows)), "max_tokens": max_tokens}
    return meta
