"""What else moved: everything that an edit was not made for, measured on the model without and with it.

    drift          PPL_edited / PPL_base - 1 of each of several texts, with a paired bootstrap over their windows
    kl, flips      KL(base || edited) of the next token in nats, and whether the likeliest is another, behind prompts
                   that have nothing to do with the edit
    same_subject   the edited subjects' other relations: whether the likeliest token stayed, and P of the base's
    distractor     neighbors behind the edited fact (CounterFact+, ``benchmarks/distractors.py``)
    growth         ‖ΔW‖ / ‖W‖ of each edited layer
    lens, canary   whether the old answer is still there: in the layers, after a doubt, behind a long text

As in ``evaluate``, both models go through the same sweeps and share every row below the first edited layer.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kedit_fast import __version__
from kedit_fast.basics import checks
from kedit_fast.basics.intervals import COUNT, SHARE, Interval, interval, summarize
from kedit_fast.basics.progress import progress, scaled, stages
from kedit_fast.basics.words import counted
from kedit_fast.edits.chain import facts_in_force, with_edits
from kedit_fast.edits.changes import TAKE_ONE
from kedit_fast.edits.deltas import growth
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation.benchmark import said_left_out
from kedit_fast.evaluation.benchmarks.distractors import DISTRACTORS
from kedit_fast.evaluation.canary import CONTEXT, DOUBT, sing, with_old_answer
from kedit_fast.evaluation.evaluate import about, evaluate
from kedit_fast.evaluation.logit_lens import logit_lens, there
from kedit_fast.evaluation.moved_questions import Asked, checked_texts, questions
from kedit_fast.evaluation.moved_report import Both, Drift, Moved, complete
from kedit_fast.evaluation.perplexity import MAX_TOKENS, n_predicted, perplexity_of
from kedit_fast.evaluation.probes import Probe, probe, read_divergences
from kedit_fast.evaluation.written import write_probes
from kedit_fast.facts.fact import Fact, fact_list
from kedit_fast.jobs.score import text_logprobs
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.sweep.plan import together

STAGES = (
    "evaluating facts", "comparing next tokens", "measuring perplexity", "logit lens", "canary, base model",
    "canary, edited model",
)  # fmt: skip
TOGETHER = 64  # prompts a sweep when the weights are in memory, so that progress moves
DRAWS = 2_000  # of windows: the bounds of a 95 % interval then move by a twentieth of its width from seed to seed


@takes_lm
@torch.no_grad()
def what_moved(
    lm: LM,
    edit: Edit | Iterable[Edit] | None,
    facts: Fact | Iterable[Fact] | None = None,
    *,
    texts: Mapping[str, str] | None = None,
    prompts: Iterable[str] | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> Moved:
    """What an edit changed that it was not made to change, each number beside the model without it.

    edit: an Edit, or several in their order, on top of those that ``lm`` carries; base is the model without any of
        them. None: those alone, for instance as they are once written: ``what_moved(lm.with_edit(edit, written=...),
        None)``
    facts: whose same_subject and neighborhood prompts and old answers are asked; None: those of the edits
    texts: {name: text} for perplexity, of each max_tokens tokens at most; None: two short ones of this package
    prompts: unrelated ones, for KL and flips. None: up to 300 of this package's facts and beginnings of the texts'
        sentences. Those that name an edited subject, or that an edited fact has for its own, are left out
    seed: of the bootstrap: windows are drawn with replacement, both models' together

    Where the edited model gives NaN it counts against the edit: infinite KL and perplexity, a flip, no answer kept.
    What cannot be measured is named in ``Moved.notes`` with the reason.

    Raises ValueError where the base model gives NaN; all else before the first sweep: ValueError for no edit,
    independent edits, an edit of another model, texts too short, a prompt that the model cannot read or of which none
    is unrelated; TypeError for anything but Facts or texts.
    Five weight passes and those of the canary: two for each token that it has written on.
    """
    seed, max_tokens = checks.seed("seed", seed), checks.whole("max_tokens", max_tokens, least=2, like=MAX_TOKENS)
    view = with_edits(lm, edit, "edit")
    if not view.edits:
        checks.refuse("edit", edit, "an Edit; Edit.load reads a file, and an editor's .edit makes one")
    if view.independent:
        raise ValueError(f"what_moved is of one model, and independent edits are as many as facts; {TAKE_ONE}")
    given = fact_list(facts) if facts is not None else facts_in_force(view.edits)
    ask = questions(view, given, checked_texts(texts), prompts, max_tokens)
    with stages(*STAGES):
        found, notes = _beside_facts(view, given)
        nearby, n_broken = _next_tokens(view, ask.prompts)
        drifts, n_wrecked = _drifts(view, ask.windows, seed)
        still = _in_layers(view, given) | _written_again(view, ask)
    broken = _said_of_nan(n_broken, len(ask.prompts), n_wrecked)
    grown = growth(view, [one for one in view.edits if one.route is None], {}) or None
    notes = (*broken, *notes, *ask.notes, *_without_growth(view, grown), *([view.note] if view.note else []))
    return Moved(drifts, complete(found | nearby | still), grown, notes, _meta(view, given, ask, seed, max_tokens))


# ---- what is answered


def _beside_facts(view, facts: Sequence[Fact]) -> tuple[dict[str, Both], list[str]]:
    """The same subject's other relations, and neighbors without and with the edited fact before them."""
    notes = [
        f"{what}: not measured, no fact has {name} prompts"
        for what, name in (("the subject's other relations", "same_subject"), ("distractors", "neighborhood"))
        if not any(fact.questions(name) for fact in facts)
    ]
    if len(notes) == 2:
        return {}, notes
    report = evaluate(view, facts, benchmark=DISTRACTORS, generate=0, both_forms=False)
    sides = [summarize(columns, DISTRACTORS.metrics) for columns in (report.base, report.edited or report.base)]
    found = {name: Both(*(side[name] for side in sides)) for name in DISTRACTORS.metrics}
    left_out = int(report.base["neighborhood_left_out"].sum())
    n = sum(len(fact.neighborhood) for fact in facts)
    notes += said_left_out(facts, left_out)
    if n > left_out and not found["distractor"].edited.n:
        notes.append("distractors: not measured, no neighbor has an answer that a new one (target_new) could displace")
    return found, notes


