"""What is traced: facts as tokens, the answer that is read, and the noise that corrupts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.words import counted, sized
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import TokenizedPrompt, fact_answer, fact_tokens
from kedit_fast.jobs.finite import not_finite
from kedit_fast.jobs.score import next_tokens
from kedit_fast.kernels.rows import add_noise
from kedit_fast.model.lm import takes_lm
from kedit_fast.sweep.runs import RunList
from kedit_fast.sweep.sites import Site

KINDS = ("state", "mlp", "attn")
SITE = {"mlp": Site.mlp_out, "attn": Site.attn_out}  # where a kind's contribution is read and written
METRICS = {  # of log-probabilities [k, m] of the answer and, for the last one, its foil
    "prob": lambda logprob: logprob[:, 0].exp(),
    "logprob": lambda logprob: logprob[:, 0],
    "logit_diff": lambda logprob: logprob[:, 0] - logprob[:, 1],
}


@dataclass(frozen=True)
class TraceSettings:
    """How facts are traced: the arguments of ``trace`` that its steps need.

    draws: corrupted runs a fact; level: what ``noise_level`` gave, None where another subject corrupts
    stride: each draw is computed at every which layer (``draws``)
    """

    kinds: tuple[str, ...]
    window: int
    metric: str
    sever: str | None
    draws: int
    level: tuple[str, float] | None
    seed: int
    stride: int = 1


@dataclass(frozen=True)
class Task:
    """One fact as it will be traced."""

    fact: Fact
    tokens: list[int]
    span: tuple[int, int]
    corrupted: list[int]  # the corrupted run's tokens: the same ones, unless another subject corrupts
    targets: list[int]  # the answer, then the foil of a logit difference


@takes_lm
def noise_level(lm, facts: Sequence[Fact], noise) -> tuple[str, float]:
    """("gaussian" or "uniform", level): a number as it is; "s3": 3 standard deviations (unbiased, over all tokens
    and features) of the embeddings of these facts' subjects, each tokenized alone, without special tokens; "u0.1":
    uniform half-width 0.1.

    Differs: the published code counts a start token as one of the subject's where the tokenizer puts one; its embedding
    is an outlier in some models, and the noise several times too large.
    Raises ValueError for anything else, and for a number that is negative or not finite.
    """
    kind, factor = checks.noise("noise", noise)
    if kind != "subjects":
        return kind, factor
    ids = [i for fact in facts for i in lm.tokenizer(fact.subject, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        return "gaussian", factor * lm.embed(torch.tensor(ids)).float().std().item()


def tasks_of(lm, facts, answer, corrupt, metric) -> list[Task]:
    """Everything that can be wrong with the facts is found here, before the sweep."""
    prompts = [fact_tokens(lm.tokenizer, fact) for fact in facts]
    others = (
        [None] * len(facts)
        if isinstance(corrupt, str) and corrupt == "noise"
        else _corrupted(lm, facts, prompts, corrupt)
    )
    for fact, prompt in zip(facts, prompts, strict=True):
        lm.check_length(len(prompt.ids), f"fact {fact.label}")
    foils = [metric == "logit_diff" and o is None and _foil(lm, fact) for fact, o in zip(facts, others, strict=True)]
    texts = [list(p.ids) for p in prompts] + [o for o in others if o is not None]
    top = next_tokens(lm, texts).tolist()
    answers = top[: len(facts)] if answer is None else [fact_answer(lm.tokenizer, f, answer)[0] for f in facts]
    tasks = []
    for i, (fact, prompt) in enumerate(zip(facts, prompts, strict=True)):
        targets = [answers[i]]
        if metric == "logit_diff":
            targets.append(top[len(facts) + i] if others[i] is not None else foils[i])
        tasks.append(Task(fact, list(prompt.ids), tuple(prompt.span), others[i] or list(prompt.ids), targets))
    return tasks


def _corrupted(lm, facts, prompts, corrupt) -> list[list[int]]:
    wanted = '"noise", another subject, or a list of one for each fact'
    subjects = checks.listed("corrupt", corrupt, str, wanted)
    subjects = subjects * len(facts) if isinstance(corrupt, str) else subjects
    if len(subjects) != len(facts):
        both = f"{counted(len(subjects), 'subject')}, {counted(len(facts), 'fact')}"
        raise ValueError(f"corrupt: {both}; expected one, or one for each fact")
    made = []
    for fact, prompt, subject in zip(facts, prompts, subjects, strict=True):
        other = fact_tokens(lm.tokenizer, replace(fact, subject=subject))
        if len(other.ids) != len(prompt.ids) or tuple(other.span) != tuple(prompt.span):
            raise ValueError(_lengths(subject, other, fact.subject, prompt))
        if other.ids[: other.span[0]] != prompt.ids[: prompt.span[0]]:
            raise ValueError(f"with {subject!r} the tokens before the subject differ from those with {fact.subject!r}")
        made.append(list(other.ids))
    return made


def _lengths(subject: str, other: TokenizedPrompt, replaced: str, prompt: TokenizedPrompt) -> str:
    """Why one subject cannot stand in for another: they take another number of tokens."""
    takes, wanted = (b - a for a, b in (other.span, prompt.span))
    if takes == wanted:  # a merge over the subject's end
        return (
            f"with {subject!r} the tokens around the subject differ from those with {replaced!r}; give another subject"
        )
    return (
        f"corrupt = {subject!r} takes {takes} token{'s' * (takes != 1)}, the subject {replaced!r} {wanted}; give a "
        f"subject of {wanted} token{'s' * (wanted != 1)}"
    )


def check_draws(lm, facts: Sequence[Fact], kinds: Sequence[str], draws: int) -> int:
    """The number of noise draws; ValueError where those of one fact would not fit the model's memory."""
    longest = max(facts, key=lambda fact: len(fact.subject))
    begin, end = fact_tokens(lm.tokenizer, longest).span
    # the noise in fp64, and of each restored run its entries in the table of runs
    each = (end - begin) * (8 * lm.d_model + 64 * len(kinds) * lm.n_layers)
    most = lm.memory // each  # 0: the plan says what a single draw needs
    if 0 < most < draws:
        raise ValueError(
            f"samples = {draws}: the noise and the runs of one fact would take {sized(draws * each)}, and this "
            f"model's sweeps may hold {sized(lm.memory)}; take at most {most} samples"
        )
    return draws


