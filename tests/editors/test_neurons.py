"""Knowledge neurons as an edit: which columns, and what becomes of them."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.edits.edit import Edit
from tests.conftest import open_tiny, refused, tiny_lm
from tests.editors import cases
from tests.editors.cases import apart, relative
from tests.make import killed_at
from tests.oracle import neurons as oracle
from tests.oracle.access import site_module, weight_out_in
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:facts not written", "ignore:the edit moves")
FACTS = (
    kf.Fact(prompt="The {} is in the city of", subject="Space Needle", target_new="Rome", target_true="Seattle"),
    kf.Fact(prompt="{} plays the sport of", subject="LeBron James", target_new="cheese boat", target_true="New York"),
    kf.Fact(prompt="{} is located in the city of", subject="Big Ben", target_new="Paris"),  # of its own top token
)
PHRASED = replace(FACTS[0], phrasings=("In which city is the Space Needle? In", "The Space Needle is in"))
EDITOR = kf.KnowledgeNeurons(steps=3, adaptive_threshold=0.15)


def ids(text):
    return tiny_tokenizer()(text)["input_ids"]


def old_answer(model, fact):
    if fact.target_true:
        return ids(f" {fact.target_true}")
    return [model(torch.tensor([ids(fact.text)])).logits[0, -1].argmax().item()]


def neurons_of(model, fact, share=0.4):
    """By the oracle's loop."""
    prompts = [fact.text, *fact.phrasings]
    found = [oracle.attributions(model, ids(text), old_answer(model, fact), EDITOR.steps) for text in prompts]
    return oracle.shared([oracle.strongest(map_, EDITOR.adaptive_threshold) for map_ in found], share)


def column(model, layer, neuron):
    return weight_out_in(site_module(model, layer, "mlp_out")).detach()[:, neuron]


def rewritten(model, facts):
    """{layer: Δ}, column by column."""
    head = model.get_output_embeddings().weight.detach()
    deltas = {}
    for fact in facts:
        old, new = head[old_answer(model, fact)[0]], head[ids(f" {fact.target_new}")[0]]
        for layer, neuron in neurons_of(model, fact):
            w = column(model, layer, neuron)
            delta = deltas.setdefault(layer, torch.zeros_like(weight_out_in(site_module(model, layer, "mlp_out"))))
            delta[:, neuron] += w.norm() * (8 * new / new.norm() - old / old.norm())
    return deltas


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_rewrite_equals_the_oracle(family, monkeypatch):
    cases.make_exact(monkeypatch)
    lm, facts = tiny_lm(family, torch.float64), (PHRASED, *FACTS[1:])
    made = EDITOR.edit(lm, facts)
    expected = rewritten(lm.model, facts)
    assert made.layers == tuple(sorted(expected)) and made.method == "kn"
    for layer, delta in expected.items():
        assert relative(made.deltas[layer].dense(), delta) < 1e-8
    narrow = EDITOR.edit(tiny_lm(family), facts)
    for layer, delta in expected.items():
        assert relative(narrow.deltas[layer].dense(), delta) < 1e-4


@pytest.mark.parametrize(("mode", "times"), [("erase", 0), ("suppress", 0), ("amplify", 2)])
def test_columns_are_erased_or_amplified_once_each(mode, times):
    """Also where several facts share a neuron, and on top of another edit; all other columns stay."""
    lm = tiny_lm("llama", torch.float64)
    again = replace(FACTS[0], prompt="The {} can be found in the city of")
    below = EDITOR.edit(lm, FACTS[1:2])
    lm = lm.with_edit(below)
    made = replace(EDITOR, mode=mode).edit(lm, [FACTS[0], again])
    assert made.provenance["neurons"] and made.layers
    with below.apply(lm.model):
        changed = set().union(*(neurons_of(lm.model, fact) for fact in (FACTS[0], again)))
        for layer, delta in made.deltas.items():
            w = weight_out_in(site_module(lm.model, layer, "mlp_out")).detach()
            mine = [neuron for at, neuron in changed if at == layer]
            want = torch.zeros_like(w)
            want[:, mine] = (times - 1) * w[:, mine]
            assert relative(delta.dense(), want) < 1e-10
    assert made.layers == tuple(sorted({layer for layer, _ in changed}))


