"""Draws that are computed at some layers alone: what is computed is exact, what is not lies between."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import kedit_fast as kf
from kedit_fast.basics.correlation import spearman
from kedit_fast.pictures.labels import impact
from kedit_fast.sweep.plan import CALL_ROWS, RowCost
from kedit_fast.tracing import exact
from kedit_fast.tracing import trace as tracing
from kedit_fast.tracing.draws import anchors, between, filled, reliability_of
from kedit_fast.tracing.exact import declared, row_layers
from kedit_fast.tracing.results import read_log
from kedit_fast.tracing.tasks import KINDS, Task, TraceSettings, tasks_of
from tests.conftest import disk_and_resident, refused, save_tiny, tiny_lm
from tests.make import killed_at, watched
from tests.tiny import tiny_model

EIFFEL = kf.Fact("{} is located in the city of", "The Eiffel Tower", target_new="Rome")
CAPITAL = kf.Fact(prompt="The capital of {} is", subject="France")
HOW = {"samples": 5, "noise": 0.5, "window": 3}
LAYERS = 7


def traced(facts, lm=None, **options):
    return kf.trace(lm or tiny_lm("llama", layers=LAYERS), facts, **HOW | options)


def by_draw(facts, lm=None, **options) -> list[np.ndarray]:
    """[T, L, draws] exact values of each result: n draws are the first n of more, so each is a difference of means."""
    means = [traced(facts, lm, **options | {"samples": n}) for n in range(1, HOW["samples"] + 1)]
    of_a_kind = zip(*means, strict=True)
    sums = [[n * r.p_restored.astype(np.float64) for n, r in enumerate(each, 1)] for each in of_a_kind]
    return [np.stack(np.diff(np.stack(each), axis=0, prepend=0), -1) for each in sums]


def slow(values: np.ndarray, stride: int, last_is_known: bool, metric: str = "prob") -> np.ndarray:
    """[T, L] mean over draws of values [T, L, draws], each kept at its own layers; the rest lies where the steps from
    layer to layer are likeliest, by least squares: of log odds, with covariance 1 + (draw = draw)."""
    _, n_layers, draws = values.shape
    known = np.array([[layer % stride == draw % stride for draw in range(draws)] for layer in range(n_layers)])
    known[-1] |= last_is_known
    odds = {
        "prob": lambda p: np.log(p) - np.log1p(-p),
        "logprob": lambda x: x - np.log1p(-np.exp(x)),
        "logit_diff": lambda x: x,
    }[metric](values)
    step = np.kron(np.diff(np.eye(n_layers), axis=0), np.eye(draws))  # [(L - 1) draws, L draws]
    whiten = np.kron(np.eye(n_layers - 1), np.linalg.inv(np.linalg.cholesky(np.eye(draws) + 1)))
    equations, given = whiten @ step, known.reshape(-1)
    found = odds.reshape(len(odds), -1).copy()
    want = -equations[:, given] @ found[:, given].T
    found[:, ~given] = np.linalg.lstsq(equations[:, ~given], want, rcond=None)[0].T
    back = {
        "prob": lambda x: 1 / (1 + np.exp(-x)),
        "logprob": lambda x: -np.log1p(np.exp(-x)),
        "logit_diff": lambda x: x,
    }[metric](found)
    return back.reshape(values.shape).mean(-1)


# ---- against the exact trace


@pytest.mark.parametrize("stride", [2, 3, 5])
@pytest.mark.parametrize(
    ("family", "metric", "noise"), [("gpt2", "logprob", 0.5), ("llama", "prob", 0.2), ("gemma2", "logit_diff", 0.5)]
)
def test_equals_slow_least_squares_over_exact_draws(family, metric, noise, stride):
    lm = tiny_lm(family, layers=LAYERS)
    options = {"metric": metric, "noise": noise}
    values = by_draw(EIFFEL, lm, **options)
    wholes, strided = traced(EIFFEL, lm, **options), traced(EIFFEL, lm, method="strided", stride=stride, **options)
    for got, whole, draws in zip(strided, wholes, values, strict=True):
        size = max(abs(whole.p_clean), abs(whole.p_corrupted))
        assert np.abs(draws.mean(-1) - whole.p_restored).max() < 1e-5 * size
        want = slow(draws, stride, got.kind == "state", metric)
        assert np.abs(got.p_restored - want).max() < 1e-5 * size
        assert np.abs(got.p_restored - whole.p_restored).max() > 1e-3  # the comparison sees something
        assert (got.p_clean, got.p_corrupted) == pytest.approx((whole.p_clean, whole.p_corrupted), abs=1e-5 * size)


@pytest.mark.parametrize("stride", [2, 5])
def test_what_a_draw_computes_is_its_exact_value(stride):
    lm, how = tiny_lm("gptj", layers=LAYERS), TraceSettings(KINDS, 3, "prob", None, 5, ("gaussian", 0.5), 1)
    tasks = tasks_of(lm, [EIFFEL, CAPITAL], None, "noise", "prob")
    whole, strided = (exact.all_cells(lm, tasks, replace(how, stride=n), None) for n in (1, stride))
    for got, want in zip(strided, whole, strict=True):
        for kind in KINDS:
            known = anchors(LAYERS, 5, stride)
            torch.testing.assert_close(got.restored[kind][:, known], want.restored[kind][:, known], atol=1e-6, rtol=0)
            assert (got.restored[kind] - want.restored[kind])[:, ~known].abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"kinds": "state", "sever": "mlp"}, {"window": 20}, {"corrupt": "England"}])
def test_every_layer_is_the_exact_trace_to_the_bit(options):
    made = (traced(CAPITAL, **how, **options) for how in ({"method": "strided", "stride": 1}, {}))
    for got, want in zip(*made, strict=True):
        assert got.to_record() == want.to_record() and got.exact is None and got.cost is None


def test_a_severed_trace_is_strided_too():
    options = {"kinds": "state", "sever": "mlp"}
    (values,) = by_draw(CAPITAL, **options)
    (got,) = traced(CAPITAL, method="strided", stride=3, **options)
    assert np.abs(got.p_restored - slow(values, 3, True)).max() < 1e-5
    assert got.sever == "mlp" and got.stride == 3


def test_one_draw_is_exact_at_its_layers():
    """Where another subject corrupts there is one; the mean of it is it."""
    options = {"corrupt": "England", "kinds": ("state", "mlp")}
    made = (traced(CAPITAL, **how, **options) for how in ({"method": "strided", "stride": 3}, {}))
    for got, want in zip(*made, strict=True):
        assert got.exact[:, ::3].all() and got.exact.sum() == got.exact[:, ::3].size
        assert np.abs(got.p_restored[got.exact] - want.p_restored[got.exact]).max() < 1e-6
        assert np.abs(got.p_restored - want.p_restored).max() > 1e-4 and math.isnan(got.reliability)


@pytest.mark.parametrize("stride", [3, 7])
def test_before_the_subject_and_in_the_last_layer_nothing_is_interpolated(stride):
    (result,) = traced(CAPITAL, kinds="state", method="strided", stride=stride)
    begin = result.subject_span[0]
    assert begin > 0 and (result.p_restored[:begin] == np.float32(result.p_corrupted)).all()
    assert (result.p_restored[:-1, -1] == np.float32(result.p_corrupted)).all()
    assert result.p_restored[-1, -1] == np.float32(result.p_clean)
    assert result.exact[:, -1].all() and not result.exact[:, :-1].any()


# ---- anchors and what lies between


def test_anchors_move_from_draw_to_draw():
    assert anchors(5, 4, 3).int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 0]]
    assert anchors(5, 4, 1).all() and (anchors(30, 10, 5).sum(1) == 2).all()


def test_between_by_hand():
    """Two draws; what stands where nothing is known is not looked at, and ends are held."""
    values = torch.tensor([[9.0, 1.0], [2.0, 9.0], [9.0, 9.0], [9.0, 7.0], [8.0, 9.0], [9.0, 9.0]])
    known = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1], [1, 0], [0, 0]], dtype=torch.bool)
    want = torch.tensor([[2.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0], [8.0, 7.0], [8.0, 7.0]])
    torch.testing.assert_close(between(values, known), want)
    torch.testing.assert_close(between(values.expand(3, 6, 2), known), want.expand(3, 6, 2))


def test_filled_by_hand():
    """Three layers, two draws; x is 0 and 2 where it is known, and one of them alone at the second layer: 6 and 7.

    The first draw steps up by 6. Half of the variance of a step is shared: the other one's is half of that, with what
    it needs to arrive. By the covariance [[2, 1], [1, 2]]: to expect of the other step, given 6, is 3; given that both
    of its own add up to 0 as well: 3 - (3 + 0) / 2 = 1.5.
    """
    values = torch.tensor([[0.0, 2.0], [6.0, 99.0], [6.0, 2.0]], dtype=torch.float64)
    known = torch.tensor([[1, 1], [1, 0], [1, 1]], dtype=torch.bool)
    assert filled(values, known)[1].tolist() == pytest.approx([6.0, 3.5])
    alone = torch.rand(4, 9, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(filled(alone, anchors(9, 1, 4)), between(alone, anchors(9, 1, 4)))  # one draw: lines


def test_between_keeps_what_is_known_to_the_bit():
    values, known = torch.rand(4, 9, 6, generator=torch.Generator().manual_seed(0)), anchors(9, 6, 4)
    assert torch.equal(between(values, known)[:, known], values[:, known])


# ---- reliability


def test_reliability_by_hand():
    """Even draws rank four cells 1 2 3 4, odd ones 2 1 4 3: rho 0.6, for all draws 2 · 0.6 / 1.6."""
    even, odd = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 1.0, 4.0, 3.0])
    draws = torch.stack([even, odd, even + 1, 3 * odd], 1)
    assert reliability_of(draws[:, ::2].mean(1), draws[:, 1::2].mean(1), 4) == pytest.approx(0.75)
    assert math.isnan(reliability_of(torch.ones(4), even, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_says_how_reliable_it_is(kind):
    """By two traces of the even and of the odd draws alone, over the cells that had to be found."""
    (values,) = by_draw(CAPITAL, kinds=kind, noise=0.2)
    (result,) = traced(CAPITAL, kinds=kind, noise=0.2)
    cells = values[result.subject_span[0] :, : LAYERS - (kind == "state")].reshape(-1, HOW["samples"])
    r = spearman(*(cells[:, i::2].mean(1) for i in (0, 1)))
    p, q = 3 / 5, 2 / 5
    assert r > 0.5
    assert result.reliability == pytest.approx(2 * r / (math.sqrt(r * r + 4 * p * q * (1 - r * r)) + r), abs=1e-3)
    assert math.isnan(traced(CAPITAL, kinds=kind, samples=1)[0].reliability)
    assert math.isnan(traced(CAPITAL, kinds=kind, method="attribution")[0].reliability)


def test_more_draws_are_more_reliable():
    few, many = (np.mean([r.reliability for r in traced([CAPITAL, EIFFEL], samples=n)]) for n in (4, 40))
    assert few < many < 1


# ---- cost


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_counted_as_they_are_declared(kind, stride):
    task = Task(CAPITAL, [5] * 9, (2, 4), [5] * 9, [1])
    how = TraceSettings((kind,), 4, "prob", None, 5, ("gaussian", 1.0), 1, stride)
    runs = declared(LAYERS, [task], how, None)[0].runs()
    assert row_layers(LAYERS, task, how) == runs.row_layers(0, LAYERS - 1)


def test_a_result_says_what_share_of_the_cost_it_was():
    for result in traced(EIFFEL, method="strided", stride=3):
        assert 1 / 3 < result.cost < 0.55  # the clean and the corrupted runs are not left out


# ---- packed, cut, logged, resumed


def test_a_long_fact_by_positions_is_the_whole(monkeypatch):
    """The tables of its runs take several sweeps, of some positions each."""
    lm, calls = tiny_lm("gpt2", layers=LAYERS), watched(monkeypatch, exact, "restored_cells")
    how = TraceSettings(KINDS, 3, "prob", None, 5, ("gaussian", 0.5), 1, 3)
    tasks = tasks_of(lm, [EIFFEL], None, "noise", "prob")
    (whole,) = exact.all_cells(lm, tasks, how, None)
    monkeypatch.setattr(exact, "TABLES", lm.memory // (4 * 3 * len(KINDS) * 12 * len(tasks[0].tokens)))
    (parts,) = exact.all_cells(lm, tasks, how, None)
    assert len(calls) > 2
    for kind in KINDS:
        torch.testing.assert_close(parts.restored[kind], whole.restored[kind], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def strided():
    return traced([EIFFEL, CAPITAL], tiny_lm("gpt2", layers=LAYERS), method="strided", stride=3)


@pytest.mark.parametrize("rows", [110, 600])
def test_cut_by_memory_is_the_whole(strided, rows):
    lm = tiny_lm("gpt2", layers=LAYERS)
    cost = RowCost.of(lm)
    lm = replace(lm, memory=CALL_ROWS * cost.passing + rows * cost.kept)
    for got, want in zip(traced([EIFFEL, CAPITAL], lm, method="strided", stride=3), strided, strict=True):
        assert np.abs(got.p_restored - want.p_restored).max() < 1e-5
        assert got.reliability == pytest.approx(want.reliability, abs=1e-2)


def test_layers_from_disk_give_the_same_bits(tmp_path):
    pair = disk_and_resident(save_tiny(tmp_path, tiny_model("llama", layers=LAYERS)))
    made, expected = (traced([EIFFEL], lm, method="strided", stride=3) for lm in pair)
    assert [r.to_record() for r in made] == [r.to_record() for r in expected]


def test_a_killed_trace_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "groups", lambda lm, tasks, how: ([task] for task in tasks))
    facts, options = [CAPITAL, EIFFEL, CAPITAL], {"method": "strided", "stride": 3}
    whole = traced(facts, log=tmp_path / "whole.jsonl", **options)
    kept = {"log": tmp_path / "log.jsonl", "checkpoint": tmp_path / "run"} | options
    with killed_at(2):
        traced(facts, **kept)
    again = traced(facts, **kept)
    assert [result.to_record() for result in again] == [result.to_record() for result in whole]
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    refused("holds other work: its stride is 3, this one's 2", traced, facts, **kept | {"stride": 2})
    for read, result in zip(read_log(tmp_path / "log.jsonl"), whole, strict=True):
        assert (read.reliability, read.stride, read.cost) == (result.reliability, 3, result.cost)


# ---- the public door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, f"stride = 0: expected a whole number from 1 to {LAYERS}, e.g. 3"),
        ({"stride": LAYERS + 1}, f"stride = {LAYERS + 1}: expected a whole number from 1 to {LAYERS}"),
        ({"stride": 2.5}, f"stride = 2.5: expected a whole number from 1 to {LAYERS}"),
        ({"stride": "third"}, "stride = 'third': expected a whole number"),
        ({"method": "stride"}, "method = 'stride': expected one of exact, attribution, screen, strided"),
        ({"sever": "mlp"}, 'method=\'strided\': expected kinds=.*, method="exact" or "strided"'),
    ],
)
def test_what_cannot_be_strided_is_refused_before_any_work(options, message, no_sweep):
    refused(message, traced, CAPITAL, **{"method": "strided"} | options)


def test_pictures_say_what_is_interpolated(strided):
    assert impact(strided[0]).endswith("(each noise draw at one layer in 3, interpolated between)")
