"""Runs: the token sequences of a sweep, declared before it as tensors.

A run *branches* from its parent: below ``branch_layer`` and before ``first_pos`` it equals the parent and costs
nothing. From ``branch_layer`` on it owns a row for each position from ``first_pos`` to its end; earlier positions
are read from the parent. Causal attention makes this exact: a change at (layer l, position p) reaches only rows at
positions >= p above layer l.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

NEVER = 1 << 30  # branch layer of a run whose rows lie in a KV store: it owns none in this sweep
NOBODY = 1 << 40  # owner of a run on which edits act, but none of the parts that have owners


@dataclass(frozen=True)
class Runs:
    """R runs. Parents stand before their children.

    tokens: [R, T] int64, padded with 0 behind each run's end
    length: [R] tokens of each run
    parent: [R] the run that earlier positions are read from, -1 for a root
    branch_layer: [R] the layer whose input holds the run's first own rows
    first_pos: [R] the first position the run owns
    source: [R] the run whose rows the new rows begin as (default: the parent); -1: from their own tokens' embeddings
    graft: [R] the run whose row stands at ``first_pos`` instead (default: ``source``). The clean run, for a
        restored state: this is the restoration.
    narrow: [R] bool; only the first row differs while the branch layer runs, so the others join one layer above
    owner: [R] whose edit acts on the run: -1 none, 0 a shared edit, i the edit of fact i when edits are independent, or
        entry i of a routed one; NOBODY: what has no owner
    prompt_end: [R] position of the last token of the prompt that the run goes on from; -1: nobody asks
    """

    tokens: Tensor
    length: Tensor
    parent: Tensor
    branch_layer: Tensor
    first_pos: Tensor
    source: Tensor
    graft: Tensor
    narrow: Tensor
    owner: Tensor
    prompt_end: Tensor

    def __len__(self) -> int:
        return len(self.length)

    @property
    def n_rows(self) -> Tensor:
        """[R] rows each run owns once it is fully grown."""
        return torch.where(self.branch_layer == NEVER, 0, self.length - self.first_pos)

    @property
    def nbytes(self) -> int:
        """Bytes of these tables."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))

    def row_layers(self, first: int, last: int) -> int:
        """Rows that go through layers first to last, summed over the layers: what a sweep costs."""
        layers = (last + 1 - self.branch_layer.clamp(min=first)).clamp(min=0)  # of the run's first row
        of_the_others = (layers - self.narrow.long()).clamp(min=0)
        return int(torch.where(self.n_rows > 0, layers + (self.n_rows - 1) * of_the_others, 0).sum())

    def take(self, which: Tensor) -> "Runs":
        """The runs ``which`` (ascending, closed under parents, sources and grafts), renumbered."""
        new = torch.full((len(self) + 1,), -1)
        new[which] = torch.arange(len(which))
        picked = {f.name: getattr(self, f.name)[which] for f in fields(self)}
        for name in ("parent", "source", "graft"):
            picked[name] = new[picked[name]]  # -1 picks the last entry, which stays -1
        return Runs(**picked)


class RunList:
    """Collects runs block by block, then becomes ``Runs``."""

    def __init__(self):
        self._blocks: list[dict] = []
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def add(
        self,
        tokens,
        *,
        parent=-1,
        branch_layer=0,
        first_pos=0,
        length=None,
        source=None,
        graft=None,
        narrow=False,
        owner=0,
        prompt_end=-1,
    ) -> Tensor:
        """Appends n runs and gives their numbers [n]. Every argument is one value for all or a tensor [n].

        tokens: [T] for one sequence shared by all of them, or [n, T]; ``length`` defaults to T.
        """
        given = {
            "parent": parent,
            "branch_layer": branch_layer,
            "first_pos": first_pos,
            "narrow": narrow,
            "owner": owner,
            "prompt_end": prompt_end,
        }
        given["source"] = given["parent"] if source is None else source
        given["graft"] = given["source"] if graft is None else graft
        tokens = torch.as_tensor(tokens, dtype=torch.int64)
        given["length"] = tokens.shape[-1] if length is None else length
        columns = {name: torch.as_tensor(v) for name, v in given.items()}
        sizes = [len(c) for c in (*columns.values(), tokens[..., 0]) if c.ndim]
        n = 0 if 0 in sizes else max([1, *sizes])
        block = {name: c.expand(n) for name, c in columns.items()}
        block["tokens"] = tokens.expand(n, tokens.shape[-1])
        self._blocks.append(block)
        self._n += n
        return torch.arange(self._n - n, self._n)

    def runs(self) -> Runs:
        """All runs collected so far."""
        width = max((b["tokens"].shape[1] for b in self._blocks), default=0)
        tokens, at = torch.zeros(self._n, width, dtype=torch.int64), 0
        for block in self._blocks:  # a block's tokens may be one sequence for thousands of runs
            tokens[at : at + len(block["tokens"]), : block["tokens"].shape[1]] = block["tokens"]
            at += len(block["tokens"])
        columns = {name: torch.cat([b[name] for b in self._blocks]) for name in self._blocks[0] if name != "tokens"}
        return Runs(tokens=tokens, **columns)


