"""Log-probabilities of target tokens: final norm, head and log-sum-exp, a few rows at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_fast.basics.state import wide
from kedit_fast.kernels import dispatch
from kedit_fast.kernels.pointwise import log_sum_exp

# Logits held at once: 128 MB in fp32. Fewer would stay in cache, and cost more, because each chunk reads the whole head
# again, and is too small for our own products: 2,048 rows of SmolLM2 on one Zen 4 core take 1.73 s with 34M, 1.74 with
# 25M, 1.92 with 13M, 2.02 with 8M; 600 rows took 0.61 s with 8M, 0.71 with 2M, 0.95 with 1M, 2.56 with 0.25M.
LOGITS = 1 << 25


@dataclass(frozen=True, eq=False)
class Head:
    """softcap(norm(h) weightᵀ + bias): a head whose parts are named, for kernels to fuse; a call gives logits.

    logits: the whole head, rows [n, d] -> [n, V], which is the truth; norm: rows -> rows, the final norm;
    weight: [V, d]; bias: [V] or None; softcap: tanh cap on the logits, or None
    """

    logits: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def __call__(self, h: Tensor) -> Tensor:
        return self.logits(h)


def target_logprob(h: Tensor, head: Head | Callable[[Tensor], Tensor], targets: Tensor, n_vocab: int) -> Tensor:
    """log softmax(head(h))[i, targets[i]] in nats, fp32 (fp64 for fp64); logits are never stored as a whole.

    h: [rows, d] hidden states after the last layer; head: rows -> logits [rows, V] (final norm, head, soft cap);
    targets: [rows] int64, or [rows, k] for several targets a row. Gives the shape of ``targets``.

    The Triton kernel needs a ``Head`` in h's dtype whose weight and bias are not trained: it has gradients for h alone,
    and keeps logits in fp32 where the reference has them in h's dtype. Everything else is the reference's.
    """
    if stores_no_logits(h, head):
        from kedit_fast.kernels.triton import target_logprob as triton

        with torch.autocast(h.device.type, enabled=False):
            many = (targets if targets.ndim == 2 else targets[:, None]).to(h.device)
            out = triton.target_logprob(head.norm(h), head.weight, head.bias, head.softcap, many)
        return out if targets.ndim == 2 else out[:, 0]
    return target_logprob_ref(h, head, targets, n_vocab)


def target_logprob_ref(h, head, targets, n_vocab):
    """The same in plain torch, over chunks of rows."""
    many = targets if targets.ndim == 2 else targets[:, None]
    step = max(1, LOGITS // n_vocab)
    parts = [_logprob(head(h[i : i + step]), many[i : i + step]) for i in range(0, len(h), step)]
    out = torch.cat(parts) if parts else torch.empty(many.shape, dtype=wide(h.dtype))
    return out if targets.ndim == 2 else out[:, 0]


def stores_no_logits(h: Tensor, head) -> bool:
    """Whether the kernel serves these rows and this head: as many rows as there are go to it at once."""
    if not isinstance(head, Head):
        return False
    weights = [x for x in (head.weight, head.bias) if x is not None]
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in weights)
    served = not trained and all(x.device == h.device and x.dtype == h.dtype for x in weights)
    return served and dispatch.backend_for("target_logprob", h.device, h.dtype) == "triton"


def _logprob(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.to(wide(logits.dtype))
    return logits.gather(1, targets.to(logits.device)) - log_sum_exp(logits)[:, None]
