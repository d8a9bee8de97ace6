"""The pretended device: what it counts, what it refuses, and that every flow gives its own numbers on it."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.jobs.gradients import GradientTask, gradient_factors
from tests.conftest import open_tiny, relative_error, tiny_lm
from tests.make import FACTS
from tests.pretend_cuda import CUDA, OnDevice, on_device, pretended_cuda
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::kedit_fast.editors.written.NotWritten")


def test_it_says_cuda_and_computes_what_the_cpu_does():
    x, y = torch.randn(4, 5), torch.randn(5, 3)
    with pretended_cuda() as counts:
        a, b = x.to(CUDA), y.to(CUDA)
        c = (a @ b).relu()
        assert isinstance(c, OnDevice) and c.device == CUDA and c.is_cuda and not c.is_meta
        assert torch.equal(c.cpu(), (x @ y).relu())
    assert dict(counts.launches) == {"mm": 1, "relu": 1} and counts.flop == 2 * 4 * 5 * 3
    assert counts.moved["mm"] == 4 * (4 * 5 + 5 * 3 + 4 * 3)
    assert counts.uploads.total() == 2 and counts.uploaded == 4 * (4 * 5 + 5 * 3)
    assert sorted(why for why, _ in counts.waits) == ["download", "upload from pageable memory"]


def test_where_the_host_waits():
    x = torch.arange(6.0)
    with pretended_cuda() as counts:
        a = x.pin_memory().to(CUDA, non_blocking=True)
        assert not counts.waits and counts.uploads.total() == 1
        assert a.sum().item() == 15 and a.tolist() == x.tolist()
        assert a[a > 2].shape == (3,) and a[torch.tensor([1, 2])].shape == (2,)
    assert {why for why, _ in counts.waits} == {"item", "tolist", "mask as index", "upload from pageable memory"}


def test_what_lies_on_two_devices_does_not_meet():
    x = torch.ones(3)
    with pretended_cuda():
        a = x.to(CUDA)
        for meet in (lambda: a + x, lambda: x[a.long()], lambda: a @ x):
            with pytest.raises(RuntimeError, match="same device"):
                meet()
        assert (a + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number may
        with pytest.raises(TypeError, match="cuda:0"):
            a.numpy()


MEMIT = kf.Memit(layers=(1, 2), mom2_adjustment=False, v_num_grad_steps=3)
FLOWS = {
    "trace": lambda lm: torch.stack([torch.as_tensor(one.p_restored) for one in kf.trace(lm, FACTS[:1], samples=2)]),
    "estimate": lambda lm: torch.as_tensor(kf.trace(lm, FACTS[:1], samples=2, method="attribution")[0].p_restored),
    "memit": lambda lm: MEMIT.edit(lm, FACTS[:2]).deltas[1].u,
    "ft": lambda lm: kf.Ft(layers=(1,), num_steps=2).edit(lm, FACTS[:2]).deltas[1].delta,
    "moments": lambda lm: kf.second_moments(lm, [1], corpus=["The tower is in Rome."] * 3, n_tokens=20)[1].matrix,
    "gradients": lambda lm: gradient_factors(lm, [GradientTask([1, 2, 3], [4, 5])], [(1, "down")]).losses,
    "generate": lambda lm: lm.generate([fact.text for fact in FACTS[:2]], 4),
    "evaluate": lambda lm: kf.evaluate(lm, FACTS[:2], both_forms=False).base["p_new"],
}


@pytest.mark.parametrize("flow", FLOWS)
def test_every_flow_gives_its_numbers(flow):
    """Where devices do not meet; with kernels, so to rounding."""
    expected = FLOWS[flow](tiny_lm("llama"))
    with pretended_cuda() as counts:
        found = FLOWS[flow](open_tiny(on_device(tiny_model("llama"))))
    assert counts.launches.total() > 20
    if flow == "generate":
        assert found == expected
    else:
        assert relative_error(getattr(found, "held", found), expected) < 1e-4


def waits_and_uploads(flow, layers, **options):
    """(how often the host waits, how often it uploads) in a flow on a model of so many layers."""
    with pretended_cuda() as counts:
        lm = open_tiny(on_device(tiny_model("llama", layers=layers)), **options)
        FLOWS[flow](lm)
        counts.clear()
        FLOWS[flow](lm)
    waits = sum(n for (_, where), n in counts.waits.items() if not where.startswith("model/fingerprint"))
    return waits, counts.uploads.total()


def test_a_step_of_values_waits_once_and_uploads_next_to_nothing():
    """What it asks is planned and uploaded when the facts that are active change, and not with each step."""
    seen = {}
    for steps in (3, 6):
        with pretended_cuda() as counts:
            lm = open_tiny(on_device(tiny_model("llama")))
            editor = replace(MEMIT, v_num_grad_steps=steps)
            editor.edit(lm, FACTS[:2])
            counts.clear()
            editor.edit(lm, FACTS[:2])
        seen[steps] = counts.waits.total(), counts.uploads.total()
    assert seen[6][0] - seen[3][0] == 3 and seen[6][1] == seen[3][1]


@pytest.mark.parametrize(("family", "most"), [("llama", 45), ("gpt2", 30)])
def test_a_block_call_is_few_launches(family, most):
    """Of an evaluation, by layer: base and edited rows are one call. 41 and 28 of them when this was written."""
    counted = []
    for layers in (4, 9):
        with pretended_cuda() as counts:
            lm = open_tiny(on_device(tiny_model(family, layers=layers)))
            FLOWS["evaluate"](lm)
            counts.clear()
            FLOWS["evaluate"](lm)
        counted.append(counts.launches.total())
    assert (counted[1] - counted[0]) / 5 <= most


@pytest.mark.parametrize("flow", ["trace", "generate", "evaluate", "memit", "gradients", "moments"])
def test_no_layer_of_a_sweep_waits_or_uploads(flow):
    """What rows there are is planned, and taken to the device, before the first layer; a trace's windows, whose writes
    differ from layer to layer, upload which they are (places and rows of two jobs), and nothing waits for it. (Of 4
    layers a step of z has but the last, whose calls have no plan of all layers: 2 tables in 3 sweeps.)"""
    few, many = (waits_and_uploads(flow, layers) for layers in (4, 9))
    assert many[0] == few[0]
    assert many[1] - few[1] <= {"trace": 5 * 4, "memit": 6}.get(flow, 0)
