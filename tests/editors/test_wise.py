"""WISE against its oracle; TIES by hand; what masks and thresholds leave as it was."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.memory import irrelevant, prompts_of
from kedit_fast.editors.wise import ties
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.edits.memory_routes import activations
from kedit_fast.evaluation.probes import probe, read_edited, read_probes
from tests.conftest import close, open_tiny, refused, tiny_lm
from tests.editors import cases
from tests.editors.cases import FACTS, GROUPS, relative
from tests.make import bits, same_bits
from tests.oracle import side as oracle
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:facts not written")
EDITOR = kf.Wise(
    layers=(2,), edit_lr=0.5, n_iter=3, alpha=0.5, beta=2.0, gamma=1.0, norm_constraint=0.05, batch_size=2, save_freq=2,
    merge_freq=2,
)  # fmt: skip
TEMPLATES = [template for group in GROUPS for template in group]


def edit(lm, facts=FACTS, editor=EDITOR):
    return editor.edit(lm, facts, contexts=GROUPS)


def mask(lm, number):
    return torch.rand(lm.shape_of("down"), generator=torch.Generator().manual_seed(number)) < EDITOR.mask_ratio


def by_hand(lm, number):
    """Δ of one shard of two facts, by the oracle."""
    some = FACTS[2 * number : 2 * number + 2]
    tasks = [task for fact in some for task in prompts_of(lm, fact, TEMPLATES)]
    whose = [i for i, fact in enumerate(some) for _ in prompts_of(lm, fact, TEMPLATES)]
    others = irrelevant(lm, FACTS)[:2]
    start = torch.zeros(lm.shape_of("down"), dtype=lm.dtype)
    how = {"lr": 0.5, "n_iter": 3, "margins": (0.5, 2.0, 1.0), "limit": 0.05}
    return oracle.wise_batch(lm.model, 2, start, tasks, whose, others, mask(lm, number), **how)[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_it_equals_the_oracle(family, monkeypatch):
    """Both shards of WISE-Retrieve, their thresholds, and the answers to prompts of each and of none."""
    cases.make_exact(monkeypatch)
    lm = tiny_lm(family, torch.float64)
    made = edit(lm, editor=replace(EDITOR, retrieve=True))
    memory = made.changes[0]
    for i in (0, 1):
        assert relative(memory.dense(i), by_hand(lm, i)) < 1e-8
        own = [prompts_of(lm, fact)[0][0] for fact in FACTS[2 * i : 2 * i + 2]]
        least = min(oracle.activation(oracle.inputs(lm.model, 2, ids), memory.dense(i)) for ids in own)
        assert made.route.threshold[i] == pytest.approx(0.88 * float(least), rel=1e-8)
    narrow = edit(tiny_lm(family), editor=replace(EDITOR, retrieve=True))
    assert relative(narrow.changes[0].dense(0), memory.dense(0)) < 1e-4
    view = lm.with_edit(made)
    asked = [fact.text for fact in FACTS] + ["The capital of France is"]
    owners, behind = view.owners(asked).tolist(), probe(lm, asked[0], ["cheese boat"]).answers[0]
    answers = read_edited(view, [probe(lm, text, ["cheese boat"], likeliest=True) for text in asked])
    for text, owner, said in zip(asked, owners, answers, strict=True):
        delta = memory.dense(owner) if owner >= 0 else torch.zeros(lm.shape_of("down"), dtype=lm.dtype)
        with oracle.beside(lm.model, 2, lambda x, delta=delta: x @ delta.T), torch.no_grad():
            loss = oracle.nll(lm.model, lm.encode(text), behind)
        assert said.p[0] == pytest.approx(float((-loss).exp()), rel=1e-8)
    assert all(owner >= 0 for owner in owners[:4])


def test_what_a_mask_leaves_out_stays_and_the_weights_stay(tmp_path):
    model = tiny_model("llama")
    lm, before = open_tiny(model), bits(model)
    made = edit(lm, FACTS[:2])
    delta = made.changes[0].dense(0)
    assert same_bits(model, before) and delta.abs().max() <= 0.05
    assert not delta[~mask(lm, 0)].any() and delta[mask(lm, 0)].count_nonzero() > 0.9 * mask(lm, 0).sum()
    made.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert digest(loaded) == digest(made) and torch.equal(loaded.changes[0].dense(0), delta)
    assert (tmp_path / "edit.safetensors").stat().st_size < 0.5 * delta.nbytes + 5_000
    refused("shares its entry with others", loaded.only, 0)


def test_below_the_threshold_the_base_model_answers_to_the_bit():
    lm = tiny_lm("llama")
    made = edit(lm, FACTS[:2])
    asked = [FACTS[0].text, *(fact.text for fact in kf.load_facts("builtin", n=6))]
    moved = activations(lm, asked, made.changes[0])[:, 0]
    middle = moved.median()
    at = replace(made, route=replace(made.route, threshold=middle[None]))
    probes = [probe(lm, text, ["Rome"], likeliest=True) for text in asked]
    base, edited = read_probes(lm.with_edit(at), probes)
    assert [a == b for a, b in zip(base, edited, strict=True)] == (moved < middle).tolist()
    close("alone", moved[2], activations(lm, asked[2:3], made.changes[0])[0, 0])


def test_ties_by_hand():
    one, two = torch.tensor([[3.0, -2.0, 0.5, 0.0]]), torch.tensor([[-1.0, -4.0, 0.0, 0.25]])
    # half of each stays: (3, -2) and (-1, -4); signs + and -; means of those of the sign
    assert ties([one, two], 0.5).tolist() == [[3.0, -3.0, 0.0, 0.0]]
    assert ties([one, two], 1.0).tolist() == [[3.0, -3.0, 0.5, 0.25]]
    assert ties([one], 0.5) is one


def test_merge_is_one_memory_and_retrieve_are_several():
    lm = tiny_lm("llama")
    merged, several = edit(lm), edit(lm, editor=replace(EDITOR, retrieve=True))
    assert (merged.route.n_entries, several.route.n_entries) == (1, 2)
    pair = [several.changes[0].dense(i) for i in (0, 1)]
    assert torch.equal(merged.changes[0].dense(0), ties(pair, 0.53))
    only = several.without  # one fact of a memory cannot be taken out
    refused("shares its entry", only, 0)
    alone = edit(lm, editor=replace(EDITOR, retrieve=True, save_freq=1, merge_freq=1, batch_size=1)).only(2)
    assert alone.changes[0].mask.shape[0] == 1 and lm.with_edit(alone).owners([FACTS[2].text]).tolist() == [0]


def test_settings(tmp_path):
    derived = kf.Wise.for_model(tiny_lm("gpt2"))
    assert derived.layers == (3,) and "derived" in derived.source
    known = kf.Wise.for_model(cases.named("gpt-j-6B", layers=28, family="gptj"))
    assert (known.layers, known.alpha, known.beta, known.gamma) == ((21,), 15.0, 40.0, 20.0)
    file = tmp_path / "wise.yaml"
    lines = [
        "alg_name: WISE",
        "inner_params: ['model.layers[27].mlp.down_proj.weight']",
        "mask_ratio: 0.2",
        "n_iter: 70",
    ]
    lines += ["act_margin: [5.0, 20.0, 10.0]", "merge_alg: ties", "densities: 0.53", "weights: 1.0", "retrieve: True"]
    file.write_text("\n".join(lines))
    assert kf.Wise.from_file(file) == kf.Wise(layers=(27,), retrieve=True)
    file.write_text("\n".join(lines).replace("[5.0, 20.0, 10.0]", "5"))
    refused("expected three numbers", kf.Wise.from_file, file)
    refused("a share", kf.Wise, layers=(1,), mask_ratio=1.5)
    refused("one layer", kf.Wise, layers=(1, 2))