def _next_tokens(view, prompts: list[Probe]) -> tuple[dict[str, Both], int]:
    """({"kl", "flips"}, after how many prompts the edited model gives NaN)."""
    parts = []
    with progress("comparing next tokens", len(prompts)) as bar:
        for part in together(prompts, lambda one: 1, math.inf, TOGETHER if not view.source.pass_bytes else None):
            parts.append(read_divergences(view, part, scaled(bar.advance, len(part))))
    kl, flips = (torch.cat(each) for each in zip(*parts, strict=True))
    none = torch.zeros(len(prompts))
    found = {"kl": Both(interval(none, COUNT), interval(kl, COUNT))}
    found["flips"] = Both(interval(none, SHARE), interval(flips.double(), SHARE))
    return found, int(kl.isinf().sum())


def _drifts(view, texts: dict[str, list[list[int]]], seed: int) -> tuple[dict[str, Drift], int]:
    """(the drift of each text, all of them in one sweep; in how many windows the edited model gives NaN)."""
    windows = [window for some in texts.values() for window in some]
    base, edited = (torch.stack([x.double().sum() for x in side]) for side in text_logprobs(view, windows))
    wrecked = edited.isnan()
    edited = edited.masked_fill(wrecked, -torch.inf)
    found, end = {}, 0
    for name, some in texts.items():
        mine = slice(end, end := end + len(some))
        before, after = (perplexity_of(side[mine].tolist(), some) for side in (base, edited))
        n = torch.tensor([len(window) - 1 for window in some], dtype=torch.float64)
        bounds = bootstrap(base[mine] - edited[mine], n, seed)
        found[name] = Drift(before, after, Interval(after / before - 1, *bounds, len(some)), n_predicted(some))
    return found, int(wrecked.sum())


