"""How this package computes, whatever its callers have set: the guard of every public door, the dtype of sums, and how
tables come to a device."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of a dtype's values have: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def upload(device: torch.device, *tables: Tensor) -> tuple[Tensor, ...]:
    """Tables of one dtype on the device: one copy for all of them, from pinned memory, which nobody waits for."""
    if device.type == "cpu":
        return tables
    flat = torch.cat([table.flatten() for table in tables]).pin_memory().to(device, non_blocking=True)
    parts = flat.split([table.numel() for table in tables])
    return tuple(part.view(table.shape) for part, table in zip(parts, tables, strict=True))


@contextmanager
def own_state() -> Iterator[None]:
    """Inside, torch is as it begins: autograd records, no inference mode, no autocast, new tensors are float32 on the
    CPU. All of it is put back at the end. Also a decorator: ``@own_state()``.

    Deterministic algorithms and the number of threads stay as the caller has them: they change no result.
    """
    accelerator, dtype = torch.accelerator.current_accelerator(), torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", *([accelerator.type] if accelerator else [])):
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":  # only then: torch calls Python at every function inside
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
