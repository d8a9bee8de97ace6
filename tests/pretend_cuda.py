"""A pretended CUDA device: tensors that hold real numbers in CPU memory and say ``cuda:0``.

It counts what a program would ask of a GPU where there is none: kernels launched and the bytes that they move, uploads
and downloads, and the points where the host would wait for the device. A CPU tensor that meets one of the device's
raises, as torch does.

    with pretended_cuda() as counts:
        lm = kf.open_model(on_device(tiny_model("llama")), tokenizer=tiny_tokenizer())
        kf.trace(lm, facts)
    print(counts)

A hollow device (``pretended_cuda(hollow=True)``) holds no floating-point numbers, only their shapes: models of any size
fit, and nothing is computed; what is read from it is 0. Integers are real on it too, for tables are made of them.

Limits. There are no streams and no times. The device is ``cuda:0``, never ``cuda``: torch cannot count devices here.
An op of torch that computes is one launch, however many kernels it has. Triton's kernels are stood in for by their
references, one launch each. What ``pin_memory`` gave counts as pinned, and its upload waits for nothing.
``Edit.apply`` refuses this class of tensor; edits act in views.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from sys import _getframe
from time import thread_time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from kedit_fast.basics import settings
from kedit_fast.kernels import attention as attention_op
from kedit_fast.kernels import lowrank as lowrank_op
from kedit_fast.kernels import pointwise as pointwise_op
from kedit_fast.kernels.triton import (
    attention,
    attention_backward,
    lowrank,
    pointwise,
    rows,
    second_moment,
    target_logprob,
)

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
BANDWIDTH, PRODUCTS, LEAST = 3.0e12, 798e12, 2e-6  # bytes/s, bf16 FLOP/s: measured on an H100; s of any launch
WIDE = 67e12  # FLOP/s of fp32 and fp64, by its data sheet
aten = torch.ops.aten
INDEXED = {
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
}  # fmt: skip
WAITING = {  # ops whose result the host has to see, or whose size it does
    aten._local_scalar_dense.default: "item", aten.is_nonzero.default: "item", aten.equal.default: "equal",
    aten.nonzero.default: "nonzero", aten.masked_select.default: "nonzero", aten._unique2.default: "unique",
    aten.unique_dim.default: "unique", aten.unique_consecutive.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}  # fmt: skip
FREE = {  # that launch nothing
    "aten::detach", "aten::alias", "aten::lift_fresh", "aten::empty", "aten::empty_like", "aten::new_empty",
    "aten::empty_strided", "aten::new_empty_strided", "aten::set_", "aten::_unsafe_view",
}  # fmt: skip
FILLS = {"zeros", "new_zeros", "zeros_like", "full", "new_full", "full_like", "fill_", "zero_", "ones", "ones_like"}
GATHERS = {"index", "index_select", "embedding"}


@dataclass
class Counts:
    """launches, moved, busy: by op, how often, bytes, and the seconds that they take at least (launch by launch the
    largest of bytes over ``BANDWIDTH``, FLOP over ``PRODUCTS`` or ``WIDE``, and ``LEAST``); waits: by (why, where), how
    often the host waits; uploads: copies to the device by where; uploaded: their bytes; flop: of matrix products; ops,
    ops_there: of torch that were looked at, on the CPU and on the device; spent: seconds that it took, without what ops
    on the CPU do"""

    launches: Counter = field(default_factory=Counter)
    moved: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    uploads: Counter = field(default_factory=Counter)
    uploaded: int = 0
    flop: int = 0
    busy: Counter = field(default_factory=Counter)
    spent: float = 0.0
    ops: int = 0
    ops_there: int = 0
    own: float = 0.0  # seconds of the op on the CPU that is being looked at
    inside: bool = False
    of_program: bool = True

    def launch(self, op: str, nbytes: int = 0, flop: int = 0, n: int = 1, rate: float = PRODUCTS) -> None:
        self.launches[op] += n
        self.moved[op] += nbytes
        self.flop += flop
        self.busy[op] += max(nbytes / BANDWIDTH, flop / rate, n * LEAST)

    def wait(self, why: str) -> None:
        self.waits[why, _where()] += 1

    def upload(self, x: Tensor, waits: bool) -> None:
        self.uploads[_where()] += 1
        self.uploaded += _size(x)
        if waits:
            self.wait("upload from pageable memory")

    @contextmanager
    def looking(self) -> Iterator[None]:
        """What happens inside is counting, but for ops on the CPU that the program asked for."""
        self.inside, self.own, began = True, 0.0, thread_time()
        try:
            yield
        finally:
            self.inside, self.spent = False, self.spent + thread_time() - began - self.own

    def clear(self) -> None:
        """Back to nothing."""
        self.__dict__.update(Counts().__dict__)

    def __str__(self) -> str:
        lines = [
            f"{self.launches.total()} launches, {1e-6 * sum(self.moved.values()):.1f} MB, {1e-9 * self.flop:.2f} GFLOP,"
            f" {self.waits.total()} waits, {self.uploads.total()} uploads of {1e-3 * self.uploaded:.1f} kB"
        ]
        lines += [f"  waits {n:6d}  {why}, {where}" for (why, where), n in self.waits.most_common()]
        lines += [f"  launches {n:6d}  {op}, {1e-6 * self.moved[op]:.1f} MB" for op, n in self.launches.most_common(20)]
        return "\n".join(lines)


@contextmanager
def pretended_cuda(hollow: bool = False) -> Iterator[Counts]:
    """The device is there inside, and what is asked of it is counted."""
    counts = Counts()
    with ExitStack() as stack:
        stack.enter_context(patch.object(OnDevice, "hollow", hollow))
        stack.enter_context(patch.object(torch.cuda, "_lazy_init", lambda: None))
        stack.enter_context(patch.object(settings, "triton_interprets", lambda: False))  # or it would not be chosen
        stack.enter_context(patch.object(Tensor, "pin_memory", _pinned_copy))
        for module, name, made in stand_ins(counts):
            stack.enter_context(patch.object(module, name, made))
        stack.enter_context(patch.object(OnDevice, "counts", counts))
        stack.enter_context(_Counting(counts))
        yield counts


def on_device(model: nn.Module) -> nn.Module:
    """The model, its parameters and buffers moved in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnDevice(parameter.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return model


class OnDevice(Tensor):
    """A tensor of the device: to Python it says so, to torch's own code "meta", or autograd would ask for a stream."""

    held: Tensor
    counts: Counts | None = None
    hollow = False
    _indexing = 0  # while torch's own indexing asks, the device is meta

    @staticmethod
    def __new__(cls, held: Tensor):
        if cls.hollow and held.is_floating_point():
            held = held.to(META)
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device="meta", requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # ten microseconds an op, which no GPU's tensor takes
    is_meta = property(lambda self: False)
    is_cuda = property(lambda self: True)
    device = property(lambda self: CUDA)

    def __repr__(self, **_):
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    def get_device(self):
        return 0

    def tolist(self):
        self.counts.wait("tolist")
        return _read(self.held).tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory")

    def __getitem__(self, index):
        with _indexing():
            return super().__getitem__(index)

    def __setitem__(self, index, value):
        with _indexing():
            return super().__setitem__(index, value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, cls.counts)


@contextmanager
def _indexing():
    OnDevice._indexing += 1
    try:
        yield
    finally:
        OnDevice._indexing -= 1


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if OnDevice not in types and not (kwargs and (kwargs.get("device") or kwargs.get("pin_memory"))):
            self.counts.ops += not self.counts.inside
            return func(*args, **kwargs or {})  # the CPU's alone, and the program's own time
        return _run(func, args, kwargs or {}, self.counts)


def _pinned_copy(x: Tensor, *_: Any) -> Tensor:
    return _as_pinned(x.clone())


def _as_pinned(x: Tensor) -> Tensor:
    x.pretended_pinned = True
    return x


def _is_pinned(x: Tensor) -> bool:
    return getattr(x, "pretended_pinned", False)


def _run(func, args, kwargs: dict, counts: Counts):
    if counts.inside:  # an op that another one is made of
        return _counted(func, args, kwargs, counts)
    counts.ops_there += 1
    with counts.looking():
        return _counted(func, args, kwargs, counts)


def _counted(func, args, kwargs: dict, counts: Counts):
    """An op of torch: on the CPU if all of it is there, else counted, and its results are the device's."""
    if func is torch.ops.prim.device.default:
        return torch.device("meta") if OnDevice._indexing else CUDA
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours, others = ([x for x in tensors if isinstance(x, OnDevice) == of_device] for of_device in (True, False))
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if not ours and device not in ("cuda", "meta"):
        pins = kwargs.pop("pin_memory", None)
        began = thread_time()
        found = func(*args, **kwargs)
        counts.own += (thread_time() - began) * counts.of_program
        return _as_pinned(found) if pins else found
    counts.of_program = False  # what an op of the device is made of
    try:
        return _on_device(func, args, kwargs, ours, others, device, counts)
    finally:
        counts.of_program = True


def _on_device(func, args, kwargs: dict, ours: list, others: list, device: str | None, counts: Counts):
    plain = tree_map(_held, kwargs) | ({"device": CPU} if device is not None else {})
    if OnDevice.hollow and func is aten._local_scalar_dense.default and ours[0].held.is_meta:
        counts.wait("item")
        return 0.0 if ours[0].is_floating_point() else 0
    if func is aten._to_copy.default:
        return _copied(args[0], kwargs, plain, device, counts)
    if func is aten.copy_.default and ours and others:
        _count_copy(args, counts)
    else:
        _check_devices(func, args, ours, [x for x in others if x.ndim], counts)
    if func in WAITING:
        counts.wait(WAITING[func])
    found = _computed(func, tree_map(_held, args), plain)
    _count_launch(func, args, ours, found, counts)
    if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments[: len(args)]):
        return args[0]
    return tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, found)


