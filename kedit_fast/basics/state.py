"""How this package computes, whatever its callers have set: the guard of every public door, and the dtype of sums."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of a dtype's values have: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


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
