"""Knowledge neurons (Dai et al. 2022, arXiv:2104.08696, section 3): of the neurons of all MLPs those by which a model
says an answer, whatever the wording that it is asked in.

Of each wording the neurons whose attribution is more than a share of the largest one; of these, those that enough of
the wordings have; of these, those that few other facts of the same relation have.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics.parts import Keep
from kedit_fast.basics.progress import progress, scaled
from kedit_fast.basics.state import wide
from kedit_fast.jobs.integrate import Asked, held_bytes, integrate
from kedit_fast.jobs.score import next_tokens
from kedit_fast.sweep.kept import in_groups
from kedit_fast.sweep.plan import together


@dataclass(frozen=True)
class NeuronSettings:
    """layers: those that are looked at, ascending; steps: m of the integral

    threshold: t, a wording's neurons have an attribution of more than t times its largest
    share: p, of the wordings that have to have a neuron for it to be the fact's; None: one of them is enough
    common: a neuron that more than this share of the other facts of its relation have is not the fact's. With fewer
        than 1 / common others a single one would be enough, and nothing is dropped
    top: neurons of which the attribution is kept, besides those above the threshold
    """

    layers: tuple[int, ...]
    steps: int
    threshold: float
    share: float | None
    common: float
    top: int = 0


class Wordings(NamedTuple):
    """A fact as it is asked for, token ids: prompts, one or more, and the answer behind each (None: the token that is
    likeliest after the first prompt). name: what errors call it; relation: equal for facts that it is common to"""

    prompts: list[list[int]]
    answers: list[list[int]] | None
    name: str
    relation: Hashable = None


@dataclass(frozen=True)
class Attributed:
    """What was found of a fact in its w wordings; a neuron is layer * d_ff + its place in the layer.

    answers: [w] tokens of each; p: [w] P(answer), the mean over its tokens, each after those before it
    by_layer: [w, L] sums over the neurons of a layer, 0 where none was looked at
    neurons: [k] int64, the ``top`` ones and those above the threshold of a wording, the strongest first
    attribution: [k] of each, the mean over wordings; wordings: [k] how many have it above their threshold
    """

    answers: list[list[int]]
    p: Tensor
    by_layer: Tensor
    neurons: Tensor
    attribution: Tensor
    wordings: Tensor

    def shared(self, share: float | None) -> Tensor:
        """The neurons [r] that more than this share of the wordings have, the strongest first."""
        least = 0 if share is None else share * len(self.p)
        return self.neurons[self.wordings > least]


def attribute(lm, facts: Sequence[Wordings], how: NeuronSettings, keep: Keep) -> list[Attributed]:
    """All facts in all wordings, in sweeps of as many facts as fit ``lm.memory``; ranks share the facts.

    Raises as ``integrate``.
    """
    facts = _answered(lm, facts)
    every = [(fact, _asked(fact)) for fact in facts]
    found: list[Attributed] = []

    def size(one) -> int:
        maps = len(one[1]) * len(how.layers) * lm.d_ff * wide(lm.dtype).itemsize
        return maps + sum(held_bytes(lm, asked, how.layers, how.steps) for asked in one[1])

    def make(some, first: int) -> dict[str, Tensor]:
        asked = [token for _, tokens in some for token in tokens]
        p, maps = integrate(lm, asked, how.layers, how.steps, scaled(bar.advance, len(some)))
        sizes = [len(tokens) for _, tokens in some]
        parts = zip(some, p.split(sizes), maps.split(sizes), strict=True)
        made = [_found(fact, of_fact, map_, how, lm.n_layers) for (fact, _), of_fact, map_ in parts]
        return {f"{name}-{i}": tensor for i, one in enumerate(made) for name, tensor in one.items()}

    with progress("integrating over keys (facts)", len(facts)) as bar:
        for group in in_groups(keep, "neurons", every, lambda rest: together(rest, size, lm.memory), make, size=size):
            for i, (fact, _) in enumerate(group.items):
                found.append(Attributed(fact.answers, *(group.part[f"{name}-{i}"] for name in _PARTS)))
            bar.resume(len(group.items) * group.found)
    return found


_PARTS = ("p", "by_layer", "neurons", "attribution", "wordings")


def chosen(facts: Sequence[Wordings], found: Sequence[Attributed], how: NeuronSettings) -> list[Tensor]:
    """By fact, its knowledge neurons [r], the strongest first."""
    mine = [one.shared(how.share) for one in found]
    places: dict[Hashable, list[int]] = {}
    for i, fact in enumerate(facts):
        places.setdefault(fact.relation, []).append(i)
    for which in places.values():
        others = len(which) - 1
        if others * how.common < 1:
            continue
        neurons, count = torch.cat([mine[i] for i in which]).unique(return_counts=True)
        common = neurons[count - 1 > how.common * others]
        for i in which:
            mine[i] = mine[i][~torch.isin(mine[i], common)]
    return mine


def _answered(lm, facts: Sequence[Wordings]) -> list[Wordings]:
    """The facts with an answer each, the model's own where none is given."""
    unknown = [fact.prompts[0] for fact in facts if fact.answers is None]
    own = iter(next_tokens(lm, unknown).tolist() if unknown else ())
    return [
        fact._replace(answers=[[next(own)]] * len(fact.prompts)) if fact.answers is None else fact for fact in facts
    ]


def _asked(fact: Wordings) -> list[Asked]:
    """Each token of each wording's answer, after those before it."""
    return [
        Asked(prompt + answer[:i], token, fact.name)
        for prompt, answer in zip(fact.prompts, fact.answers or (), strict=True)
        for i, token in enumerate(answer)
    ]


def _found(fact: Wordings, p: Tensor, maps: Tensor, how: NeuronSettings, n_layers: int) -> dict[str, Tensor]:
    """The fields of ``Attributed``, by P(answer) [tokens] and maps [tokens, layers, d_ff] of its answers' tokens."""
    lengths = [len(answer) for answer in fact.answers or ()]
    by_wording = torch.stack([part.mean(0) for part in maps.split(lengths)])
    by_layer = by_wording.new_zeros(len(lengths), n_layers)
    layers = torch.tensor(how.layers)
    by_layer[:, layers] = by_wording.sum(-1)
    flat, mean = by_wording.flatten(1), by_wording.mean(0).flatten()
    above = (flat > how.threshold * flat.amax(1, keepdim=True)).sum(0)
    some = above > 0
    some[mean.topk(min(how.top, len(mean))).indices] = True
    places = some.nonzero()[:, 0]
    places = places[mean[places].argsort(descending=True, stable=True)]
    d_ff = maps.shape[-1]
    return {
        "p": torch.stack([part.mean() for part in p.split(lengths)]), "by_layer": by_layer,
        "neurons": layers[places // d_ff] * d_ff + places % d_ff, "attribution": mean[places],
        "wordings": above[places],
    }  # fmt: skip
