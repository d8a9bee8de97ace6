"""Which implementation of an op runs: plain torch (reference), native code (the C++ extension, the OpenBLAS that numpy
brings, the CUDA libraries that torch brings), or Triton.

Left alone, an op takes the first implementation in ``IMPLEMENTATIONS`` that serves the tensor's device and dtype and
can run on this machine, and the reference otherwise. ``KEDIT_FAST_BACKEND`` forces one; what is forced and cannot
be had is an error, never replaced in silence. ``kedit-fast info`` prints ``report()``.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

from kedit_fast.basics import settings
from kedit_fast.kernels import cusolver, openblas

BACKENDS = ("reference", "native", "triton")
INTERFACE = 6  # of csrc/bindings.cpp; a module that says otherwise was built from other sources


class Implementation(NamedTuple):
    """A backend that computes an op for tensors of this device type and these dtypes.

    why_not: why this op of the backend cannot run on this machine; empty if it can
    why_not_chosen: why it runs only where it is forced, though it could; empty if it is taken unasked
    """

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[], str] = str
    why_not_chosen: Callable[[], str] = str


def _triton(*dtypes: torch.dtype) -> tuple[Implementation, ...]:
    """The rows of an op that has a Triton kernel for these dtypes: on GPUs, and on the CPU for tests."""
    return (
        Implementation("triton", "cuda", dtypes, lambda: why_not_triton(), _interpreted),
        Implementation("triton", "cpu", dtypes, _not_interpreted, _interpreted),
    )


def _interpreted() -> str:
    return "Triton's interpreter (TRITON_INTERPRET=1) is for tests" if settings.triton_interprets() else ""


def _not_interpreted() -> str:
    if not settings.triton_interprets():
        return "Triton runs on the CPU only under TRITON_INTERPRET=1"
    return why_not_triton()


_UP_TO_32_BITS = (torch.float32, torch.float16, torch.bfloat16)

# An op absent from here, or a device or dtype absent from its row, is computed by the op's reference.
IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "attention": (
        Implementation("native", "cpu", (torch.float32,), lambda: why_not_native()),
        *_triton(*_UP_TO_32_BITS),
    ),
    "target_logprob": _triton(*_UP_TO_32_BITS),
    "rows": _triton(*_UP_TO_32_BITS, torch.float64),
    "lowrank": _triton(*_UP_TO_32_BITS),
    "pointwise": (
        Implementation("native", "cpu", (torch.float32,), lambda: why_not_native()),
        *_triton(*_UP_TO_32_BITS),
    ),
    "second_moment": (
        Implementation("native", "cpu", _UP_TO_32_BITS, lambda: why_not_native()),
        *_triton(*_UP_TO_32_BITS),
    ),
    "solve": (
        Implementation("native", "cpu", (torch.float64,), lambda: openblas.why_not()),
        Implementation("native", "cuda", (torch.float64,), lambda: cusolver.why_not()),
    ),
    "linear": (
        Implementation(
            "native", "cpu", (torch.float32,), lambda: why_not_native() or openblas.why_not(), lambda: _not_amd()
        ),
    ),
}


def _not_amd() -> str:
    return "" if native().is_amd() else "torch's own products are as fast on processors that are not AMD's"


def native() -> ModuleType | None:
    """The compiled extension, or None where it was not built; ``why_not_native`` then says why."""
    return _load_native()[0]


def why_not_native() -> str:
    """Why ``native()`` is None and what to do about it; empty if the extension is there."""
    return _load_native()[1]


@cache
def _load_native() -> tuple[ModuleType | None, str]:
    # torch is imported above, before the extension: both name libgomp.so.1, and the first to come decides which copy
    # the process maps. Two copies would be two thread pools on the same cores.
    try:
        from kedit_fast import _native as module
    except ImportError as error:
        return None, (
            f"the extension was not built or does not load ({error}); with a C++17 compiler at hand, "
            "KEDIT_FAST_NATIVE=1 pip install . shows what fails"
        )
    found = getattr(module, "interface", None)
    if found != INTERFACE:
        return None, (
            f"{module.__file__} has interface {found}, this package needs {INTERFACE}: it was built from other "
            "sources; install the package again"
        )
    return module, ""


def backend_for(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that will run ``op`` on tensors of this device and dtype: "reference", "native" or "triton".

    ``KEDIT_FAST_BACKEND`` forces a backend for every op that has it at all; an op without it stays on the reference,
    as ``report`` shows. ValueError: an unknown backend name, one that cannot run on this machine, or one that has
    the op but not for this device and dtype.
    """
    device = torch.device(device)
    forced = _forced_backend()
    candidates = IMPLEMENTATIONS.get(op, ())
    if forced is None:
        usable = (each for each in candidates if _serves(each, device, dtype))
        return next((each.backend for each in usable if not (each.why_not() or each.why_not_chosen())), "reference")
    offered = [each for each in candidates if each.backend == forced]
    if forced == "reference" or not offered:
        return "reference"
    offered = [each for each in offered if _serves(each, device, dtype)]
    if not offered:
        raise ValueError(
            f"KEDIT_FAST_BACKEND={forced}: {op} has no {forced} implementation for {dtype} on {device.type}; "
            "unset the variable to let device and dtype decide"
        )
    reason = offered[0].why_not()
    if reason:
        raise ValueError(f"KEDIT_FAST_BACKEND={forced}: {op} cannot run here: {reason}")
    return forced


