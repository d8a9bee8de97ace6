"""Scoring: log-probabilities of tokens after a place, and of whole continuations."""

import torch
from torch import Tensor

from ..kernels.target_logprob import target_logprob
from ..sites import Site
from ..sweep.engine import sweep
from ..sweep.runs import RunList, add_sequences
from .collect import collect


class Score:
    """``logprob`` [k] or [k, m] fp32 nats: log p(targets | place), read after the last layer at run [k], pos [k].

    targets: [k] int64, or [k, m] for several tokens a place
    """

    def __init__(self, lm, run: Tensor, pos: Tensor, targets: Tensor):
        self._lm, self.run, self.pos, self.targets = lm, run, pos, targets
        self.logprob = torch.full(targets.shape, torch.nan, dtype=torch.float64 if lm.dtype == torch.float64 else torch.float32)

    def sites(self, layer):
        return (Site.layer_out,) if layer == self._lm.n_layers - 1 else ()

    def reads(self, layer):
        return self.run, self.pos

    def at(self, site, layer, x, call):
        which, row = call.find(self.run, self.pos)
        if len(which):
            h = x[row.to(x.device)]
            self.logprob[which] = target_logprob(h, self._lm.head, self.targets[which], self._lm.n_vocab).cpu()
        return None


def add_edited(lm, runs: RunList, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Adds each sequence as a base run and, where ``lm`` carries edits, as an edited run that branches from it.

    Gives the run numbers (base [n], edited [n]). The edited run begins as its base run at the first edited layer, so
    everything below is shared; without an edit both are the same run.
    """
    base = add_sequences(runs, sequences, owner=-1)
    layers = [layer for edit in lm.edits for layer in edit.deltas]
    if not layers:
        return base, base
    return base, add_sequences(runs, sequences, branch_layer=min(layers), owner=0, source=base)


def continuation_logprobs(lm, pairs: list[tuple[list[int], list[int]]]) -> tuple[list[Tensor], list[Tensor]]:
    """log p of each target token given what stands before it, for (prompt ids, target ids) pairs: (base, edited).

    Each a list of [len(target)] fp32 nats. One sweep for all pairs, both models; equal prefixes are one row.
    """
    runs = RunList()
    base, edited = add_edited(lm, runs, [prompt + target[:-1] for prompt, target in pairs])
    lengths = torch.tensor([len(target) for _, target in pairs])
    pair = torch.arange(len(pairs)).repeat_interleave(lengths)
    step = torch.cat([torch.arange(n) for n in lengths.tolist()])
    pos = torch.tensor([len(prompt) - 1 for prompt, _ in pairs])[pair] + step
    targets = torch.tensor([token for _, target in pairs for token in target])
    both = Score(lm, torch.cat([base[pair], edited[pair]]), pos.repeat(2), targets.repeat(2))
    sweep(lm, runs.runs(), [both])
    halves = both.logprob.chunk(2)
    return tuple(list(half.split(lengths.tolist())) for half in halves)


def next_token_probs(lm, prompts: list[list[int]]) -> Tensor:
    """[n, V] probabilities of the next token after each prompt, with the model's edits."""
    runs = RunList()
    number = add_edited(lm, runs, prompts)[1]
    last = torch.tensor([len(p) - 1 for p in prompts])
    h = collect(lm, runs.runs(), Site.layer_out, [lm.n_layers - 1], number, last)[lm.n_layers - 1]
    with torch.no_grad():
        return lm.head(h).to(torch.promote_types(h.dtype, torch.float32)).softmax(-1)


def text_logprobs(lm, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(base, edited): mean log p of a token given those before it in its sequence [n], for each sequence."""
    pairs = [(s[:1], s[1:]) for s in sequences]
    return tuple(torch.stack([x.mean() for x in side]) for side in continuation_logprobs(lm, pairs))
