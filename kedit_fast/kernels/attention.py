"""Attention of packed rows through a row table: shared prefixes are read where they lie, never copied per run."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics.state import upload, wide
from kedit_fast.kernels import dispatch

GATHERED = 1 << 25  # numbers of K, or of scores, held at once by the reference: 128 MB in fp32
DENSE_FROM = 64  # a run that starts at position 0 and is this long goes to SDPA: gathering costs 200x there
# And where it is this long SDPA overtakes the extension too, which takes 0.5-0.7 of its time at 64 rows, 0.6-0.8 at 512
# and 0.8-1.5 at 1,024 (one thread of a Zen 4, AVX-512).
NATIVE_BELOW = 512


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_rows: Tensor,
    run: Tensor,
    pos: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    room: int | None = None,
    cut: Callable[[int, int], Any] | None = None,
    groups: Callable[[], list["Group"]] | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """softmax(softcap(q k^T scale)) v, each row over the positions <= its own that its run can see.

    query: [rows, H, D]; rows of a run stand together in ascending position
    key, value: [slots, Hkv, D]: the KV store followed by (or holding) this layer's rows; H is a multiple of Hkv
    key_rows: [R, T] int64: slot of position t of run r; of positions that a row sees one that there is
    run, pos: [rows] int64
    window: positions a row sees, its own included (None: all); softcap: tanh cap on the scores (None: none)
    sinks: [H] logits that take part in each head's softmax and have no value (gpt_oss; None: none)
    room: numbers of K, or of scores, that the reference gathers at once (``GATHERED`` at most; one run's at least)
    cut: gives the kernel's plan of these rows, where one is at hand (``kernels.triton.attention.Plan``), or None
    groups: gives the reference's ``grouped`` of these rows
    lse: [rows, H] fp32 that the kernel fills with the log-sum-exp of each row's scores, for its gradients
    Gives [rows, H, D] in query's dtype. Scores and softmax in fp32 (fp64 for fp64).

    The Triton kernel and, on the CPU in fp32, the extension read every key where it lies and hold no scores; the
    extension leaves calls with a very long run to the reference. Autograd records none of them: gradients go through
    ``kernels.slots``.
    """
    _check(query, key, value, key_rows, run, pos, window, softcap, sinks)
    how: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    backend = backend_of(query, key, value, run, pos, softcap)
    if backend == "triton":
        from kedit_fast.kernels.triton import attention as triton

        return triton.attention(query, key, value, key_rows, run, pos, **how, cut=cut, lse=lse)
    if backend == "native":
        return _native(query, key, value, key_rows, run, pos, **how)
    return attention_ref(query, key, value, key_rows, run, pos, **how, room=room, groups=groups)


def attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_rows: Tensor,
    run: Tensor,
    pos: Tensor,
    key_grad: Tensor,
    value_grad: Tensor,
    *,
    base: int,
    room: int | None = None,
    cut: Callable[[int, int], Any] | None = None,
    groups: Callable[[], list["Group"]] | None = None,
    **how,
) -> Tensor:
    """Gradient [rows, H, D] of ``attention``'s query, from that of what it gave.

    grad, out: [rows, H, D]; lse: as the kernel filled it
    key_grad, value_grad: [n, Hkv, D], to which the gradients of slots ``base`` to ``base + n`` are added; slots below
        are constants
    """
    if runs_on_triton(query):
        from kedit_fast.kernels.triton.attention_backward import attention_backward as triton

        given = grad, out, lse, query, key, value, key_rows, run, pos, key_grad, value_grad
        return triton(*given, base=base, cut=cut, **how)
    given = grad, query, key, value, key_rows, run, pos, key_grad, value_grad
    return attention_backward_ref(*given, base=base, room=room, groups=groups, **how)


def _check(query, key, value, key_rows, run, pos, window, softcap, sinks) -> None:
    """Raises ValueError for what a kernel, which has addresses alone, would read or write beside."""
    (rows, heads, dim), (_, kv_heads, key_dim) = query.shape, key.shape
    if value.shape != key.shape or key_dim != dim or heads % max(kv_heads, 1):
        raise ValueError(
            f"query is {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}; expected the same last "
            "axis, as many slots and heads in key and value, and a multiple of these heads in query"
        )
    if key.device != query.device or value.device != query.device:
        raise ValueError(f"query is on {query.device}, key on {key.device}, value on {value.device}")
    if any(x.dtype != torch.int64 for x in (key_rows, run, pos)) or not run.shape == pos.shape == (rows,):
        raise ValueError(f"run {list(run.shape)} and pos {list(pos.shape)} are to be int64 [{rows}], key_rows int64")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks is {list(sinks.shape)}; expected [{heads}]")
    if (window is not None and window < 1) or (softcap is not None and not softcap > 0):
        raise ValueError(f"window is {window} and softcap {softcap}; expected None or more than 0")


def runs_on_triton(query: Tensor) -> bool:
    """Whether the kernel serves these queries."""
    return dispatch.serving("attention", query.device, query.dtype) == "triton"


def backend_of(query: Tensor, key: Tensor, value: Tensor, run: Tensor, pos: Tensor, softcap: float | None) -> str:
    """What ``attention`` runs on."""
    backend = dispatch.serving("attention", query.device, query.dtype)
    if backend != "native":
        return backend
    plain = all(type(x) is Tensor and x.dtype == torch.float32 for x in (query, key, value))
    return "native" if plain and len(query) and not (softcap is None and _has_long(run, pos)) else "reference"


def _has_long(run: Tensor, pos: Tensor) -> bool:
    """Whether some run begins at position 0 and has ``NATIVE_BELOW`` rows here: by the first and the last of them."""
    last = NATIVE_BELOW - 1
    ends = (pos[last:] == last).nonzero()[:, 0]
    return len(ends) > 0 and bool(((pos[ends] == 0) & (run[ends] == run[ends + last])).any())


def _native(query, key, value, key_rows, run, pos, *, scale, window, softcap, sinks) -> Tensor:
    query, key, value, key_rows = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, key_rows))
    run, pos, out = run.contiguous(), pos.contiguous(), query.new_empty(query.shape)
    sinks = None if sinks is None else sinks.to(query).contiguous()
    given = (out, query, key, value, key_rows, run, pos)
    dispatch.native().attention(
        [*(x.data_ptr() for x in given), 0 if sinks is None else sinks.data_ptr()],
        [*query.shape[:2], *key.shape[1:], len(key), *key_rows.shape],
        [*query.stride()[:2], *key.stride()[:2], *value.stride()[:2], key_rows.stride(0)],
        scale, softcap or 0.0, window or key_rows.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return out


class Group(NamedTuple):
    """Rows of runs that have equally many of them, as the reference reads them; tables on the device.

    rows, pos: [n, m] int64; slots: [n, T] of the positions up to the last that one of them sees; begins: whether each
    run's first row is at position 0; slab: (first slot, from one run to the next) where slots lie in equal slabs;
    most: the highest slot
    """

    rows: Tensor
    pos: Tensor
    slots: Tensor
    begins: bool
    slab: tuple[int, int] | None
    most: int


def grouped(key_rows: Tensor, run: Tensor, pos: Tensor, device: torch.device) -> list[Group]:
    """The rows of a call in groups; tables go to the device by one copy."""
    made, tables = [], []
    for rows, which in _groups(run, pos):
        slots = key_rows[which, : int(pos[rows[:, -1]].max()) + 1]
        made.append((not bool(pos[rows[:, 0]].any()), _slab(slots), int(slots.max())))
        tables += [rows, pos[rows], _there(slots, int(slots.max()) + 1)]
    there = upload(device, *tables) if tables else ()
    return [Group(*there[3 * i : 3 * i + 3], *about) for i, about in enumerate(made)]


@torch.no_grad()
def attention_ref(query, key, value, key_rows, run, pos, *, room=None, groups=None, **how):
    """The same in plain torch: runs with equally many rows at a time; dense (SDPA) or gathered."""
    out = torch.empty_like(query)
    for group, part in _parts(query, key, groups, key_rows, run, pos, room, how):
        rows = group.rows[part]
        out[rows] = _of_part(query[rows], _take(key, group, part), _take(value, group, part), group, part, **how)
    return out


@torch.no_grad()
def attention_backward_ref(
    grad, query, key, value, key_rows, run, pos, key_grad, value_grad, *, base, room=None, groups=None, **how
):
    """``attention_backward`` in plain torch: each part of the reference once more, for autograd."""
    out = torch.empty_like(query)
    for group, part in _parts(query, key, groups, key_rows, run, pos, room, how):
        rows, slots = group.rows[part], _there(group.slots[part], len(key))
        leaves = [x.requires_grad_() for x in (query[rows], key[slots], value[slots])]
        with torch.enable_grad():
            got = _of_part(*leaves, group, part, **how)
        out[rows], *of_slots = torch.autograd.grad(got, leaves, grad[rows])
        own = slots >= base
        at = slots[own] - base
        for total, found in zip((key_grad, value_grad), of_slots, strict=True):
            total.index_add_(0, at, found[own].to(total.dtype))
    return out


def _parts(query, key, groups, key_rows, run, pos, room, how) -> Iterator[tuple["Group", slice]]:
    """What the reference takes at a time: some runs of a group, so that neither keys nor scores exceed ``room``."""
    room = GATHERED if room is None else min(room, GATHERED)
    for group in groups() if groups else grouped(key_rows, run, pos, query.device):
        (n, m), n_keys = group.rows.shape, group.slots.shape[1]
        widest = max(key.shape[1] * key.shape[2], 0 if _is_dense(group, how) else m * query.shape[1])
        step = max(1, room // max(1, n_keys * widest))
        for i in range(0, n, step):
            yield group, slice(i, min(i + step, n))


def _is_dense(group: "Group", how: dict) -> bool:
    return group.begins and group.rows.shape[1] >= DENSE_FROM and how.get("softcap") is None


def _of_part(q, k, v, group: "Group", part: slice, *, scale, window=None, softcap=None, sinks=None) -> Tensor:
    """Attention of a part's rows q [n, m, H, D] to keys and values [n, T, Hkv, D], in q's dtype."""
    if _is_dense(group, {"softcap": softcap}):
        return _dense(q, k, v, scale, window, sinks).to(q.dtype)
    given = (x.to(wide(q.dtype)) for x in (q, k, v))
    return _gathered(*given, group.pos[part], scale, window, softcap, sinks).to(q.dtype)


def _groups(run: Tensor, pos: Tensor):
    """(rows [n, length], run [n]) for every number of rows that stand together in one run."""
    new = torch.ones_like(run, dtype=torch.bool)
    new[1:] = (run[1:] != run[:-1]) | (pos[1:] != pos[:-1] + 1)
    start = new.nonzero()[:, 0]
    length = torch.diff(start, append=torch.tensor([len(run)]))
    for n in length.unique().tolist():
        of_n = start[length == n]
        yield of_n[:, None] + torch.arange(n), run[of_n]


def _slab(slots: Tensor) -> tuple[int, int] | None:
    """(the first, how far from one run to the next) where the runs' slots [n, T] lie in equal slabs: a generation's."""
    first, n_keys = slots[:, 0], slots.shape[1]
    stride = int(first[1] - first[0]) if len(first) > 1 else n_keys
    slabs = first[0] + torch.arange(len(slots))[:, None] * stride + torch.arange(n_keys)
    return (int(first[0]), stride) if n_keys <= stride and torch.equal(slots, slabs) else None


def _take(x: Tensor, group: Group, part: slice) -> Tensor:
    """x at the slots of a part of the runs as [n, T, Hkv, D]; a view where they lie in equal slabs, else gathered."""
    slots = group.slots[part]
    if group.slab is not None:
        first, stride = group.slab[0] + part.start * group.slab[1], group.slab[1]
        end, step = first + (len(slots) - 1) * stride + slots.shape[1], x.stride()
        if end <= len(x):
            return x.as_strided(
                (*slots.shape, *x.shape[1:]), (stride * step[0], *step), x.storage_offset() + first * step[0]
            )
    return x[_there(slots, len(x)) if group.most >= len(x) else slots]


def _there(slots: Tensor, n: int) -> Tensor:
    """[runs, T]: for a slot that is none of n, behind a run's end or of a later position, the run's own first. No row
    looks there, but what is read there is multiplied by 0, and 0 * NaN of another fact is NaN."""
    return torch.where((slots < 0) | (slots >= n), slots[:, :1], slots).clamp(min=0)


def _gathered(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, scale: float, window, softcap, sinks) -> Tensor:
    """q [n, m, H, D] against k, v [n, T, Hkv, D]; heads that share a key head are stacked as further rows."""
    n, m, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.view(n, m, kv_heads, heads // kv_heads, dim).transpose(1, 2).reshape(n, kv_heads, -1, dim)
    scores = q @ k.permute(0, 2, 3, 1) * scale  # [n, Hkv, m * group, T]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = _visible(pos, k.shape[1], window).repeat_interleave(heads // kv_heads, 1)[:, None]
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.to(scores).view(kv_heads, 1, -1).expand(-1, m, -1).reshape(1, kv_heads, -1, 1)
        weights = torch.cat([scores, sink.expand(n, -1, -1, 1)], -1).softmax(-1)[..., :-1]
    out = (weights @ v.transpose(1, 2)).view(n, kv_heads, m, heads // kv_heads, dim)
    return out.transpose(1, 2).reshape(n, m, heads, dim)


def _visible(pos: Tensor, n_keys: int, window: int | None) -> Tensor:
    """[n, m, T] whether a row at ``pos`` [n, m] sees key position t."""
    t = torch.arange(n_keys, device=pos.device)
    seen = t <= pos[..., None]
    return seen if window is None else seen & (t > pos[..., None] - window)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, window, sinks) -> Tensor:
    """Whole sequences from position 0 through torch's SDPA; a sink is a further key, of 0, with its logit as bias."""
    n_keys = k.shape[1]
    mask = None if window is None and sinks is None else _visible(torch.arange(n_keys, device=q.device), n_keys, window)
    if sinks is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
        bias = bias.expand(len(sinks), -1, -1)
        mask = torch.cat([bias, sinks.to(q).view(-1, 1, 1).expand(-1, n_keys, 1)], -1)
        k, v = (torch.cat([x, x.new_zeros(len(x), 1, *x.shape[2:])], 1) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