def bootstrap(rise: Tensor, n: Tensor, seed: int) -> tuple[float, float]:
    """95 % interval of a drift exp(Σ rise / Σ n) - 1: percentiles over ``DRAWS`` draws of windows with replacement.

    rise: [m] fp64, how much larger each window's negative log-likelihood is with the edit, in nats (the two models'
    windows are drawn together: paired); n: [m] its predicted tokens. NaN for a single window, and where a rise is
    infinite. Efron and Tibshirani 1993, section 13.3.
    """
    m = len(rise)
    if m < 2 or not bool(rise.isfinite().all()):
        return math.nan, math.nan
    which = torch.randint(m, (DRAWS, m), generator=torch.Generator().manual_seed(seed))
    drift = (rise[which].sum(1) / n[which].sum(1)).expm1()
    low, high = drift.quantile(torch.tensor([0.025, 0.975], dtype=drift.dtype)).tolist()
    return low, high


def _in_layers(view, facts: Sequence[Fact]) -> dict[str, Both]:
    """Whether the old answer is among the likeliest of some layer from the first edited one on, and of the last."""
    known = [facts[i] for i in with_old_answer(facts)]
    if not known:
        return {}
    lens = logit_lens(view, known)
    sides = [there(one, lens.first_layer or 0) for one in (lens.before, lens.after or lens.before)]
    each = zip(("lens_present", "lens_ends"), zip(*sides, strict=True), strict=True)
    return {name: Both(*(interval(column, SHARE) for column in columns)) for name, columns in each}


def _written_again(view, ask: Asked) -> dict[str, Both]:
    """Whether the old answer is in what the models write after a doubt, and behind a long text."""
    probes = [probe(view, one.prompt, n_written=ask.n_written) for one in ask.canaries]
    base = dataclasses.replace(view, edits=())
    before, after = (
        [text or "" for text in write_probes(model, probes, f"canary, {which} model")]
        for which, model in (("base", base), ("edited", view))
    )
    songs = sing(ask.canaries, before, after)
    found = {}
    for name, kind in (("canary_doubt", DOUBT), ("canary_context", CONTEXT)):
        mine = [(song.leaked_before, song.leaked) for song in songs if song.canary.kind == kind]
        if mine:
            found[name] = Both(*(interval(column, SHARE) for column in torch.tensor(mine).double().unbind(1)))
    return found


# ---- what is said of it


def _said_of_nan(n_prompts: int, of: int, n_windows: int) -> list[str]:
    """Sentences for how often the edited model gives NaN, or none."""
    said = [f"the edited model gives NaN after {n_prompts} of {counted(of, 'prompt')}"] * bool(n_prompts)
    said += [f"the edited model gives NaN in {counted(n_windows, 'window')} of the texts"] * bool(n_windows)
    if said:
        said.append("what such a model does not say is not therefore gone: its lens and canary show little")
    return said


def _without_growth(view, grown) -> list[str]:
    if grown is not None:
        return []
    if any(edit.weights for edit in view.edits if edit.route is None):
        return ["weight growth: not measured, the weights are packed"]
    return ["weight growth: none, the edit acts beside the weights, which stay as they are"]


def _meta(view, facts: Sequence[Fact], ask: Asked, seed: int, max_tokens: int) -> dict:
    return {
        **about(view),
        "method": " + ".join(edit.method for edit in view.edits),
        "layers": sorted({layer for edit in view.edits for layer in edit.layers}),
        "n": len(facts),
        "prompts": len(ask.prompts),
        "texts": {name: len(some) for name, some in ask.windows.items()},
        "seed": seed,
        "max_tokens": max_tokens,
        "version": __version__,
    }
