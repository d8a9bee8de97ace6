"""Whether Triton's interpreter works with the numpy that is here: 3.6's does not with 2.5, which reads no array of one
element as a number any more, so no loop to a loaded bound runs."""

from functools import cache

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def count_kernel(out, bound):
    """out = how often a loop to a loaded bound runs."""
    total = 0
    for _ in range(tl.load(bound)):
        total += 1
    tl.store(out, total)


@cache
def why_not_interpreted() -> str:
    """Why the interpreter cannot run kernels here; empty if it can."""
    out, bound = torch.zeros(1, dtype=torch.int64), torch.full((1,), 3)
    try:
        count_kernel[(1,)](out, bound)
    except Exception as error:
        return f"the interpreter of Triton {triton.__version__} does not work with numpy {numpy.__version__}: {error}"
    return "" if int(out) == 3 else f"the interpreter of Triton {triton.__version__} loops {int(out)} times, not 3"
