"""The native second moment against torch: ``C += KᵀK`` at three widths, in the same run, one after the other.

torch multiplies the whole square, the native op one triangle: half the FLOP. Each is timed with the FLOP it does, so
that the share of the fp32 peak says how good its products are (bf16 products may pass it), and the ratio of times which
of them to use. The rival of bf16 keys is torch's fp32 product of keys that are fp32 already: torch's own bf16 product
rounds its sums to bf16.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.common import CheckFailed, Figure, Measured, Skipped, peak_matmul, timed
from kedit_fast.kernels import dispatch
from kedit_fast.kernels.second_moment import second_moment_, second_moment_ref

ROWS = {1536: 4096, 4096: 4096, 14336: 512}  # of keys, by d_ff: SmolLM2-135M, GPT-2-medium, Llama-3-8B
TOLERANCE = 1e-5  # relative RMS error in fp32, as the tests have it
RIVAL = "torch.addmm, fp32"


class Provider(NamedTuple):
    """An op on an accumulator of its own, the keys' dtype, the FLOP of a row over d_ff², the ratio to reach at ROWS."""

    accumulator: torch.dtype
    keys: torch.dtype
    op: Callable
    flop: int
    mark: str = ""


def _providers() -> dict[str, Provider]:
    wide, narrow = torch.float64, torch.float32
    return {
        "native, fp64 sum": Provider(wide, narrow, second_moment_, 1, ">= 1.7"),
        "native, fp32 sum": Provider(narrow, narrow, second_moment_, 1),
        "native, bf16 keys": Provider(wide, torch.bfloat16, second_moment_, 1, ">= 3"),
        "native, fp16 keys": Provider(wide, torch.float16, second_moment_, 1),
        RIVAL: Provider(narrow, narrow, lambda c, keys: c.addmm_(keys.T, keys), 2),
        "torch reference, fp64": Provider(wide, narrow, second_moment_ref, 2),
    }


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped without the compiled extension."""
    if dispatch.backend_for("second_moment", "cpu", torch.float32) != "native":
        raise Skipped(dispatch.why_not_native() or "another backend is forced by KEDIT_FAST_BACKEND")
    if options.quick:
        return measure(widths=(256,), n_rows=512, repeats=3)
    return measure()


def measure(widths=tuple(ROWS), n_rows: int | None = None, repeats: int = 5) -> Measured:
    """Keys [n_rows, d_ff], as many as ROWS says where None; median of ``repeats``, providers taking turns."""
    rows = {d_ff: n_rows or ROWS[d_ff] for d_ff in widths}
    peaks, timings = [peak_matmul()], {}
    for d_ff in widths:
        timings[d_ff] = _times(d_ff, rows[d_ff], repeats)
        peaks.append(peak_matmul())
    figures = [figure for d_ff in widths for figure in _figures(d_ff, rows[d_ff], *timings[d_ff], max(peaks))]
    note = (
        f"Rows of keys: {', '.join(f'{count} at {d_ff}' for d_ff, count in rows.items())}; fp32 keys and fp64 sums "
        f"where nothing else is named; instruction set {_instruction_set()}; median of {repeats}."
    )
    return Measured(figures, max(peaks), [note])


def _instruction_set() -> str:
    """The best one that the extension has here."""
    module = dispatch.native()
    return module.instruction_sets()[0] if module else "none, there is no extension"


def _times(d_ff: int, n_rows: int, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """({provider: seconds}, {provider: relative RMS error against fp64})."""
    keys = torch.randn(n_rows, d_ff, generator=torch.Generator().manual_seed(0))
    by_dtype = {dtype: keys.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    providers, runs, errors = _providers(), {}, {}
    for name, provider in providers.items():
        runs[name], errors[name] = [], _error(provider, by_dtype[provider.keys])
        if not errors[name] <= TOLERANCE:
            raise CheckFailed(f"{name}, d_ff {d_ff}: relative error {errors[name]:.1e}, allowed {TOLERANCE:g}")
    # One accumulator a dtype: one a provider would be 7 GB at the largest width.
    sums = {dtype: torch.zeros(d_ff, d_ff, dtype=dtype) for dtype in (torch.float64, torch.float32)}
    for _ in range(repeats):
        for name, provider in providers.items():
            runs[name].append(timed(provider.op, sums[provider.accumulator], by_dtype[provider.keys]).seconds)
    return {name: statistics.median(seconds) for name, seconds in runs.items()}, errors


def _error(provider: Provider, keys: torch.Tensor) -> float:
    """Relative RMS error of some rows of the lower triangle, against fp64; all rows where there are not many."""
    d_ff = keys.shape[1]
    c = provider.op(torch.zeros(d_ff, d_ff, dtype=provider.accumulator), keys)
    rows = torch.arange(0, d_ff, max(1, d_ff // 1024))
    below = torch.arange(d_ff) <= rows[:, None]
    truth = keys[:, rows].T.double() @ keys.double()
    return float(((c[rows].double() - truth) * below).norm() / (truth * below).norm())


def _figures(d_ff: int, n_rows: int, seconds: dict, errors: dict, peak: float) -> list[Figure]:
    case, providers, marked = f"d_ff {d_ff}", _providers(), d_ff in ROWS
    figures = [
        Figure(case, f"{name}: ratio to {RIVAL}", seconds[RIVAL] / seconds[name], "x", mark=provider.mark * marked)
        for name, provider in providers.items()
        if provider.op is second_moment_
    ]
    for name, provider in providers.items():
        rate = 1e-9 * provider.flop * d_ff**2 * n_rows / seconds[name]
        figures += [
            Figure(case, name, 1000 * seconds[name], "ms"),
            Figure(case, f"{name}: rate", rate, "GFLOP/s"),
            Figure(case, f"{name}: share of peak", 100 * rate / peak, "%"),
            Figure(case, f"{name}: error", errors[name], "difference", mark=f"<= {TOLERANCE:g}"),
        ]
    return figures
