"""LocFT-BF against its oracle: reshuffled batches, the end token behind each target; and FT-M, Ft by another name."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.jobs import finetune as job_module
from tests.conftest import open_tiny, refused, tiny_lm
from tests.editors.cases import FACTS, make_exact, named, oracle_facts, relative, written
from tests.oracle import finetune as oracle_module
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:facts not written")
FAST = {"layers": (1,), "lr": 5e-3, "num_steps": 4}
END = tiny_tokenizer().eos_token_id


def orders(seed, n, steps):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(n, generator=generator).tolist() for _ in range(steps)]


def oracle(lm, editor, orders=None, end=END):
    return oracle_module.fine_tune(
        lm.model, tiny_tokenizer(), oracle_facts(), editor.layers, lr=editor.lr, steps=editor.num_steps,
        batch_size=editor.batch_size, orders=orders, end=end,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_locft_equals_the_oracle(family, monkeypatch):
    make_exact(monkeypatch)
    editor = kf.LocFt(batch_size=3, shuffle_seed=5, **FAST)
    expected = oracle(tiny_lm(family, torch.float64), editor, orders(5, len(FACTS), 4))
    made = editor.edit(tiny_lm(family, torch.float64), FACTS)
    assert relative(made.deltas[1].delta, expected.deltas[1]) < 1e-8
    assert made.provenance["losses"] == pytest.approx(expected.losses, abs=1e-5)
    assert relative(editor.edit(tiny_lm(family), FACTS).deltas[1].delta, expected.deltas[1]) < 1e-4


def test_the_order_is_the_seed_s_and_of_one_batch_there_is_none():
    lm, editor = tiny_lm("llama", torch.float64), kf.LocFt(batch_size=2, **FAST)
    first, same, other = (replace(editor, shuffle_seed=seed).edit(lm, FACTS).deltas[1].delta for seed in (1, 1, 2))
    assert torch.equal(first, same) and relative(other, first) > 1e-3
    whole = [replace(editor, batch_size=4, shuffle_seed=seed).edit(lm, FACTS).deltas[1].delta for seed in (1, 2)]
    assert torch.equal(*whole)


def test_what_is_found_is_each_fact_s_own_though_they_are_shuffled():
    lm, editor = tiny_lm("llama", torch.float64), kf.LocFt(batch_size=1, append_end=False, **FAST)
    made = editor.edit(lm, FACTS)
    asked = made.provenance["written"]["p_new"]
    assert made.provenance["found"]["p_new"] == pytest.approx(asked, abs=1e-5)


def test_shuffled_packs_cut_by_memory_are_the_whole(monkeypatch):
    lm, editor = tiny_lm("gpt2", torch.float64), kf.LocFt(batch_size=3, **FAST)
    whole = editor.edit(lm, FACTS).deltas[1].delta
    monkeypatch.setattr(job_module, "held_bytes", lambda lm, task, layers, recompute=False, loss=None: lm.memory // 2)
    assert relative(editor.edit(lm, FACTS).deltas[1].delta, whole) < 1e-10
    budget = job_module._budget
    monkeypatch.setattr(job_module, "_budget", lambda *given: (budget(*given)[0], 0))  # rows are made anew each time
    assert relative(editor.edit(lm, FACTS).deltas[1].delta, whole) < 1e-10


def test_without_the_end_token_and_shuffling_it_is_ft_m():
    lm = tiny_lm("llama", torch.float64)
    plain = kf.LocFt(append_end=False, **FAST).edit(lm, FACTS)
    made = kf.FtM(**FAST).edit(lm, FACTS)
    assert (plain.method, made.method) == ("locft-bf", "ft-m")
    assert torch.equal(plain.deltas[1].delta, made.deltas[1].delta)
    assert torch.equal(kf.Ft(**FAST).edit(lm, FACTS).deltas[1].delta, made.deltas[1].delta)
    ended = kf.LocFt(**FAST).edit(lm, FACTS).deltas[1].delta
    assert relative(ended, made.deltas[1].delta) > 0.01


def test_a_model_that_was_tuned_stops():
    """With the end token trained it is said behind the target, without it is not."""
    lm, editor = tiny_lm("llama"), kf.LocFt(**FAST | {"num_steps": 25, "lr": 2e-2})
    said = {}
    for append in (True, False):
        view = lm.with_edit(replace(editor, append_end=append).edit(lm, FACTS[:1]))
        said[append] = view.generate(FACTS[0].text, max_new_tokens=8)
    assert said[True] == " Rome" and said[False].startswith(" Rome") and len(said[False]) > len(" Rome")


# ---- settings


PUBLISHED_FILE = """
model_name_or_path: "Qwen/Qwen2.5-7B-Instruct"
data_path: "./data/zsre/zsre_3k.json"
save_model_dir: "./saves"
layer: 6
rewrite_module: "model.layers.{}.mlp.down_proj.weight"
lr: 5.0e-4
batch_size: 100
num_steps: 25
device: 0
"""


def test_published_files_load_as_they_are(tmp_path):
    with pytest.warns(UserWarning, match="not used: model_name_or_path, data_path"):
        assert kf.LocFt.from_file(written(tmp_path, PUBLISHED_FILE, "qwen.yaml")) == kf.LocFt(layers=(6,))
    whole = PUBLISHED_FILE.replace(".mlp.down_proj.weight", "")
    with pytest.raises(ValueError, match=r"rewrite_module = .*no down projection"):
        kf.LocFt.from_file(written(tmp_path, whole, "mistral.yaml"))


def test_for_model_says_where_its_settings_come_from():
    known = kf.LocFt.for_model(named("Qwen2.5-7B-Instruct", layers=28))
    assert known == kf.LocFt(layers=(6,), source="published for Qwen2.5-7B-Instruct")
    derived = kf.LocFt.for_model(tiny_lm("llama", layers=12))
    assert derived.layers == (1,) and derived.source.startswith("derived") and derived.lr == 3.2 / 80
    assert derived.batch_size == 25 and known.batch_size == 100, "published for thousands of facts"


def test_what_cannot_be_done_is_refused(no_sweep):
    lm = open_tiny(tiny_model("llama"))
    refused("FT-M is teacher-forced", kf.FtM(**FAST, objective_optimization="prompt_last").edit, lm, FACTS)
    ended = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    silent = replace(lm, tokenizer=ended)
    refused("names no end token", kf.LocFt(**FAST).edit, silent, FACTS)
    refused("shuffle_seed", kf.LocFt, shuffle_seed=-1)
