"""LEACE's theorem on rows whose label is plain to see, and what must not matter: how the rows come."""

import pytest
import torch

import kedit_fast as kf
from kedit_fast.moments.leace import METHODS, _capped
from tests.conftest import refused
from tests.oracle.leace import leace as oracle_leace

N, D, CLASSES = 600, 24, 3


def rows(n=N, d=D, dtype=torch.float64, seed=0):
    """Correlated rows of very different widths, and classes that move their mean along two directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, d, dtype=torch.float64)
    z = torch.randint(CLASSES, (n,), generator=generator)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + 2
    means = torch.randn(CLASSES, d, generator=generator, dtype=torch.float64) @ mix
    return (x + means[z]).to(dtype), z


def fitted(x, z, **how):
    return kf.LeaceFitter(x.shape[1], CLASSES, **how).update(x, z)


def cross_covariance(x, z):
    """The largest |cov(x, z)| over the standard deviations of both."""
    x, z = x.double(), torch.nn.functional.one_hot(z, CLASSES).double()
    x, z = (each - each.mean(0) for each in (x, z))
    return ((x.T @ z) / len(x) / (x.std(0)[:, None] * z.std(0).clamp(min=1e-9))).abs().max().item()


@pytest.mark.parametrize(
    "how", [{}, {"method": "orth"}, {"affine": False}, {"shrinkage": False}, {"constrain_cov_trace": False}]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_nothing_linear_is_left(how, dtype, tolerance):
    x, z = rows(dtype=dtype)
    eraser = fitted(x, z, **how).eraser
    erased = eraser(x)
    assert cross_covariance(x, z) > 0.1 and cross_covariance(erased, z) < tolerance
    assert erased.dtype == dtype and eraser.rank == CLASSES - 1
    twice = eraser(erased)
    assert (twice - erased).norm() / erased.norm() < tolerance  # idempotent
    kept = how.get("affine", True)
    assert torch.allclose(erased.double().mean(0), x.double().mean(0), atol=1e-4) == kept


def accuracy(x, z):
    """Of a logistic regression trained on all of it until nothing moves."""
    x = (x - x.mean(0)) @ torch.linalg.pinv(torch.linalg.cholesky(torch.cov(x.T) + 1e-9 * torch.eye(x.shape[1]))).T
    weight = torch.zeros(CLASSES, x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    steps = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        steps.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight.T, z)
        value.backward()
        return value

    steps.step(loss)
    return ((x @ weight.T).argmax(1) == z).double().mean().item()


def test_a_trained_linear_probe_is_no_better_than_the_majority():
    x, z = rows()
    majority = torch.bincount(z).max().item() / len(z)
    assert accuracy(x, z) > majority + 0.3
    assert accuracy(fitted(x, z).eraser(x), z) <= majority + 2 * (majority * (1 - majority) / len(z)) ** 0.5


def test_it_is_the_paper_s_formula_and_changes_least():
    x, z = rows()
    onehot = torch.nn.functional.one_hot(z, CLASSES).double()
    P, mu = oracle_leace(x, onehot)
    fitter = fitted(x, z, shrinkage=False, constrain_cov_trace=False)
    eraser = fitter.eraser
    assert (eraser.P - P).norm() / P.norm() < 1e-8 and torch.allclose(eraser.mu, mu)
    orth = fitted(x, z, method="orth").eraser
    moved = {name: (each - x).square().sum() for name, each in (("leace", eraser(x)), ("orth", orth(x)))}
    assert moved["leace"] < moved["orth"] and torch.allclose(orth.P, orth.P.T) and METHODS[1] == "orth"
    told = fitter.with_labels(x, onehot)
    assert (told - x).square().sum() < moved["leace"] and cross_covariance(told, z) < 1e-10


@pytest.mark.parametrize("cuts", [(1, 7), (300,), (0, 599)])
def test_streaming_is_the_whole_batch(cuts):
    x, z = rows()
    x = x + 1e4  # sums of squares would lose what Welford's do not
    whole, parts = fitted(x, z), kf.LeaceFitter(D, CLASSES)
    for some in torch.arange(N).tensor_split(cuts):
        parts.update(x[some], z[some])
    assert parts.n == whole.n == N
    assert torch.allclose(parts.sigma_xx, torch.cov(x.T, correction=0), rtol=1e-9, atol=1e-7)
    assert torch.allclose(parts.eraser(x), whole.eraser(x), rtol=0, atol=1e-6)


def test_the_trace_is_held():
    """An oblique projection stretches what is left: it is mixed with the orthogonal one of the same kernel."""
    x, _ = rows()
    sigma, left = torch.cov(x.T), torch.randn(D, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    across = torch.linalg.pinv(left)
    for tilt in (0.0, 3.0):
        right = across + tilt * torch.ones(2, D, dtype=torch.float64) @ (torch.eye(D).double() - left @ across)
        traces = []
        for each in (right, _capped(left, right, sigma)):
            P = torch.eye(D, dtype=torch.float64) - left @ each
            assert (P @ left).abs().max() < 1e-10 and torch.allclose(P @ P, P, atol=1e-8)
            traces.append((P @ sigma @ P.T).trace() / sigma.trace())
        assert traces[1] == pytest.approx(1.0 if tilt else traces[0]) and (traces[0] > 1) == (tilt > 0)


def test_few_rows_are_shrunk():
    """With fewer rows than columns every direction has some variance, so rows that were not fitted lose it too."""
    x, z = rows(n=15)
    rank = lambda how: torch.linalg.matrix_rank(fitted(x, z, **how).eraser.proj_right)  # noqa: E731
    assert rank({}) == rank({"shrinkage": False}) == CLASSES - 1
    assert cross_covariance(fitted(x, z).eraser(x), z) < 1e-10


def test_labels_may_be_numbers_and_what_is_not_there_is_not_erased():
    x, z = rows()
    onehot = torch.nn.functional.one_hot(z, CLASSES).double()
    assert torch.equal(fitted(x, onehot).eraser(x), fitted(x, z).eraser(x))
    blind = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    assert fitted(blind, z, svd_tol=0.5).eraser.rank == 0


def test_how_large_labels_are_does_not_matter():
    """Small numbers, and a class that few rows have, are erased; a column that is constant but for rounding is none."""
    x, z = rows()
    onehot = torch.nn.functional.one_hot(z, CLASSES).double()
    assert torch.allclose(fitted(x, 1e-4 * onehot).eraser(x), fitted(x, z).eraser(x), rtol=1e-9)
    x, z = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.zeros(20_000)
    z[0], x[0] = 1, 9
    fitter = kf.LeaceFitter(3, 2).update(x, z.long())
    assert fitter.sigma_xz.abs().max() < 1e-3 and fitter.eraser.rank == 1
    constant = torch.full((20_000, 2), 0.1, dtype=torch.float64) * torch.tensor([1, 1e6])
    assert kf.LeaceFitter(3, 2).update(x[:7_000], constant[:7_000]).update(x[7_000:], constant[7_000:]).eraser.rank == 0


def test_it_is_saved(tmp_path):
    x, z = rows()
    eraser = fitted(x, z).eraser
    eraser.save(tmp_path / "eraser.safetensors")
    assert torch.equal(kf.Eraser.load(tmp_path / "eraser.safetensors")(x), eraser(x))
    (tmp_path / "other").write_bytes(b"abc")
    refused("other is no eraser", kf.Eraser.load, tmp_path / "other")
    refused("expected finite floats", kf.Eraser, torch.zeros(3, 1), torch.zeros(1, 3), torch.full((3,), torch.nan))
    refused("rows .2, 4.: expected .n, 24.", eraser, torch.zeros(2, 4))
    refused("x = .*expected a tensor", kf.LeaceFitter(3, 2).update, [[1, 2, 3]], torch.tensor([0]), error=TypeError)
    refused("expected .d, k.", kf.Eraser, torch.zeros(3, 1), torch.zeros(2, 3), torch.zeros(3))


def test_bad_input_is_refused():
    fitter = kf.LeaceFitter(D, CLASSES)
    x, z = rows(n=4)
    refused(r"expected rows \[n, 24\]", fitter.update, x[:, 1:], z)
    refused("class numbers from 0 to 2", fitter.update, x, z + 5)
    refused("NaN or infinity; nothing was added", fitter.update, x * torch.nan, z)
    refused("0 rows: expected 2", lambda: fitter.eraser)
    refused("method = 'lda': expected one of leace, orth", kf.LeaceFitter, 2, 2, method="lda")
    assert fitter.n == 0


def test_the_published_package_gives_the_same():
    published = pytest.importorskip("concept_erasure", reason="concept-erasure is not on this package index")
    x, z = rows()
    for how in ({}, {"method": "orth"}, {"affine": False}, {"shrinkage": False}):
        other = published.LeaceFitter(D, CLASSES, dtype=torch.float64, **how)
        other.update(x, torch.nn.functional.one_hot(z, CLASSES))
        assert torch.allclose(other.eraser(x), fitted(x, z, **how).eraser(x), atol=1e-6)
