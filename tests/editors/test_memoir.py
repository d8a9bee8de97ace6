"""MEMOIR against its oracle; masks by hand; what must not change."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.memory import irrelevant, prompts_of
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.evaluation.probes import probe, read_edited, read_probes
from tests.conftest import open_tiny, refused, tiny_lm
from tests.editors import cases
from tests.editors.cases import FACTS, relative
from tests.make import bits, same_bits
from tests.oracle import side as oracle
from tests.tiny import D_FF, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:facts not written")
EDITOR = kf.Memoir(layers=(2,), n_iter=3, top_k=24, batch_size=3, edit_lr=0.5)
STRANGE = ["The capital of France is", "Zürich is located in", "Big cats sleep"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_it_equals_the_oracle(family, monkeypatch):
    """Masks, the memory after two batches, and the answers, each under the mask of its fact."""
    cases.make_exact(monkeypatch)
    lm = tiny_lm(family, torch.float64)
    made = EDITOR.edit(lm, FACTS)
    memory, route = made.changes[0], made.route
    usual = torch.stack([oracle.inputs(lm.model, 2, ids).mean(0) for ids in irrelevant(lm, FACTS)]).mean(0)
    assert relative(route.background, usual) < 1e-8
    tasks = [prompts_of(lm, fact)[0] for fact in FACTS]
    masks = [oracle.top_hash(lm.model, 2, prompt, usual, 24, route.permutation) for prompt, _ in tasks]
    assert memory.masks.tolist() == masks
    weight = torch.zeros(lm.shape_of("down"), dtype=lm.dtype)
    for some in (slice(0, 3), slice(3, 4)):
        weight = oracle.memoir_batch(lm.model, 2, weight, tasks[some], masks[some], lr=0.5, n_iter=3, clip=1.0)
    assert relative(memory.weight, weight[:, memory.columns]) < 1e-8
    assert not weight[:, ~torch.isin(torch.arange(D_FF), memory.columns)].any()
    assert relative(EDITOR.edit(tiny_lm(family), FACTS).changes[0].weight, memory.weight) < 1e-4
    view, behind = lm.with_edit(made), probe(lm, FACTS[0].text, ["cheese boat"]).answers[0]
    asked = [fact.text for fact in FACTS]
    assert view.owners(asked).tolist() == [0, 1, 2, 3]
    answers = read_edited(view, [probe(lm, text, ["cheese boat"]) for text in asked])
    for text, mask, said in zip(asked, masks, answers, strict=True):
        with oracle.beside(lm.model, 2, lambda x, m=mask: x[..., m] @ weight[:, m].T), torch.no_grad():
            loss = oracle.nll(lm.model, lm.encode(text), behind)
        assert said.p[0] == pytest.approx(float((-loss).exp()), rel=1e-8)


def test_misses_are_the_base_model_and_the_weights_stay():
    model = tiny_model("llama")
    lm, before = open_tiny(model), bits(model)
    made = EDITOR.edit(lm, FACTS)
    assert same_bits(model, before)
    shares = {}
    for least in (0.0, 1.0):
        view = lm.with_edit(replace(made, route=replace(made.route, least=least)))
        base, edited = read_probes(view, [probe(lm, text, ["Rome"], likeliest=True) for text in STRANGE])
        shares[least] = [a == b for a, b in zip(base, edited, strict=True)]
        assert (torch.tensor(shares[least]) == (view.owners(STRANGE) < 0)).all()
    assert shares == {0.0: [False] * 3, 1.0: [True] * 3}


def test_a_fact_is_taken_out_with_its_mask(tmp_path):
    lm = tiny_lm("llama")
    made = EDITOR.edit(lm, FACTS)
    made.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert digest(loaded) == digest(made)
    asked = [fact.text for fact in FACTS]
    exact = replace(loaded, route=replace(loaded.route, least=1.0))  # no other fact's mask will do
    without = exact.without(1)
    assert lm.with_edit(without).owners(asked).tolist() == [0, -1, 1, 2]
    assert set(without.changes[0].columns.tolist()) == set(loaded.changes[0].masks[[0, 2, 3]].flatten().tolist())
    refused("entries 0 to 3; the edit has 1, with the entries", replace, made, changes=without.changes)
    refused("the edit has 0, with the entries", replace, made, changes=())
    assert exact.only(3).without(0).changes == ()
    written = lm.with_edit(exact).generate(asked, 2)
    assert lm.with_edit(without).generate(asked, 2) == [written[0], lm.generate(asked[1], 2), *written[2:]]
    assert lm.with_edit(exact.only(3)).generate(asked[3], 2) == written[3]


def test_unrelated_prompts_are_asked_as_the_facts_are_and_there_are_some():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}me:"
    lm = kf.open_model(tiny_model("llama"), tokenizer=tokenizer)
    of, (first, *_), builtin = partial(irrelevant, lm), FACTS, kf.load_facts("builtin")
    plain, chat = of(FACTS), of([replace(fact, chat=True) for fact in FACTS])
    assert chat == [lm.encode(f"user: {tokenizer.decode(ids)} me:") for ids in plain] and len(plain) > 60
    mixed = of([first, replace(FACTS[1], chat=True)])
    assert mixed[::2] == plain[::2] and mixed[1::2] == chat[1::2]
    assert of([kf.Fact(prompt=builtin[0].text, target_new="Rome")]) == [lm.encode(fact.text) for fact in builtin[1:]]
    for editor, options in ((EDITOR, {}), (kf.Wise(layers=(2,)), {"contexts": [["{}"]]})):
        refused("so none is left for what a memory has to leave alone", editor.edit, lm, builtin, **options)


def test_settings():
    derived = kf.Memoir.for_model(tiny_lm("gpt2"))
    assert derived.layers == (3,) and derived.top_k == round(D_FF * 4096 / 14336) and "derived" in derived.source
    refused("this model's keys have 80 features", replace(EDITOR, top_k=81).edit, tiny_lm("llama"), FACTS)
    refused("a share", kf.Memoir, layers=(1,), tau=1.5)
    refused("one layer", kf.Memoir, layers=(1, 2))
