"""The uncentered second moment of keys, C += sum over rows of k k^T, accumulated one triangle at a time.

ROME and MEMIT weigh a change of the down projection by C = E[k k^T] over text (Meng et al. 2022, ROME, eq. 2;
Meng et al. 2023, MEMIT, eq. 15). Callers keep the sum, divide by the token count at the end, and call
``fill_upper_`` once if they want the whole matrix; ``solve`` reads the lower triangle only.
"""

import math

import torch

from kedit_fast.kernels import dispatch

# Rows the reference converts to the accumulator's dtype at once: the copy is then 4096 d_ff elements, not the pack.
_CHUNK = 4096
_BLOCK = 1024  # columns mirrored at once by fill_upper_


def second_moment_(c: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``c += keys.T @ keys`` in place, lower triangle only; returns ``c``.

    c: [d_ff, d_ff] fp64 or fp32, contiguous; changed in place. Afterwards only its lower triangle means anything:
       backends differ in whether they write above the diagonal.
    keys: [n, d_ff] fp32, fp16, bf16 or fp64, on c's device, any strides; facts or tokens are rows. Not kept.

    Native on the CPU for keys of at most 32 bits: products of 256 rows are summed in fp32 and added to ``c``, so with
    an fp64 ``c`` the relative error stays below 1e-6 for any number of rows. Keys of 16 bits are never copied to
    fp32; on processors with avx512_bf16 bf16 keys are multiplied as they are, subnormal ones as zeros. Uses
    ``torch.get_num_threads()`` threads; the result does not depend on how many. On GPUs with Triton, for the
    same keys, products of 4096 rows are summed in fp32. Elsewhere the reference runs (``dispatch.backend_for``).

    Cost: n d_ff^2 FLOP native and on Triton, twice that as reference; native, the keys are read twice, and the
    triangle of ``c`` is read and written once per 256 rows.

    Raises ValueError, and leaves ``c`` as it was, for a NaN or infinite key, wrong shapes, or tensors on two devices;
    TypeError for other dtypes. Keys beyond 1e18 overflow fp32 sums.
    """
    _check(c, keys)
    keys = keys.detach()
    backend = dispatch.backend_for("second_moment", keys.device, keys.dtype)
    if backend == "reference":
        return second_moment_ref(c, keys)
    if backend == "triton":
        from kedit_fast.kernels.triton import second_moment

        require_finite("keys", keys)
        return second_moment.second_moment_(c, keys)
    if not _native(c, keys):
        require_finite("keys", keys)
    return c


def second_moment_ref(c: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``second_moment_`` in plain torch, in c's dtype throughout: the reference, and the path off the CPU.

    Same arguments, result and errors; fp64 keys into an fp32 ``c`` are rounded first.
    """
    _check(c, keys)
    require_finite("keys", keys)
    with torch.no_grad():
        for chunk in keys.split(_CHUNK):
            chunk = chunk.to(c.dtype)
            c.addmm_(chunk.T, chunk)
    return c


def fill_upper_(c: torch.Tensor) -> torch.Tensor:
    """Copies the lower triangle of ``c`` [d, d] onto the upper one, in place, in blocks; returns ``c``."""
    if c.ndim != 2 or c.shape[0] != c.shape[1]:
        raise ValueError(f"c has shape {list(c.shape)}; expected a square matrix [d_ff, d_ff]")
    for begin in range(0, len(c), _BLOCK):
        end = begin + _BLOCK
        square = c[begin:end, begin:end]
        square.copy_(square.tril() + square.tril(-1).T)
        c[begin:end, end:] = c[end:, begin:end].T
    return c


class NotFinite(ValueError):
    """NaN or infinity among numbers that have to be finite."""


def require_finite(name: str, x: torch.Tensor) -> None:
    """Raises NotFinite with the place and the value of the first NaN or infinity in ``x``."""
    if math.isfinite(float(x.detach().sum())):  # NaN and infinity survive a sum, which is 17x faster than what follows
        return
    finite = torch.isfinite(x)
    if bool(finite.all()):
        return
    place = tuple(torch.nonzero(~finite)[0].tolist())
    raise NotFinite(
        f"{name}[{', '.join(map(str, place))}] is {x[place].item()} ({int((~finite).sum())} such values in "
        f"{name} {list(x.shape)})"
    )


def _native(c: torch.Tensor, keys: torch.Tensor) -> bool:
    """Runs the extension; False, with ``c`` as it was, if a key is not finite."""
    if keys.stride(1) != 1 or keys.stride(0) < keys.shape[1]:
        keys = keys.contiguous()
    c_type, key_type = (str(x.dtype).removeprefix("torch.") for x in (c, keys))
    run = getattr(dispatch.native(), f"second_moment_{c_type}_{key_type}")
    n, d_ff = keys.shape
    return run(c.data_ptr(), c.stride(0), keys.data_ptr(), n, d_ff, keys.stride(0), torch.get_num_threads())


def _check(c: torch.Tensor, keys: torch.Tensor) -> None:
    if c.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"c is {c.dtype}; expected torch.float64 or torch.float32, to accumulate in")
    if not keys.is_floating_point():
        raise TypeError(f"keys are {keys.dtype}; expected a floating-point dtype")
    if keys.ndim != 2:
        raise ValueError(f"keys have shape {list(keys.shape)}; expected [n, d_ff], one row a token")
    if c.shape != (keys.shape[1], keys.shape[1]):
        raise ValueError(f"c has shape {list(c.shape)}; keys {list(keys.shape)} need [{keys.shape[1]}] * 2")
    if c.device != keys.device:
        raise ValueError(f"c is on {c.device} and keys on {keys.device}; move one of them")
    if not c.is_contiguous():
        raise ValueError("c is not contiguous; it is changed in place, so pass the whole accumulator")
    if c.requires_grad:
        raise ValueError("c requires grad; an accumulator is not differentiated, pass c.detach()")
