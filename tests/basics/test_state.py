"""No flow depends on what its caller has set in torch: each state around each flow gives the same bits, and stays."""

import functools
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

import pytest
import torch

import kedit_fast as kf
from kedit_fast.gating import Suite
from kedit_fast.gating.questions import Sizes
from kedit_fast.shipping.adapter import export_peft
from kedit_fast.shipping.merge import merge_checkpoint
from tests.conftest import disk_and_resident, open_tiny, save_tiny
from tests.tiny import TEXT, tiny_model

EIFFEL = kf.Fact(
    prompt="{} is in the city of", subject="The Eiffel Tower", target_new="Rome", target_true="Paris",
    paraphrases=["The Eiffel Tower is located in"], neighborhood=["Big Ben is in the city of"],
    same_subject=["The Eiffel Tower plays the"],
)  # fmt: skip
CAMRY = kf.Fact(prompt="{} is produced by", subject="Toyota Camry", target_new="Microsoft", target_true="Toyota")
CAPITAL = kf.Fact(prompt="The capital of {} is", subject="France")
FACTS = [EIFFEL, CAMRY]
CONTEXTS = [["{}"], ["Therefore. {}"]]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}


# ---- states


@contextmanager
def setting(put, value, before):
    put(value)
    try:
        yield
    finally:
        put(before)


def default_dtype(dtype):
    return setting(torch.set_default_dtype, dtype, torch.float32)


@contextmanager
def together(*states):
    with ExitStack() as stack:
        for one in states:
            stack.enter_context(one)
        yield


# Several at a time where none hides another: a flow takes a second.
STATES = {
    "inference mode": torch.inference_mode,
    "no grad, default float64": lambda: together(torch.no_grad(), default_dtype(torch.float64)),
    "default device meta, deterministic": lambda: together(
        setting(torch.set_default_device, "meta", None), setting(torch.use_deterministic_algorithms, True, False)
    ),
    "autocast, inside a device, default bfloat16": lambda: together(
        torch.autocast("cpu", torch.bfloat16), torch.device("meta"), default_dtype(torch.bfloat16)
    ),
}


