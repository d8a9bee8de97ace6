"""Log-probabilities of target tokens: final norm, head and log-sum-exp, a few rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

LOGITS = 1 << 23  # logits held at once: 32 MB in fp32


def target_logprob(h: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, n_vocab: int) -> Tensor:
    """log softmax(head(h))[i, targets[i]] in nats, fp32 (fp64 for fp64); logits are never stored as a whole.

    h: [rows, d] hidden states after the last layer; head: rows -> logits [rows, V] (final norm, head, soft cap);
    targets: [rows] int64, or [rows, k] for several targets a row. Gives the shape of ``targets``.
    """
    return target_logprob_ref(h, head, targets, n_vocab)


def target_logprob_ref(h, head, targets, n_vocab):
    """The same in plain torch, over chunks of rows."""
    many = targets if targets.ndim == 2 else targets[:, None]
    step = max(1, LOGITS // n_vocab)
    parts = [_logprob(head(h[i : i + step]), many[i : i + step]) for i in range(0, len(h), step)]
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    out = torch.cat(parts) if parts else torch.empty(many.shape, dtype=dtype)
    return out if targets.ndim == 2 else out[:, 0]


def _logprob(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return logits.gather(1, targets.to(logits.device)) - logits.logsumexp(1, keepdim=True)