def _copied(x: Tensor, kwargs: dict, plain: dict, device: str | None, counts: Counts):
    """``x.to``: a download, an upload, a cast, or x itself."""
    found = _computed(aten._to_copy.default, (_held(x),), plain)
    if not isinstance(x, OnDevice):
        counts.upload(x, waits=not (kwargs.get("non_blocking") and _is_pinned(x)))
    elif device == "cpu":
        counts.wait("download")
        return _read(found).clone()
    elif kwargs.get("dtype") in (None, x.dtype) and kwargs.get("memory_format") is None:
        return x
    else:
        counts.launch("_to_copy", _size(_held(x)) + _size(found))
    return OnDevice(found)


def _computed(func, args, kwargs: dict):
    """The op on what tensors hold: nothing but shapes where one of them has no numbers, or where it makes some that a
    hollow device would not keep."""
    parts = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    made = OnDevice.hollow and not parts and (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
    if not made and not any(x.is_meta for x in parts):
        return func(*args, **kwargs)
    if func in INDEXED:
        args = (args[0], [part for index in args[1] for part in _places(index)], *args[2:])
    if func not in WAITING:
        shapes = tree_map(lambda x: x.to(META) if isinstance(x, Tensor) and x.ndim else x, (args, kwargs))
        found = func(*shapes[0], **shapes[1] | ({"device": META} if "device" in kwargs else {}))
        if all(x.is_floating_point() for x in tree_leaves(found) if isinstance(x, Tensor)):
            return found
    args, kwargs = tree_map(lambda x: _read(x) if isinstance(x, Tensor) else x, (args, kwargs))
    return func(*args, **kwargs)  # truth values and numbers of places are real: those of zeros


def _places(index):
    """A mask as the numbers of its places, for no shape follows from a mask without numbers."""
    is_mask = isinstance(index, Tensor) and index.dtype == torch.bool
    return _read(index).nonzero(as_tuple=True) if is_mask else (index,)


def _read(x: Tensor) -> Tensor:
    """What the host gets of held numbers: 0 where there are none."""
    return torch.zeros((), dtype=x.dtype).expand(x.shape) if x.is_meta else x


def _count_copy(args, counts: Counts) -> None:
    """``a.copy_(b, non_blocking)`` between host and device."""
    to, source, *blocking = args
    non_blocking = bool(blocking and blocking[0])
    if isinstance(to, OnDevice):
        counts.upload(source, waits=not (non_blocking and _is_pinned(source)))
    elif not (non_blocking and _is_pinned(to)):
        counts.wait("download")


def _check_devices(func, args, ours, others, counts: Counts) -> None:
    """Raises where CPU tensors meet the device's; an index may, and is an upload."""
    if not (ours and others):
        return
    if func in INDEXED and isinstance(args[0], OnDevice):
        for index in (i for i in args[1] if isinstance(i, Tensor) and not isinstance(i, OnDevice)):
            counts.upload(index, waits=True)
        values = args[2] if len(args) > 2 else None
        if values is None or isinstance(values, OnDevice) or not values.ndim:
            return
    shapes = [tuple(x.shape) for x in others]
    raise RuntimeError(f"Expected all tensors to be on the same device: {func} got CPU tensors of shapes {shapes}")


def _count_launch(func, args, ours, found, counts: Counts) -> None:
    schema = func._schema
    view = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    if view or schema.name in FREE:
        return
    if func in INDEXED and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
        counts.wait("mask as index")
    op, made = schema.name.removeprefix("aten::"), [x for x in tree_leaves(found) if isinstance(x, Tensor)]
    written = sum(map(_size, made))
    nbytes = written + sum(_size(x.held) for x in ours)
    if op in FILLS:
        nbytes = written
    elif op in GATHERS:
        nbytes = 2 * written
    elif op.removesuffix("_") in ("index_put", "_index_put_impl") and len(args) > 2:
        nbytes = 2 * _size(_held(args[2]))
    flop, rate = 0, PRODUCTS
    if op in ("mm", "addmm", "bmm", "baddbmm"):
        left, right = [_held(x) for x in args if isinstance(x, Tensor)][-2:]
        flop, rate = 2 * left.numel() * right.shape[-1], WIDE if left.element_size() > 2 else PRODUCTS
    counts.launch(op, nbytes, flop, rate=rate)


def _held(x):
    return x.held if isinstance(x, OnDevice) else x


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _where() -> str:
    """The innermost line of the package, else of transformers, that is on the way."""
    frame, fallback = _getframe(2), "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if "/kedit_fast/" in name:
            return f"{name.rpartition('/kedit_fast/')[2]}:{frame.f_lineno}"
        if fallback == "?" and "/transformers/" in name:
            fallback = f"transformers/{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return fallback


# ---- Triton's kernels, by their references


def stand_ins(counts: Counts) -> list[tuple[Any, str, Callable]]:
    """(module, name, what stands there while the device is pretended) of each function that launches a kernel."""

    def hollow(*shape: int, dtype: torch.dtype = torch.float32) -> OnDevice:
        with _disable_current_modes():
            return OnDevice(torch.empty(shape, dtype=dtype, device=META))

    def exact(reference: Callable, x: Tensor, *args, shape: Sequence[int] | None = None, **kwargs) -> OnDevice:
        """What the reference gives, in x's dtype; shape: of it, where that is not x's."""
        if OnDevice.hollow:
            return hollow(*(x.shape if shape is None else shape), dtype=x.dtype)
        with counts.looking(), _disable_current_modes():
            return OnDevice(reference(_held(x), *tree_map(_held, args), **tree_map(_held, kwargs)))

    def looked_up(query, key, key_rows, run, pos, most, cut) -> tuple[int, int]:
        """(bytes of the keys, each read once, FLOP of a product) of a launch, whose plan is made as it would be."""
        heads = min(query.shape[1] // key.shape[1], attention._HEADS)
        if not (cut and cut(heads, most)):
            attention.plan(key_rows, run, pos, heads, most, CUDA)
        with counts.looking(), _disable_current_modes():
            seen, read = int((pos + 1).sum()), _keys_read(run, pos)
        nbytes = read * key.shape[1] * key.shape[2] * key.element_size()
        return nbytes, 2 * seen * query.shape[1] * query.shape[2]

    def attend(query, key, value, key_rows, run, pos, *, cut=None, lse=None, **how):
        most = attention._MOST[query.element_size()]
        nbytes, flop = looked_up(query, key, key_rows, run, pos, most, cut)
        out = exact(attention_op.attention_ref, query, key, value, key_rows, run, pos, **how)
        counts.launch("triton attention", 2 * _size(out.held) + 2 * nbytes, 2 * flop)
        return out

    def attend_back(
        grad, out, lse, query, key, value, key_rows, run, pos, key_grad, value_grad, *, base, cut=None, **how
    ):
        width = max(64, 1 << (query.shape[2] - 1).bit_length())
        most = attention_backward._CONFIGS[query.element_size(), width][0]
        nbytes, flop = looked_up(query, key, key_rows, run, pos, most, cut)
        given = query, key, value, key_rows, run, pos, key_grad, value_grad
        found = exact(
            lambda query, grad, *rest: attention_op.attention_backward_ref(grad, query, *rest, base=base, **how),
            query, grad, *given[1:],
        )  # fmt: skip
        counts.launch("triton attention_backward", 4 * _size(out.held) + 2 * nbytes + 2 * _size(key_grad), 5 * flop)
        return found

    def branch(out, source):
        n, source = len(out) - len(source), source.contiguous().to(out.device)
        if not OnDevice.hollow:
            with counts.looking(), _disable_current_modes():
                _held(out)[n:] = _held(out)[_held(source)]
        counts.launch("triton branch_rows", 2 * _size(out.held[n:]))

    def noise(x, added, index):
        def reference(x, added, index):
            out = x.clone()
            out[index] = (out[index].double() + added).to(out.dtype)
            return out

        out = exact(reference, x, added.to(x.device, torch.float64), index.to(x.device))
        counts.launch("triton add_noise", 2 * _size(out.held), n=4)  # with the table of which row gets which
        return out

    def forward(h, weight, bias, softcap, targets):
        counts.launch("triton target_logprob", _size(h.held) + _size(weight.held), 2 * h.numel() * len(weight))
        counts.launch("logsumexp", n=6)
        if OnDevice.hollow:
            return hollow(*targets.shape), hollow(len(h))
        logits = _logits(h, weight, bias, softcap)
        return OnDevice(logits.gather(1, targets.held)), OnDevice(logits.logsumexp(1))

    def backward(h, weight, bias, softcap, targets, lse, gradient):
        parts = -(-len(weight) // max(1, target_logprob._GRADIENTS // len(h)))
        counts.launch("triton logit_gradient", _size(weight.held), 2 * h.numel() * len(weight), parts)
        counts.launch("mm", _size(weight.held), 2 * h.numel() * len(weight), parts)
        counts.launch("add_", n=parts)
        if OnDevice.hollow:
            return hollow(*h.shape, dtype=h.dtype)
        with _disable_current_modes():
            leaf = h.held.detach().float().requires_grad_()
            with torch.enable_grad():
                logits = _logits(OnDevice(leaf), weight, bias, softcap)
                found = logits.gather(1, targets.held) - logits.logsumexp(1, keepdim=True)
                (made,) = torch.autograd.grad(found, leaf, gradient.held)
        return OnDevice(made.to(h.dtype))

    def low_rank(y, x, u, v, row_owner=None, factor_owner=None):
        if row_owner is not None:
            lowrank.owned_tiles(row_owner, factor_owner, CUDA)
        out = exact(lowrank_op.lowrank_add_ref, y, x, u, v, row_owner, factor_owner)
        flop = 2 * len(y) * u.shape[1] * (y.shape[1] + x.shape[1])
        counts.launch("triton lowrank", 3 * _size(y.held), flop, 2, WIDE if u.element_size() > 2 else PRODUCTS)
        return out

    def written(op: str, reference: Callable, outs: Sequence[Tensor], *given) -> None:
        """A pointwise op's launch, which writes to ``outs``."""
        tensors = [x for x in (*outs, *given) if isinstance(x, Tensor)]
        counts.launch(f"triton {op}", sum(_size(x.held) for x in tensors))
        if not OnDevice.hollow:
            with counts.looking(), _disable_current_modes(), torch.enable_grad():
                for out, made in zip(outs, reference(*tree_map(_held, given)), strict=True):
                    _held(out).copy_(made.view_as(_held(out)))

    def of_norm(x, weight, eps, offset):
        return [pointwise_op.rms_norm_ref(x, weight, eps, offset=offset).detach()]

    def of_norm_back(dy, x, weight, eps, offset):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(pointwise_op.rms_norm_ref(x, weight, eps, offset=offset), x, dy.view_as(x))

    def of_gated_back(d, gate, up, act):
        gate, up = (x.detach().requires_grad_() for x in (gate, up))
        return torch.autograd.grad(pointwise_op.gated_ref(gate, up, act), (gate, up), d.view_as(gate))

    norm_back = partial(written, "rms_norm_backward", of_norm_back)
    gated_back = partial(written, "gated_backward", of_gated_back)
    pointwise_ops = [
        (pointwise, "rms_norm", lambda out, *given: written("rms_norm", of_norm, [out], *given)),
        (pointwise, "rms_norm_backward", lambda dx, *given: norm_back([dx], *given)),
        (pointwise, "gated", lambda out, *g: written("gated", lambda *x: [pointwise_op.gated_ref(*x)], [out], *g)),
        (pointwise, "gated_backward", lambda dg, du, *given: gated_back([dg, du], *given)),
    ]
    right = pointwise_op._backend
    pointwise_ops.append((pointwise_op, "_backend", lambda x, y: "triton" if isinstance(x, OnDevice) else right(x, y)))

    def moment(c, keys):
        counts.launch("triton second_moment", _size(keys), keys.numel() * len(c), -(-len(keys) // second_moment._CHUNK))
        if not OnDevice.hollow:
            with counts.looking(), _disable_current_modes():
                wide = _held(keys).to(_held(c).dtype)
                _held(c).add_(wide.T @ wide)
        return c

    return [
        *pointwise_ops,
        (attention, "attention", attend),
        (attention_backward, "attention_backward", attend_back),
        (rows, "branch_rows_", branch),
        (rows, "_add_noise", noise),
        (target_logprob, "_forward", forward),
        (target_logprob, "_backward", backward),
        (lowrank, "lowrank_add", low_rank),
        (second_moment, "second_moment_", moment),
    ]


def _keys_read(run: Tensor, pos: Tensor) -> int:
    """Positions of all segments of a run up to their last row, each read once."""
    last = torch.ones_like(run, dtype=torch.bool)
    last[:-1] = (run[1:] != run[:-1]) | (pos[1:] <= pos[:-1])
    return int((pos[last] + 1).sum())


def _logits(h, weight, bias, softcap) -> Tensor:
    with _disable_current_modes():
        logits = _held(h).float() @ _held(weight).float().T
        logits = logits if bias is None else logits + _held(bias).float()
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap
