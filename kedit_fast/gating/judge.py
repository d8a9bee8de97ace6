"""The gate: one edit, or a chain of them, in each form it ships in, against the thresholds."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import cast

import torch

from kedit_fast import __version__
from kedit_fast.basics import checks
from kedit_fast.basics.intervals import SHARE, Interval, interval
from kedit_fast.basics.progress import stages
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import counted
from kedit_fast.edits.chain import check_chain, with_edits
from kedit_fast.edits.edit import Edit, edit_list
from kedit_fast.evaluation.canary import CONTEXT, DOUBT, LANGUAGE, PLAIN, Song
from kedit_fast.evaluation.evaluate import about
from kedit_fast.evaluation.logit_lens import TOP, LogitLens, logit_lens, there
from kedit_fast.evaluation.texts import says
from kedit_fast.facts.fact import Chat
from kedit_fast.gating import forms
from kedit_fast.gating.ask import FormAnswers, ask, names_of
from kedit_fast.gating.policy import Advice, advise
from kedit_fast.gating.questions import (
    EARLIER,
    IN_CHAT,
    PARAPHRASE,
    PLAINLY,
    REWRITE,
    Kept,
    Questions,
    Sizes,
    questions,
)
from kedit_fast.gating.report import POLICY, Answered, GateReport
from kedit_fast.gating.suite import Question, Suite
from kedit_fast.gating.thresholds import Check, Thresholds
from kedit_fast.model.lm import LM, takes_lm

MODEL_DTYPE = "model"


@takes_lm
def gate(
    lm: LM,
    edit: Edit | Iterable[Edit],
    suite: Suite | None = None,
    *,
    thresholds: Thresholds | None = None,
    written: torch.dtype | str | None = MODEL_DTYPE,
    requantize: str | None = None,
    group: int = forms.GROUP,
    builtin: bool = True,
    sizes: Sizes | None = None,
    chat: Chat | None = None,
) -> GateReport:
    """Whether an edit may ship: did it take in other words too, what did it break, does the old answer come back?

    edit: an Edit, or several in the order they were made. The facts of the last are judged; the earlier ones' must
        still hold (retention); damage is that of all of them together, against the model without any.
    suite: what to ask besides the probes that the edits' facts carry; see ``load_suite``
    written: the dtype the edit will be written in (default: the model's). Each weight is W + Δ rounded, as
        ``Edit.apply`` leaves it, edit by edit. None: the edit stays an adapter, and is judged as it is; so is one that
        acts beside the weights (a routed edit, a memory, a text), unless a dtype is asked for
    requantize: "int8" or "int4": judged again, edited layers quantized by groups of ``group``, as those of the base
    builtin: fill up specificity prompts with those of this package's facts, as far as the thresholds ask for more
    sizes: how much is generated and read
    chat: how the facts are asked, see ``Fact.chat``; None: in the form they were edited in. Where the model has a chat
        template, their wordings are asked in the other form too, as a check of its own

    Specificity: a prompt is lost when the base model gave its answer, greedily, and the edited one does not; where the
    base model does not know the answer, or none is given, its likeliest token has to stay. So a suite that the model
    knows nothing of does not pass by that. Too few probes fail a check, and so does a NaN.

    Greedy: the same inputs give the same report. Raises ValueError, before the first sweep, for a model that carries
    edits, independent edits, an edit of another model, a suite of another edit, or a form that cannot be made.
    """
    thresholds, sizes = _given("thresholds", thresholds, Thresholds), _given("sizes", sizes, Sizes)
    suite = checks.optional(checks.instance, "suite", suite, Suite, "a Suite; load_suite reads a file")
    edits, group = edit_list(edit, "edit"), checks.whole("group", group, least=1, like=forms.GROUP)
    dtype = _checked_form(lm, edits, written, requantize)
    asked = questions(lm, edits, suite or Suite(), thresholds, checks.flag("builtin", builtin), sizes, chat)
    for note in asked.notes:
        warn(note)  # now, not when hours are spent
    views, grown = _views(lm, edits, dtype, requantize, group)
    first = next(iter(views))
    with stages(*(name for form in views for name in names_of(form)), "logit lens"):
        found = {form: ask(view, asked, form) for form, view in views.items()}
        lens = _lens(views[first], asked)
    judged = [check for form, answers in found.items() for check in _checks(form, answers, asked, thresholds)]
    value = {check.name: check.value for check in judged if check.form == first}
    texts = {fact.text for e in edits for fact in e.facts}
    advice = advise(len(texts), grown, value["perplexity drift"], value.get("retention"), thresholds.policy)
    judged += [*([_lens_check(lens, first)] if lens else []), _policy_check(advice, first)]
    return GateReport(
        checks=tuple(judged),
        advice=advice,
        answers=tuple(a for answers in found.values() for a in answers.answered),
        songs=tuple((form, song) for form, answers in found.items() for song in answers.songs),
        lens=lens,
        lost=tuple(lost for answers in found.values() for lost in answers.lost),
        meta=_meta(lm, edits, suite, asked, thresholds, sizes, grown, {f: a.perplexity for f, a in found.items()}),
    )


def _given(name: str, value, kind: type):
    return kind() if value is None else checks.instance(name, value, kind, kind.__name__)


def _checked_form(lm, edits, written, requantize) -> torch.dtype | None:
    """What edits are judged in: ``written``, or if nothing is said the model's dtype, None where one of them is not to
    be written. Raises ValueError where they cannot be."""
    dtype = written
    if written == MODEL_DTYPE:
        dtype = None if any(map(forms.is_served, edits)) else lm.dtype
    if lm.edits:
        raise ValueError("the model carries edits already; open it plain, and give the gate the whole chain in order")
    check_chain(edits)
    if dtype is not None and dtype not in forms.FLOATS:
        checks.refuse("written", dtype, f"one of {', '.join(map(str, forms.FLOATS))}, or None for an adapter")
    checks.optional(checks.choice, "requantize", requantize, forms.BITS)
    if requantize is not None and (dtype is None or not lm.source.in_memory):
        raise ValueError(
            "a requantized edit is judged after it was written (written=), with the weights in memory (open the model "
            "without memory=)"
        )
    forms.check_form(lm, edits, dtype)
    return dtype


def _views(lm, edits, dtype, requantize, group) -> tuple[dict, dict[int, float]]:
    """({form: the model with the edits in that form}, {layer: ‖ΔW‖ / ‖W‖} of the first form)."""
    if dtype is None:
        everywhere = [edit for edit in edits if edit.route is None]  # a routed one is no one change of the weights
        plain = all(lm.source.weight(*place).is_floating_point() for e in everywhere for place in e.weights)
        grown = forms.growth(forms.chain_deltas(lm, everywhere, torch.float32)) if plain else {}
        return {"served" if any(map(forms.is_served, edits)) else "adapter": with_edits(lm, edits, "edit")}, grown
    weights = forms.chain_deltas(lm, edits, dtype)
    views = {f"written {str(dtype).removeprefix('torch.')}": forms.view_of_written(lm, edits, weights)}
    if requantize:
        bits = forms.BITS[requantize]
        name = f"{requantize}, groups of {group}"
        views[name] = forms.view_of_quantized(lm, edits, weights, bits, group)
    return views, forms.growth(weights)


# ---- judging one form


def _checks(form: str, found: FormAnswers, asked: Questions, limits: Thresholds) -> list[Check]:
    """Every measured value of one form, in the order they are shown."""
    how, made = limits.measure, []

    def add(name, value: Interval, counted, limit, note, required: str | None = None, confident=limits.confident):
        """limit, required: fields of the thresholds; the value must reach a limit "min_" and not exceed one "max_"."""
        more = {"limit": getattr(limits, limit), "rises": limit.startswith("min_"), "confident": confident}
        more |= {"required": getattr(limits, required)} if required else {}
        made.append(Check.of(name, form, value, note=note, counted=counted, **more))

    def of(*kinds: str) -> list[Answered]:
        return [answer for answer in found.answered if answer.kind in kinds]

    def share(answers: list[Answered]) -> Interval:
        return _share(answer.by(how) for answer in answers)

    direct, paraphrases = of(REWRITE, PARAPHRASE), of(PARAPHRASE)
    add("wordings answered", share(direct), "wordings", "min_answered", _beside(direct, how), "min_probes")
    beside = _beside(paraphrases, how)
    add("generalization", share(paraphrases), "paraphrases", "min_generalization", beside, "min_paraphrases")
    lost, note = _share(x.is_lost for x in found.lost), _specificity_note(found, asked)
    add("specificity drop", lost, "prompts", "max_specificity_drop", note, "min_specificity_prompts")
    note = f"{found.perplexity[0]:.3f} to {found.perplexity[1]:.3f}"
    add("perplexity drift", found.drift, "tokens", "max_perplexity_drift", note, "min_text_tokens")
    note = "" if found.follows else "no questions in the suite"
    add("portability", _share(_follows(x, how) for x in found.follows), "questions", "min_portability", note)
    if earlier := of(EARLIER):
        note = "facts of the earlier edits, on their own prompts"
        add("retention", share(earlier), "facts", "min_retention", note)
    for kind in (IN_CHAT, PLAINLY):
        if answers := of(kind):
            note = "the facts' wordings in the form they were not edited in"
            add(kind, share(answers), "wordings", "min_other_form", note)
    for kind, limit in _LEAKS.items():
        songs = [song for song in found.songs if song.canary.kind == kind]
        # No share is known to be 0: that limit is held against the value itself.
        confident = limits.confident and getattr(limits, limit) not in (None, 0)
        leaked = _share(song.leaked for song in songs)
        add(f"canary, {kind}", leaked, "texts", limit, _canary_note(songs, kind), confident=confident)
    return made


_LEAKS = {
    PLAIN: "max_leak", DOUBT: "max_leak_doubt", CONTEXT: "max_leak_context", LANGUAGE: "max_leak_language",
}  # fmt: skip
_NO_CANARY = {
    PLAIN: "no fact has an old answer to look for (target_true)",
    DOUBT: "no fact has an old answer to look for (target_true)",
    CONTEXT: "no old answer to look for (target_true), or no place for a context",
    LANGUAGE: 'the suite has no prompts in other languages ("languages") for these facts',
}


def _canary_note(songs: Sequence[Song], kind: str) -> str:
    if not songs:
        return _NO_CANARY[kind]
    before, after = sum(song.leaked_before for song in songs), sum(song.leaked for song in songs)
    note = f"the old answer was written {counted(before, 'time')} before, {counted(after, 'time')} after"
    return note if before else f"{note}; the model did not say it before, so this shows little"


def _lens(view, asked: Questions) -> LogitLens | None:
    """The layers' answers to the facts that the canary asks; None where no old answer is known."""
    facts = [asked.facts[i] for i in dict.fromkeys(c.fact for c in asked.canaries if c.kind == DOUBT)]
    return logit_lens(view, facts) if facts else None


def _lens_check(lens: LogitLens, form: str) -> Check:
    """Facts whose old answer is still near the top after some edited or later layer: outvoted rather than replaced."""
    present, _ = there(lens.after or lens.before, lens.first_layer or 0)
    outcomes = [None if math.isnan(one) else one > 0 for one in present.tolist()]
    found = lens.summary()
    note = (
        f"facts whose old answer is among the {TOP} likeliest after some layer from the first edited one on; "
        f"before the edit {found['present_before']:.0%}"
    )
    return Check.of("old answer in layers", form, _share(outcomes), note=note, counted="facts")


def _policy_check(advice: Advice, form: str) -> Check:
    """The policy as a check: of the limits looked at, the one that is spent most."""
    most = max(advice.spent.values())
    return Check(
        POLICY, form, most, math.nan, math.nan, len(advice.spent), limit=1.0, rises=False, note=advice.sentence,
        counted="limits",
    )  # fmt: skip


def _share(outcomes) -> Interval:
    """The share of true ones, None left out, with Wilson's interval; n = 0 where there is none."""
    column = torch.tensor([float(x) for x in outcomes if x is not None])
    return interval(column, SHARE) if len(column) else Interval(math.nan, math.nan, math.nan, 0)


def _follows(answer: tuple[Question, str, bool], measure: str) -> bool:
    question, text, exact = answer
    return says(text, cast(str, question.answer)) if measure == "generated" else exact


def _beside(answers: Sequence[Answered], measure: str) -> str:
    """The other ways to count, for the reader."""
    others = {name: _share(a.by(name) for a in answers) for name in ("generated", "exact", "success")}
    parts = [f"{name} {share.mean:.1%}" for name, share in others.items() if name != measure and share.n]
    return f"counted as {measure!r}" + (f"; {', '.join(parts)}" if parts else "")


def _specificity_note(found: FormAnswers, asked: Questions) -> str:
    lost: list[Kept] = [x.asked for x in found.lost if x.is_lost]
    by_source = Counter(kept.source for kept in lost)
    parts = [f"{len(lost)} lost" + "".join(f", {n} of {source}" for source, n in by_source.items())]
    if found.gained:
        parts.append(f"{found.gained} answered rightly only after the edit")
    if asked.left_out:
        parts.append(f"{asked.left_out} left out, they name an edited subject")
    return "; ".join(parts)


def _meta(lm, edits, suite, asked: Questions, thresholds, sizes, grown, perplexity) -> dict:
    return {
        **about(lm),
        "edits": [{"method": e.method, "facts": len(e.facts), "layers": list(e.layers)} for e in edits],
        "suite": suite.name if suite is not None else "",
        "facts": len(asked.facts),
        "earlier_facts": len(asked.earlier),
        "left_out": asked.left_out,
        "specificity_prompts": dict(Counter(kept.source for kept in asked.kept)),
        "perplexity": {form: list(pair) for form, pair in perplexity.items()},
        "growth": {str(layer): value for layer, value in grown.items()},
        "thresholds": dataclasses.asdict(thresholds),
        "sizes": dataclasses.asdict(sizes)
        | {"max_new_tokens": asked.max_new_tokens, "context_tokens": asked.context_tokens},
        "notes": list(asked.notes),
        "version": __version__,
    }
