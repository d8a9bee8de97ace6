"""Bytes of tensors alive during a piece of work: what ``memory=`` promises, seen where torch makes its tensors."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """``peak``: most bytes of tensors alive at once that were made inside, a model's own not counted."""

    def __init__(self, model):
        super().__init__()
        self.alive = {x.untyped_storage()._cdata: 0 for x in (*model.parameters(), *model.buffers())}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._end, storage._cdata)

    def _end(self, key):
        self.now -= self.alive.pop(key, 0)
