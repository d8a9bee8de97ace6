"""What one form of an edit answers: every question in shared sweeps, the base model beside the edited one."""

import dataclasses
import math
from typing import NamedTuple

import torch

from kedit_fast.basics.intervals import Z95, Interval
from kedit_fast.basics.progress import progress, scaled
from kedit_fast.evaluation.canary import Song, sing
from kedit_fast.evaluation.probes import Answer, Probe, read_probes
from kedit_fast.evaluation.texts import leaks, says
from kedit_fast.evaluation.written import write_probes
from kedit_fast.gating.questions import CANARY, KEPT, PORTABILITY, WORDING, Kept, Questions, Wording
from kedit_fast.gating.report import Answered, Lost
from kedit_fast.gating.suite import Question
from kedit_fast.jobs.score import text_logprobs
from kedit_fast.sweep.plan import together

TOGETHER = 64  # prompts a sweep when the weights are in memory, so that progress moves


class FormAnswers(NamedTuple):
    """What one form of the edit answered."""

    answered: list[Answered]
    follows: list[tuple[Question, str, bool]]  # portability: the question, what was written, whether exactly answered
    songs: list[Song]
    lost: list[Lost]
    gained: int
    perplexity: tuple[float, float]
    drift: Interval


def names_of(form: str) -> list[str]:
    """The stages of one form, as their progress calls them."""
    return [f"{form}: {stage}" for stage in ("asking", "writing", "base model, writing", "measuring perplexity")]


@torch.no_grad()
def ask(view, asked: Questions, form: str) -> FormAnswers:
    """All answers of ``view``, a model that carries the edit, and of the same model without it."""
    base, probes = dataclasses.replace(view, edits=()), asked.probes(view)
    before, after = _read(view, probes, form)
    texts = write_probes(view, probes, f"{form}: writing")
    after = [answer._replace(text=text) for answer, text in zip(after, texts, strict=True)]
    canaries = [one for one in probes if one.kind == CANARY]
    base_texts = write_probes(base, canaries, f"{form}: base model, writing")
    both = {kind: [] for kind in (WORDING, PORTABILITY, KEPT, CANARY)}
    for one, answers in zip(probes, zip(before, after, strict=True), strict=True):
        both[one.kind].append(answers)
    perplexity, drift = _drift(*text_logprobs(view, list(asked.windows), f"{form}: measuring perplexity"))
    return FormAnswers(
        answered=[_answered(form, w, a) for w, (_, a) in zip(asked.wordings, both[WORDING], strict=True)],
        follows=[(q, a.text, a.exact[0] == 1) for q, (_, a) in zip(asked.portability, both[PORTABILITY], strict=True)],
        songs=sing(asked.canaries, base_texts, [a.text for _, a in both[CANARY]]),
        lost=[_stayed(view, form, kept, *answers) for kept, answers in zip(asked.kept, both[KEPT], strict=True)],
        gained=sum(b.exact[0] == 0 and a.exact[0] == 1 for b, a in both[KEPT]),
        perplexity=perplexity,
        drift=drift,
    )


def _read(view, probes: list[Probe], form: str) -> tuple[list[Answer], list[Answer]]:
    """(base, edited) answers to all probes, in order."""
    most = TOGETHER if not view.source.pass_bytes else None
    before, after = [], []
    with progress(f"{form}: asking", len(probes)) as bar:
        for part in together(probes, lambda one: 1, math.inf, most):
            base, edited = read_probes(view, part, scaled(bar.advance, len(part)))
            before += base
            after += edited
    return before, after


def _answered(form: str, wording: Wording, answer: Answer) -> Answered:
    fact, (p_new, p_true) = wording.fact, answer.p
    said_old = fact.target_true is not None and leaks(answer.text, fact.target_true, fact.target_new)
    return Answered(
        form=form,
        fact=fact.label,
        kind=wording.kind,
        prompt=wording.prompt,
        text=answer.text,
        generated=says(answer.text, fact.target_new) and not said_old,
        exact=answer.exact[0] == 1,
        success=None if math.isnan(p_true) else p_new > p_true,
        p_new=p_new,
        p_true=None if math.isnan(p_true) else p_true,
    )


def _stayed(view, form: str, kept: Kept, before: Answer, after: Answer) -> Lost:
    tops = ("" if x.top is None else view.tokenizer.decode([x.top]) for x in (before, after))
    return Lost(form, kept, _is_lost(before, after), *tops)


def _is_lost(before: Answer, after: Answer) -> bool:
    """The base model's answer is gone: the given one where it gave that, else its likeliest token."""
    return after.exact[0] != 1 and (before.exact[0] == 1 or after.top != before.top)


def _drift(before, after) -> tuple[tuple[float, float], Interval]:
    """((perplexity before, after), relative rise with its 95 % interval, over windows, and the number of tokens).

    r = Σ_w d_w / Σ_w n_w, with d_w the rise of a window's negative log-likelihood and n_w its tokens; drift e^r - 1.
    Windows, not tokens, are independent: the variance of r is m / (m - 1) Σ (d_w - r n_w)² / (Σ n_w)².
    """
    n = torch.tensor([len(x) for x in before]).double()
    nll, edited = (-torch.stack([x.double().sum() for x in side]) for side in (before, after))
    rise = edited - nll
    r, m = float(rise.sum() / n.sum()), len(n)
    half = math.nan
    if m > 1:
        half = Z95 * float(((rise - r * n).square().sum() * m / (m - 1)).sqrt() / n.sum())
    pair = tuple(_exp(float(side.sum() / n.sum())) for side in (nll, edited))
    return pair, Interval(_exp(r) - 1, _exp(r - half) - 1, _exp(r + half) - 1, int(n.sum()))


def _exp(x: float) -> float:
    return math.exp(x) if not x > 700 else math.inf
