"""Generation: a prefill sweep, then a sweep of one row a run for each token, over one KV store."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kedit_fast.basics import checks, ranks
from kedit_fast.basics.progress import progress
from kedit_fast.jobs.collect import Collect
from kedit_fast.jobs.finite import check_answers, is_broken
from kedit_fast.model.seam import prepared
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.plan import RowCost, free, logit_bytes
from kedit_fast.sweep.runs import RunList, prefixes
from kedit_fast.sweep.sites import Site
from kedit_fast.sweep.store import KVStore

LOGITS = 4  # numbers of the vocabulary's width that a text holds while its next token is chosen


@torch.no_grad()
def generate(
    lm,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    draw: torch.Generator | None = None,
    repetition_penalty: float | None = None,
    stop: bool = True,
    until: Callable[[list[int]], bool] | None = None,
    nan_ends: bool = False,
    owners: Tensor | None = None,
    after: Callable[[list[list[int]]], None] | None = None,
    label: str = "generating",
) -> list[list[int]]:
    """Token ids that follow each prompt, with the model's edits; greedy at temperature 0, else sampled from ``seed``.

    As many texts at a time as ``lm.memory`` holds, those of like length together; what is sampled depends on that cut.
    Ranks share the texts of each batch, and draw as one of them would.

    draw: a generator to sample from, in place of a seed; after: is given the tokens made so far, after each step, where
        all texts go in one batch
    repetition_penalty: what the logits of tokens that are in the text already, its prompt included, are divided by, or
        multiplied where they are negative (Keskar et al. 2019, CTRL); None: ``lm.repetition_penalty``, 1: none
    top_k: sample among the k likeliest tokens (None: all); stop: end a run at any of ``lm.stop_tokens``; until: ends a
        text where it says so of the tokens made of it so far, which are kept
    nan_ends: end a text where the model gives NaN, which an edit that overflows may bring about, in place of an error.
    owners: [n] whose edit acts on each text (``LM.as_read``); None: as ``LM.owners`` has it of the prompts
    Raises ValueError, before any work, for an empty prompt, a length below 1 or beyond the model's positions, sampling
    without a seed; later for a model that gives NaN.
    """
    checks.whole("max_new_tokens", max_new_tokens, least=1, like=20)
    checks.optional(checks.whole, "top_k", top_k, least=1, most=lm.n_vocab, like=5)
    penalty = lm.repetition_penalty if repetition_penalty is None else repetition_penalty
    checks.number("repetition_penalty", penalty, above=0, like=1.1)
    if until is not None and not callable(until):
        checks.refuse("until", until, "a function of the tokens made so far that says whether the text ends")
    if not prompts or not all(prompts):
        raise ValueError("generate needs prompts of at least one token")
    draw = _drawing(temperature, seed, draw)
    longest = max(map(len, prompts), default=0)
    lm.check_length(longest + max_new_tokens - 1, f"a prompt of {longest} and {max_new_tokens} new tokens")
    ended = partial(_ended, lm.stop_tokens if stop else frozenset(), until)
    read = partial(_logits, lm, nan_ends=nan_ends, penalty=penalty)
    owners = lm.owners(prompts) if owners is None else owners
    cuts = list(batches(lm, [len(prompt) for prompt in prompts], max_new_tokens))
    made: list[list[int]] = [[] for _ in prompts]
    with progress(f"{label} (tokens)", max_new_tokens * len(cuts)) as bar:
        for number, batch in enumerate(cuts, 1):
            mine = ranks.mine([len(prompts[i]) for i in batch])
            draws = None if draw is None else partial(_draws, (len(batch), lm.n_vocab), mine, draw)
            choose = partial(_choose, temperature=temperature, top_k=top_k, draws=draws)
            tell = after if len(cuts) == 1 else None
            own = [(prompts[batch[i]], int(owners[batch[i]])) for i in mine]
            for i, text in zip(batch, _written(lm, own, max_new_tokens, read, choose, ended, tell, bar), strict=True):
                made[i] = text
            bar.advance(number * max_new_tokens - bar.done)  # where all texts ended early
    return made


def _drawing(temperature: float, seed: int | None, draw: torch.Generator | None) -> torch.Generator | None:
    """The generator to sample from; None at temperature 0. Raises ValueError for sampling that nobody could repeat."""
    checks.number("temperature", temperature, least=0, like=1.0)
    checks.optional(checks.seed, "seed", seed)
    if temperature == 0:
        return None
    if draw is not None:
        return draw
    if seed is None:
        raise ValueError("sampling (temperature > 0) needs a seed, so that the text can be made again")
    return torch.Generator().manual_seed(seed)


@ranks.joint()
def _written(lm, prompts, max_new_tokens: int, read, choose, ended, after, bar) -> list[list[int]]:
    """What follows each of the prompts of one batch, of all ranks. prompts: this rank's, with the owner of each; read:
    as ``_logits``; choose: logits [n, V] of its texts -> tokens [n]; ended: as ``_ended``

    All ranks take as many steps, for each of them draws for all texts.
    """
    cache = _Cache(lm, prompts, max_new_tokens) if prompts else None
    with prepared(lm.model, lm.family):  # once, not for each token: of a small model that is a tenth of the time
        return _of_all(_steps(cache, len(prompts), max_new_tokens, read, choose, ended, after, bar))


def _steps(cache: "_Cache | None", n: int, max_new_tokens: int, read, choose, ended, after, bar):
    """What follows each of n texts, of this rank."""
    made: list[list[int]] = [[] for _ in range(n)]
    running = torch.ones(n, dtype=torch.bool)
    for _ in range(max_new_tokens):
        tokens = choose(read(cache, running) if cache is not None and running.any() else None)
        for i in running.nonzero()[:, 0].tolist():
            running[i] = not ended(made[i], int(tokens[i]))
        if after is not None:
            after(_of_all(made))
        bar.advance()
        if not ranks.anyone(bool(running.any())):
            break
        if cache is not None and running.any():
            cache.append(tokens)
    return made


def _ended(ends: frozenset[int], until: Callable | None, made: list[int], token: int) -> bool:
    """Whether a text ends with its next token, which is put to what was made of it unless it is an end token."""
    if token in ends:
        return True
    made.append(token)
    return until is not None and until(made)


def _of_all(made: list[list[int]]) -> list[list[int]]:
    """The texts of all ranks, in order."""
    return [text for of_rank in ranks.gathered_json(made) for text in of_rank]


def _logits(lm, cache: "_Cache", running: Tensor, nan_ends: bool, penalty: float) -> Tensor:
    """[n, V] after each text, those of its own tokens penalized. A text does not run on where the model gives NaN, or
    that is an error unless ``nan_ends``."""
    logits = lm.head(cache.advance())
    largest = logits.amax(-1).cpu()
    if not nan_ends:
        check_answers(lm, largest.where(running, 0.0), cache.text)
    broken = is_broken(largest)
    running &= ~broken
    if broken.any():  # its rows go on beside the others, and nobody reads them
        logits = logits.masked_fill(broken[:, None].to(logits.device), 0.0)
    return logits if penalty == 1 else _penalized(logits, cache.tokens().to(logits.device), penalty)


def _penalized(logits: Tensor, said: Tensor, penalty: float) -> Tensor:
    """Logits [n, V] in fp32, or wider, with those of ``said`` [n, tokens] divided by the penalty, or multiplied."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = logits.gather(1, said)
    return logits.scatter(1, said, torch.where(own < 0, own * penalty, own / penalty))


