"""Products of rows with weights: OpenBLAS through the extension against fp64, and who is sent there."""

from types import SimpleNamespace

import pytest
import torch

from kedit_fast.jobs.collect import collect
from kedit_fast.kernels import dispatch, openblas
from kedit_fast.kernels import linear as module
from kedit_fast.kernels.linear import linear, linear_ref
from kedit_fast.model.seam import prepared
from kedit_fast.sweep.runs import RunList
from kedit_fast.sweep.sites import Site
from tests.conftest import close, open_tiny
from tests.kernels import normal
from tests.tiny import tiny_model

WHY = dispatch.why_not_native() or openblas.why_not()
native_only = pytest.mark.skipif(bool(WHY), reason=f"no native products: {WHY}")
FEWEST = 64  # as the tests have it: tiny models have few rows
FP32 = (torch.device("cpu"), torch.float32)


def numbers(*shape, seed=0):
    return normal(*shape, seed=seed, dtype=torch.float32)


@pytest.fixture
def counted(monkeypatch):
    """Forces the native products, from 64 rows on; (rows, n_in, n_out) of those that ran."""
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "native")
    monkeypatch.setattr(module, "FEWEST", FEWEST)
    real, shapes = dispatch.native(), []
    product = real.linear

    def counting(out, x, w, bias, *sizes_and_rest):
        shapes.append(sizes_and_rest[:3])
        product(out, x, w, bias, *sizes_and_rest)

    monkeypatch.setattr(real, "linear", counting)
    return shapes


@native_only
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [64, 129, 600])
def test_equals_the_product_in_fp64(rows, with_bias, in_out, n_threads, counted, threads):
    threads(n_threads)
    for n_in, n_out in ((1, 1), (17, 5), (48, 129)):
        x, weight = numbers(rows, n_in), numbers(n_out, n_in, seed=1)
        bias = numbers(n_out, seed=2) if with_bias else None
        want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        got = linear(x, weight.T.contiguous() if in_out else weight, bias, in_out=in_out)
        close(f"{n_in} to {n_out}", got, want)
    assert counted == [(rows, 1, 1), (rows, 17, 5), (rows, 48, 129)]


@native_only
def test_strides_and_leading_dimensions(counted):
    wide, weight = numbers(2, 50, 40), numbers(30, 64, seed=1)
    for x, w in (
        (wide, weight[:, :40]),  # a part of a fused weight
        (wide[..., :20], weight[:, 10:30]),
        (wide.transpose(1, 2), weight[:, 14:64]),
        (wide[:, :1].expand(2, 50, 40), weight[:, :40]),  # the same row again and again: stride 0
    ):
        close("out", linear(x, w), x.double() @ w.double().T)
    assert len(counted) == 4


@native_only
@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_gradient_of_rows_is_another_product(in_out, with_bias, counted):
    x, weight, bias = numbers(2, 70, 17).requires_grad_(), numbers(5, 17, seed=1), numbers(5, seed=2)
    pull = numbers(5, seed=3).expand(2, 70, 5)  # a gradient that does not lie in rows
    y = linear(x, weight.T.contiguous() if in_out else weight, bias if with_bias else None, in_out=in_out)
    y.backward(pull)
    close("y", y, x.double() @ weight.double().T + (bias.double() if with_bias else 0))
    close("gradient", x.grad, pull.double() @ weight.double())
    assert counted == [(140, 17, 5), (140, 5, 17)]


@native_only
def test_what_is_left_to_torch(counted):
    x, weight = numbers(FEWEST, 8), numbers(4, 8, seed=1)
    for left in (
        lambda: linear(x[: FEWEST - 1], weight),
        lambda: linear(x.double(), weight.double()),
        lambda: linear(x, numbers(8, 4).T),  # rows of the weight do not lie together
        lambda: linear(x[0], weight),
        lambda: linear(x[:, :0], weight[:, :0]),
        lambda: linear(x, weight[:0]),
    ):
        left()
    weight.requires_grad_()
    linear(x, weight).sum().backward()
    close("gradient", weight.grad, x.sum(0).expand(4, 8))
    assert not counted
    with torch.no_grad():
        linear(x, weight)
    assert len(counted) == 1


def test_reference_of_both_orientations():
    x, weight, bias = numbers(5, 3, 8), numbers(4, 8, seed=1), numbers(4, seed=2)
    want = x.double() @ weight.double().T + bias.double()
    close("rows", linear_ref(x, weight, bias), want)
    close("columns", linear_ref(x, weight.T, bias, in_out=True), want)
    close("no bias", linear_ref(x, weight.T, in_out=True), x.double() @ weight.double().T)


@native_only
@pytest.mark.parametrize("family, per_layer", [("llama", 7), ("gpt2", 4)])  # gpt2: Conv1D
def test_the_layers_of_blocks_come_here(family, per_layer, counted):
    model = tiny_model(family)
    lm, before = open_tiny(model), [set(vars(module)) for module in model.modules()]
    with pytest.raises(KeyError), prepared(model, lm.family):
        raise KeyError
    assert [set(vars(module)) for module in model.modules()] == before
    runs = RunList()
    runs.add(torch.arange(5, 75))
    everything = torch.zeros(70, dtype=torch.int64), torch.arange(70)
    h = collect(lm, runs.runs(), Site.layer_out, [0, 3], *everything)
    assert len(counted) == per_layer * 4 and {rows for rows, _, _ in counted} == {70}
    with torch.no_grad():
        want = model(torch.arange(5, 75)[None], output_hidden_states=True).hidden_states[1][0]
    close("h", h[0], want)
    assert len(counted) == per_layer * 4  # Hugging Face's own forward multiplies as ever


@native_only
def test_a_layer_with_a_forward_of_its_own_keeps_it(counted):
    model = tiny_model("llama")
    module, called = model.model.layers[1].mlp.up_proj, []
    module.forward = lambda x: called.append(len(x)) or torch.nn.functional.linear(x, module.weight)
    kept = module.forward
    with prepared(model, open_tiny(model).family):
        assert module.forward is kept
    assert module.forward is kept


@native_only
def test_numpys_threads_are_put_back():
    library = openblas._library()
    before = library.scipy_openblas_get_num_threads64_()
    with pytest.raises(KeyError), openblas.threads(1):
        assert library.scipy_openblas_get_num_threads64_() == 1
        raise KeyError
    assert library.scipy_openblas_get_num_threads64_() == before


def test_without_openblas_torch_does_the_work(monkeypatch):
    monkeypatch.setattr(openblas, "_library", lambda: None)
    monkeypatch.delenv("KEDIT_FAST_BACKEND", raising=False)
    assert "OpenBLAS" in openblas.why_not()
    assert dispatch.backend_for("linear", *FP32) == "reference"
    x, weight = numbers(70, 8), numbers(4, 8, seed=1)
    assert torch.equal(linear(x, weight), linear_ref(x, weight))
    model = tiny_model("llama")
    with prepared(model, open_tiny(model).family):
        assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, torch.nn.Linear))


@native_only
def test_only_amd_processors_choose_it_unasked(monkeypatch):
    monkeypatch.delenv("KEDIT_FAST_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "native", lambda: SimpleNamespace(is_amd=lambda: False))
    assert dispatch.backend_for("linear", *FP32) == "reference"
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "native")
    assert dispatch.backend_for("linear", *FP32) == "native"


@native_only
def test_forcing_what_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "native")
    monkeypatch.setattr(openblas, "_library", lambda: None)
    with pytest.raises(ValueError, match="linear cannot run here: numpy brings no OpenBLAS"):
        dispatch.backend_for("linear", *FP32)
