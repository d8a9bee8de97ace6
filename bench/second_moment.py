"""The native second moment against torch: ``C += KᵀK`` at two widths, in the same run, one after the other.

torch multiplies the whole square, the native op one triangle: half the FLOP. Each is timed with the FLOP it does, so
that the share of the peak says how good its products are, and the ratio of times which of them to use.
"""

import statistics

import torch

from bench.common import CheckFailed, Figure, Measured, Skipped, peak_matmul, timed
from kedit_fast.kernels import dispatch
from kedit_fast.kernels.second_moment import second_moment_, second_moment_ref

WIDTHS = (1536, 4096)  # SmolLM2-135M, GPT-2-medium
ROWS = 4096
TOLERANCE = 1e-5  # relative RMS error in fp32, as the tests have it


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped without the compiled extension."""
    if dispatch.backend_for("second_moment", "cpu", torch.float32) != "native":
        raise Skipped(dispatch.why_not_native() or "another backend is forced by KEDIT_FAST_BACKEND")
    if options.quick:
        return measure(widths=(256,), n_rows=512, repeats=3)
    return measure()


def measure(widths=WIDTHS, n_rows: int = ROWS, repeats: int = 10) -> Measured:
    """fp32 keys [n_rows, d_ff]; median of ``repeats``, providers taking turns."""
    peaks, timings = [peak_matmul()], {}
    for d_ff in widths:
        timings[d_ff] = _times(d_ff, n_rows, repeats)
        peaks.append(peak_matmul())
    figures = [figure for d_ff in widths for figure in _figures(d_ff, n_rows, *timings[d_ff], max(peaks))]
    return Measured(figures, max(peaks), [f"{n_rows} rows of fp32 keys; median of {repeats}."])


def _providers(d_ff: int):
    """{name: (accumulator, op, FLOP of a row)}."""
    wide, narrow = (torch.zeros(d_ff, d_ff, dtype=dtype) for dtype in (torch.float64, torch.float32))
    return {
        "native, fp64 sum": (wide, second_moment_, d_ff**2),
        "native, fp32 sum": (narrow, second_moment_, d_ff**2),
        "torch.addmm, fp32": (narrow.clone(), lambda c, keys: c.addmm_(keys.T, keys), 2 * d_ff**2),
        "torch reference, fp64": (wide.clone(), second_moment_ref, 2 * d_ff**2),
    }


def _times(d_ff: int, n_rows: int, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """({provider: seconds}, {provider: relative RMS error against fp64})."""
    keys = torch.randn(n_rows, d_ff, generator=torch.Generator().manual_seed(0))
    providers = _providers(d_ff)
    truth = second_moment_ref(torch.zeros(d_ff, d_ff, dtype=torch.float64), keys).tril()
    errors = {name: _error(op(c, keys), truth) for name, (c, op, _) in providers.items()}
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise CheckFailed(f"{name}, d_ff {d_ff}: relative error {error:.1e}, allowed {TOLERANCE:g}")
    runs: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, (c, op, _) in providers.items():
            runs[name].append(timed(op, c, keys).seconds)
    return {name: statistics.median(seconds) for name, seconds in runs.items()}, errors


def _error(c: torch.Tensor, truth: torch.Tensor) -> float:
    return float((c.tril().double() - truth).norm() / truth.norm())


def _figures(d_ff: int, n_rows: int, seconds: dict, errors: dict, peak: float) -> list[Figure]:
    case, rival = f"d_ff {d_ff}", seconds["torch.addmm, fp32"]
    figures = [
        Figure(case, f"{name}: ratio to torch.addmm", rival / seconds[name], "x")
        for name in ("native, fp64 sum", "native, fp32 sum")
    ]
    for name, (_, _, flop) in _providers(1).items():
        rate = 1e-9 * flop * d_ff**2 * n_rows / seconds[name]
        figures += [
            Figure(case, name, 1000 * seconds[name], "ms"),
            Figure(case, f"{name}: rate", rate, "GFLOP/s"),
            Figure(case, f"{name}: share of peak", 100 * rate / peak, "%"),
            Figure(case, f"{name}: error", errors[name], "difference", mark=f"<= {TOLERANCE:g}"),
        ]
    return figures
