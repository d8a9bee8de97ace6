"""Where the text behind statistics comes from, and how it is cut."""

import gzip
import sys

import pytest
import torch

from kedit_fast.moments.corpus import WINDOW, read_corpus, windows_of
from tests.conftest import open_tiny, tiny_lm
from tests.tiny import TEXT, tiny_model, tiny_tokenizer

TEXTS = ["The Space Needle is in Seattle.", "", "José Álvarez was born in Spain. " * 30]


def ids(text):
    return tiny_tokenizer()(text)["input_ids"]


def joined(windows):
    return [token for window in windows for token in window]


def read(corpus, n_tokens=60):
    return read_corpus(tiny_lm("gpt2"), corpus, n_tokens)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [1, 3, 40, 150])
def test_exactly_the_tokens_asked_for_in_order(n_tokens):
    corpus = read_corpus(tiny_lm("llama"), TEXTS, n_tokens)
    assert corpus.n_tokens == n_tokens
    assert joined(corpus.windows) == (ids(TEXTS[0]) + ids(TEXTS[2]))[:n_tokens]
    assert all(corpus.windows), "no empty window"


def test_texts_share_no_window():
    corpus = read_corpus(tiny_lm("llama"), TEXTS, 100)
    assert corpus.windows[0] == ids(TEXTS[0])
    assert corpus.windows[1][:5] == ids(TEXTS[2])[:5]


def test_windows_fit_the_model():
    """The tiny models have 128 positions, fewer than a window."""
    text = TEXT * 2
    lm = tiny_lm("gpt2")
    windows = windows_of(lm, text)
    assert max(map(len, windows)) == 128 < WINDOW
    assert joined(windows) == ids(text)
    model = tiny_model("llama")
    model.config.max_position_embeddings = 1024
    assert len(windows_of(open_tiny(model), text)[0]) == WINDOW
    short = tiny_model("gpt2")
    short.config.n_positions = 20
    assert {len(w) for w in read_corpus(open_tiny(short), "self", 60).windows} == {20}


# --- sampled text ----------------------------------------------------------------------------------------------------


def test_sampled_text_comes_from_the_seed():
    lm = tiny_lm("llama")
    made = read_corpus(lm, "self", 200, seed=3)
    torch.manual_seed(99)
    assert read_corpus(lm, "self", 200, seed=3) == made
    assert read_corpus(lm, "self", 200, seed=4).windows != made.windows
    assert made.id == "self-seed3" != read_corpus(lm, "self", 10, seed=4).id
    assert [len(window) for window in made.windows] == [128, 72]
    assert all(window[0] == tiny_tokenizer().eos_token_id for window in made.windows)
    assert made.windows[0] != made.windows[1]


def test_sampled_text_is_the_model_s():
    """At temperature 1 the mean log-probability of what was sampled is minus the model's entropy, to sampling error."""
    lm = tiny_lm("gpt2")
    windows = torch.tensor(read_corpus(lm, "self", 128 * 8).windows)
    log_p = lm.model(windows).logits[:, :-1].log_softmax(-1)
    drawn = log_p.gather(-1, windows[:, 1:, None])[..., 0]
    surplus = drawn + (-log_p.exp() * log_p).sum(-1)
    error = surplus.std() / surplus.numel() ** 0.5
    assert surplus.mean().abs() < 4 * error
    assert (drawn.mean() - log_p.amax(-1).mean()).abs() > 20 * error, "greedy text would look like this"


def test_the_text_goes_on_behind_an_end_token():
    windows = read_corpus(tiny_lm("llama"), "self", 128 * 12).windows
    assert {len(window) for window in windows} == {128}
    assert any(tiny_tokenizer().eos_token_id in window[1:-1] for window in windows)


def test_a_tokenizer_without_start_and_end_needs_text():
    lm = open_tiny(tiny_model("gpt2"))
    object.__setattr__(lm, "tokenizer", tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer()._tokenizer))
    with pytest.raises(ValueError, match=r"neither a start nor an end token.*give a corpus"):
        read_corpus(lm, "self", 10)


# --- texts and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_a_file_is_its_text(name, tmp_path):
    path = tmp_path / name
    raw = TEXT.encode()
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    corpus = read(path, 150)
    assert corpus == read(str(path), 150)
    assert joined(corpus.windows) == ids(TEXT)[:150]
    assert corpus.id.startswith(f"{name}-")


def test_the_id_follows_the_text(tmp_path):
    names = set()
    for text in (TEXT, TEXT + "x"):
        (tmp_path / "text.txt").write_text(text)
        names.add(read(tmp_path / "text.txt").id)
    assert len(names) == 2
    lists = [["ab c"], ["ab", " c"], ["a", "b c"], ["ab c", ""]]
    assert len({read(texts, 1).id for texts in lists}) == len(lists)


