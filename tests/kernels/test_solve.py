"""The solves of ROME and MEMIT against a general solve of the same matrix, and the errors that replace bad inverses.

Every test runs twice: on plain torch and on numpy's OpenBLAS.
"""

import math

import pytest
import torch

from kedit_fast.kernels import dispatch, openblas
from kedit_fast.kernels import solve as module
from kedit_fast.kernels.second_moment import second_moment_
from kedit_fast.kernels.solve import MomentFactor, condition, factor, factor_ref, memit_solve, memit_solve_ref
from tests.compare import close
from tests.kernels import normal, random_moment, solves

WIDTHS = [1, 7, 48, 80, 130]
WHY = dispatch.why_not_native() or openblas.why_not()
native_only = pytest.mark.skipif(bool(WHY), reason=f"no native solves: {WHY}")


@pytest.fixture(autouse=True, params=["reference", pytest.param("native", marks=native_only)])
def backend(request, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_BACKEND", request.param)
    return request.param


def moment_with(eigenvalues, seed=0):
    basis = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    return basis * eigenvalues @ basis.T


def truth(keys, residual, moment, weight):
    """Δ = Rᵀ K (λC + KᵀK)⁻¹ by LU: where the gradient of ‖K Δᵀ - R‖² + λ tr(Δ C Δᵀ) vanishes."""
    return torch.linalg.solve(weight * moment + keys.T @ keys, keys.T @ residual).T


def delta(u, v):
    return u @ v.T


@pytest.mark.parametrize("way", ["dense", "woodbury", None])
@pytest.mark.parametrize("d_ff", WIDTHS)
@pytest.mark.parametrize("n", [1, 17, 129])
def test_both_ways_equal_a_general_solve(n, d_ff, way):
    keys, residual, moment = normal(n, d_ff), normal(n, 5, seed=1), random_moment(d_ff)
    u, v = memit_solve(keys, residual, moment, 30.0, way=way)
    assert u.shape == (5, n) and v.shape == (d_ff, n)
    assert u.dtype == v.dtype == torch.float64
    close("Δ", delta(u, v), truth(keys, residual, moment, 30.0), torch.float64)
    matrix = 30 * moment + keys.T @ keys
    close("v", v, torch.linalg.solve(matrix, keys.T), torch.float64)


@pytest.mark.parametrize("n, same_as", [(9, "woodbury"), (10, "dense"), (11, "dense")])
def test_the_way_is_chosen_by_size(n, same_as):
    arguments = normal(n, 10), normal(n, 3), random_moment(10), 2.0
    assert torch.equal(memit_solve(*arguments)[1], memit_solve(*arguments, way=same_as)[1])


def test_small_weight_reaches_the_values_and_large_weight_leaves_the_model_alone():
    keys, residual, moment = normal(5, 30), normal(5, 4, seed=1), random_moment(30)
    reached = keys @ delta(*memit_solve(keys, residual, moment, 1e-8)).T
    assert (reached - residual).abs().max() < 1e-6
    assert delta(*memit_solve(keys, residual, moment, 1e9)).abs().max() < 1e-6


def test_rome_direction():
    moment, key = random_moment(48), normal(48, seed=3)
    direction = factor(moment).solve(key)
    assert direction.shape == (48,)
    close("C⁻¹k", direction, torch.linalg.solve(moment, key), torch.float64)
    several = normal(48, 5, seed=4)
    close("C⁻¹[k..]", factor(moment).solve(several), torch.linalg.solve(moment, several), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inputs_of_any_float_dtype_are_taken_exactly(dtype):
    keys, residual, moment = normal(6, 20).to(dtype), normal(6, 3).to(dtype), random_moment(20).float()
    u, v = memit_solve(keys, residual, moment, 4.0)
    close("Δ", delta(u, v), truth(keys.double(), residual.double(), moment.double(), 4.0), torch.float64)


@pytest.mark.parametrize("way", ["dense", "woodbury"])
def test_only_the_lower_triangle_is_read_and_nothing_is_changed(way):
    keys, residual, moment = normal(9, 25), normal(9, 3), random_moment(25)
    lower_only = moment.tril() + torch.full_like(moment, 1e6).triu(1)
    before = [x.clone() for x in (keys, residual, lower_only)]
    close("v", memit_solve(keys, residual, lower_only, 2.0, way=way)[1], memit_solve(keys, residual, moment, 2.0)[1],
          torch.float64)  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip((keys, residual, lower_only), before, strict=True))
    assert condition(lower_only) == pytest.approx(condition(moment), rel=1e-12)


def test_an_accumulated_moment_serves_as_it_is():
    text = normal(300, 33).float()
    moment = second_moment_(torch.zeros(33, 33, dtype=torch.float64), text) / len(text)
    keys = normal(4, 33, seed=2)
    whole = text.double().T @ text.double() / len(text)
    close("v", memit_solve(keys, normal(4, 2), moment, 1.0)[1], torch.linalg.solve(whole + keys.T @ keys, keys.T),
          torch.float32)  # fmt: skip


@pytest.mark.parametrize("way", ["dense", "woodbury", None])
def test_no_facts(way):
    u, v = memit_solve(torch.zeros(0, 7), torch.zeros(0, 3), random_moment(7), 1.0, way=way)
    assert u.shape == (3, 0) and v.shape == (7, 0)


def test_strided_inputs():
    keys, residual, moment = normal(40, 12).T[::2, 5:25], normal(6, 9)[:, ::3], random_moment(20)
    close("Δ", delta(*memit_solve(keys, residual, moment, 1.0)), truth(keys, residual, moment, 1.0), torch.float64)


@pytest.mark.parametrize("d", [1, 7, 80, 130])
@pytest.mark.parametrize("decades", [0, 3, 6, 10])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_condition_estimate(d, decades, seed):
    moment = moment_with(torch.logspace(0, -decades, d, dtype=torch.float64), seed)
    estimate = condition(moment)
    assert estimate == factor(moment).condition
    # A lower bound of the 1-norm condition number. The bound loses its digits as the inverse does.
    exact = torch.linalg.cond(moment, 1).item()
    assert exact / 3 <= estimate <= exact * 1.001
    assert 0.1 <= estimate / torch.linalg.cond(moment).item() <= 10


def test_condition_estimate_leaves_a_saddle():
    # An inverse, in exact numbers, that maps the ascent's first vector (all equal) and a linear ramp to themselves.
    w = torch.tensor([1, -1, -1, 1, 1, -1, -1, 1], dtype=torch.float64)
    inverse = torch.eye(8, dtype=torch.float64) + 1024 * torch.outer(w, w)
    exact = torch.linalg.norm(inverse, 1).item()
    assert exact / 20 <= module._inverse_one_norm(lambda row: row @ inverse, inverse) <= exact


def test_blocks_of_a_matrix(monkeypatch):
    matrix = random_moment(37)
    one_norm = module._algebra(matrix.device).one_norm
    for block in (1, 8, 36, 37, 100):
        monkeypatch.setattr(module, "_BLOCK", block)
        assert one_norm(matrix.tril()) == pytest.approx(torch.linalg.norm(matrix, 1).item(), rel=1e-12)
        assert torch.equal(module._weighted(matrix.float(), 3.0, 0.0), 3 * matrix.float().double().tril())


def test_regularizer_is_relative_to_the_mean_diagonal():
    moment, keys, residual = 50 * random_moment(20), normal(3, 20), normal(3, 2)
    ridged = moment + 0.1 * moment.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    kept = factor(moment, 2.0, regularizer=0.1)
    for way in ("dense", "woodbury"):
        got = delta(*memit_solve(keys, residual, kept, 2.0, way=way))
        close("Δ", got, truth(keys, residual, ridged, 2.0), torch.float64)
    with pytest.raises(ValueError, match=r"regularizer = -0.001"):
        factor(moment, regularizer=-1e-3)


def test_what_earlier_edits_wrote_is_kept():
    moment, earlier, keys, residual = random_moment(20), normal(4, 20, seed=2), normal(3, 20), normal(3, 2)
    kept = factor(moment, 2.0, kept=earlier)
    for way in ("dense", "woodbury"):
        got = delta(*memit_solve(keys, residual, kept, 2.0, way=way))
        close("Δ", got, truth(keys, residual, moment + earlier.T @ earlier / 2, 2.0), torch.float64)
    assert torch.equal(factor(moment, kept=earlier[:0]).lower, factor(moment).lower)
    with pytest.raises(ValueError, match=r"kept has shape \[4, 7\]; expected \[m, 20\]"):
        factor(moment, kept=normal(4, 7))
    with pytest.raises(ValueError, match=r"kept\[2, 1\] is nan"):
        factor(moment, kept=spoiled(earlier))


def test_too_few_tokens():
    text = normal(12, 20)
    moment = text.T @ text / 12
    with pytest.raises(ValueError, match=r"rank ≤ n_tokens = 12 < d_ff = 20 .*collect more tokens, or pass a reg"):
        factor(moment, n_tokens=12)
    assert factor(moment, n_tokens=12, regularizer=1e-3).condition < 1e6
    assert factor(random_moment(20), n_tokens=20).condition < 1e3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_singular_moment_is_never_inverted(seed, dtype):
    # Rounding makes some of these positive definite: then the condition number must catch them.
    text = normal(15, 40, seed=seed).to(dtype)
    moment = text.T @ text / 15
    with pytest.raises(ValueError, match=r"not positive definite|singular in fp64"):
        factor(moment, 3.0)
    with pytest.raises(ValueError, match=r"not positive definite|singular in fp64"):
        memit_solve(normal(4, 40), normal(4, 3), moment, 1.0, way="dense")


def test_bad_moments():
    solves.check_bad_moments()


def test_dense_bears_a_singular_moment_that_the_keys_complete():
    moment, keys, residual = torch.diag(torch.tensor([1.0, 1.0, 0.0]).double()), torch.eye(3).double(), normal(3, 2)
    u, v = memit_solve(keys, residual, moment, 2.0)
    close("Δ", delta(u, v), truth(keys, residual, moment, 2.0), torch.float64)


GOOD = {"keys": normal(4, 6), "residual": normal(4, 3), "moment": random_moment(6), "weight": 2.0}


def spoiled(x, value=float("nan")):
    x = x.clone()
    x[2, 1] = value
    return x


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keys": spoiled(GOOD["keys"])}, r"keys\[2, 1\] is nan"),
        ({"residual": spoiled(GOOD["residual"], math.inf)}, r"residual\[2, 1\] is inf"),
        ({"moment": spoiled(GOOD["moment"])}, r"moment\[2, 1\] is nan"),
        ({"keys": normal(4, 5)}, r"keys \[4, 5\] do not fit the second moment \[6, 6\]"),
        ({"keys": normal(6)}, "a row a fact"),
        ({"residual": normal(3, 3)}, "a row a fact"),
        ({"moment": normal(5, 6)}, r"second moment has shape \[5, 6\]"),
        ({"weight": 0.0}, "weight = 0.0; expected"),
        ({"weight": -1.0}, "weight = -1.0"),
        ({"weight": math.nan}, "weight = nan"),
        ({"way": "lu"}, "way = 'lu'; expected"),
        ({"moment": factor(GOOD["moment"], 3.0)}, r"weight = 2.0, but the factor was made with 3.0"),
        ({"moment": factor(GOOD["moment"], 2.0), "keys": normal(4, 5)}, "d_ff differs"),
    ],
)
def test_wrong_arguments(change, message):
    memit_solve(**GOOD)
    with pytest.raises(ValueError, match=message):
        memit_solve(**{**GOOD, **change})