def batches(lm, lengths: list[int], max_new_tokens: int) -> Iterator[list[int]]:
    """Numbers of the texts of each batch, ascending. Keys and values of a batch stay for all layers, in a slab of the
    longest prompt's length for each text; and each text has a row of logits."""
    cost = RowCost.of(lm)
    slot = 2 * lm.n_layers * lm.n_key_heads * lm.head_dim * lm.dtype.itemsize + cost.kept + cost.position
    logits = logit_bytes(lm, LOGITS)
    batch: list[int] = []
    shortest = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        width = lengths[i] + max_new_tokens
        fits = (len(batch) + 1) * (width * slot + logits) <= free(lm)
        if batch and (not fits or width > 3 * shortest):
            yield sorted(batch)
            batch = []
        shortest = shortest if batch else width
        batch.append(i)
    if batch:
        yield sorted(batch)


def _draws(shape: tuple[int, int], mine: range, draw: torch.Generator) -> Tensor:
    """[mine, V] of Exp(1): this rank's rows of those of a whole batch, so that all ranks' generators move alike."""
    return torch.empty(shape).exponential_(generator=draw)[mine.start : mine.stop]


def _choose(logits: Tensor | None, temperature: float, top_k: int | None, draws) -> Tensor | None:
    """[n] one token for each row of logits [n, V]; None, of texts that have all ended, draws without choosing.

    draws: gives [n, V] of Exp(1); a token is the largest p / Exp(1), which is what ``torch.multinomial`` gives, to the
        bit. None: the likeliest token
    """
    if draws is None:
        return logits if logits is None else logits.argmax(-1).cpu()
    against = draws()
    if logits is None:
        return None
    logits = logits.float().cpu() / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[:, -1:], -torch.inf)
    return (logits.softmax(-1) / against).argmax(-1)


