"""Probes: what is asked of a model, and what it and its edited view answer to many of them in shared sweeps.

There are two ways to ask. Read, here: the answers stand behind the prompt, and the model says how likely each of their
tokens is and which one it would say instead. Written (``evaluation/written.py``): the model goes on by itself.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics import ranks
from kedit_fast.basics.bits import json_of, json_tensor
from kedit_fast.facts.tokens import answer_tokens, encode
from kedit_fast.jobs.collect import collect
from kedit_fast.jobs.finite import check_answers
from kedit_fast.jobs.score import Places, continuation_places, divergences, likeliest_tokens, logprobs
from kedit_fast.sweep.runs import RunList, add_edited, add_under
from kedit_fast.sweep.sites import Site


class Probe(NamedTuple):
    """A prompt that a model is asked, and the answers that are looked for behind it.

    prompt: token ids, as the model reads it; text: the same as text
    answers: token ids of each as it continues the prompt; None: not known
    kind: what it is to whoever asks, for instance "paraphrase"; case: the number of the case that it belongs to
    owner: the fact whose independent edit acts on it; 0 where edits are shared. A routed edit says it of the prompt
    likeliest: whether the likeliest token after the prompt is read too; top: the token whose probability is read there,
        where it is known which the base model finds likeliest
    n_written: tokens to go on by, greedily; 0: none; until: texts that what is written ends before
    accepted: what is right to write, where that is known; inside of it nothing ends, "." in "St. Louis"
    """

    prompt: list[int]
    text: str
    answers: tuple[list[int] | None, ...] = ()
    kind: str = ""
    case: int = 0
    owner: int = 0
    likeliest: bool = False
    top: int | None = None
    n_written: int = 0
    until: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text that is read; an answer's last token is predicted, not read."""
        behind = [len(answer) - 1 for answer in self.answers if answer is not None]
        return [len(self.prompt) + n for n in (*behind, *[0] * self.likeliest)]

    @property
    def longest(self) -> int:
        """Tokens of the longest text that is read, or written on; 0 where nothing is asked."""
        return max([*self.lengths, *[len(self.prompt) + self.n_written - 1] * (self.n_written > 0)], default=0)


class Answer(NamedTuple):
    """What one model answers to a probe.

    p: of each of the probe's answers, exp of the mean log-probability of its tokens; exact: 1 where each of them is the
        likeliest behind those before it, else 0; both NaN where the answer is not known
    said: of each, the likeliest token at the place of each of its tokens
    top: the likeliest token after the prompt; p_top: the probability there of the one that the base model finds
        likeliest; None and NaN where that is not read
    text: what the model wrote; None where it is not asked to

    Of a model that answers NaN (its activations overflow) p, exact and p_top are 0, said is empty and top None: such a
    prompt counts against it and is not left out.
    """

    p: tuple[float, ...] = ()
    exact: tuple[float, ...] = ()
    said: tuple[tuple[int, ...], ...] = ()
    top: int | None = None
    p_top: float = math.nan
    text: str | None = None

    @classmethod
    def of(cls, p, exact, said, *rest) -> "Answer":
        """From JSON, which has lists for tuples."""
        return cls(tuple(p), tuple(exact), tuple(map(tuple, said)), *rest)


def probe(lm, prompt: str, answers: Sequence[str | None] = (), attached: bool | None = None, **how) -> Probe:
    """The probe of a prompt as the model reads it (what ``tokens.asked`` gives) and of its answers.

    attached: as in ``answer_tokens``; how: the other fields of the Probe
    """
    ids = (None if answer is None else answer_tokens(lm.tokenizer, prompt, answer, attached) for answer in answers)
    return Probe(encode(lm.tokenizer, prompt), prompt, tuple(ids), **how)


# ---- read


@torch.no_grad()
def read_probes(lm, probes: Sequence[Probe], advance=None) -> tuple[list[Answer], list[Answer] | None]:
    """(what the base model answers, what the edited one does; None where ``lm`` carries no edits), by probe.

    One sweep for both: equal prefixes are one row, and below the first edited layer the two models share theirs. Under
    independent edits each probe is asked under its owner's. Values are fp64. Ranks share the probes. advance: as in
    ``sweep``
    Raises ValueError where the base model gives NaN, of which there is nothing to say.
    """
    base, edited = _of_all(probes, lambda some: _read(lm, some, advance))
    return base, edited if lm.edits else None