def test_wrong_right_sides():
    kept = factor(random_moment(6))
    assert isinstance(kept, MomentFactor) and kept.d_ff == 6
    for b in (normal(5), normal(5, 6), normal(6, 1, 1)):
        with pytest.raises(ValueError, match="b has shape"):
            kept.solve(b)
    with pytest.raises(ValueError, match=r"b\[2, 1\] is nan"):
        kept.solve(spoiled(normal(6, 3)))
    with pytest.raises(TypeError, match=r"torch.int64"):
        kept.solve(torch.arange(6))


# ---- which algebra


@pytest.mark.parametrize("way", ["dense", "woodbury"])
@pytest.mark.parametrize("n, d_ff", [(1, 1), (5, 64), (17, 7), (129, 130), (40, 301)])
def test_equals_the_reference(n, d_ff, way):
    solves.check_solve(n, d_ff, way)


@pytest.mark.parametrize("op", [factor, factor_ref])
def test_a_factor_is_lower_triangular(op):
    lower = op(random_moment(70).float() + torch.full((70, 70), 9.0).triu(1)).lower
    assert torch.equal(lower, lower.tril())


def test_the_residual_is_at_rounding_without_refinement():
    eigenvalues = torch.logspace(0, -6, 200, dtype=torch.float64)
    moment, keys = moment_with(eigenvalues), normal(30, 200)
    for way in ("dense", "woodbury"):
        v = memit_solve(keys, keys, moment, 0.5, way=way)[1]
        left = 0.5 * moment @ v + keys.T @ (keys @ v) - keys.T
        assert left.norm() <= 1e-13 * keys.norm()