class _Cache:
    """The texts so far and their keys and values: each run has a slab of slots.

    Of equal beginnings of prompts the first sweep takes one up, and the others have its keys and values copied: slabs
    are read as they lie, token after token.
    """

    def __init__(self, lm, prompts, max_new_tokens):
        self._lm, self._owner = lm, torch.tensor([owner for _, owner in prompts])
        lengths = torch.tensor([len(p) for p, _ in prompts])
        self._width = int(lengths.max()) + max_new_tokens
        self._tokens = torch.zeros(len(prompts), self._width, dtype=torch.int64)
        for i, (prompt, _) in enumerate(prompts):
            self._tokens[i, : len(prompt)] = torch.tensor(prompt)
        self._known = torch.zeros_like(lengths)  # positions whose keys are in the store
        self._length, self._prompt_end = lengths, lengths - 1
        self._store = KVStore.slabs(len(prompts), self._width)
        self._begun = False

    def text(self, i: int) -> list[int]:
        """Token ids of text i so far."""
        return self._tokens[i, : self._length[i]].tolist()

    def tokens(self) -> Tensor:
        """[n, longest] token ids of the texts so far, the shorter ones filled up with their first."""
        longest = int(self._length.max())
        there = torch.arange(longest) < self._length[:, None]
        return torch.where(there, self._tokens[:, :longest], self._tokens[:, :1])

    def append(self, tokens: Tensor) -> None:
        """One token behind each text."""
        self._tokens[torch.arange(len(tokens)), self._length] = tokens
        self._length = self._length + 1

    def advance(self) -> Tensor:
        """Takes the texts' new tokens up the model; the hidden state [n, d] of each text's last token."""
        if self._begun:
            return self._swept(torch.arange(len(self._length)))
        self._begun, slabs = True, self._store.table
        order, self._known, self._store.table = self._beginnings(slabs)
        taken = self._store.table != slabs
        last = self._swept(order)
        self._store.copy(self._store.table[taken], slabs[taken])
        self._store.table = slabs
        return last

    def _beginnings(self, slabs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the texts in an order [n] in which each stands behind those that it shares a beginning with, how many tokens
        [n] of each others have before it, a table [n, width] in which these are the others' slots)."""
        by_owner = self._owner.tolist() if self._lm.by_owner else [0] * len(self._owner)
        ends = self._prompt_end.tolist() if self._lm.by_owner else [0] * len(by_owner)
        keys = [[owner, end, *self.text(i)] for i, (owner, end) in enumerate(zip(by_owner, ends, strict=True))]
        table, known, order = slabs.clone(), torch.zeros_like(self._length), []
        for i, shared, other in prefixes(keys):
            order.append(i)
            known[i] = n = min(max(shared - 2, 0), int(self._length[i]) - 1)  # the last token's row is each text's own
            if n:
                table[i, :n] = table[other, :n]
        return torch.tensor(order), known, table

    def _swept(self, order: Tensor) -> Tensor:
        """[n, d] as ``advance`` gives it; order: in which the texts go up."""
        runs = RunList()
        known, length, table = self._known[order], self._length[order], self._store.table
        how = {"first_pos": known, "owner": self._owner[order], "prompt_end": self._prompt_end[order]}
        runs.add(self._tokens[order][:, : int(length.max())], length=length, **how)
        self._store.table = table[order]
        slots = torch.cat([row[a:b] for row, a, b in zip(self._store.table, known, length, strict=True)])
        last = self._lm.n_layers - 1
        top = Collect(Site.layer_out, [last], order.argsort(), self._length - 1)
        sweep(self._lm, runs.runs(), [top], store=self._store, slots=slots)
        self._known, self._store.table = self._length, table
        return top.values[last]
