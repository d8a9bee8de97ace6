"""What transformers do between their products: RMS norms and gated activations in one pass over memory, log-sum-exps.

They compute in fp32 (fp64 for fp64 inputs) and round once. On the CPU the extension does fp32 with
``torch.get_num_threads()`` threads, on GPUs Triton does 16 and 32 bits; elsewhere, also for tensors of other classes
than torch's own, the reference runs (``dispatch.backend_for("pointwise", ...)``). So it does, as for ``linear``, where
a forced backend lacks the dtype or device. Gradients are one pass too, keep the inputs only, and have none themselves.
A row gets the same bits whatever rows are beside it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kedit_fast.kernels import dispatch

ACTS = ("silu", "gelu_tanh")
_WIDEST = 16384  # numbers of a row that one Triton program holds


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """(offset + weight) x / sqrt(mean(x²) + eps), the mean over the last axis. Gives a new tensor in x's dtype.

    x: [..., d], any strides; weight: [d], of any float dtype, on x's device (native: fp32); offset: 1 in Gemma's norms,
    whose weights are stored less one. Gradients of x alone are one pass; for those of weight the reference runs.

    Raises ValueError for a weight of another shape.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {list(weight.shape)}; x {list(x.shape)} needs {list(x.shape[-1:])}")
    backend = _backend(x, weight)
    wide_weight = backend == "native" and weight.dtype != torch.float32
    if backend == "reference" or wide_weight or (torch.is_grad_enabled() and weight.requires_grad):
        return rms_norm_ref(x, weight, eps, offset=offset)
    if backend == "triton" and x.shape[-1] > _WIDEST:
        return rms_norm_ref(x, weight, eps, offset=offset)
    if torch.is_grad_enabled() and x.requires_grad:
        return _RmsNorm.apply(x, weight, eps, offset, backend)
    return _rms_norm(x, weight, eps, offset, backend)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """``rms_norm`` in plain torch."""
    wide = _wide(x)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((offset + weight.to(wide.dtype)) * scaled).to(x.dtype)


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) · up, element by element. Gives a new tensor in gate's dtype.

    gate, up: [..., n], any strides: also the halves of one tensor; act: "silu", or "gelu_tanh", which is
    0.5 g (1 + tanh(sqrt(2/π) (g + 0.044715 g³))). Not a number where torch's activations are: at gate = -inf too.

    Raises ValueError for another act, or shapes that differ.
    """
    _check_gated(gate, up, act)
    backend = _backend(gate, up)
    if backend == "reference" or gate.dtype != up.dtype:
        return gated_ref(gate, up, act)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up, act, backend)
    return _gated(gate, up, act, backend)


def gated_ref(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """``gated`` in plain torch."""
    _check_gated(gate, up, act)
    wide = _wide(gate)
    acted = F.silu(wide) if act == "silu" else F.gelu(wide, approximate="tanh")
    return (acted * up.to(wide.dtype)).to(gate.dtype)


def log_sum_exp(x: Tensor) -> Tensor:
    """log Σ eˣ over the last axis of x [rows, n]: [rows], in fp32 (fp64 for fp64). Under autograd, and elsewhere than
    on a CPU in fp32, the reference runs."""
    recorded = torch.is_grad_enabled() and x.requires_grad
    if recorded or x.dtype != torch.float32 or _backend(x, x) != "native":
        return log_sum_exp_ref(x)
    rows, out = _rows(x), x.new_empty(x.shape[:-1])
    dispatch.native().log_sum_exp(out.data_ptr(), rows.data_ptr(), *rows.shape, _apart(rows), torch.get_num_threads())
    return out


def log_sum_exp_ref(x: Tensor) -> Tensor:
    """``log_sum_exp`` in plain torch: four passes over x."""
    return _wide(x).logsumexp(-1)


class _RmsNorm(torch.autograd.Function):
    """rms_norm, and the gradient of x."""

    @staticmethod
    def forward(ctx, x, weight, *rest):
        ctx.save_for_backward(x, weight)
        ctx.rest = rest
        return _rms_norm(x, weight, *rest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return _rms_norm_backward(dy, *ctx.saved_tensors, *ctx.rest), None, None, None, None


class _Gated(torch.autograd.Function):
    """gated, and the gradients of gate and up."""

    @staticmethod
    def forward(ctx, gate, up, *rest):
        ctx.save_for_backward(gate, up)
        ctx.rest = rest
        return _gated(gate, up, *rest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        gradients = _gated_backward(d, *ctx.saved_tensors, *ctx.rest)
        needed = ctx.needs_input_grad
        return *(x if wanted else None for x, wanted in zip(gradients, needed, strict=False)), None, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, backend: str) -> Tensor:
    rows, weight, out = _rows(x), weight.contiguous(), x.new_empty(x.shape)
    if backend == "triton":
        _triton().rms_norm(out, rows, weight, eps, offset)
    else:
        dispatch.native().rms_norm(
            out.data_ptr(), rows.data_ptr(), weight.data_ptr(), *rows.shape, _apart(rows), eps, offset,
            torch.get_num_threads(),
        )  # fmt: skip
    return out


def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, backend: str) -> Tensor:
    rows, weight, dy, dx = _rows(x), weight.contiguous(), dy.contiguous(), x.new_empty(x.shape)
    if backend == "triton":
        _triton().rms_norm_backward(dx, dy, rows, weight, eps, offset)
    else:
        dispatch.native().rms_norm_backward(
            dx.data_ptr(), dy.data_ptr(), rows.data_ptr(), weight.data_ptr(), *rows.shape, _apart(rows), eps, offset,
            torch.get_num_threads(),
        )  # fmt: skip
    return dx


def _gated(gate: Tensor, up: Tensor, act: str, backend: str) -> Tensor:
    gates, ups, out = _rows(gate), _rows(up), gate.new_empty(gate.shape)
    if backend == "triton":
        _triton().gated(out, gates, ups, act)
    else:
        dispatch.native().gated(
            out.data_ptr(), gates.data_ptr(), ups.data_ptr(), *gates.shape, _apart(gates), _apart(ups), act,
            torch.get_num_threads(),
        )  # fmt: skip
    return out


def _gated_backward(d: Tensor, gate: Tensor, up: Tensor, act: str, backend: str) -> tuple[Tensor, Tensor]:
    gates, ups, d = _rows(gate), _rows(up), d.contiguous()
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if backend == "triton":
        _triton().gated_backward(d_gate, d_up, d, gates, ups, act)
    else:
        dispatch.native().gated_backward(
            d_gate.data_ptr(), d_up.data_ptr(), d.data_ptr(), gates.data_ptr(), ups.data_ptr(), *gates.shape,
            _apart(gates), _apart(ups), act, torch.get_num_threads(),
        )  # fmt: skip
    return d_gate, d_up


def _triton():
    from kedit_fast.kernels.triton import pointwise

    return pointwise


def _backend(x: Tensor, other: Tensor) -> str:
    """What runs an op on these two."""
    plain = (Tensor, torch.nn.Parameter)  # quantized and distributed tensors know their own ops
    if type(x) not in plain or type(other) not in plain or other.device != x.device:
        return "reference"
    if x.dtype == torch.float64 or x.ndim == 0 or x.numel() == 0:
        return "reference"
    return dispatch.serving("pointwise", x.device, x.dtype)


def _rows(x: Tensor) -> Tensor:
    """x as [rows, n], numbers of a row side by side and rows apart; a copy only where it does not lie so."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.is_contiguous() or (rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]):
        return rows
    return rows.contiguous()


def _apart(rows: Tensor) -> int:
    """How far rows of ``_rows`` lie apart; the stride of a single one may be anything."""
    return rows.shape[1] if rows.is_contiguous() else rows.stride(0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_gated(gate: Tensor, up: Tensor, act: str) -> None:
    if act not in ACTS:
        raise ValueError(f"act is {act!r}; expected one of {', '.join(ACTS)}")
    if gate.shape != up.shape:
        raise ValueError(f"gate has shape {list(gate.shape)} and up {list(up.shape)}; expected the same")