@pytest.mark.parametrize("way", ["dense", "woodbury"])
def test_threads_do_not_change_the_result(way, threads):
    keys, residual, moment = normal(90, 260), normal(90, 3, seed=1), random_moment(260)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(memit_solve(keys, residual, moment, 2.0, way=way)[1])
    close("2 threads", results[1], results[0], torch.float64)
    close("3 threads", results[2], results[0], torch.float64)


def test_inputs_of_the_working_dtype_are_not_worked_on_in_place():
    solves.check_inputs_stay()


@native_only
def test_without_openblas_the_reference_runs_and_the_extension_is_not_needed(monkeypatch):
    monkeypatch.delenv("KEDIT_FAST_BACKEND")
    monkeypatch.setattr(dispatch, "_load_native", lambda: (None, "the extension was not built"))
    assert dispatch.backend_for("solve", "cpu", torch.float64) == "native"
    monkeypatch.setattr(openblas, "_library", lambda: None)
    assert dispatch.backend_for("solve", "cpu", torch.float64) == "reference"
    arguments = normal(4, 30), normal(4, 3), random_moment(30), 2.0
    assert torch.equal(memit_solve(*arguments)[1], memit_solve_ref(*arguments)[1])


# ---- the routines of OpenBLAS


@native_only
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("left, shape", solves.SIDES)
def test_triangular_solves(left, shape, transposed):
    solves.check_triangular(openblas, left, shape, transposed)


@native_only
def test_products_and_factors_leave_the_upper_triangle():
    for by_rows in (False, True):
        solves.check_gram(openblas, 7, 4, by_rows)
    moment = random_moment(70)
    assert openblas.one_norm(solves.with_nan_above(moment)) == pytest.approx(
        torch.linalg.norm(moment, 1).item(), rel=1e-12
    )
    solves.check_cholesky(openblas, 70)
    assert openblas.cholesky_(torch.diag(torch.tensor([1.0, 2.0, -1.0, 3.0]).double()))[1] == 3


@native_only
def test_routines_use_torchs_threads_and_put_numpys_back(threads, monkeypatch):
    library, seen = openblas._library(), []
    count = library.scipy_openblas_get_num_threads64_
    before = count()

    class Watching:
        def __getattr__(self, name):
            seen.append(count())
            return getattr(library, name)

    threads(3)
    monkeypatch.setattr(openblas, "_library", Watching)
    assert openblas.cholesky_(-torch.eye(3, dtype=torch.float64))[1] == 1
    assert seen[-2:] == [3, 3] and count() == before  # at the call, and when the number is put back
