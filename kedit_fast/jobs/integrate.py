"""Integrated gradients over the keys of MLPs: what each neuron of each layer gives to an answer (Dai et al. 2022,
Knowledge Neurons, arXiv:2104.08696, eq. 3; Sundararajan et al. 2017, arXiv:1703.01365).

    Attr(k)_i = k_i / m  Σ_{s=1..m}  ∂ P(answer | the key is (s/m) k) / ∂ k_i

k [d_ff] is the key of one layer at the last token before the answer. A key that is scaled there changes only that
token's row, from its layer on: every step of every layer is a run that branches there and owns one row, all of them in
one sweep, and one backward pass takes the gradients of all. Over the neurons of a layer the attributions add up to
P(answer) - P(answer | the key is 0), as m grows.

A norm behind the down projection (gemma2, gemma3, olmo2) would undo a key's factor: P would be the same all the way and
jump at 0. There the norm divides as it does for the whole key, so that the residual stream gets the same share.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics.progress import scaled as part_of
from kedit_fast.basics.state import wide
from kedit_fast.jobs.collect import GraphRows
from kedit_fast.jobs.finite import check_answers
from kedit_fast.kernels.target_logprob import target_logprob
from kedit_fast.model.seam import frozen
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.plan import graph_bytes, logit_bytes, logit_rows, together, too_large
from kedit_fast.sweep.rows import There
from kedit_fast.sweep.runs import RunList, add_sequences
from kedit_fast.sweep.sites import Site

LOGITS = 4  # logits that a row holds while its gradient is taken
FORTH = 1 / 3  # of the work: the way back takes two products for each one forth


class Asked(NamedTuple):
    """A token that is asked for: tokens, what stands before it; answer: the token; name: what errors call it."""

    tokens: list[int]
    answer: int
    name: str = ""


class ScaledKeys:
    """Puts share[i] times the key in its place in layer[i] at (run[i], pos[i]), and keeps it for its gradient.

    run, pos, layer: [k] int64; share: [k]
    """

    ahead = True  # an edited down projection reads the scaled key

    def __init__(self, run: Tensor, pos: Tensor, layer: Tensor, share: Tensor):
        self.run, self.pos, self.layer, self.share = run, pos, layer, share
        every = {i: (layer == i).nonzero()[:, 0] for i in layer.unique().tolist()}
        self._places = {i: (There(mine), run[mine], pos[mine], There(share[mine])) for i, mine in every.items()}
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def sites(self, layer):
        return (Site.mlp_key,) if layer in self._places else ()

    def reads(self, layer):
        return None

    def at(self, site, layer, x, call):
        which, row, share = self.found(layer, call)
        if not len(which):
            return None
        key = x[row].detach()
        scaled = (key * share[:, None].to(key)).requires_grad_()  # also again: autograd counts what it keeps
        if not call.again:
            self._seen.append((which, key, scaled))
        return x.index_copy(0, row, scaled)

    def found(self, layer: int, call) -> tuple[Tensor, Tensor, Tensor]:
        """(which of them, their rows, their shares) of a call in a layer."""
        mine, run, pos, share = self._places[layer]
        which, row = call.find(run, pos)
        return mine.on(which.device)[which], row, share.on(which.device)[which]

    def products(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(which [n], key times gradient [n, d_ff], fp32 or fp64), after the backward pass; given away."""
        seen, self._seen = self._seen, []
        for which, key, scaled in seen:
            assert scaled.grad is not None
            yield which, (key.to(wide(key.dtype)) * scaled.grad)


class HeldNorm:
    """Has the norm behind the down projection divide the rows of scaled keys as it does those of the whole keys."""

    def __init__(self, lm, keys: ScaledKeys):
        self.lm, self.keys = lm, keys
        self._out: Tensor | None = None  # [n, d] what the down projection made of the scaled keys of this call

    def sites(self, layer):
        return (Site.mlp_out, Site.mlp_norm) if self.keys.sites(layer) else ()

    def reads(self, layer):
        return None

    def at(self, site, layer, x, call):
        which, row, share = self.keys.found(layer, call)
        if not len(which):
            return None
        if site is Site.mlp_out:
            self._out = x[row]
            return None
        out, self._out = self._out, None
        assert out is not None
        whole = out.detach() / share[:, None].to(out)
        norm = self.lm.source.layers[layer].get_submodule(self.lm.family.post_norm)
        factor = torch.where(whole == 0, 0.0, norm.forward(whole) / whole)  # not a call: hooks stand on it
        return x.index_copy(0, row, out * factor.to(out))


