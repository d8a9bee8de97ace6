"""Products of rows with a layer's weights on the CPU: four fifths of what a sweep does.

A trace of one fact takes 2-6 % less time by them than by torch's products on a quiet core of a Zen 4, and 15 % less
beside a busy one; the widest product, the output head, runs at 76-80 GFLOP/s in place of 62-70.

For the length of a sweep the linear layers of Hugging Face's blocks come here (``model.seam``); torch itself, and every
other call to it, is not touched.
"""

import torch
from torch import Tensor

from kedit_fast.kernels import dispatch, openblas

# Rows; with fewer, packing the weights shows: 73-88 GFLOP/s at 128 rows where torch's products reach 97-99.
FEWEST = 512


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, in_out: bool = False) -> Tensor:
    """x Wᵀ + b for x [..., n_in].

    weight: [n_out, n_in], or [n_in, n_out] with ``in_out`` (Conv1D); bias: [n_out] or None. Any float dtype.

    Native on the CPU of an AMD processor for fp32, at least ``FEWEST`` rows and weights that need no gradient: numpy's
    OpenBLAS, with torch's threads (``dispatch.backend_for("linear", ...)``), also for the gradient of x. The result
    depends on the number of rows and threads as that of torch's own products does, in the last bits. Elsewhere the
    reference runs.
    """
    if not _native_serves(x, weight, bias):
        return linear_ref(x, weight, bias, in_out=in_out)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Recorded.apply(x, weight, bias, in_out)
    return _native(x, weight, bias, in_out)


class _Recorded(torch.autograd.Function):
    """The native product, whose gradient dL/dx = (dL/dy) W is another product with the same weights."""

    @staticmethod
    def forward(ctx, x, weight, bias, in_out):
        ctx.save_for_backward(weight)
        ctx.in_out = in_out
        return _native(x, weight, bias, in_out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return _native(gradient, *ctx.saved_tensors, None, not ctx.in_out), None, None, None


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, in_out: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()
    n_out = weight.shape[1] if in_out else weight.shape[0]
    out = x.new_empty(len(rows), n_out)
    with openblas.threads(1):  # the extension calls it from threads of its own
        dispatch.native().linear(
            out.data_ptr(), rows.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), len(rows),
            x.shape[-1], n_out, rows.stride(0), weight.stride(0), in_out, openblas.address("sgemm_"),
            torch.get_num_threads(),
        )  # fmt: skip
    return out.view(*x.shape[:-1], n_out)


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, in_out: bool = False) -> Tensor:
    """``linear`` in plain torch."""
    if not in_out:
        return torch.nn.functional.linear(x, weight, bias)
    return x @ weight if bias is None else torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(
        *x.shape[:-1], weight.shape[1]
    )  # fmt: skip


def _native_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = [x, weight] if bias is None else [x, weight, bias]
    plain = (Tensor, torch.nn.Parameter)  # quantized and distributed tensors know their own products
    return (
        all(type(t) in plain and t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given[1:]))
        and x.ndim >= 2 and x.numel() >= FEWEST * x.shape[-1] > 0
        and weight.ndim == 2 and weight.numel() > 0 and weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1]
        and (bias is None or bias.is_contiguous())
        and dispatch.backend_for("linear", "cpu", torch.float32) == "native"
    )  # fmt: skip
