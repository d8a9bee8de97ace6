"""The solves of MEMIT against torch: v = (λC + KᵀK)⁻¹ Kᵀ at d_ff 4096 in fp64, in the same run, one after the other.

The rival does what a reader of the paper would write: the whole matrix, ``torch.linalg.cholesky_ex``,
``torch.cholesky_solve``. It neither checks its inputs nor estimates the condition; ``memit_solve`` does both.
"""

import statistics

import torch

from bench.common import CheckFailed, Figure, Measured, Skipped, peak_matmul, timed
from kedit_fast.kernels import dispatch, openblas
from kedit_fast.kernels.solve import factor, factor_ref, memit_solve, memit_solve_ref

D_FF = 4096
FACTS = (100, 500)
WEIGHT = 100.0  # λ
TOLERANCE = 1e-10  # of the residual ‖(λC + KᵀK) v - Kᵀ‖ / ‖K‖
RIVAL = "torch Cholesky"
MARKS = {("once", 500): ">= 1.3", ("cached factor", 500): ">= 3", ("cached factor", 100): ">= 8"}


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped without the compiled extension or OpenBLAS."""
    if dispatch.backend_for("solve", "cpu", torch.float64) != "native":
        why_not = dispatch.why_not_native() or openblas.why_not()
        raise Skipped(why_not or "another backend is forced by KEDIT_FAST_BACKEND")
    if options.quick:
        return measure(d_ff=256, facts=(20,), repeats=3)
    return measure()


def measure(d_ff: int = D_FF, facts=FACTS, repeats: int = 7) -> Measured:
    """A second moment of 3 d_ff rows of fp32 keys; median of ``repeats``, providers taking turns."""
    moment = _moment(d_ff)
    peak, figures = peak_matmul(), []
    kept, kept_ref = factor(moment, WEIGHT), factor_ref(moment, WEIGHT)
    for n in facts:
        keys = 10 * _keys(n, d_ff, seed=1)
        figures += _figures(n, *_times(_providers(keys, moment, kept, kept_ref), keys, moment, repeats))
    notes = [
        f"d_ff {d_ff}, fp64, condition of C {kept.condition:.0e}; once: C is factored and used, cached factor: C was "
        f"factored before; ratios to {RIVAL} of the whole matrix; median of {repeats}."
    ]
    return Measured(figures, max(peak, peak_matmul()), notes)


def _keys(n: int, d_ff: int, seed: int) -> torch.Tensor:
    """Random keys [n, d_ff], whose last columns are a tenth of the first."""
    return torch.randn(n, d_ff, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -1, d_ff)


def _moment(d_ff: int) -> torch.Tensor:
    text = _keys(3 * d_ff, d_ff, seed=0)
    return (text.T @ text / len(text)).double()


def _providers(keys, moment, kept, kept_ref) -> dict:
    """{name: what gives v [d_ff, n]}."""
    no_residual = keys[:, :1]

    def matrix():
        rows = keys.double()
        return (WEIGHT * moment).addmm_(rows.T, rows), rows.T

    def cholesky():
        whole, columns = matrix()
        return torch.cholesky_solve(columns, torch.linalg.cholesky_ex(whole).L)

    return {
        "once": lambda: memit_solve(keys, no_residual, moment, WEIGHT)[1],
        "once, dense": lambda: memit_solve(keys, no_residual, moment, WEIGHT, way="dense")[1],
        "once, reference": lambda: memit_solve_ref(keys, no_residual, moment, WEIGHT)[1],
        "cached factor": lambda: memit_solve(keys, no_residual, kept, WEIGHT)[1],
        "cached factor, reference": lambda: memit_solve_ref(keys, no_residual, kept_ref, WEIGHT)[1],
        RIVAL: cholesky,
        "torch.linalg.solve": lambda: torch.linalg.solve(*matrix()),
    }


def _times(providers, keys, moment, repeats) -> tuple[dict[str, float], dict[str, float]]:
    """({provider: seconds}, {provider: relative residual})."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    residuals = {name: _residual(solved(), keys.double(), moment) for name, solved in providers.items()}
    for name, residual in residuals.items():
        if not residual <= TOLERANCE:
            raise CheckFailed(f"{name}, {len(keys)} facts: relative residual {residual:.1e}, allowed {TOLERANCE:g}")
    for _ in range(repeats):
        for name, solved in providers.items():
            seconds[name].append(timed(solved).seconds)
    return {name: statistics.median(taken) for name, taken in seconds.items()}, residuals


def _residual(v, keys, moment) -> float:
    left = WEIGHT * (moment @ v) + keys.T @ (keys @ v) - keys.T
    return float(left.norm() / keys.norm())


def _figures(n: int, seconds: dict, residuals: dict) -> list[Figure]:
    case = f"{n} facts"
    figures = [
        Figure(case, f"{name}: ratio to {RIVAL}", seconds[RIVAL] / taken, "x", mark=MARKS.get((name, n), ""))
        for name, taken in seconds.items()
        if not name.startswith("torch")
    ]
    for name, taken in seconds.items():
        figures += [
            Figure(case, name, 1000 * taken, "ms"),
            Figure(case, f"{name}: residual", residuals[name], "difference", mark=f"<= {TOLERANCE:g}"),
        ]
    return figures
