"""What ROME and MEMIT share: the value that makes the model say the new answer, and the key of a fact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.oracle.access import changing, embedding, frozen, lookup, read_key, site_module, target_ids

KL_TEMPLATE = "{} is a"
LOSS_GOAL = 0.05  # nats: below it the value is good enough


class Fact(NamedTuple):
    """prompt has one {} for the subject, and so has each of phrasings, further prompts for the value alone."""

    prompt: str
    subject: str
    target_new: str
    phrasings: tuple[str, ...] = ()


class Value(NamedTuple):
    """value and init: [d] in float32, or float64 for a float64 model; losses: the total before each update, nats."""

    value: Tensor
    init: Tensor
    n_iterations: int
    losses: list[float]


class Batch(NamedTuple):
    """One row a prompt (in each context, then each phrasing), one a keep, then the KL row; right padded.

    ids, mask: [rows, tokens]; lookups: [rows]; starts: position that predicts the first target token, [prompts];
    target: [target tokens]; ends: [keeps] last position.
    """

    ids: Tensor
    mask: Tensor
    lookups: Tensor
    starts: Tensor
    target: Tensor
    ends: Tensor


def in_context(context: str, prompt: str) -> str:
    """The template of a prompt (with {} for the subject) inside a context (with {} for the prompt)."""
    before, after = context.split("{}")
    return before + prompt + after


def value_batch(
    tok: Any, fact: Fact, contexts: Sequence[str], device: torch.device, keeps: Sequence[str] = ()
) -> Batch:
    """Prompts in all contexts and phrasings, each followed by all target tokens but the last; keeps; the KL row.

    Differs: the published code appends the decoded target as text and tokenizes again; here its tokens are appended.
    """
    target = target_ids(tok, fact.target_new)
    prompts = [lookup(tok, in_context(context, fact.prompt), fact.subject) for context in contexts]
    prompts += [lookup(tok, phrasing, fact.subject) for phrasing in fact.phrasings]
    others = [lookup(tok, keep, fact.subject) for keep in [*keeps, KL_TEMPLATE]]
    rows = [ids + target[:-1] for ids, _ in prompts] + [ids for ids, _ in others]
    longest = max(map(len, rows))
    pad = tok.pad_token_id or 0
    return Batch(
        ids=torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device),
        mask=torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device),
        lookups=torch.tensor([index for _, index in [*prompts, *others]], device=device),
        starts=torch.tensor([len(ids) - 1 for ids, _ in prompts], device=device),
        target=torch.tensor(target, device=device),
        ends=torch.tensor([len(ids) - 1 for ids, _ in others[:-1]], dtype=torch.int64, device=device),
    )


def nll(log_p: Tensor, batch: Batch) -> Tensor:
    """Mean over prompts of the mean over target tokens of -log p(token), from log p [rows, tokens, vocabulary]."""
    rows = torch.arange(len(batch.starts), device=log_p.device)[:, None]
    places = batch.starts[:, None] + torch.arange(len(batch.target), device=log_p.device)
    return -log_p[rows, places, batch.target].mean(1).mean(0)


def says_target(log_p: Tensor, batch: Batch) -> bool:
    """Whether greedy decoding under teacher forcing gives every target token in every prompt."""
    rows = torch.arange(len(batch.starts), device=log_p.device)[:, None]
    places = batch.starts[:, None] + torch.arange(len(batch.target), device=log_p.device)
    return bool((log_p[rows, places].argmax(-1) == batch.target).all())


def optimize_value(
    model: nn.Module,
    tok: Any,
    fact: Fact,
    contexts: Sequence[str],
    layer: int,
    site: str = "mlp_out",
    *,
    lr: float = 0.5,
    steps: int = 20,
    weight_decay: float = 0.5,
    kl_factor: float = 0.0625,
    clamp: float = 4.0,
    hits: int = 0,
    keeps: Sequence[str] = (),
    keep_factor: float = 0.0,
) -> Value:
    """v* (site mlp_out) or z (site layer_out): init + δ, δ found by Adam (Meng et al. 2022, eq. 4; MEMIT, eq. 16).

    loss(δ) = NLL(target) + kl_factor KL(p_δ || p_0) + weight_decay ||δ|| / ||init||^2. δ is added at the lookup token
    of every row; the KL is taken there too, in the row "{subject} is a". init is the site's value at the lookup token
    of the first context, which must be the bare "{}". At most `steps` forwards and `steps` - 1 updates; stops when the
    loss is under 0.05. After each update δ is pulled back to ||δ|| <= clamp ||init||, Adam's state is kept.

    contexts: templates with {} for the prompt, flat, "{}" first.
    keeps: templates with {} for the subject: + keep_factor * mean over them of KL(p_0 || p_δ) at their last token.
    hits: stops, too, when so many iterations have found all target tokens the likeliest in all contexts; 0: never.
    Differs: MEMIT's published code projects z's loss by hand from the last norm on, leaving out logit soft caps; this
    takes the model's own logits, which are the same where there is no cap.
    """
    batch = value_batch(tok, fact, contexts, model.device, keeps)
    kept = torch.arange(len(keeps), device=model.device) + len(batch.starts)
    weight = embedding(model).weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    delta = torch.zeros(weight.shape[1], device=weight.device, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=lr)
    change, seen = _adder(delta, batch.lookups)
    losses: list[float] = []
    found = 0
    with frozen(model), torch.enable_grad(), changing([(site_module(model, layer, site), change)]):
        for iteration in range(steps):
            log_p = model(input_ids=batch.ids, attention_mask=batch.mask).logits.log_softmax(-1)
            log_p_kl = log_p[-1, batch.lookups[-1]]
            log_p_kept = log_p[kept, batch.ends]
            if iteration == 0:
                init, log_p_start, kept_start = seen[0], log_p_kl.detach(), log_p_kept.detach()
            kl = (log_p_kl.exp() * (log_p_kl - log_p_start)).sum()
            loss = nll(log_p, batch) + kl_factor * kl + weight_decay * delta.norm() / init.norm() ** 2
            if keeps:
                loss = loss + keep_factor * (kept_start.exp() * (kept_start - log_p_kept)).sum(1).mean()
            losses.append(loss.item())
            found += says_target(log_p, batch)
            if loss < LOSS_GOAL or iteration == steps - 1 or (hits and found == hits):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            _pull_back(delta, clamp * init.norm())
    return Value((init + delta).detach(), init, len(losses), losses)


def _adder(delta: Tensor, lookups: Tensor) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """A change of [rows, tokens, d] that adds δ at each row's lookup token, and a list that it gives row 0's value."""
    seen: list[Tensor] = []

    def change(hidden: Tensor) -> Tensor:
        rows = torch.arange(len(lookups), device=hidden.device)
        if not seen:
            seen.append(hidden[0, lookups[0]].detach().to(delta.dtype))
        hidden = hidden.clone()
        hidden[rows, lookups] = (hidden[rows, lookups] + delta).to(hidden.dtype)
        return hidden

    return change, seen


@torch.no_grad()
def _pull_back(delta: Tensor, longest: Tensor) -> None:
    """Project δ onto the ball of that radius, in place."""
    norm = delta.norm()
    if norm > longest:
        delta *= longest / norm


def keys(model: nn.Module, tok: Any, fact: Fact, context_groups: Sequence[Sequence[str]], layer: int) -> Tensor:
    """k* [d_ff]: the down projection's input at the lookup token, mean of the groups' means over their contexts.

    MEMIT passes [["{}"], [the sampled contexts]], so the bare prompt weighs one half; ROME passes one group. No target
    is appended; each context runs alone.
    """
    means = []
    for contexts in context_groups:
        places = [lookup(tok, in_context(context, fact.prompt), fact.subject) for context in contexts]
        means.append(torch.stack([read_key(model, ids, index, layer) for ids, index in places]).mean(0))
    return torch.stack(means).mean(0)