def add_sequences(
    runs: RunList,
    sequences: list[list[int]],
    *,
    branch_layer: int = 0,
    owner: int = 0,
    prompt_end: int = -1,
    source=None,
):
    """Adds token sequences as a trie: each distinct prefix is one row, whoever begins with it.

    Gives the runs' numbers [n] in the order of ``sequences``; equal sequences share a run. ``source`` [n] names, for
    each sequence, the run its rows begin as (an edited run begins as its base run at the first edited layer).
    24 facts with 6 contexts each: 876 rows in place of 2,245.
    """
    number = torch.empty(len(sequences), dtype=torch.int64)
    chosen: list[int] = []  # the sequences that become runs, in their order
    parents: list[int] = []
    first_pos: list[int] = []
    run_of: dict[int, int] = {}
    for i, shared, sharer in prefixes(sequences):
        parent = run_of[sharer] if shared else -1
        if shared < len(sequences[i]):
            run_of[i] = len(runs) + len(chosen)
            chosen.append(i)
            parents.append(parent)
            first_pos.append(shared)
        else:
            run_of[i] = parent
        number[i] = run_of[i]
    if chosen:
        tokens, length = padded([sequences[i] for i in chosen])
        runs.add(
            tokens,
            length=length,
            parent=torch.tensor(parents),
            first_pos=torch.tensor(first_pos),
            branch_layer=branch_layer,
            owner=owner,
            prompt_end=prompt_end,
            source=-1 if source is None else torch.as_tensor(source)[chosen],
        )
    return number


def prefixes(sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int]]:
    """(sequence, how many tokens at its beginning an earlier one has too, the earlier one whose they first were; -1),
    of each in an order in which prefixes stand before what begins with them."""
    before: Sequence[int] = ()
    owners: list[int] = []  # for each position of the sequence before: whose it first was
    for i in sorted(range(len(sequences)), key=lambda i: list(sequences[i])):
        tokens = sequences[i]
        shared = _common(before, tokens)
        yield i, shared, owners[shared - 1] if shared else -1
        owners = owners[:shared] + [i] * (len(tokens) - shared)
        before = tokens


def add_edited(
    lm, runs: RunList, sequences: list[list[int]], owners=None, read=None, ends=None
) -> tuple[Tensor, Tensor]:
    """Adds each sequence as a base run and, where ``lm`` carries edits, as an edited run that branches from it.

    Gives the run numbers (base [n], edited [n]). The edited run begins as its base run at the first edited layer, so
    everything below is shared; a sequence that no edit acts on is its base run, to the bit. Equal prefixes are one row.

    owners: [n] whose edit acts on each sequence (``LM.as_read``, ``Runs.owner``); None: shared edits, which act on all
    read: [n] sequences that the edited model reads in their place (``LM.as_read``); one that differs is a run by itself
    ends: [n] position of the last token of each one's prompt, for a routed edit
    Raises ValueError without owners for edits that do not act on all.
    """
    base = add_sequences(runs, sequences, owner=-1)
    owners = torch.full_like(base, lm.run_owner) if owners is None else torch.as_tensor(owners)
    first = first_edited(lm)
    read = sequences if read is None else read
    other = torch.tensor([a != b for a, b in zip(sequences, read, strict=True)], dtype=torch.bool)
    acted = (owners >= 0) & (other | (first is not None))
    if not acted.any():
        return base, base
    ends = torch.full_like(base, -1) if ends is None or not lm.by_owner else torch.as_tensor(ends)
    owners = owners if lm.by_owner else owners.clamp(max=0)
    edited = base.clone()
    for owner, end, by_itself in torch.stack([owners, ends, other.long()], 1)[acted].unique(dim=0).tolist():
        mine = (acted & (owners == owner) & (ends == end) & (other == by_itself)).nonzero()[:, 0]
        begin = {} if by_itself else {"branch_layer": first, "source": base[mine]}
        some = [read[i] for i in mine.tolist()]
        edited[mine] = add_sequences(runs, some, owner=owner, prompt_end=end, **begin)
    return base, edited


def add_under(lm, runs: RunList, sequences: list[list[int]], owners=None, ends=None) -> Tensor:
    """Adds each sequence as a run [n] on the model as its edits have it; ``owners``, ``ends`` as in ``add_edited``."""
    if lm.owned:
        return add_edited(lm, runs, sequences, owners, ends=ends)[1]
    return add_sequences(runs, sequences, owner=lm.run_owner)


def first_edited(lm) -> int | None:
    """The lowest layer that the model's edits change; None where none does."""
    return min((layer for edit in lm.edits for layer in edit.layers), default=None)


def in_order(lm, jobs: list) -> list:
    """The jobs of a sweep with those of the model's edits: an edit acts first, and others see what it made. A job that
    is ``ahead`` comes before: a weight change reads the input that it leaves."""
    ahead = [job for job in jobs if getattr(job, "ahead", False)]
    return [*ahead, *lm.acting, *(job for job in jobs if job not in ahead)]


def padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(tokens [n, T] with 0 behind each end, length [n]) of n sequences."""
    length = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
    tokens = torch.zeros(len(sequences), max(map(len, sequences), default=0), dtype=torch.int64)
    tokens[spans(torch.zeros_like(length), length)] = torch.tensor([t for s in sequences for t in s], dtype=torch.int64)
    return tokens, length


def spans(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """(which [m], position [m]) of every position in the half-open spans start, stop [n], span after span."""
    count = (stop - start).clamp(min=0)
    which = torch.arange(len(count)).repeat_interleave(count)
    offset = torch.arange(len(which)) - (count.cumsum(0) - count)[which]
    return which, start[which] + offset


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
