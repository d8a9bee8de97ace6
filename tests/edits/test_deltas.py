"""Deltas: factors and their product, and what is left of them in the model's dtype."""

import math

import pytest
import torch

import kedit_fast.edits.deltas as algebra
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import Dense, Halves, LowRank, as_smallest, edited_weight, for_products, written_delta
from kedit_fast.edits.edit import Edit
from tests.conftest import open_tiny, refused
from tests.kernels import normal
from tests.make import lowrank
from tests.pretend_cuda import CPU, CUDA, on_device, pretended_cuda
from tests.tiny import D_FF, D_MODEL, tiny_model


@pytest.mark.parametrize("delta", [lowrank(rank=5), Dense(lowrank(rank=5).dense())], ids=["low rank", "dense"])
def test_delta_is_what_it_says(delta):
    expected = lowrank(rank=5).u @ lowrank(rank=5).v.T
    assert delta.shape == (D_MODEL, D_FF)
    assert torch.equal(delta.dense(), expected)
    assert math.isclose(delta.norm(), expected.double().norm().item(), rel_tol=1e-6)
    assert torch.allclose(delta.part(slice(3, 7)), expected[3:7].double(), rtol=1e-5)
    assert delta.to(dtype=torch.bfloat16).dense().dtype == torch.float32
    assert delta.to("meta").shape == delta.shape


def test_growth_is_of_all_edits_together():
    lm = open_tiny(tiny_model("llama"))
    one, two = (Edit("test", {}, lm.fingerprint, (), {2: lowrank(seed=seed)}) for seed in (1, 2))
    more = Edit("test", {}, lm.fingerprint, (), {1: Dense(lowrank().dense())})
    weight = lm.source.weight(2, "down").double().norm()
    norms: dict = {}
    found = algebra.growth(lm, [one, more, two], norms)
    both = (one.deltas[2].dense() + two.deltas[2].dense()).double().norm()
    assert found[2] == pytest.approx((both / weight).item()) and sorted(found) == [1, 2] and len(norms) == 2
    assert algebra.growth(lm, [one], norms)[2] == pytest.approx(one.deltas[2].norm() / weight.item())
    norms[2, "down"] = 1.0  # known: not read again
    assert algebra.growth(lm, [one], norms)[2] == pytest.approx(one.deltas[2].norm())


def test_norm_of_factors_that_cancel_is_not_nan():
    for seed in range(20):  # rounding takes the sum below zero in 8 of these
        pair = lowrank(rank=2, seed=seed, dtype=torch.float64)
        u = torch.cat([pair.u, -pair.u.sum(1, keepdim=True)], 1)
        assert LowRank(u, pair.v[:, :1].expand(-1, 3)).norm() < 1e-5


def test_rank_and_size_and_low_rank_until_it_is_larger_than_dense():
    assert lowrank(rank=5).rank == 5 and lowrank(rank=5).nbytes == 4 * 5 * (D_MODEL + D_FF)
    assert Dense(torch.zeros(4, 9)).rank == 4
    limit = D_MODEL * D_FF // (D_MODEL + D_FF)
    kept = lowrank(rank=limit)
    assert as_smallest(kept) is kept
    dense = as_smallest(lowrank(rank=limit + 1))
    assert isinstance(dense, Dense)
    assert torch.equal(dense.delta, lowrank(rank=limit + 1).dense())
    assert dense.nbytes < lowrank(rank=limit + 1).nbytes


def test_factors_that_do_not_fit_are_refused():
    refused(r"u \[d, r\] and v \[d_ff, r\]", LowRank, torch.zeros(4, 2), torch.zeros(5, 3))
    refused("one floating dtype", LowRank, torch.zeros(4, 2), torch.zeros(5, 2).half())
    refused("floating delta", Dense, torch.zeros(4, 2, dtype=torch.int8))


# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", algebra.FLOATS, ids=str)
def test_edited_weight_is_the_fp64_sum_rounded(dtype, monkeypatch):
    monkeypatch.setattr(algebra, "_BLOCK", 3 * D_FF + 1)  # blocks of three outputs: the cut must not show
    weight = torch.randn(D_MODEL, D_FF, generator=torch.Generator().manual_seed(5)).to(dtype)
    delta = lowrank()
    expected = (weight.double() + delta.u.double() @ delta.v.double().T).to(dtype)
    assert torch.equal(edited_weight(weight, delta), expected)
    assert torch.equal(edited_weight(weight.T.contiguous().T, delta), expected)


