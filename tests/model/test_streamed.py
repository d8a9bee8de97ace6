"""Layers that come from elsewhere, fetched ahead: the same bits as in memory, and each read once a pass."""

import contextlib

import pytest
import torch

import kedit_fast as kf
from kedit_fast.model import streamed
from kedit_fast.model.host import Host
from kedit_fast.model.lm import LM
from tests.conftest import disk_and_resident, save_tiny
from tests.tiny import PROMPTS, TEXT, tiny_model

FACTS = [
    kf.Fact(p.template, p.subject, target_new=new, target_true=p.answer.strip())
    for p, new in zip(PROMPTS[:3], ("Rome", "London", "Madrid"), strict=True)
]
CONTEXTS = [["{}"], ["So. {}"]]


def opened(folder, family, kind, keep=0):
    """(the model with its layers in memory, the same one that streams them)"""
    disk, resident = disk_and_resident(save_tiny(folder, tiny_model(family)))
    if kind == "host":
        disk = LM(disk.model, disk.tokenizer, Host(disk.source, keep), disk.memory)
    return resident, disk


def traced(lm):
    return [result.p_restored for result in kf.trace(lm, FACTS[:1], samples=2, window=2, noise=0.5)]


def edited(lm):
    moments = kf.second_moments(lm, [1, 2], [TEXT], n_tokens=200)
    memit = kf.Memit(layers=(1, 2), v_num_grad_steps=3)
    edit = memit.edit(lm, FACTS, moments=moments, contexts=CONTEXTS)
    tuned = kf.Ft(layers=(2,), num_steps=2).edit(lm, FACTS)
    report = kf.evaluate(lm, FACTS, edit, text="Big Ben is a clock.", generate=2)
    tensors = [moments[1].matrix, edit.values, tuned.deltas[2].delta, report.edited["p_new"]]
    return [x.numpy() for x in tensors], report.generations, report.perplexity


@pytest.mark.parametrize("kind, keep", [("disk", 0), ("host", 0), ("host", 1), ("host", 9)])
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "gptj"])
def test_streamed_is_bit_for_bit_as_in_memory(family, kind, keep, tmp_path, monkeypatch):
    """A buffer that is free again is spoiled, so nobody reads one too late."""
    monkeypatch.setattr(streamed, "SPOIL", True)
    resident, lm = opened(tmp_path, family, kind, keep)
    for ours, theirs in zip(traced(lm), traced(resident), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert lm.source.missed == 0 and lm.fingerprint == resident.fingerprint
    assert lm.top_tokens("The Eiffel Tower is", 5) == resident.top_tokens("The Eiffel Tower is", 5)


@pytest.mark.parametrize("kind, keep", [("disk", 0), ("host", 1)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_measured_edited_and_asked_is_the_same(family, kind, keep, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "SPOIL", True)
    resident, lm = opened(tmp_path, family, kind, keep)
    (ours, *said), (theirs, *told) = edited(lm), edited(resident)
    for a, b in zip(ours, theirs, strict=True):
        assert a.tolist() == b.tolist()
    assert said == told and lm.source.missed == 0


def test_layers_are_fetched_once_a_pass_and_a_wrong_guess_is_counted(tmp_path):
    _, lm = opened(tmp_path, "llama", "disk")
    source = lm.source
    lm.top_tokens("Big Ben is", 1)
    assert (source.fetched, source.missed) == (5, 0)  # four, and the first of a pass that may follow
    lm.generate("Big Ben is", 3)
    assert (source.fetched, source.missed) == (5 + 3 * 4, 0)
    source.expect([0, 1, 2, 3])
    weights = source._weights(2)
    assert source.missed == 1 and sorted(weights) == sorted(name for name, _ in source.layers[2].named_parameters())


def test_under_autograd_a_step_reads_each_layer_twice_and_the_highest_once(tmp_path):
    _, lm = opened(tmp_path, "llama", "disk")
    memit = kf.Memit(layers=(1,), v_num_grad_steps=4, mom2_adjustment=False)
    memit.edit(lm, FACTS, contexts=CONTEXTS)
    assert lm.source.missed == 0


def test_a_checkpoint_that_changes_while_it_is_read_is_an_error(tmp_path):
    _, lm = opened(tmp_path, "llama", "disk")
    file = tmp_path / "model.safetensors"
    lm.top_tokens("Big Ben is", 1)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors has changed since the model was opened; open it again"):
        lm.top_tokens("Big Ben is", 1)


def test_a_ring_holds_two_layers(tmp_path):
    _, lm = opened(tmp_path, "llama", "disk")
    largest = max(sum(p.numel() * 4 for p in layer.parameters()) for layer in lm.source.layers)
    assert 2 * largest <= lm.source.ring_bytes <= 2 * (largest + 256 * len(list(lm.source.layers[0].parameters())))


class Stream:
    """What a stream of a GPU is told, in order."""

    def __init__(self, name, told):
        self.name, self.told = name, told

    def record_event(self):
        self.told.append((self.name, "records", len(self.told)))
        return len(self.told) - 1

    def wait_event(self, event):
        self.told.append((self.name, "waits", event))


def test_on_a_gpu_a_buffer_is_filled_once_it_is_free_and_read_once_it_is_filled(tmp_path, monkeypatch):
    _, lm = opened(tmp_path, "llama", "host")
    told: list[tuple] = []
    compute = Stream("compute", told)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    lm.source._stream = Stream("copy", told)
    lm.generate("Big Ben is", 2)
    lm.source._reader.shutdown()
    waits = [(name, event) for name, what, event in told if what == "waits"]
    assert len([name for name, _ in waits if name == "compute"]) == 2 * 4  # a wait for each layer of each pass
    for name, event in waits:
        other = "copy" if name == "compute" else "compute"
        assert told[event] == (other, "records", event)
    free = [event for name, event in waits if name == "copy"]
    assert free == sorted(set(free))  # each buffer is free once for each time it is filled again
