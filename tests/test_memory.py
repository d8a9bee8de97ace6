"""``memory=`` is a promise: bytes of tensors alive beyond the weights, in each flow, for one long fact and for many.

Seen where torch makes its tensors, not as the process's resident set, which an allocator's habits blur. Calls are of
64 rows here, so that a limit of 2.5 MB is far below what these flows would take uncut.
"""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.edits.deltas import LowRank
from kedit_fast.evaluation.perplexity import perplexity
from kedit_fast.evaluation.probes import probe
from kedit_fast.evaluation.written import write_probes
from kedit_fast.jobs import finetune, generate, values
from kedit_fast.sweep import engine, plan
from kedit_fast.tracing import attribution
from tests.conftest import on_disk, save_tiny, tiny_lm
from tests.live import LiveBytes
from tests.tiny import tiny_model

LIMIT = 2_500_000
TEXT = "The night train left the harbor at ten. Rain ran down the windows. "
SAME = {"target_new": "Rome", "target_true": "Paris", "neighborhood": ["The Louvre is in the city of"]}
LONG = [kf.Fact(prompt="{} is in the city of" + " which we have seen and know well in" * 2, subject="Big Ben", **SAME)]
PLACES = [f"The {kind} {place}" for kind in ("Old", "New", "Red", "Big", "Sad") for place in ("Tower", "Hall", "Mill")]
MANY = [kf.Fact(prompt="{} is in the city of", subject=subject, **SAME) for subject in PLACES]
CONTEXTS = [["{}"], ["So. {}", "And then. {}"]]
EDITS = {"v_num_grad_steps": 2, "v_loss_layer": 3, "mom2_adjustment": False}
MEMIT, ROME = kf.Memit(layers=(0, 1), **EDITS), kf.Rome(layers=(0,), **EDITS)
WINDOWS = [list(range(100))] * 20


def edited(lm):
    generator = torch.Generator().manual_seed(0)
    u, v = (0.01 * torch.randn(width, 2, generator=generator) for width in (lm.d_model, lm.d_ff))
    return lm.with_edit(kf.Edit("made up", {}, lm.fingerprint, (), {1: LowRank(u, v)}))


FLOWS = {
    "trace": lambda lm, facts: kf.trace(lm, facts[:3], samples=1),
    "attribution": lambda lm, facts: kf.trace(lm, facts[:3], samples=4, method="attribution"),
    "screen": lambda lm, facts: kf.trace(lm, facts[:2], samples=2, method="screen"),
    "rome": lambda lm, facts: ROME.edit(lm, facts[:2], contexts=CONTEXTS),
    "memit": lambda lm, facts: MEMIT.edit(lm, facts, contexts=CONTEXTS),
    "independent": lambda lm, facts: MEMIT.edit(lm, facts, contexts=CONTEXTS, independent=True),
    "ft": lambda lm, facts: kf.Ft(layers=(0,), num_steps=2).edit(lm, facts),
    "evaluate": lambda lm, facts: kf.evaluate(edited(lm), facts, generate=4, text=TEXT * 40),
    "write_probes": lambda lm, facts: write_probes(
        edited(lm), [probe(lm, fact.text, n_written=6) for fact in facts * 2]
    ),
    "perplexity": lambda lm, facts: perplexity(edited(lm), WINDOWS[: 20 * len(facts)]),
    "lens": lambda lm, facts: kf.logit_lens(edited(lm), facts),
    "statistics": lambda lm, facts: kf.second_moments(lm, [0, 1], [fact.text for fact in facts * 40], n_tokens=1500),
    "sampled text": lambda lm, facts: generate.generate(
        lm, [[fact_id] for fact_id in range(20 * len(facts))], 6, temperature=1.0, seed=0, stop=False
    ),
}  # fmt: skip


@pytest.fixture
def small_calls(monkeypatch):
    monkeypatch.setattr(plan, "CALL_ROWS", 64)


def peak(flow: str, facts, limit: int = LIMIT, lm=None) -> int:
    lm = replace(lm or tiny_lm("llama"), memory=limit)
    with LiveBytes(lm.model) as held:
        FLOWS[flow](lm, facts)
    return held.peak


@pytest.mark.parametrize("facts", [LONG, MANY], ids=["long", "many"])
@pytest.mark.parametrize("flow", FLOWS)
def test_no_flow_holds_more_than_it_may(flow, facts, small_calls):
    assert peak(flow, facts) <= LIMIT


@pytest.mark.parametrize("flow", FLOWS)
def test_layers_that_come_from_disk_are_held_in_the_ring_alone(flow, small_calls, tmp_path):
    """What lies around them is there before; both are what ``placement.weights`` counts."""
    lm = on_disk(save_tiny(tmp_path, tiny_model("llama")))
    assert peak(flow, MANY, lm=lm) <= LIMIT + lm.source.ring_bytes


def whole(items, size, most, count=None):
    yield list(items)


def every_draw(lm, task, n, kinds):
    return [torch.arange(n)], False


# flow, facts, bytes that it may hold; then what is not cut, and how
UNCUT = {
    "the estimate's draws": ("attribution", LONG, LIMIT, attribution, "_cut", every_draw),
    "values": ("memit", MANY, 1_300_000, values, "together", whole),
    "fine-tuning": ("ft", MANY, 600_000, finetune, "together", whole),
    "rows of a sweep": ("perplexity", MANY, LIMIT, engine, "cut", lambda runs, *_: [torch.arange(len(runs))]),
    "texts": ("sampled text", MANY, LIMIT, generate, "batches", lambda lm, lengths, n: [list(range(len(lengths)))]),
}  # fmt: skip


@pytest.mark.parametrize("what", UNCUT)
def test_what_is_not_cut_is_seen(what, small_calls, monkeypatch):
    """The measure can fail: each cut left out in turn."""
    flow, facts, limit, module, name, uncut = UNCUT[what]
    assert peak(flow, facts, limit) <= limit
    monkeypatch.setattr(module, name, uncut)
    assert peak(flow, facts, limit) > limit
