"""The facts whose values are optimized, and how they are cut so that they fit the memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from kedit_fast.sweep.plan import graph_bytes, logit_bytes, too_large
from kedit_fast.sweep.sites import Site

LOGITS, KL_LOGITS = 3, 6  # logits that a target row, and a fact's KL row and p_0, hold at the height of a step


@dataclass(frozen=True)
class ValueTask:
    """One fact: token sequences, where its value acts, and what is to come after.

    sequences: prompt tokens in each context, the bare one first; lookups: index of the lookup token in each
    target: token ids; essence: tokens of "{subject} is a" up to its lookup token, its last one
    name: what errors call it, besides its number; owner: the fact whose independent edit acts on it, if any do
    """

    sequences: list[list[int]]
    lookups: list[int]
    target: list[int]
    essence: list[int]
    name: str = ""
    owner: int = 0


@dataclass(frozen=True)
class ValueSettings:
    """Where the values live and the hyper-parameters of their optimization, under the published names.

    loss_layer: the hidden state of this layer is what the target's loss reads through norm and head
    """

    layer: int
    site: Site
    lr: float
    steps: int
    weight_decay: float
    kl_factor: float
    clamp: float
    loss_layer: int


def held_bytes(lm, task: ValueTask, settings: ValueSettings) -> int:
    """Bytes that one fact holds at the height of a step, from above: prefixes that facts share count for each.

    Keys and values in the store, and what autograd keeps: rows from the lookup token on, their attention weights, keys
    and values as attention gathers them, wide and as long as the longest. Once: the store's rows, and logits of target
    rows and of the KL row.
    """
    return _stored_bytes(lm, task, settings) + _step_bytes(lm, task, settings, range(len(task.sequences) + 1))


def _stored_bytes(lm, task: ValueTask, settings: ValueSettings) -> int:
    """Of one fact's prefixes, for all steps; and p_0."""
    itemsize = lm.dtype.itemsize
    rows = sum(len(s) + len(task.target) - 1 for s in task.sequences) + len(task.essence)
    by_layer = 2 * lm.n_key_heads * lm.head_dim * itemsize
    return ((lm.n_layers - settings.layer) * by_layer + lm.d_model * itemsize) * rows + logit_bytes(lm, 2)


def _step_bytes(lm, task: ValueTask, settings: ValueSettings, some: Sequence[int], recompute: bool = False) -> int:
    """Of ``some`` of one fact's sequences, the last one being its KL prompt, at the height of a step."""
    lengths = [len(s) + len(task.target) - 1 for s in task.sequences] + [len(task.essence)]
    first = [*task.lookups, len(task.essence) - 1]
    rows, longest = sum(lengths[i] - first[i] for i in some), max(lengths[i] for i in some)
    layers = graph_bytes(
        lm, rows, len(some) * longest, rows * longest, lm.n_layers - settings.layer,
        recomputes=recompute or not lm.source.in_memory,
    )  # fmt: skip
    return layers + logit_bytes(lm, LOGITS * len(some) * len(task.target) + KL_LOGITS)


def parts(lm, tasks: list[ValueTask], settings: ValueSettings) -> tuple[list[range], bool]:
    """The sequences of a group in parts whose gradients are added up, so that each fits the memory; and whether layers
    have to be computed again for that. Facts that fit together are one part."""
    n = sum(len(task.sequences) for task in tasks) + len(tasks)
    if len(tasks) > 1:
        return [range(n)], False
    task, room = tasks[0], lm.memory - _stored_bytes(lm, tasks[0], settings)
    for recompute in (False, True):
        need = max(_step_bytes(lm, task, settings, [i], recompute) for i in range(n))
        if need <= room:
            size = next(s for s in range(n, 0, -1) if _largest(lm, task, settings, s, recompute) <= room)
            return [range(i, min(i + size, n)) for i in range(0, n, size)], recompute
    what = f"fact {task.name}, one context at a time,"
    raise ValueError(too_large(what, need + lm.memory - room, lm.memory))


def _largest(lm, task: ValueTask, settings: ValueSettings, size: int, recompute: bool) -> int:
    """Bytes of the largest part, where a fact's sequences are cut into parts of that size."""
    n = len(task.sequences) + 1
    cut = (range(i, min(i + size, n)) for i in range(0, n, size))
    return max(_step_bytes(lm, task, settings, some, recompute) for some in cut)