def integrate(
    lm, asked: Sequence[Asked], layers: Sequence[int], steps: int, advance: Callable[[float], None] | None = None
) -> tuple[Tensor, Tensor]:
    """(P(answer) [n], attributions [n, layers, d_ff]), fp32 or fp64 on the CPU, of n tokens that are asked for.

    layers: ascending; steps: m. With the model's edits. Two passes over the weights for what ``lm.memory`` holds; a
    token whose layers do not fit together is cut by layers. Raises ValueError for NaN, and, with the bytes needed,
    where one layer of one token does not fit.
    """
    p, maps = torch.zeros(len(asked), dtype=wide(lm.dtype)), torch.zeros(len(asked), len(layers), lm.d_ff)
    maps, place = maps.to(p.dtype), {layer: i for i, layer in enumerate(layers)}
    for which, some, recompute in _packs(lm, asked, layers, steps):
        share = len(which) * len(some) / (len(asked) * len(layers))
        found, made = _pack(lm, [asked[i] for i in which], some, steps, recompute, part_of(advance, share))
        p[which] = found
        maps[torch.tensor(which)[:, None], torch.tensor([place[layer] for layer in some])] = made
    return p, maps


def held_bytes(lm, one: Asked, layers: Sequence[int], steps: int, recompute: bool = False) -> int:
    """Bytes that a token's runs of these layers hold at the height of the work, from above."""
    n, recomputes = len(one.tokens), recompute or not lm.source.in_memory
    total = graph_bytes(lm, n, n, n * n, lm.n_layers, recomputes=recomputes)
    of_keys = 3 * steps * lm.d_ff * wide(lm.dtype).itemsize  # key, scaled key, gradient
    for layer in layers:
        above = lm.n_layers - layer
        total += of_keys + graph_bytes(lm, steps, steps * n, steps * n, above, recomputes=recomputes)
    return total + logit_bytes(lm, LOGITS * min(logit_rows(lm), 1 + steps * len(layers)))


def _packs(lm, asked: Sequence[Asked], layers: Sequence[int], steps: int) -> Iterator[tuple[list[int], list, bool]]:
    """(which tokens, which layers, whether layers have to be computed again) of each pack."""
    for group in together(range(len(asked)), lambda i: held_bytes(lm, asked[i], layers, steps), lm.memory):
        one = asked[group[0]]
        if len(group) > 1 or held_bytes(lm, one, layers, steps) <= lm.memory:
            yield group, list(layers), False
            continue
        for recompute in (False, True):
            alone = held_bytes(lm, one, (), steps, recompute)
            size = {layer: held_bytes(lm, one, [layer], steps, recompute) - alone for layer in layers}
            if alone + max(size.values()) <= lm.memory:
                for some in together(layers, size.__getitem__, lm.memory - alone):
                    yield group, some, recompute
                break
        else:
            need = alone + max(size.values())
            raise too_large(f"integrating over the keys of one layer for {one.name}", need, lm.memory)


def _pack(lm, asked: list[Asked], layers: list[int], steps: int, recompute: bool, advance) -> tuple[Tensor, Tensor]:
    """(P(answer) [n], attributions [n, layers, d_ff]) by one sweep forth and back."""
    n, m, runs = len(asked), len(layers), RunList()
    base = add_sequences(runs, [one.tokens for one in asked], owner=lm.run_owner)
    layer = torch.tensor(layers).repeat_interleave(steps)
    share = (torch.arange(1, steps + 1, dtype=torch.float64) / steps).repeat(m * n)
    last, answer = (torch.tensor(x) for x in ([len(one.tokens) - 1 for one in asked], [one.answer for one in asked]))
    branches = [
        runs.add(one.tokens, parent=base[i], branch_layer=layer, first_pos=last[i], owner=lm.run_owner)
        for i, one in enumerate(asked)
    ]
    run, pos = torch.cat(branches), last.repeat_interleave(m * steps)
    keys = ScaledKeys(run, pos, layer.repeat(n), share)
    top = GraphRows(lm.n_layers - 1, torch.cat([base, run]), torch.cat([last, pos]))
    held = [HeldNorm(lm, keys)] if lm.ends_in_norm else []
    sweep(lm, runs.runs(), [keys, *held, top], grad=True, recompute=recompute, advance=part_of(advance, FORTH))
    p = _descended(lm, top.take(), torch.cat([answer, answer.repeat_interleave(m * steps)]))
    check_answers(lm, p, lambda i: asked[i if i < n else (i - n) // (m * steps)].tokens)
    if advance is not None:
        advance(1 - FORTH)
    made = torch.zeros(n * m, lm.d_ff, dtype=p.dtype)
    for which, product in keys.products():
        made.index_add_(0, which.cpu() // steps, product.cpu().to(made))
    return p[:n], made.view(n, m, -1) / steps


def _descended(lm, rows: Tensor, answers: Tensor) -> Tensor:
    """[k] P(answer) after rows [k, d] of the last layer; takes their gradients down. Logits of a few rows at a time."""
    leaf, found, step = rows.detach().requires_grad_(), [], logit_rows(lm)
    for first in range(0, len(rows), step):
        some = slice(first, first + step)
        with frozen(lm.model):
            p = target_logprob(leaf[some], lm.fusable_head, answers[some], lm.n_vocab).exp()
        p.sum().backward()
        found.append(p.detach().cpu())
    rows.backward(leaf.grad)
    return torch.cat(found)
