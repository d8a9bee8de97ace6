"""Scoring: log-probabilities of tokens after a place, and of whole continuations."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics import ranks
from kedit_fast.basics.progress import progress, scaled
from kedit_fast.basics.state import wide
from kedit_fast.jobs.collect import collect
from kedit_fast.jobs.finite import check_answers
from kedit_fast.kernels.target_logprob import stores_no_logits, target_logprob
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.plan import PLACE, logit_rows
from kedit_fast.sweep.rows import There
from kedit_fast.sweep.runs import RunList, add_edited, first_edited, padded, spans
from kedit_fast.sweep.sites import Site


class Score:
    """``logprob`` [k] or [k, m] fp32 nats: log p(targets | place), read after the last layer at run [k], pos [k].

    targets: [k] int64, or [k, m] for several tokens a place
    """

    def __init__(self, lm, run: Tensor, pos: Tensor, targets: Tensor):
        self._lm, self.run, self.pos, self.targets = lm, run, pos, There(targets)
        self._read = torch.full(targets.shape, torch.nan, dtype=wide(lm.dtype), device=lm.device)

    @property
    def logprob(self) -> Tensor:
        """On the CPU."""
        return self._read.cpu()

    def sites(self, layer):
        return (Site.layer_out,) if layer == self._lm.n_layers - 1 else ()

    def reads(self, layer):
        return self.run, self.pos

    def at(self, site, layer, x, call):
        which, row = call.find(self.run, self.pos)
        if len(which):
            self._read[which] = logprobs(self._lm, x[row], self.targets.on(x.device)[which])
        return None


def logprobs(lm, h: Tensor, targets: Tensor) -> Tensor:
    """log p of targets [rows] or [rows, k] after hidden states h [rows, d] of the last layer, in nats; where logits are
    stored, of a few rows at a time."""
    if stores_no_logits(h, lm.fusable_head):  # by chunks of logits a trace of an 8B shape read its head 645 times
        return target_logprob(h, lm.fusable_head, targets, lm.n_vocab)
    step = logit_rows(lm)
    parts = zip(h.split(step), targets.split(step), strict=True)
    return torch.cat([target_logprob(rows, lm.fusable_head, some, lm.n_vocab) for rows, some in parts])


def likeliest_tokens(lm, h: Tensor) -> Tensor:
    """[rows] int64: the likeliest next token after each hidden state h [rows, d]; logits are not kept."""
    parts = [lm.head(rows).argmax(-1) for rows in h.split(logit_rows(lm))]
    return torch.cat(parts)


def divergences(lm, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || q) in nats [rows] fp64, whether the likeliest token is another [rows] bool), on the CPU, of the next
    token after hidden states [rows, d] of the last layer without (p) and with (q) a change of the model.

    KL = Σ_v p_v (log p_v - log q_v), in fp64, for of a small change nearly everything cancels; logits of a few rows at
    a time. Where q is NaN, KL is infinite and the token another; where p is, KL is NaN.
    """
    step = max(1, logit_rows(lm) // 4)  # both models' logits, and each of them in fp64
    parts = [_divergences(lm, *rows) for rows in zip(before.split(step), after.split(step), strict=True)]
    kl, differs = zip(*parts, strict=True)
    return torch.cat(kl), torch.cat(differs)


def _divergences(lm, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    log_p, log_q = (_log_probs(lm, h) for h in (before, after))
    p = log_p.exp()
    kl = torch.where(p != 0, p * (log_p - log_q), 0.0).sum(-1)
    unknown, broken = p.isnan().any(-1), log_q.isnan().any(-1)
    differs = broken | (log_p.argmax(-1) != log_q.argmax(-1))
    kl = kl.clamp(min=0).masked_fill(broken, torch.inf).masked_fill(unknown, torch.nan)
    return kl.cpu(), differs.cpu()


def _log_probs(lm, h: Tensor) -> Tensor:
    """[rows, V] fp64; on the CPU where the device has none."""
    logits = lm.head(h)
    return (logits.cpu() if logits.device.type == "mps" else logits).double().log_softmax(-1)


class Places(NamedTuple):
    """Where (prompt, target) pairs are read: at each token that a target token follows.

    sequences: a token list a pair, what must be run; pair, pos, targets: [k] int64, of each target token; lengths: of
    the targets.
    """

    sequences: list[list[int]]
    pair: Tensor
    pos: Tensor
    targets: Tensor
    lengths: list[int]


def continuation_places(pairs: list[tuple[list[int], list[int]]]) -> Places:
    """The places of (prompt ids, target ids) pairs; targets of one pair stand together."""
    lengths = [len(target) for _, target in pairs]
    start = torch.tensor([len(prompt) - 1 for prompt, _ in pairs], dtype=torch.int64)
    pair, pos = spans(start, start + torch.tensor(lengths, dtype=torch.int64))
    targets = [token for _, target in pairs for token in target]
    return Places(
        [prompt + target[:-1] for prompt, target in pairs],
        pair,
        pos,
        torch.tensor(targets, dtype=torch.int64),
        lengths,
    )


def text_logprobs(
    lm, sequences: list[list[int]], label: str = "measuring perplexity", alone: bool = False
) -> list[list[Tensor]]:
    """log p of each token but the first given those before it in its sequence: [base, edited], lists of [len - 1].
    alone: the model as its edits have it, without the base: [edited]

    An edit that puts text before prompts puts it before such a sequence too, behind its first token; to a routed edit
    the whole sequence is the prompt. Ranks share the sequences. Raises ValueError where the base model gives NaN; the
    edited one may.
    """
    with progress(f"{label} (tokens)", sum(map(len, sequences))) as bar:
        found = ranks.joined(ranks.shared(sequences, lambda some: _text_logprobs(lm, some, bar, alone), len))
    lengths = [len(ids) - 1 for ids in sequences]
    return [list(found[side].split(lengths)) for side in (("edited",) if alone else ("base", "edited"))]


def _text_logprobs(lm, sequences: list[list[int]], bar, alone: bool) -> dict[str, Tensor]:
    """{"base", "edited": [tokens]} of the sequences behind each other."""
    runs = RunList()
    tokens, length = bare, bare_length = padded(sequences)
    first, owners = first_edited(lm), lm.owners(sequences)
    texts = [
        lm.prompting and owner >= 0 and lm.before(lm.tokenizer.decode(ids), owner)
        for ids, owner in zip(sequences, owners.tolist(), strict=True)
    ]
    heads = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts]
    shift = torch.tensor([len(head) for head in heads])
    if shift.any():
        tokens, length = padded([ids[:1] + head + ids[1:] for ids, head in zip(sequences, heads, strict=True)])
    acted = (owners >= 0).nonzero()[:, 0]
    # No trie: a run that owns all its rows takes the dense attention, up to 200 times cheaper on long text.
    if alone:
        sides = [runs.add(tokens, length=length, owner=owners, prompt_end=length - 1)]
    else:
        sides = [runs.add(bare, length=bare_length, owner=-1)]
        if len(acted) and (shift.any() or first is not None):
            begin = {} if shift.any() else {"branch_layer": first, "source": sides[0][acted]}
            how = {"length": length[acted], "owner": owners[acted], "prompt_end": length[acted] - 1}
            sides.append(sides[0].index_copy(0, acted, runs.add(tokens[acted], **how, **begin)))
    places, n = continuation_places([(s[:1], s[1:]) for s in sequences]), sum(map(len, sequences))
    run, moved = torch.cat([side[places.pair] for side in sides]), places.pos + shift[places.pair]
    pos = moved if alone else torch.cat([places.pos, moved][: len(sides)])
    job = Score(lm, run, pos, places.targets.repeat(len(sides)))
    sweep(replace(lm, prompted=True), runs.runs(), [job], held=PLACE * len(run), advance=scaled(bar.advance, n))
    read = job.logprob.chunk(len(sides))
    if alone:
        return {"edited": read[0]}
    check_answers(replace(lm, edits=()), read[0], lambda i: places.sequences[places.pair[i]])
    return {"base": read[0], "edited": read[-1]}


@torch.no_grad()
def next_token_probs(lm, prompts: list[list[int]], owners: Tensor | None = None) -> Tensor:
    """[n, V] probabilities of the next token after each prompt, with the model's edits; owners: as in ``generate``.
    Raises ValueError for NaN."""
    h = _last_rows(lm, prompts, owners)
    probs = lm.head(h).to(wide(h.dtype)).softmax(-1)
    check_answers(lm, probs.amax(-1), prompts.__getitem__)
    return probs


@torch.no_grad()
def next_tokens(lm, prompts: list[list[int]]) -> Tensor:
    """[n] the likeliest next token after each prompt, with the model's edits; logits of a few rows at a time. Ranks
    share the prompts. Raises ValueError for NaN."""

    def tokens(some: list[list[int]]) -> dict[str, Tensor]:
        parts = [lm.head(rows).max(-1) for rows in _last_rows(lm, some).split(logit_rows(lm))]
        check_answers(lm, torch.cat([part.values for part in parts]), some.__getitem__)
        return {"tokens": torch.cat([part.indices for part in parts])}

    return ranks.joined(ranks.shared(prompts, tokens, len))["tokens"]


def _last_rows(lm, prompts: list[list[int]], owners: Tensor | None = None) -> Tensor:
    """[n, d] after the last layer, at each prompt's last token."""
    runs, last = RunList(), torch.tensor([len(p) - 1 for p in prompts])
    number = add_edited(lm, runs, prompts, lm.owners(prompts) if owners is None else owners, ends=last)[1]
    return collect(lm, runs.runs(), Site.layer_out, [lm.n_layers - 1], number, last)[lm.n_layers - 1]
