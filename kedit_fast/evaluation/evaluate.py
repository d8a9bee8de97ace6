"""Evaluation of an edit: did it take, does it generalize, and what did it change that it should not have.

The model without and with the edit goes through the same sweeps; below the first edited layer they share every row.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from kedit_fast import __version__
from kedit_fast.basics import checks
from kedit_fast.basics.files import append_records, check_place
from kedit_fast.basics.progress import progress, scaled, stages
from kedit_fast.edits.chain import with_edits
from kedit_fast.evaluation.metrics import METRICS, fact_columns, knew
from kedit_fast.evaluation.perplexity import MAX_TOKENS, n_predicted, perplexity, text_windows
from kedit_fast.evaluation.probes import FactProbes, Names, check_fit, fact_probes, read_probes
from kedit_fast.evaluation.report import EvalReport, fact_record
from kedit_fast.facts.fact import Fact, fact_list
from kedit_fast.facts.tokens import asked, has_template, other_form
from kedit_fast.kernels.dispatch import backend_for
from kedit_fast.model.lm import takes_lm
from kedit_fast.sweep.plan import RowCost, free
from kedit_fast.sweep.together import together

OPS = ("attention", "linear", "lowrank", "target_logprob")  # that an evaluation runs
CHUNK = 64  # facts a sweep when the weights are in memory: progress moves and the log grows


@takes_lm
def evaluate(
    lm,
    facts,
    edit=None,
    *,
    text=None,
    generate: int = 0,
    max_tokens: int = MAX_TOKENS,
    log=None,
    both_forms: bool = True,
) -> EvalReport:
    """CounterFact's metrics of facts for the model and, in the same sweeps, for the model with its edits.

    edit: an Edit, or several in their order, on top of those that ``lm`` carries; base is the model without any of
        them. To judge an edit as it will be once written in some dtype: ``evaluate(lm.with_edit(edit,
        written=torch.bfloat16), facts)``. Under independent edits each fact is asked under its own.
    text: a string or several, for perplexity and its drift; of it max_tokens tokens at most
    generate: tokens to continue each fact's prompt by, greedily, without and with the edits
    log: a .jsonl path; each fact's record is added to it as soon as its chunk is done
    both_forms: where the model has a chat template, ask each fact in the other form too: plain prompts as questions in
        a chat, questions in a chat plainly. ``EvalReport.other`` is what came of it

    A fact needs target_new or target_true, same_subject prompts, or neighbors with answers of their own; a metric is
    NaN where the fact lacks what it compares. A prompt whose answer is NaN (an edit that overflows) has probability 0
    and is no success, and a text that is continued ends there; NaN of the base model is an error. Neighborhood prompts
    that name a subject edited together with the fact (those of ``facts`` and of the edits' own facts; with independent
    edits only the fact's own) are left out and counted.

    Raises ValueError where the base model gives NaN; all else before the first sweep: ValueError for no facts, nothing
    to compare, text too short, an edit for another model or without those that it stands on, independent edits that do
    not hold a fact, or text together with them; TypeError for anything but Facts or an Edit; OSError for a log that
    cannot be written.
    One weight pass for each chunk of facts (64, or as many as memory holds when weights are streamed) and for the text.
    """
    facts = _checked(facts, generate, max_tokens, both_forms, log)
    lm = with_edits(lm, edit, "edit")
    owners = _owners(lm, facts)
    if owners is not None and text is not None:
        raise ValueError(
            "text= with independent edits: perplexity is of one model, and these are as many as facts; "
            "evaluate edit.only(i) with the text"
        )
    windows = None if text is None else text_windows(lm, text, max_tokens)
    turned = [other_form(fact) for fact in facts] if both_forms and has_template(lm.tokenizer) else []
    probes, in_turn = _probes(lm, facts, owners), _probes(lm, turned, owners) if turned else []
    check_fit(lm, [*facts, *turned], [*probes, *in_turn], generate)
    chunks = list(_chunks(lm, probes))
    meta = _meta(lm, facts, windows, max_tokens)
    with stages(*["generating"][: generate > 0], "evaluating facts", *["measuring perplexity"][: windows is not None]):
        generations = _generations(lm, facts, chunks, owners, generate)
        rows, others = _read_all(lm, facts, chunks, in_turn, generations, log)
        drift = None if windows is None else perplexity(lm, windows)
    return EvalReport(
        **_both_columns(rows),
        facts=tuple(facts),
        meta=meta,
        perplexity=drift,
        generations=tuple(generations),
        other=EvalReport(**_both_columns(others), facts=tuple(turned), meta=meta | {"note": ""}) if turned else None,
    )


# ---- what is asked


def _checked(facts, generate, max_tokens, both_forms, log) -> list[Fact]:
    checks.flag("both_forms", both_forms)
    checks.optional(lambda _, path: check_place(path), "log", log)
    checks.whole("generate", generate, like=20)
    checks.whole("max_tokens", max_tokens, least=2, like=5_120)
    facts = fact_list(facts)
    for fact in facts:
        with_answers = any(question.answer for question in fact.questions("neighborhood"))
        if not (fact.target_new or fact.target_true or fact.same_subject or with_answers):
            raise ValueError(
                f"fact {fact.label} has neither target_new nor target_true nor same_subject prompts: nothing to compare"
            )
    return facts


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


def _probes(lm, facts: Sequence[Fact], owners: list[int] | None) -> list[FactProbes]:
    shared = Names(fact.subject for edit in lm.edits if not edit.independent for fact in edit.facts)
    if owners is not None:
        return [
            fact_probes(lm, fact, [shared, Names([fact.subject])], owner)
            for fact, owner in zip(facts, owners, strict=True)
        ]
    edited = [shared, Names(fact.subject for fact in facts)]
    return [fact_probes(lm, fact, edited) for fact in facts]


def _chunks(lm, probes: list[FactProbes]) -> Iterator[list[FactProbes]]:
    """Consecutive facts for one sweep; one that is too large is cut by the sweep's plan."""
    kept = RowCost.of(lm).kept + lm.d_model * lm.dtype.itemsize  # the rows that are read
    most = CHUNK if not lm.source.pass_bytes else None
    return together(probes, lambda one: one.n_rows, free(lm) // kept, most)


# ---- what is answered

Values = tuple[dict, dict | None]  # {metric: value} of one fact, by the base and the edited model


def _read_all(lm, facts, chunks, turned: list[FactProbes], generations, log) -> tuple[list[Values], list[Values]]:
    """(values of each fact, its values in the other form). turned: the probes in that form, or none."""
    rows: list[Values] = []
    others: list[Values] = []
    with progress("evaluating facts", len(facts)) as bar:
        for chunk in chunks:
            done = slice(len(rows), len(rows) + len(chunk))
            advance = scaled(bar.advance, len(chunk) / 2 if turned else len(chunk))
            rows += _values(lm, chunk, advance)
            others += _values(lm, turned[done], advance) if turned else []
            _append(log, facts[done], rows[done], generations[done], others[done])
    return rows, others


def _values(lm, chunk: list[FactProbes], advance) -> list[Values]:
    base, edited = read_probes(lm, chunk, any(edit.independent for edit in lm.edits), advance)
    values = []
    for i, fact in enumerate(chunk):
        known = knew(base[i])
        after = None if edited is None else fact_columns(edited[i], known, fact.left_out)
        values.append((fact_columns(base[i], known, fact.left_out), after))
    return values


def _generations(lm, facts, chunks, owners, n: int) -> list[tuple[str, str, str | None]]:
    """(prompt, continuation before, after or None) for each fact; nothing for n = 0."""
    if n == 0:
        return []
    base = dataclasses.replace(lm, edits=())
    made: list[tuple[str, str, str | None]] = []
    for chunk in chunks:
        mine = facts[len(made) : len(made) + len(chunk)]
        prompts = [asked(lm.tokenizer, fact.text, fact.chat) for fact in mine]
        after: list[str | None] = [None] * len(prompts)
        if owners is not None:
            after = [
                _alone(lm, fact.owner).generate(prompt, n, nan_ends=True)
                for fact, prompt in zip(chunk, prompts, strict=True)
            ]
        elif lm.edits:
            after = lm.generate(prompts, n, nan_ends=True)
        made += zip((fact.text for fact in mine), base.generate(prompts, n), after, strict=True)
    return made


def _alone(lm, owner: int):
    """The model with one fact's own of the independent edits."""
    edits = tuple(edit.only(owner) if edit.independent else edit for edit in lm.edits)
    return dataclasses.replace(lm, edits=edits)


# ---- what is reported


def _append(log, facts, values, generations, others) -> None:
    nothing = [None] * len(facts)
    rows = zip(facts, values, generations or nothing, others or nothing, strict=True)
    append_records(log, (fact_record(fact, *both, generation, other) for fact, both, generation, other in rows))


def _both_columns(rows: list[Values]) -> dict:
    """{"base", "edited"} columns of the facts' values."""
    edited = None if rows[0][1] is None else _columns([after for _, after in rows])
    return {"base": _columns([before for before, _ in rows]), "edited": edited}


def _columns(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in METRICS}


def _meta(lm, facts, windows, max_tokens) -> dict:
    meta = {
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "backend": {op: backend_for(op, lm.device, lm.dtype) for op in OPS},
        "note": lm.note,
        "method": " + ".join(edit.method for edit in lm.edits) or None,
        "layers": sorted({layer for edit in lm.edits for layer in edit.layers}),
        "independent": any(edit.independent for edit in lm.edits),
        "n": len(facts),
        "version": __version__,
    }
    if windows is not None:
        meta["text"] = {"n_predicted": n_predicted(windows), "window": max(map(len, windows)), "max_tokens": max_tokens}
    return meta
