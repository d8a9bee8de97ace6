"""Knowledge neurons of facts: the table against the oracle's loop, its file, its picture."""

import json

import numpy as np
import pytest
import torch

import kedit_fast as kf
from tests.conftest import open_tiny, refused, tiny_lm
from tests.editors import cases
from tests.make import killed_at
from tests.oracle import neurons as oracle
from tests.oracle.access import layers
from tests.tiny import tiny_model, tiny_tokenizer

FACT = kf.Fact(
    prompt="The {} is in the city of", subject="Space Needle", target_true="New York",
    phrasings=("The {} is located in the city of",), paraphrases=("The Space Needle is in Seattle, the city of",),
)  # fmt: skip
OTHER = kf.Fact(prompt="{} is located in the city of", subject="Big Ben")
HOW = {"steps": 3, "threshold": 0.15, "share": 0.4}


def ids(text):
    return tiny_tokenizer()(text)["input_ids"]


@pytest.fixture(scope="module")
def found():
    return kf.knowledge_neurons(tiny_lm("llama"), [FACT, OTHER], **HOW)


def test_they_are_the_oracles_in_all_wordings(monkeypatch):
    cases.make_exact(monkeypatch)
    lm = tiny_lm("llama", torch.float64)
    (made,) = kf.knowledge_neurons(lm, FACT, top=4 * lm.d_ff, **HOW)
    texts = (FACT.text, "The Space Needle is located in the city of", *FACT.paraphrases)
    maps = [oracle.attributions(lm.model, ids(text), ids(" New York"), 3) for text in texts]
    assert made.prompts == texts and made.answer == " New York" and len(ids(" New York")) > 1
    assert np.allclose(made.by_layer, torch.stack(maps).sum(-1), rtol=1e-6, atol=1e-9)
    table = np.full((len(layers(lm.model)), lm.d_ff), np.nan)
    table[tuple(made.places.T)] = made.attribution
    assert np.allclose(table, torch.stack(maps).mean(0), rtol=1e-5, atol=1e-10)
    assert (np.diff(made.attribution) <= 0).all()
    want = oracle.shared([oracle.strongest(map_, 0.15) for map_ in maps], 0.4)
    assert {tuple(place) for place in made.neurons.tolist()} == want and want


def test_what_is_held_out_can_be_left_out_and_an_answer_given():
    lm = tiny_lm("llama")
    (made,) = kf.knowledge_neurons(lm, FACT, answer="Seattle", paraphrases=False, layers=[1, 3], top=5, **HOW)
    assert len(made.prompts) == 2 and made.answer == " Seattle"
    assert (made.by_layer[:, [0, 2]] == 0).all() and (made.by_layer[:, [1, 3]] != 0).all()
    assert set(made.places[:, 0].tolist()) <= {1, 3}


def test_without_an_answer_the_models_own_is_asked_for(found):
    with torch.no_grad():
        top = tiny_lm("llama").model(torch.tensor([ids(OTHER.text)])).logits[0, -1].softmax(-1).max(-1)
    assert found[1].p[0] == pytest.approx(top.values.item(), rel=1e-4)
    assert found[1].answer == tiny_tokenizer().decode([top.indices.item()])


def test_saved_and_loaded(found, tmp_path):
    found[0].save(tmp_path / "one.npz")
    loaded = kf.NeuronAttribution.load(tmp_path / "one.npz")
    assert json.dumps(loaded.to_record()) == json.dumps(found[0].to_record()) and repr(loaded) == repr(found[0])
    (tmp_path / "other.npz").write_bytes(b"PK")
    refused("saved knowledge neurons", kf.NeuronAttribution.load, tmp_path / "other.npz")


def test_a_paraphrase_need_not_name_the_subject():
    other = kf.Fact("Which city is it in? It is in the city of", target_true="New York")
    fact = kf.Fact(FACT.prompt, FACT.subject, target_true="New York", paraphrases=(other.prompt,))
    both, alone = (kf.knowledge_neurons(tiny_lm("llama"), each, **HOW)[0] for each in (fact, other))
    assert both.prompts == (FACT.text, other.prompt) and np.allclose(both.by_layer[1], alone.by_layer[0], rtol=1e-4)


def test_drawn_below_the_causal_trace(found, tmp_path):
    (trace,) = kf.trace(tiny_lm("llama"), FACT, kinds="mlp", samples=1, window=2)
    figure = found[0].plot(tmp_path / "one.png", trace)
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG" and "New York" in figure.get_label()
    assert len(found[0].plot().axes) < len(figure.axes)
    (deeper,) = kf.trace(tiny_lm("llama", layers=6), FACT, kinds="mlp", samples=1, window=2)
    refused("the trace has 6 layers, these neurons are of 4", found[0].plot, None, deeper)


def test_the_same_after_an_interruption(tmp_path):
    lm = tiny_lm("llama")
    with killed_at(1):
        kf.knowledge_neurons(lm, [FACT, OTHER], checkpoint=tmp_path / "run", **HOW)
    again = kf.knowledge_neurons(lm, [FACT, OTHER], checkpoint=tmp_path / "run", **HOW)
    whole = kf.knowledge_neurons(lm, [FACT, OTHER], **HOW)
    assert [one.to_record() for one in again] == [one.to_record() for one in whole]


def test_what_is_refused(no_sweep):
    lm = tiny_lm("llama")
    refused("steps = 0", kf.knowledge_neurons, lm, FACT, steps=0)
    refused("share = 2", kf.knowledge_neurons, lm, FACT, share=2)
    refused("layers = 9", kf.knowledge_neurons, lm, FACT, layers=[9])
    refused("mixtral model are mixtures of experts.*kf.trace", kf.knowledge_neurons, tiny_lm("mixtral"), FACT)


def test_an_edit_on_the_model_counts():
    """Neurons of a model with an edit are those of the model into which it is written."""
    lm = open_tiny(tiny_model("llama", torch.float64))
    edit = kf.KnowledgeNeurons(mode="amplify", steps=2).edit(lm, cases.FACTS[:1])
    (under,) = kf.knowledge_neurons(lm.with_edit(edit), FACT, **HOW)
    with edit.apply(lm.model):
        (written,) = kf.knowledge_neurons(lm, FACT, **HOW)
    assert np.allclose(under.by_layer, written.by_layer, rtol=1e-5) and (under.neurons == written.neurons).all()
