"""Plans: what they say of a piece of work is what the work then does; and shapes of 70B from a few hundred bytes."""

import json
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.located import Prompts
from kedit_fast.experiments.forecast import STEPS, Rates, edit_steps, forecast, halving, trace_steps
from kedit_fast.model.folder import read_config
from kedit_fast.model.shape import shape_of
from kedit_fast.tracing.tasks import TraceSettings, tasks_of
from tests.conftest import on_disk, save_tiny
from tests.tiny import PROMPTS, TEXT, tiny_model

FACTS = [
    kf.Fact(p.template, p.subject, target_new=new)
    for p, new in zip(PROMPTS[:3], ("Rome", "London", "Madrid"), strict=True)
]
SHAPES = {
    "llama-3-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
    },
    "qwen2.5-72b": {
        "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064, "torch_dtype": "bfloat16",
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
BYTES = {"llama-3-70b": 141.1e9, "qwen2.5-72b": 145.4e9, "mixtral-8x7b": 93.4e9}  # of their published checkpoints
GPU, GIB, RATES = torch.device("cuda"), 1 << 30, Rates(400e12, 25e9, 25e12)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    lm = on_disk(save_tiny(tmp_path_factory.mktemp("planned"), tiny_model("llama", layers=6)))
    return replace(lm, memory=10**9)


def on_paper(lm):
    return replace(lm.placement.on_paper(), memory=lm.memory)


class Counted:
    """layers: turns from one layer to another, while it is in place; rows: that went through their blocks."""

    def __init__(self, lm, monkeypatch):
        self.layers = self.rows = 0
        self.last, call = None, lm.source.call

        def counting(layer, h, kwargs):
            self.layers += layer != self.last
            self.rows += h.shape[1]
            self.last = layer
            return call(layer, h, kwargs)

        monkeypatch.setattr(lm.source, "call", counting)


def near(found, planned, share):
    assert planned * (1 - share) <= found <= planned * (1 + share), f"{found} of {planned} planned"


def test_a_trace_goes_through_the_layers_and_rows_that_were_planned(lm, monkeypatch):
    how = TraceSettings(("state", "mlp", "attn"), 2, "prob", None, 3, ("gaussian", 0.5), 1)
    tasks, counted = tasks_of(lm, FACTS[:1], None, "noise", "prob"), Counted(lm, monkeypatch)
    steps = list(trace_steps(on_paper(lm), tasks, how, "exact"))
    kf.trace(lm, FACTS[:1], samples=3, window=2, noise=0.5)
    near(counted.layers, sum(step.layers_read for step in steps), 0.1)
    shape = lm.placement.shape
    near(counted.rows * shape.layer_flop, sum(step.flop for step in steps), 0.25)  # the head is in the plan alone


def test_an_edit_goes_through_the_layers_and_rows_that_were_planned(lm, monkeypatch):
    editor = kf.Memit(layers=(1, 2), v_num_grad_steps=4, clamp_norm_factor=0.01)  # none is done before its last step
    moments, contexts = kf.second_moments(lm, [1, 2], [TEXT], n_tokens=200), [["{}"], ["So. {}"]]
    tasks, counted = Prompts.of(lm, FACTS, contexts).value_tasks(lm), Counted(lm, monkeypatch)
    editor.edit(lm, FACTS, moments=moments, contexts=contexts)
    steps = list(edit_steps(on_paper(lm), tasks, editor.z_settings(lm), (1, 2)))
    near(counted.layers, sum(step.layers_read for step in steps), 0.15)
    heads = sum(step.flop for step in steps) / lm.placement.shape.layer_flop
    assert counted.rows <= heads  # rows that go back are counted once again in the plan, and so is the head


def test_values_of_the_last_layer_read_no_layers_a_step(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["mixtral-8x7b"] | {"num_hidden_layers": 4}))
    plan = forecast("edit", shape_of(read_config(tmp_path)), 1, None, torch.device("cpu"))
    assert {step.name: step.layers_read for step in plan.steps}["values"] == 4, "the pass that finds where they start"


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_70b_are_planned_from_their_config_alone(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name]))
    assert (tmp_path / "config.json").stat().st_size < 400
    shape = shape_of(read_config(tmp_path))
    assert abs(shape.n_bytes / BYTES[name] - 1) < 0.002
    for what in STEPS:
        plan = forecast(what, shape, 100, 24 * GIB, GPU, host=512 * GIB)
        assert plan.placement.source == "host" and plan.placement.weights <= 18 * GIB
        assert all(step.held <= 24 * GIB - plan.placement.weights for step in plan.steps), what
        assert 0 < plan.total(RATES) < 1e6
        assert "all" in plan.table(RATES) and "-" in plan.table(None)
        assert forecast(what, shape, 100, 24 * GIB, GPU, host=GIB).placement.source == "disk"
    whole = forecast("edit", shape, 100, 200 * GIB, GPU)
    assert whole.placement.source == "resident" and sum(map(whole.read, whole.steps)) == 0


def test_a_strided_trace_goes_through_a_fifth_of_the_rows(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-3-70b"]))
    shape = shape_of(read_config(tmp_path))
    exact, strided = (forecast("trace", shape, 10, None, GPU, method=method) for method in ("exact", "strided"))
    assert [step.name for step in exact.steps] == [step.name for step in strided.steps] == ["answers", "cells"]
    assert 1 / 5 < strided.steps[1].flop / exact.steps[1].flop < 0.22
    assert any('method="strided"' in line for line in halving(exact, RATES, GPU))


def test_what_would_halve_it_is_tried(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-3-70b"]))
    shape = shape_of(read_config(tmp_path))
    plan = forecast("edit", shape, 100, 24 * GIB, GPU, host=512 * GIB)
    told = halving(plan, RATES, GPU, host=512 * GIB)
    assert any("corpus=FILE" in line for line in told)
    named = forecast("edit", shape, 100, 24 * GIB, GPU, host=512 * GIB, sampled=False)
    share = named.total(RATES) / plan.total(RATES)
    assert any(f"{share:.0%} of the time" in line for line in told) and share < 0.55
    assert plan.bound(RATES).startswith("reading weights")