def _of_all(probes: Sequence[Probe], read: Callable[[Sequence[Probe]], list[list[Answer]]]) -> list[list[Answer]]:
    """What ``read`` gives of the probes that each rank asks, one list or several of all of them."""
    if ranks.n_ranks() == 1:
        return read(probes)
    parts = ranks.shared(probes, lambda some: {"said": json_tensor(read(some))}, lambda one: sum(one.lengths))
    sides = zip(*(json_of(part["said"]) for part in parts), strict=True)
    return [[Answer.of(*each) for some in side for each in some] for side in sides]


def _read(lm, probes: Sequence[Probe], advance) -> list[list[Answer]]:
    """The answers of the base model, and of the edited one, where there is one, else the same."""
    where, sides = _both_sides(lm, probes, advance)
    top = likeliest_tokens(lm, sides[0][where.n_tokens :])
    read = []
    for h in sides:
        logprob, p_top = _probabilities(lm, h, where, top)
        if h is sides[0]:
            bare = dataclasses.replace(lm, edits=())
            check_answers(bare, logprob, lambda i: where.sequences[where.places.pair[i]])
            check_answers(bare, p_top, where.sequences[len(where.pairs) :].__getitem__)
        read.append(_answers(lm, probes, where, h, logprob, p_top))
    return [read[0], read[-1]]


def _both_sides(lm, probes: Sequence[Probe], advance) -> tuple["_Places", list[Tensor]]:
    """(where probes are read, the hidden states there, see ``_hidden_states``, of the base model and, where an edit
    acts, of the edited one): one sweep."""
    view, read = as_read(lm, probes)
    where, runs = _Places.of(probes), RunList()
    theirs = where if read is probes else _Places.of(read)
    owners = theirs.owners if lm.owned else None
    base, edited = add_edited(lm, runs, where.sequences, owners, theirs.sequences, theirs.ends)
    asked = [(base, where)] if edited is base else [(base, where), (edited, theirs)]
    return where, _hidden_states(view, runs, asked, advance)


@torch.no_grad()
def read_divergences(lm, probes: Sequence[Probe], advance=None) -> tuple[Tensor, Tensor]:
    """(KL(base || edited) in nats [n] fp64, whether the likeliest token is another [n] bool) of the token after each
    probe's prompt; as ``read_probes``: one sweep, ranks share the probes. A prompt that no edit acts on has exactly 0.

    An edited model that gives NaN counts as infinitely far, and its token as another. Raises ValueError where the base
    model gives NaN.
    """

    def read(some: Sequence[Probe]) -> dict[str, Tensor]:
        where, sides = _both_sides(lm, [one._replace(answers=(), likeliest=True) for one in some], advance)
        kl, differs = divergences(lm, sides[0], sides[-1])
        check_answers(dataclasses.replace(lm, edits=()), kl.where(kl.isnan(), 0.0), where.sequences.__getitem__)
        return {"kl": kl, "differs": differs}

    found = ranks.joined(ranks.shared(probes, read, lambda one: len(one.prompt)))
    return found["kl"], found["differs"]


@torch.no_grad()
def read_edited(lm, probes: Sequence[Probe], advance=None) -> list[Answer]:
    """What the model answers as its edits have it, by probe; as ``read_probes``, without rows of the base model.
    ``p_top`` is of the probe's ``top``, of one without of the likeliest token."""

    def read(some: Sequence[Probe]) -> list[list[Answer]]:
        view, as_asked = as_read(lm, some)
        where, runs = _Places.of(as_asked), RunList()
        number = add_under(lm, runs, where.sequences, where.owners, where.ends)
        (h,) = _hidden_states(view, runs, [(number, where)], advance)
        own = likeliest_tokens(lm, h[where.n_tokens :])
        known = torch.tensor([-1 if (top := some[i].top) is None else top for i in where.likeliest]).to(own)
        top = torch.where(known < 0, own, known)
        return [_answers(lm, some, where, h, *_probabilities(lm, h, where, top))]

    return _of_all(probes, read)[0]


def as_read(lm, probes: Sequence[Probe]):
    """(the view to ask, the probes as it reads them, under the owners that act on them), see ``LM.as_read``; the same
    ones where no edit puts text or is routed."""
    if not lm.prompting and lm.routed is None:
        return lm, probes
    view, texts, owners = lm.as_read([one.text for one in probes], _given_owners(lm, probes))
    read = []
    for one, text, owner in zip(probes, texts, owners.tolist(), strict=True):
        changed = {} if text is one.text else {"text": text, "prompt": encode(lm.tokenizer, text)}
        read.append(one._replace(owner=owner, **changed))
    return view, read


def _given_owners(lm, probes: Sequence[Probe]) -> list[int] | None:
    """Of independent edits, whose probes name them."""
    return [one.owner for one in probes] if lm.independent else None


