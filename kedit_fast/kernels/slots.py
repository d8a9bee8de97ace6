"""Keys and values of a layer as its block calls write and read them; and what autograd records of that.

A call writes its rows' keys and values to their slots and reads those of its own and of earlier calls. Autograd sees
two nodes a call, a write and a read. All reads of a layer add to one pair of gradients, wide, of the sweep's own slots;
a write gives its rows' part of them to what made its keys. Slots of a stored prefix are constants. So nothing as large
as the slots is copied, either way: by index_put each call would copy all of them, twice (6 to 8 MB a row in a layer
were counted of GPT-J's shape), and hold the keys that it gathered.
"""

from typing import Any

import torch
from torch import Tensor

from kedit_fast.basics.state import wide
from kedit_fast.kernels.attention import attention, attention_backward, runs_on_triton


class Slots:
    """keys, values: [slots, Hkv, D], without gradients; those of the sweep's own rows lie from ``base`` on."""

    def __init__(self, keys: Tensor, values: Tensor, base: int = 0):
        self.keys, self.values = keys, values
        self._gradients = _Gradients(base)
        self._written: Tensor | None = None  # the last write, as autograd has it

    @classmethod
    def again(cls, keys: Tensor, values: Tensor, base: int) -> "Slots":
        """Slots in memory that may be an earlier sweep's (``KVStore.room``), whose graph must not go down any more."""
        torch.autograd.graph.increment_version((keys, values))
        return cls(keys, values, base)

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> "Slots":
        """The keys and values of one call, which are all that there are."""
        made = cls(key.detach().contiguous(), value.detach().contiguous())
        made._record(key, value, slice(0, len(key)))
        return made

    def write(self, key: Tensor, value: Tensor, where: slice | Tensor) -> None:
        """Puts a call's keys and values [rows, Hkv, D] into the slots ``where``."""
        # .data counts no versions: what autograd has saved of these slots are others, written before
        self.keys.data[where], self.values.data[where] = key.detach(), value.detach()
        self._record(key, value, where)

    def _record(self, key: Tensor, value: Tensor, where: slice | Tensor) -> None:
        if torch.is_grad_enabled() and (self._written is not None or key.requires_grad or value.requires_grad):
            before = key.new_empty(0) if self._written is None else self._written
            self._written = _Write.apply(before, key, value, self._gradients, where)

    def attend(self, query: Tensor, key_rows: Tensor, run: Tensor, pos: Tensor, **how: Any) -> Tensor:
        """``kernels.attention.attention`` of a call's rows to these slots."""
        recorded = self._written is not None or query.requires_grad
        if not (torch.is_grad_enabled() and recorded):
            return attention(query, self.keys, self.values, key_rows, run, pos, **how)
        written = query.new_empty(0) if self._written is None else self._written
        return _Read.apply(query, written, self.keys, self.values, self._gradients, (key_rows, run, pos), how)


class _Gradients:
    """key, value: [own slots, Hkv, D], wide; made where the first read on the way down adds to them."""

    def __init__(self, base: int):
        self.base = base
        self.key = self.value = None
        self._pass = -1  # of autograd, which these belong to

    def of(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        if not self._is_now():
            self._pass = torch._C._current_graph_task_id()
            shape = len(keys) - self.base, *keys.shape[1:]
            self.key, self.value = (keys.new_zeros(shape, dtype=wide(keys.dtype)) for _ in range(2))
        return self.key, self.value

    def _is_now(self) -> bool:
        """Whether reads of this backward pass have added to them: a graph that is kept goes down again from zero."""
        return self.key is not None and self._pass == torch._C._current_graph_task_id()

    def at(self, where: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Of the slots ``where``, once all reads have added to them."""
        if not self._is_now():
            return None, None
        own = slice(where.start - self.base, where.stop - self.base) if isinstance(where, slice) else where - self.base
        return self.key[own].to(dtype), self.value[own].to(dtype)


class _Write(torch.autograd.Function):
    """Keys and values that went to their slots. What it gives holds no numbers: a chain of writes, from which a read
    hangs, so that on the way down each write comes after all reads of its slots."""

    @staticmethod
    def forward(ctx, before, key, value, gradients: _Gradients, where):
        ctx.set_materialize_grads(False)
        ctx.gradients, ctx.where, ctx.dtype = gradients, where, key.dtype
        return key.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        found = ctx.gradients.at(ctx.where, ctx.dtype)
        if not ctx.needs_input_grad[0]:  # the first write, and so the last to come here: nobody asks any more
            ctx.gradients.key = ctx.gradients.value = None
        return None, *found, None, None


class _Read(torch.autograd.Function):
    """Attention to the slots written so far."""

    @staticmethod
    def forward(ctx, query, written, keys, values, gradients: _Gradients, rows, how: dict):
        ctx.set_materialize_grads(False)
        on_triton = runs_on_triton(query)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32) if on_triton else None
        out = attention(query, keys, values, *rows, **how, lse=lse)
        ctx.save_for_backward(query, keys, values, *((out, lse) if on_triton else (None, None)))
        ctx.gradients, ctx.rows, ctx.how = gradients, rows, how
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 7
        query, keys, values, out, lse = ctx.saved_tensors
        totals = ctx.gradients.of(keys)
        found = attention_backward(
            grad, out, lse, query, keys, values, *ctx.rows, *totals, base=ctx.gradients.base, **ctx.how
        )
        return found, *(None,) * 6
