"""What one form of an edit answers: every question in shared sweeps, the base model beside the edited one."""

import dataclasses
import math
from typing import NamedTuple

import torch

from kedit_fast.basics.progress import progress, scaled
from kedit_fast.evaluation.metrics import Z95, Answers, Interval
from kedit_fast.evaluation.probes import FactProbes, probe, read_probes
from kedit_fast.facts import tokens
from kedit_fast.gating.canary import Song, continuations, leaks, says, sing
from kedit_fast.gating.questions import Questions
from kedit_fast.gating.report import Answered, Lost
from kedit_fast.gating.suite import Question
from kedit_fast.jobs.score import text_logprobs
from kedit_fast.sweep.together import together

TOGETHER = 64  # prompts a sweep when the weights are in memory, so that progress moves


class Found(NamedTuple):
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
def ask(view, asked: Questions, form: str) -> Found:
    """All answers of ``view``, a model that carries the edit, and of the same model without it."""
    base = dataclasses.replace(view, edits=())
    prompts = asked.prompts(view.tokenizer)
    n, m = len(asked.wordings), len(asked.wordings) + len(asked.portability)
    of_facts = zip(prompts[:n], asked.wordings, strict=True)
    probes = [_probe(view, p, w.fact.target_new, w.fact.target_true, w.fact.attached) for p, w in of_facts]
    probes += [_probe(view, p, q.answer) for p, q in zip(prompts[n:m], asked.portability, strict=True)]
    probes += [
        _probe(view, tokens.asked(view.tokenizer, k.prompt, k.chat), None, k.answer, keep=True) for k in asked.kept
    ]
    before, after = _read(view, probes, form)
    written = continuations(view, prompts, asked.max_new_tokens, f"{form}: writing")
    texts = [written[prompt] for prompt in prompts]
    singing = [c.prompt for c in asked.canaries]
    base_text = continuations(base, singing, asked.max_new_tokens, f"{form}: base model, writing")
    lost = [Lost(form, k, _is_lost(b, a)) for k, b, a in zip(asked.kept, before[m:], after[m:], strict=True)]
    perplexity, drift = _drift(*text_logprobs(view, list(asked.windows), f"{form}: measuring perplexity"))
    return Found(
        answered=[_answered(form, w, a, text) for w, a, text in zip(asked.wordings, after[:n], texts[:n], strict=True)],
        follows=[
            (q, text, bool(a.rewrite.exact_new))
            for q, a, text in zip(asked.portability, after[n:m], texts[n:m], strict=True)
        ],
        songs=sing(asked.canaries, base_text, written),
        lost=lost,
        gained=sum(_gained(b, a) for b, a in zip(before[m:], after[m:], strict=True)),
        perplexity=perplexity,
        drift=drift,
    )


def _probe(
    view, prompt: str, new: str | None, true: str | None = None, attached=None, keep: bool = False
) -> FactProbes:
    """One prompt as the model reads it, with its answers; keep: its likeliest token is read as well."""
    one = probe(view, prompt, (new, true), attached)
    return FactProbes(([one], [], [], []), [one.prompt] if keep else [], 0, 0)


def _read(view, probes: list[FactProbes], form: str):
    """(base, edited) readings of all probes, in order."""
    most = TOGETHER if not view.source.pass_bytes else None
    before, after = [], []
    with progress(f"{form}: asking", len(probes)) as bar:
        for part in together(probes, lambda one: 1, math.inf, most):
            base, edited = read_probes(view, part, advance=scaled(bar.advance, len(part)))
            before += base
            after += edited
    return before, after


def _answered(form: str, wording, reading, text: str) -> Answered:
    answers: Answers = reading.rewrite
    fact = wording.fact
    said_old = fact.target_true is not None and leaks(text, fact.target_true, fact.target_new)
    p_new, p_true, exact = (float(answers[i]) for i in (0, 1, 2))
    return Answered(
        form=form,
        fact=fact.label,
        kind=wording.kind,
        prompt=wording.prompt,
        text=text,
        generated=says(text, fact.target_new) and not said_old,
        exact=exact == 1,
        success=None if math.isnan(p_true) else p_new > p_true,
        p_new=p_new,
        p_true=None if math.isnan(p_true) else p_true,
    )


def _is_lost(before, after) -> bool:
    """The base model's answer is gone: the given one where it gave that, else its likeliest token."""
    if bool(before.rewrite.exact_true == 1):
        return not bool(after.rewrite.exact_true == 1)
    return not (bool(after.same_top == 1) or bool(after.rewrite.exact_true == 1))


def _gained(before, after) -> bool:
    return bool(before.rewrite.exact_true == 0) and bool(after.rewrite.exact_true == 1)


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