def _foil(lm, fact) -> int:
    if fact.target_new is None:
        raise ValueError(f"metric 'logit_diff' needs a foil: fact {fact.label} has no target_new")
    return fact_answer(lm.tokenizer, fact)[0]


def add_runs(runs: RunList, tasks: Sequence[Task], draws: int) -> tuple[list[Tensor], list[Tensor]]:
    """Adds each fact's clean run [1] and its corrupted runs [draws], which own rows from the subject on."""
    clean, corrupted = [], []
    for task in tasks:
        clean.append(runs.add(task.tokens))
        first = torch.full((draws,), task.span[0])
        corrupted.append(runs.add(task.corrupted, parent=clean[-1], first_pos=first, source=-1))
    return clean, corrupted


@dataclass(frozen=True)
class _Corrupt:
    """Changes embeddings at places run [k], pos [k]."""

    run: Tensor
    pos: Tensor

    def sites(self, layer):
        return (Site.embed,) if layer == 0 else ()

    def reads(self, layer):
        return None


@dataclass(frozen=True)
class AddNoise(_Corrupt):
    """Adds noise [k, d] fp64 (level times draw)."""

    noise: Tensor

    def at(self, site, layer, x, call):
        which, row = call.find_here(self.run, self.pos)
        return add_noise(x, self.noise[which], row) if len(which) else None


@dataclass(frozen=True)
class Toward(_Corrupt):
    """Moves embeddings that share of the way to those of other tokens [k]."""

    lm: object
    tokens: Tensor
    share: float

    def at(self, site, layer, x, call):
        which, row = call.find_here(self.run, self.pos)
        row = row.to(x.device)
        theirs = self.lm.embed(self.tokens[which])
        return x.index_copy(0, row, x[row].lerp(theirs, self.share))


def noise_job(
    lm, tasks: Sequence[Task], corrupted: list[Tensor], how: TraceSettings, draw: Tensor | None = None
) -> AddNoise:
    """Published noise: one fp64 draw [draws, subject tokens, d] a fact, the generator restarted for each fact.

    draw: which of them each of a fact's corrupted runs has; None: each its own
    """
    run, pos, noise = [], [], []
    for task, runs in zip(tasks, corrupted, strict=True):
        b, e = task.span
        generator = np.random.RandomState(how.seed)
        size = (how.draws, e - b, lm.d_model)
        drawn = generator.randn(*size) if how.level[0] == "gaussian" else generator.uniform(-1, 1, size=size)
        drawn = torch.from_numpy(how.level[1] * drawn)
        noise.append((drawn if draw is None else drawn[draw]).flatten(0, 1))
        run.append(runs.repeat_interleave(e - b))
        pos.append(torch.arange(b, e).repeat(len(runs)))
    return AddNoise(torch.cat(run), torch.cat(pos), torch.cat(noise))


@dataclass(frozen=True)
class Drawn:
    """What was read of one fact, draw by draw: p_clean []; p_corrupted [draws]; restored: {kind: [T, L, draws]}, the
    corrupted value wherever nothing was computed."""

    p_clean: Tensor
    p_corrupted: Tensor
    restored: dict[str, Tensor]


@dataclass(frozen=True)
class Traced:
    """What was read of one fact, in its metric: p_clean, p_corrupted []; restored: {kind: [T, L]}; reliability: {kind:
    of the mean over noise draws}, where it is known."""

    p_clean: Tensor
    p_corrupted: Tensor
    restored: dict[str, Tensor]
    reliability: dict[str, float] = field(default_factory=dict)

    def check(self, lm, task: Task) -> None:
        """Raises ValueError where a run gave NaN, naming the fact."""
        read = {"the clean run gives": self.p_clean, "the corrupted run gives": self.p_corrupted}
        read |= {f"restored runs ({kind}) give": table for kind, table in self.restored.items()}
        for what, values in read.items():
            if values.isnan().any():
                raise not_finite(lm, f"fact {task.fact.label}: {what} NaN", "noise that is too large")