def test_small_changes_are_lost_in_bf16_and_said():
    weight = torch.randn(D_MODEL, D_FF, generator=torch.Generator().manual_seed(5)).bfloat16()
    delta = lowrank(scale=1e-3)
    written = written_delta(weight, delta, torch.bfloat16)
    assert written.delta.dtype == torch.float32
    assert torch.equal((weight.float() + written.delta).bfloat16(), edited_weight(weight, delta))
    assert 0.01 < (written.delta == 0).float().mean() < 0.99
    exact = written_delta(weight.double(), delta, torch.float64)
    assert torch.allclose(exact.delta, delta.dense(), rtol=1e-5, atol=1e-9)


def test_written_delta_leaves_out_the_rounding_of_the_weight_itself():
    weight = torch.randn(D_MODEL, D_FF)
    nothing = LowRank(torch.zeros(D_MODEL, 1), torch.zeros(D_FF, 1))
    assert written_delta(weight, nothing, torch.bfloat16).norm() == 0
    written = written_delta(weight, lowrank(), torch.bfloat16)
    assert torch.equal(written.delta, written_delta(weight.bfloat16(), lowrank(), torch.bfloat16).delta)
    refused("int8", written_delta, weight, nothing, torch.int8)


def test_growth_is_of_the_matrix_that_grew_most_and_hides_no_nan():
    norms = {(1, "up"): (2.0, 4.0), (1, "down"): (3.0, 4.0), (0, "down"): (math.nan, 1.0), (0, "up"): (1.0, 1.0)}
    assert algebra.grown(norms) == pytest.approx({0: math.nan, 1: 0.75}, nan_ok=True)


def test_a_dense_delta_in_two_halves_is_as_exact_as_the_result():
    """Nearer to fp64 than the result's own rounding; one half alone is not."""
    y, x = normal(40, 24, seed=1).bfloat16(), normal(40, 33, seed=2).bfloat16()
    delta = normal(24, 33, seed=3).float()
    wanted = y.double() + x.double() @ delta.double().T
    error = (Halves(delta).add_to(y, x).double() - wanted).abs()
    assert (error <= 2**-8 * (wanted.abs() + y.double().abs())).all()
    both = Halves(delta).both.double()
    assert ((both[:, :33] + both[:, 33:] - delta.double()).abs() <= 2**-17 * delta.double().abs()).all()
    assert ((both[:, :33] - delta.double()).abs() > 2**-12 * delta.double().abs()).any()


def test_what_multiplies_where():
    """On a GPU, and for bf16 alone, dense deltas and low-rank ones of many factors go to the tensor cores."""
    few, many = (LowRank(torch.ones(48, r), torch.ones(96, r)) for r in (5, 6))  # 5.33 would cost as much
    dense = Dense(torch.ones(48, 96))
    with pretended_cuda():
        found = {
            (name, device.type, dtype): type(for_products(delta, False, device, dtype)).__name__
            for name, delta in (("few", few), ("many", many), ("dense", dense))
            for device in (CPU, CUDA)
            for dtype in (torch.bfloat16, torch.float32)
        }
        assert isinstance(for_products(many, True, CUDA, torch.bfloat16), LowRank)
    halved = {name for (name, *where), kind in found.items() if kind == "Halves" and where == ["cuda", torch.bfloat16]}
    assert halved == {"many", "dense"} and sum(kind == "Halves" for kind in found.values()) == 2


def test_a_delta_goes_to_the_device_once():
    """What stood in its place took it there again with every call of a block."""
    with pretended_cuda() as counts:
        lm = open_tiny(on_device(tiny_model("llama")))
        view = lm.with_edit(Edit("test", {}, lm.fingerprint, (), [WeightChange(1, lowrank(rank=2))]))
        view.top_tokens("The tower")
        counts.clear()
        view.top_tokens("The tower")
    assert not [where for where in counts.uploads if where.startswith("edits/")]