@pytest.fixture
def data_sets(monkeypatch):
    """A stand-in for the package: {(name, config): rows}, and what was asked of it. Reading past the end fails."""
    found, asked = {}, []

    def load_dataset(path, config, split, streaming, trust_remote_code):
        assert (split, streaming, trust_remote_code) == ("train", True, False)
        asked.append((path, config))
        if (path, config) not in found:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['de', 'en']")
        return iter(found[path, config])

    package = type("datasets", (), {"load_dataset": staticmethod(load_dataset)})
    monkeypatch.setitem(sys.modules, "datasets", package)
    return found, asked


def rows_of(*texts, column="text", **rest):
    for text in texts:
        yield {"id": 1, column: text} | rest
    raise AssertionError("read on")


def test_a_data_set_is_read_only_as_far_as_needed(data_sets):
    found, asked = data_sets
    found["owner/name", "part"] = rows_of("", "  ", *TEXTS[2:])
    corpus = read("hf:owner/name#part")
    assert corpus.id == "hf:owner/name#part" and joined(corpus.windows) == ids(TEXTS[2])[:60]
    found["name", None] = rows_of(TEXTS[2])
    read("hf:name", 5)
    assert asked == [("owner/name", "part"), ("name", None)]


@pytest.mark.parametrize(("name", "config"), [("hf:owner/name:body", None), ("hf:owner/name#2023.en:body", "2023.en")])
def test_a_column_can_be_chosen(data_sets, name, config):
    found, _ = data_sets
    found["owner/name", config] = rows_of(TEXTS[2], column="body", text="other")
    corpus = read(name)
    assert corpus.id == name and joined(corpus.windows) == ids(TEXTS[2])[:60]


def test_a_column_that_is_not_there_is_told_with_those_that_are(data_sets):
    found, _ = data_sets
    for name, config in (("hf:owner/name", None), ("hf:owner/name#en", "en"), ("hf:owner/name:words", None)):
        found["owner/name", config] = rows_of(TEXTS[2], column="content", url="u")
        with pytest.raises(ValueError, match=r"has no column '(text|words)'; it has 'id', 'content', 'url'") as error:
            read(name)
        assert f"choose one, {name.removesuffix(':words')}:id" in str(error.value)
    found["owner/name", None] = rows_of(["a", "list"])
    with pytest.raises(ValueError, match=r"column 'text' holds a list in row 1; expected texts; .* 'id', 'text'"):
        read("hf:owner/name")


def test_null_rows_are_left_out_and_counted(data_sets):
    found, _ = data_sets
    found["owner/name", None] = rows_of(None, TEXTS[0], None, TEXTS[2])
    with pytest.warns(UserWarning, match=r"hf:owner/name: 2 of the 4 rows read are null in 'text' and left out"):
        corpus = read("hf:owner/name")
    assert joined(corpus.windows) == (ids(TEXTS[0]) + ids(TEXTS[2]))[:60]
    found["owner/name", None] = iter([{"text": None}] * 3)
    says = pytest.warns(UserWarning, match="3 of the 3 rows read are null")
    with says, pytest.raises(ValueError, match="holds 0 tokens"):
        read("hf:owner/name")


def test_a_data_set_that_cannot_be_read_is_said_in_a_line(data_sets):
    with pytest.raises(ValueError, match=r"^corpus hf:owner/many cannot be read: Config name .*: \['de', 'en'\]$"):
        read("hf:owner/many")
    for name in ("hf:", "hf:#en", "hf:name#", "hf:name:", "hf:name#en:", "hf:a:b:c", "hf:a#b#c"):
        with pytest.raises(ValueError, match="expected hf:NAME, hf:NAME#CONFIG"):
            read(name)


def test_a_data_set_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hf:name needs the package `datasets`"):
        read("hf:name", 5)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_corpus_that_is_too_short_says_what_it_has():
    n = len(ids(TEXTS[0]))
    with pytest.raises(ValueError, match=f"corpus texts-.* holds {n} tokens, fewer than the {n + 1} asked for"):
        read(TEXTS[:1], n + 1)
    assert read(TEXTS[:1], n).n_tokens == n


@pytest.mark.parametrize("n_tokens", [0, -5])
def test_no_tokens(n_tokens):
    with pytest.raises(ValueError, match=f"n_tokens = {n_tokens}: expected a whole number of at least 1"):
        read("self", n_tokens)


@pytest.mark.parametrize("corpus", [[], [3], [TEXT, None], TEXT])
def test_something_else_than_texts(corpus):
    with pytest.raises(ValueError, match=r'corpus .*expected "self" .*, a text file, "hf:NAME" or a list of texts'):
        read(corpus, 5)


def test_a_file_that_is_missing(tmp_path):
    for path in (tmp_path / "absent.txt", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="no such file; give a text file"):
            read(path, 5)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("latin.txt", "Zürich".encode("latin-1")),
        ("cut.txt.gz", gzip.compress(TEXT.encode(), mtime=0)[:-20]),
        ("plain.txt.gz", TEXT.encode()),
        ("broken.txt.gz", gzip.compress(TEXT.encode(), mtime=0)[:30] + b"\xff" * 40),
    ],
)
def test_a_file_that_is_no_text(name, raw, tmp_path):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{name}.*(cannot be read|not UTF-8 text).*expected UTF-8 text or its .gz"):
        read(tmp_path / name, 5)