class _Places(NamedTuple):
    """Where probes are read.

    pairs: (probe, answer) numbers of the known answers; places: of their tokens; likeliest: numbers of the probes whose
    likeliest token is read; sequences, owners, ends (position of the prompt's last token): what must be run, first of
    the pairs and then of these
    """

    pairs: list[tuple[int, int]]
    places: Places
    likeliest: list[int]
    sequences: list[list[int]]
    owners: list[int]
    ends: list[int]

    @classmethod
    def of(cls, probes: Sequence[Probe]) -> "_Places":
        pairs = [(i, j) for i, one in enumerate(probes) for j, ids in enumerate(one.answers) if ids is not None]
        likeliest = [i for i, one in enumerate(probes) if one.likeliest]
        places = continuation_places([(probes[i].prompt, probes[i].answers[j]) for i, j in pairs])
        sequences = places.sequences + [probes[i].prompt for i in likeliest]
        asked = [probes[i] for i in (*(i for i, _ in pairs), *likeliest)]
        owners, ends = [one.owner for one in asked], [len(one.prompt) - 1 for one in asked]
        return cls(pairs, places, likeliest, sequences, owners, ends)

    @property
    def n_tokens(self) -> int:
        """Of the answers."""
        return len(self.places.pos)

    def in_runs(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """(run, pos) [k + m] of the answers' tokens and of the prompts' last ones; number: of each sequence's run."""
        ends = self.sequences[len(self.pairs) :]
        pos = torch.tensor([len(ids) - 1 for ids in ends], dtype=torch.int64)
        return torch.cat([number[self.places.pair], number[len(self.pairs) :]]), torch.cat([self.places.pos, pos])


def _hidden_states(lm, runs: RunList, sides: list[tuple[Tensor, _Places]], advance) -> list[Tensor]:
    """[k + m, d] after the last layer, of each side: at the k tokens of answers and the m prompts' last tokens.

    sides: the run numbers of a model's sequences and where they are read, for each model that is asked
    """
    if not sides[0][1].sequences:
        return [torch.empty(0, lm.d_model, dtype=lm.dtype, device=lm.device)] * len(sides)
    run, pos = (torch.cat(each) for each in zip(*(where.in_runs(number) for number, where in sides), strict=True))
    last = lm.n_layers - 1
    read = collect(lm, runs.runs(), Site.layer_out, [last], run, pos, advance)
    return list(read[last].chunk(len(sides)))


def _probabilities(lm, h: Tensor, where: _Places, top: Tensor) -> tuple[Tensor, Tensor]:
    """(log p [k] of the answers' tokens, p [m] of ``top``), fp64: where an edit wrecks both answers of a prompt, their
    order is still told below e^-103."""
    k = where.n_tokens
    logprob = logprobs(lm, h[:k], where.places.targets).cpu().double()
    return logprob, logprobs(lm, h[k:], top).cpu().double().exp()


def _answers(lm, probes: Sequence[Probe], where: _Places, h: Tensor, logprob: Tensor, p_top: Tensor) -> list[Answer]:
    """The answers of one model, by probe; the arguments as the functions above give them."""
    places, k = where.places, where.n_tokens
    said = likeliest_tokens(lm, h[:k]).cpu()
    n_tokens = torch.tensor(places.lengths, dtype=logprob.dtype)
    found = torch.stack([logprob, (said == places.targets).to(logprob.dtype)])
    sums = torch.zeros(2, len(n_tokens), dtype=logprob.dtype).index_add(1, places.pair, found)
    # All answers of a prompt: were only the one that overflowed 0, the others would win against it.
    failed = {i for (i, _), is_nan in zip(where.pairs, sums[0].isnan().tolist(), strict=True) if is_nan}
    read = [[(math.nan, math.nan, ())] * len(one.answers) for one in probes]
    tokens = iter(said.tolist())
    each = zip((sums[0] / n_tokens).exp().tolist(), (sums[1] == n_tokens).tolist(), places.lengths, strict=True)
    for (i, j), (p, exact, n) in zip(where.pairs, each, strict=True):
        own = tuple(islice(tokens, n))
        read[i][j] = (0.0, 0.0, ()) if i in failed else (p, float(exact), own)
    tops = zip(likeliest_tokens(lm, h[k:]).tolist(), p_top.tolist(), strict=True)
    of_top = {i: (None, 0.0) if math.isnan(p) else (top, p) for i, (top, p) in zip(where.likeliest, tops, strict=True)}
    return [
        Answer(*(zip(*cells, strict=True) if cells else [()] * 3), *of_top.get(i, ())) for i, cells in enumerate(read)
    ]