def state():
    """What a flow must leave as it found it."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
    )


# ---- flows, each of its own inputs, which are made in no state


@functools.cache
def lm():
    return open_tiny(tiny_model("llama", layers=3))


@functools.cache
def moments():
    return kf.second_moments(lm(), [0, 1], [TEXT] * 4, n_tokens=900)


def settings(editor, **rest):
    return editor(layers=(1,), v_num_grad_steps=2, **rest)


@functools.cache
def made():
    """An edit, as a file gives it."""
    return settings(kf.Memit).edit(lm(), FACTS, moments=moments(), contexts=CONTEXTS)


def edited(editor, **given):
    edit = editor.edit(lm(), FACTS, **given)
    return [edit.deltas, edit.values, edit.keys]


def reopened(folder):
    """From a folder in memory and from disk; an edit on top of one that was loaded here; merged, and as an adapter."""
    streamed, resident = disk_and_resident(folder / "model")
    editor = settings(kf.Rome, mom2_adjustment=False)
    editor.edit(resident, EIFFEL, contexts=CONTEXTS).save(folder / "edit.safetensors")
    loaded = kf.Edit.load(folder / "edit.safetensors")
    on_top = editor.edit(streamed, CAMRY, contexts=CONTEXTS, previous=loaded)
    merge_checkpoint(folder / "model", [loaded, on_top], folder / "merged")
    export_peft(loaded, folder / "adapter", model=resident)
    files = [folder / "merged" / "model.safetensors", folder / "adapter" / "adapter_model.safetensors"]
    return [resident.top_tokens("The Eiffel Tower is"), on_top.deltas, *(file.read_bytes() for file in files)]


def applied(folder):
    on_top = settings(kf.Rome, mom2_adjustment=False).edit(lm(), CAMRY, contexts=CONTEXTS, previous=made())
    joined, weight = kf.compose([made(), on_top]), lm().model.model.layers[1].mlp.down_proj.weight
    with joined.apply(lm().model):
        written = weight.tolist()
    return [joined.deltas, written, weight, lm().fingerprint]


FLOWS = {
    "trace": lambda folder: kf.trace(lm(), FACTS, samples=2, window=2),
    "trace by another subject": lambda folder: kf.trace(lm(), CAPITAL, corrupt="England", metric="logprob"),
    "attribution": lambda folder: kf.trace(lm(), FACTS, samples=2, window=2, method="attribution"),
    "screen": lambda folder: kf.trace(lm(), FACTS, samples=2, window=2, method="screen", top=2),
    "second_moments": lambda folder: [
        moment.matrix for moment in kf.second_moments(lm(), [1], [TEXT], n_tokens=100, cache_dir=folder).values()
    ],
    "rome": lambda folder: edited(settings(kf.Rome), moments=moments(), seed=1),
    "memit": lambda folder: edited(settings(kf.Memit), moments=moments(), contexts=CONTEXTS, independent=True),
    "alphaedit": lambda folder: edited(
        settings(kf.AlphaEdit, nullspace_threshold=0.0), moments=moments(), contexts=CONTEXTS),
    "ft": lambda folder: edited(kf.Ft(layers=(1,), num_steps=2, weight_decay=0.1)),
    "evaluate": lambda folder: _columns(kf.evaluate(lm(), FACTS, made(), text=TEXT, generate=3, max_tokens=60)),
    "gate": lambda folder: [asdict(answered) for answered in kf.gate(
        lm(), made(), Suite(text=(TEXT,)), builtin=False, sizes=Sizes(3, 40)).answers],
    "generate": lambda folder: [
        lm().with_edit(made(), written=torch.bfloat16).generate(["The Eiffel Tower", "Toyota"], 6),
        lm().generate("Big Ben", 6, temperature=1.0, seed=3),
        lm().top_tokens("Big Ben is in", 3),
    ],
    "lens": lambda folder: kf.logit_lens(lm(), FACTS, made()),
    "rounds": lambda folder: [r.to_record() | {"edit_s": 0, "evaluate_s": 0} for r in kf.edit_in_rounds(
        lm(), FACTS, kf.Ft(layers=(1,), num_steps=2), per_round=1)],
    "layers": lambda folder: kf.edit_by_layer(
        lm(), FACTS, settings(kf.Rome, mom2_adjustment=False), contexts=CONTEXTS, samples=2).to_record(),
    "folders": reopened,
    "apply": applied,
}  # fmt: skip


def _columns(report):
    return [report.base, report.edited, report.perplexity, report.generations]


def bits(found):
    """What was found as values that are equal where every bit is."""
    if isinstance(found, kf.TraceResult):
        return found.to_record()
    if isinstance(found, torch.Tensor):
        assert not found.is_inference() and not found.is_meta and found.is_leaf
        return str(found.dtype), found.shape, found.detach().view(BITS[found.dtype]).tolist()
    if isinstance(found, dict):
        return {key: bits(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [bits(value) for value in found]
    if hasattr(found, "__dict__"):
        return bits(vars(found))
    return repr(found)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state") / "model"
    model = tiny_model("llama", layers=6)
    model.set_attn_implementation("sdpa")
    return save_tiny(folder, model)


def run(flow, folder, saved):
    folder.mkdir()
    (folder / "model").symlink_to(saved)
    return FLOWS[flow](folder)


EXPECTED: dict = {}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("flow", FLOWS)
def test_the_same_bits_in_every_state(flow, name, saved, tmp_path):
    if flow not in EXPECTED:
        EXPECTED[flow] = bits(run(flow, tmp_path / "plain", saved))
    made(), moments()
    with STATES[name]():
        before = state()
        found = run(flow, tmp_path / "in state", saved)
        assert state() == before
    assert bits(found) == EXPECTED[flow]
