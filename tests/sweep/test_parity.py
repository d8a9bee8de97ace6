"""A packed sweep gives Hugging Face's own logits, in every family, and shows it when anything is wrong."""

import functools
from dataclasses import replace

import pytest
import torch

from kedit_fast.jobs.collect import Collect
from kedit_fast.kernels import slots
from kedit_fast.kernels.attention import attention
from kedit_fast.model.family import FAMILIES
from kedit_fast.sweep import engine, plan
from kedit_fast.sweep.runs import RunList, add_sequences
from kedit_fast.sweep.sites import Site
from kedit_fast.tracing.exact import Restore
from kedit_fast.tracing.tasks import AddNoise
from tests.conftest import TOLERANCE, close, relative_error, tiny_lm
from tests.oracle.access import changing, embedding, site_module, subject_span
from tests.tiny import PROMPTS, tiny_tokenizer

DRAWS, LAYERS = 2, 4
WINDOWED = {
    "mistral", "mistral3", "ministral3", "qwen2", "gemma2", "gemma3", "gemma3_text", "phi3", "olmo3", "exaone4",
    "cohere2", "starcoder2", "mixtral", "gpt_oss",
}  # fmt: skip
# What is restored in each prompt: (site, first layer, end, tokens behind the subject's first one).
STATES = ((Site.layer_out, 0, 1, 0), (Site.layer_out, 2, 3, 2))
CELLS = (*STATES, (Site.mlp_out, 1, 3, 1), (Site.mlp_out, 0, 2, 0), (Site.attn_out, 1, 4, 2))


@functools.cache
def prompts():
    """(token ids, first and end of the subject) of three prompts of different lengths, two beginning alike."""
    return [subject_span(tiny_tokenizer(), p.template, p.subject) for p in (PROMPTS[0], PROMPTS[1], PROMPTS[3])]


@functools.cache
def noise(fact: int) -> torch.Tensor:
    """[draws, subject tokens, d] fp64"""
    begin, end = prompts()[fact][1]
    return 0.5 * torch.randn(DRAWS, end - begin, 48, generator=torch.Generator().manual_seed(fact), dtype=torch.float64)


@functools.cache
def texts() -> list[list[int]]:
    """Clean sequences: the prompts, one that goes on behind a prompt, and one that leaves it half way."""
    ids = [p[0] for p in prompts()]
    return [*ids, ids[0] + ids[1][:3], ids[0][:5] + ids[2][:4]]


# ---- Hugging Face's own forward


@functools.cache
def wanted(family: str) -> torch.Tensor:
    """[n, V] logits, clean texts at every position, then corrupted and restored runs at the last one."""
    model = tiny_lm(family).model
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0] for ids in texts()]
        for fact, (ids, (begin, end)) in enumerate(prompts()):
            batch = torch.tensor([ids] * (DRAWS + 1))
            corrupted = (embedding(model), functools.partial(_corrupt, noise(fact), begin, end))
            for cell in (None, *CELLS):
                with changing([corrupted, *_restorations(model, cell, begin)]):
                    logits.append(model(batch).logits[1:, -1])
    return torch.cat(logits)


def _corrupt(drawn, begin, end, hidden):
    hidden = hidden.clone()
    hidden[1:, begin:end] = (hidden[1:, begin:end].double() + drawn).to(hidden.dtype)
    return hidden


def _restorations(model, cell, subject_begin):
    if cell is None:
        return []
    site, first, end, offset = cell

    def restore(hidden):
        hidden = hidden.clone()
        hidden[1:, subject_begin + offset] = hidden[0, subject_begin + offset]
        return hidden

    return [(site_module(model, layer, site.value), restore) for layer in range(first, end)]


# ---- the same as one pack


