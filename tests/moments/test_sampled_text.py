"""Sampled text is kept while it is made: a killed run goes on where it was and ends with the same text."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kedit_fast.moments import corpus
from kedit_fast.moments import second_moment as moments
from kedit_fast.moments.corpus import FORMAT, read_corpus, sampled_windows
from kedit_fast.moments.second_moment import second_moments
from tests.conftest import tiny_lm

N, LENGTH = 90, 20  # tokens: four texts and a half


def sampled(folder=None, seed=3, n=N, family="llama"):
    return sampled_windows(tiny_lm(family), n, LENGTH, seed, folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("steps", [1, 7, 19])
def test_a_killed_run_goes_on_with_the_same_text(steps, family, tmp_path, monkeypatch):
    whole = sampled(family=family)
    keep, calls = corpus._Kept.keep, []

    def stopping(self, made):
        keep(self, made)
        calls.append(made)
        if len(calls) == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "EVERY", -1.0)  # keeps after each step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus._Kept, "keep", stopping)
        sampled(tmp_path, family=family)
    (file,) = tmp_path.iterdir()
    assert load_file(file)["ids"].shape == (5, steps)
    asked, generate = [], corpus.generate
    monkeypatch.setattr(corpus, "generate", lambda *a, **how: asked.append(a[2]) or generate(*a, **how))
    assert sampled(tmp_path, family=family) == whole
    assert asked == ([LENGTH - 1 - steps] if steps < LENGTH - 1 else [])
    assert [len(text) for text in whole] == [20, 20, 20, 20, 10]


def test_text_that_is_there_is_not_sampled_again(tmp_path, monkeypatch):
    made = sampled(tmp_path)
    monkeypatch.setattr(corpus, "generate", None)
    assert sampled(tmp_path) == made
    assert sampled(tmp_path, n=85) == [*made[:-1], made[-1][:5]]
    for other in (dict(seed=4), dict(n=110), dict(family="gpt2")):
        with pytest.raises(TypeError):
            sampled(tmp_path, **other)


def test_statistics_take_the_text_that_is_there_and_leave_none(tmp_path, monkeypatch):
    """Killed when the text was there, before the first sums."""
    lm = tiny_lm("llama")
    monkeypatch.setattr(moments, "sweep", None)
    with pytest.raises(TypeError):
        second_moments(lm, [1], n_tokens=40, cache_dir=tmp_path)
    assert sorted(path.name[:5] for path in tmp_path.glob("*.run/*")) == ["run.j", "text-"]
    monkeypatch.undo()
    monkeypatch.setattr(corpus, "generate", None)
    made = second_moments(lm, [1], n_tokens=40, cache_dir=tmp_path)
    assert [path.name[:7] for path in tmp_path.iterdir()] == ["moment-"]
    monkeypatch.undo()
    assert torch.equal(made[1].matrix, second_moments(lm, [1], n_tokens=40)[1].matrix)


def test_a_damaged_text_is_named(tmp_path):
    sampled(tmp_path)
    (file,) = tmp_path.iterdir()
    tensors, n_vocab = load_file(file), tiny_lm("llama").n_vocab
    state = tensors["state"]
    for wrong in (
        {"ids": tensors["ids"][:2], "state": state},
        {"ids": tensors["ids"] + n_vocab, "state": state},
        {"ids": torch.zeros(5, 40, dtype=torch.int32), "state": state},
        {"ids": tensors["ids"], "state": state[:10]},
        {"ids": tensors["ids"]},
    ):
        save_file({name: tensor.contiguous() for name, tensor in wrong.items()}, file, {"format": FORMAT})
        with pytest.raises(ValueError, match=r"is damaged .*; delete it to sample the text anew") as caught:
            sampled(tmp_path)
        assert str(file) in str(caught.value)
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged"):
        sampled(tmp_path)


def test_the_default_is_cut_into_parts():
    """8 d_ff of the demo model, 12,288 tokens, are under ``BATCH_TOKENS``."""
    assert [moments.batch_tokens(n) for n in (100, 12_288, 10**6)] == [1024, 3072, moments.BATCH_TOKENS]


def test_nothing_is_kept_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_corpus(tiny_lm("llama"), "self", 40).n_tokens == 40
    assert list(tmp_path.iterdir()) == []