def serving(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """``backend_for``; but the reference where a forced extension has the op for other devices or dtypes alone."""
    served = any(_serves(each, device, dtype) for each in IMPLEMENTATIONS[op] if each.backend == "native")
    return "reference" if settings.backend() == "native" and not served else backend_for(op, device, dtype)


def _serves(implementation: Implementation, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == implementation.device and dtype in implementation.dtypes


def _forced_backend() -> str | None:
    name = settings.backend()
    if name is None:
        return None
    if name not in BACKENDS:
        raise ValueError(f"KEDIT_FAST_BACKEND={name}: expected one of {', '.join(BACKENDS)}, or unset")
    reason = {"native": why_not_native, "triton": why_not_triton}.get(name, str)()
    if reason:
        raise ValueError(f"KEDIT_FAST_BACKEND={name} cannot run here: {reason}")
    return name


def why_not_triton() -> str:
    """Why Triton's kernels cannot run here; empty if they can."""
    return "" if find_spec("triton") else "Triton is not installed; pip install triton"


def report() -> dict:
    """What ``kedit-fast info`` shows.

    forced: the value of KEDIT_FAST_BACKEND or None; native, triton: True, or the reason it is missing;
    instruction_sets, openmp: of the extension ([] and False without it); threads: that CPU ops use; ops: {op: {device:
    {dtype name: backend}}} for the devices present; not_used: {op: {device: why a backend with that op is not taken}}.
    Raises what ``backend_for`` raises for a wrong KEDIT_FAST_BACKEND.
    """
    module = native()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "forced": _forced_backend(),
        "native": True if module else why_not_native(),
        "triton": why_not_triton() or True,
        "instruction_sets": module.instruction_sets() if module else [],
        "openmp": module.has_openmp() if module else False,
        "threads": torch.get_num_threads(),
        "ops": {op: {device: _backends(op, device) for device in devices} for op in IMPLEMENTATIONS},
        "not_used": {op: {device: _not_used(op, device) for device in devices} for op in IMPLEMENTATIONS},
    }


def _not_used(op: str, device: str) -> str:
    reasons = [
        f"{each.backend}: {why}"
        for each in IMPLEMENTATIONS[op]
        if device == each.device and (each.backend, device) != ("triton", "cpu")  # that is for tests only
        and (why := each.why_not() or each.why_not_chosen())
    ]  # fmt: skip
    return "; ".join(reasons)


def _backends(op: str, device: str) -> dict[str, str]:
    """{dtype name: backend} of an op; a forced backend that the op lacks for a dtype shows as "none"."""
    backends = {}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        try:
            backends[str(dtype).removeprefix("torch.")] = backend_for(op, device, dtype)
        except ValueError:
            backends[str(dtype).removeprefix("torch.")] = "none"
    return backends