def declared(lm):
    """(runs, jobs, places): everything in one pack, and where the wanted logits are read."""
    runs, places, writes = RunList(), [], []
    clean = add_sequences(runs, texts())
    for number, ids in zip(clean.tolist(), texts(), strict=True):
        places += [(number, pos) for pos in range(len(ids))]
    noisy = []
    for fact, (ids, (begin, end)) in enumerate(prompts()):
        last = len(ids) - 1
        corrupted = runs.add(ids, parent=clean[fact], first_pos=torch.full((DRAWS,), begin), source=-1)
        noisy += [(int(run), pos) for run in corrupted for pos in range(begin, end)]
        places += [(int(run), last) for run in corrupted]
        for site, first, stop, offset in CELLS:
            pos = begin + offset
            if site is Site.layer_out:
                made = runs.add(ids, parent=corrupted, branch_layer=stop, first_pos=pos, graft=clean[fact])
            else:
                made = runs.add(ids, parent=corrupted, branch_layer=first, first_pos=pos, narrow=True)
                writes += [(site, int(run), pos, int(clean[fact]), first, stop) for run in made]
            places += [(int(run), last) for run in made]
    where = torch.tensor(noisy).unbind(1)
    jobs = [AddNoise(*where, torch.cat([noise(f).flatten(0, 1) for f in range(len(prompts()))]))]
    for site in (Site.mlp_out, Site.attn_out):
        jobs.append(Restore(site, *torch.tensor([w[1:] for w in writes if w[0] is site]).unbind(1)))
    return runs.runs(), jobs, places


def swept(family: str, change=lambda runs: runs) -> torch.Tensor:
    """[n, V] the logits of one packed sweep."""
    lm = tiny_lm(family)
    runs, jobs, places = declared(lm)
    top = Collect(Site.layer_out, [LAYERS - 1], *torch.tensor(places).unbind(1))
    engine.sweep(lm, change(runs), [*jobs, top])
    with torch.no_grad():
        return lm.head(top.values[LAYERS - 1])


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest relative error of a row."""
    return max(relative_error(g, w) for g, w in zip(got, want, strict=True))


# ---- the tests


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sweep_gives_hugging_faces_logits(family):
    got, want = swept(family), wanted(family)
    close(family, got, want, torch.float32)
    assert worst(got, want) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("size", [1, 3, 11])
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_calls_may_be_cut_anywhere(family, size, monkeypatch, poisoned_memory):
    """Rows read keys of their own and earlier calls only, and nothing that has not been written yet."""
    monkeypatch.setattr(plan, "CALL_ROWS", size)
    assert worst(swept(family), wanted(family)) <= TOLERANCE[torch.float32]


def _key_row(query, key, value, key_rows, run, pos, **how):
    """One wrong entry: the token before a row of the last run reads the key of the token before it."""
    key_rows = key_rows.clone()
    key_rows[run[-1], pos[-1] - 1] = key_rows[run[-1], pos[-1] - 2]
    return attention(query, key, value, key_rows, run, pos, **how | {"groups": None})  # they are made of the table


def _with(**changes):
    def changed(*args, **how):
        return attention(*args, **how | {name: f(how[name]) for name, f in changes.items() if how[name] is not None})

    return changed


MUTATIONS = {
    "scale": _with(scale=lambda s: s * 1.5),
    "window + 1": _with(window=lambda w: w + 1),
    "window - 1": _with(window=lambda w: w - 1),
    "key row": _key_row,
    "no soft cap": _with(softcap=lambda c: None),
    "no sinks": _with(sinks=lambda s: None),
}


ONLY_IN = {"window + 1": WINDOWED, "window - 1": WINDOWED, "no soft cap": {"gemma2"}, "no sinks": {"gpt_oss"}}
MUTATED = [(family, name) for family in FAMILIES for name in MUTATIONS if family in ONLY_IN.get(name, FAMILIES)]


@pytest.mark.parametrize(("family", "mutation"), MUTATED)
def test_a_wrong_attention_is_seen(family, mutation, monkeypatch):
    monkeypatch.setattr(slots, "attention", MUTATIONS[mutation])
    assert worst(swept(family), wanted(family)) >= 100 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("mutation", ["no clean row", "a layer late", "a position late"])
def test_a_wrong_branch_is_seen(family, mutation):
    def change(runs):
        branches = runs.branch_layer > 0
        late = branches.long()
        return {
            "no clean row": replace(runs, graft=runs.source),
            "a layer late": replace(runs, branch_layer=runs.branch_layer + late),
            "a position late": replace(runs, first_pos=runs.first_pos + late),
        }[mutation]

    assert worst(swept(family, change), wanted(family)) >= 100 * TOLERANCE[torch.float32]


def test_windows_and_caps_are_where_they_are_expected(monkeypatch):
    """The mutations above apply to every family that has a window or a cap, and to no other."""
    seen = {"window": set(), "softcap": set()}

    def record(*args, **how):
        for kind, families in seen.items():
            families |= {family} if how[kind] else set()
        return attention(*args, **how)

    monkeypatch.setattr(slots, "attention", record)
    for family in FAMILIES:
        swept(family)
    assert seen == {"window": WINDOWED, "softcap": {"gemma2"}}