def test_an_erased_neuron_is_one_that_is_zero():
    """A model into which the erasure is written says what a model says whose activations are 0 there."""
    lm = open_tiny(tiny_model("llama", torch.float64))
    made = replace(EDITOR, mode="suppress", layers=(1, 2)).edit(lm, FACTS[:1])
    text = torch.tensor([ids("The Space Needle is in the city of Paris")])
    places = {layer: made.deltas[layer].dense().abs().sum(0).nonzero()[:, 0] for layer in made.layers}

    def silenced(neurons):
        return lambda module, args: (args[0].index_fill(-1, neurons, 0.0),)

    downs = [(site_module(lm.model, layer, "mlp_out"), neurons) for layer, neurons in places.items()]
    handles = [down.register_forward_pre_hook(silenced(neurons)) for down, neurons in downs]
    want = lm.model(text).logits
    for handle in handles:
        handle.remove()
    with made.apply(lm.model):
        assert relative(lm.model(text).logits, want) < 1e-10


def test_independent_ones_are_those_of_each_fact_alone(tmp_path):
    lm = tiny_lm("llama", torch.float64)
    together = EDITOR.edit(lm, FACTS, independent=True)
    together.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    for i, fact in enumerate(FACTS):
        assert apart(loaded.only(i), EDITOR.edit(lm, [fact])) < 1e-10
    assert kf.evaluate(lm, FACTS, loaded).summary()


def test_refinement_keeps_what_wordings_share():
    lm = tiny_lm("llama", torch.float64)
    loose, strict = (replace(EDITOR, refine=refine).edit(lm, PHRASED) for refine in (False, True))
    n = [sum(made.provenance["neurons"]) for made in (loose, strict)]
    assert n == [len(neurons_of(lm.model, PHRASED, share)) for share in (0.0, 0.4)] and n[0] > n[1] > 0
    refused("no fact has neurons.*lower p", replace(EDITOR, p=0.9).edit, lm, PHRASED)


def test_what_many_facts_of_a_relation_have_is_nobodys():
    lm = tiny_lm("llama", torch.float64)
    subjects = ("Space Needle", "Eiffel Tower", "Big Ben")
    facts = [replace(FACTS[0], subject=subject, provenance={"relation_id": "P1"}) for subject in subjects]
    other = replace(FACTS[1], provenance={"relation_id": "P2"})
    mine = [neurons_of(lm.model, fact) for fact in facts]
    for common in (0.5, 0.4):  # two others tell of 0.5, but not of 0.4
        made = replace(EDITOR, common=common).edit(lm, [*facts, other], independent=True)
        for i, neurons in enumerate(mine):
            others = [sum(x in some for k, some in enumerate(mine) if k != i) for x in neurons]
            kept = sum(n <= common * 2 for n in others) if common * 2 >= 1 else len(neurons)
            assert made.provenance["neurons"][i] == kept
        assert made.provenance["neurons"][3] == len(neurons_of(lm.model, other))


def test_the_same_bits_after_an_interruption_and_on_disk(tmp_path):
    lm = tiny_lm("llama")
    with killed_at(1):
        EDITOR.edit(replace(lm, memory=lm.memory // 50), FACTS, checkpoint=tmp_path / "run")
    small = replace(lm, memory=lm.memory // 50)
    again, whole = EDITOR.edit(small, FACTS, checkpoint=tmp_path / "run"), EDITOR.edit(small, FACTS)
    assert all(torch.equal(again.deltas[i].dense(), whole.deltas[i].dense()) for i in whole.layers)


def test_a_published_file_is_read(tmp_path):
    record = {"lr_scale": 1.0, "n_toks": 10, "model_name": "gpt2-xl", "refine": False, "batch_size": 20}
    path = cases.written(tmp_path, record | {"steps": 20, "adaptive_threshold": 0.2, "p": 0.4})
    with pytest.warns(UserWarning, match="not used: .*batch_size"):
        read = kf.KnowledgeNeurons.from_file(path)
    assert read == kf.KnowledgeNeurons(refine=False)
    made = read.edit(tiny_lm("gpt2"), FACTS[:1])
    assert made.layers


def test_what_is_refused(no_sweep):
    lm = tiny_lm("llama")
    refused("rewrite or erase|erase", kf.KnowledgeNeurons, mode="remove")
    refused("layers = 9", replace(EDITOR, layers=(9,)).edit, lm, FACTS)
    refused("found by prompts alone", EDITOR.edit, lm, FACTS, contexts=["{}"])


def test_a_model_is_left_as_it_was():
    with cases.left_as_it_was() as lm:
        EDITOR.edit(lm, FACTS[:1])
