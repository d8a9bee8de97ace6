"""Second moments of keys against sums over Hugging Face's own forward, and the files that keep them."""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import kedit_fast as kf
import kedit_fast.moments.second_moment as moments_module
from kedit_fast.commands.inputs import find_moments
from kedit_fast.kernels.solve import factor
from kedit_fast.moments.given import check_room, factored
from kedit_fast.moments.second_moment import SecondMoment, second_moments
from kedit_fast.sweep.plan import RowCost, together
from tests.conftest import close, disk_and_resident, open_tiny, refused, relative_error, save_tiny, tiny_lm
from tests.make import bits, make_edit, same_bits, watched
from tests.oracle.access import site_module
from tests.tiny import D_FF, DISTINCT, TEXT, tiny_model, tiny_tokenizer

LINES = [line for line in TEXT.splitlines() if line]
N_TOKENS = 200  # cuts the last line
LAYERS = (0, 2)


def by_hooks(model, layer, texts=LINES, n_tokens=N_TOKENS):
    """(mean of k kᵀ in float64, tokens): one forward a text, the input of the layer's down projection."""
    seen, left = [], n_tokens
    down = site_module(model, layer, "mlp_out")
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].detach().double()))
    with torch.no_grad():
        for text in texts:
            ids = tiny_tokenizer()(text)["input_ids"][:left]
            left -= len(ids)
            if ids:
                model(torch.tensor([ids]))
    handle.remove()
    keys = torch.cat(seen)
    return keys.T @ keys / len(keys), len(keys)


def measured(lm, layers=LAYERS, corpus=LINES, n_tokens=N_TOKENS, **options):
    return second_moments(lm, layers, corpus, n_tokens=n_tokens, **options)


def all_close(made: dict, expected: dict) -> None:
    for layer, moment in expected.items():
        close(f"layer {layer}", made[layer].matrix, moment.matrix)


def same(a: SecondMoment, b: SecondMoment) -> bool:
    return torch.equal(a.matrix, b.matrix) and {**vars(a), "matrix": 0} == {**vars(b), "matrix": 0}


def equal(a: dict, b: dict) -> bool:
    """The same layers, the same bits, and the same said of them."""
    return a.keys() == b.keys() and all(same(a[i], b[i]) for i in a)


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in DISTINCT), ("llama", torch.float64)]
)
def test_several_layers_in_one_pass_equal_the_hooks(family, dtype, monkeypatch):
    sweeps, sweep = [], moments_module.sweep
    monkeypatch.setattr(moments_module, "sweep", lambda *a, **k: sweeps.append(k["last_layer"]) or sweep(*a, **k))
    model = tiny_model(family, dtype)
    before = bits(model)
    made = measured(open_tiny(model))
    assert sweeps == [2], "one pass, which stops at the last of the layers"
    assert same_bits(model, before)
    assert tuple(made) == LAYERS
    for layer in LAYERS:
        expected, n = by_hooks(model, layer)
        moment = made[layer]
        close("second moment", moment.matrix, expected.float())
        assert torch.equal(moment.matrix, moment.matrix.T)
        assert moment.n_tokens == n == N_TOKENS and moment.layer == layer
        assert (moment.matrix.dtype, f"torch.{moment.dtype}") == (torch.float32, str(dtype))


def test_what_a_moment_says_of_itself():
    lm = tiny_lm("gpt2")
    moment = measured(lm, [1])[1]
    assert moment.fingerprint == lm.fingerprint and moment.dtype == "float32" and moment.corpus.startswith("texts-")
    assert measured(lm, [1], "self", seed=7)[1].corpus == "self-seed7"
    assert second_moments(lm, [1], LINES * 20)[1].n_tokens == 8 * D_FF


def test_a_bfloat16_model():
    """As near to the same weights in float64 as Hugging Face's own bfloat16 forward."""
    model = tiny_model("llama", torch.bfloat16)
    made = measured(open_tiny(model))
    exact = copy.deepcopy(model).double()
    for layer in LAYERS:
        truth, own = by_hooks(exact, layer)[0], by_hooks(model, layer)[0]
        error = relative_error(made[layer].matrix, truth)
        assert error < 1.5 * relative_error(own, truth) < 0.1
        assert made[layer].dtype == "bfloat16" and made[layer].matrix.dtype == torch.float32


def test_a_layer_alone_is_as_with_others():
    lm = tiny_lm("gemma2")
    made = measured(lm, (0, 1, 3))
    all_close({layer: measured(lm, [layer])[layer] for layer in made}, made)
    assert equal(measured(lm, (3, 0, 1, 3)), made)


@pytest.mark.parametrize("batch_tokens", [1, 50, 10**6])
def test_batches_and_packs_do_not_change_the_sum(batch_tokens, monkeypatch):
    lm = tiny_lm("mistral")
    whole = measured(lm)
    monkeypatch.setattr(moments_module, "BATCH_TOKENS", batch_tokens)
    cost = RowCost.of(lm)
    sums = 8 * D_FF**2 * len(LAYERS)
    small = replace(lm, memory=cost.rows * cost.passing + 40 * cost.kept + sums)
    for cut in (lm, small):
        all_close(measured(cut), whole)


def test_sums_that_do_not_fit_in_float64_are_float32(monkeypatch):
    dtypes, job = [], moments_module.Moments
    monkeypatch.setattr(moments_module, "Moments", lambda lm, sums: dtypes.append(sums[0].dtype) or job(lm, sums))
    lm = tiny_lm("gpt2", layers=60)
    cost = RowCost.of(lm)
    small = replace(lm, memory=cost.rows * cost.passing + 100 * cost.kept + 4 * D_FF**2 * 60 * 4 // 3)
    wide, narrow = (measured(x, range(60)) for x in (lm, small))
    assert dtypes == [torch.float64, torch.float32]
    all_close(narrow, wide)


def test_sums_of_layers_that_do_not_fit_take_passes_of_their_own(monkeypatch):
    """The text is read again for each group of layers; what is found is the same."""
    lm, layers, job = tiny_lm("llama"), [], moments_module.Moments
    monkeypatch.setattr(moments_module, "Moments", lambda lm, sums: layers.append(sorted(sums)) or job(lm, sums))
    cost = RowCost.of(lm)
    small = replace(lm, memory=cost.rows * cost.passing + 40 * cost.kept + 2 * 4 * D_FF**2 * 4 // 3)
    whole, cut = (measured(x, range(4)) for x in (lm, small))
    assert [0, 1] in layers and [2, 3] in layers
    all_close(cut, whole)


def test_a_layer_whose_sum_does_not_fit_is_refused_before_any_work(no_sweep):
    lm = tiny_lm("llama")
    cost = RowCost.of(lm)
    small = replace(lm, memory=cost.rows * cost.passing + 4 * D_FF**2)  # a quarter of what is free is the sweep's
    with pytest.raises(ValueError, match=f"the second moment of a layer of d_ff {D_FF} needs .* memory allows"):
        measured(small)


def test_a_layer_is_solved_on_the_host_where_the_device_has_no_room():
    elsewhere = SimpleNamespace(device=torch.device("cuda"), memory=0, d_ff=D_FF, moment_shape=(D_FF, D_FF))
    moment = measured(tiny_lm("llama"), [0])[0]
    found = factored(elsewhere, moment, 2.0, 1e-6)
    assert found.lower.device.type == "cpu" and found.lower.equal(factor(moment.matrix, 2.0, regularizer=1e-6).lower)
    check_room(elsewhere)
    refused(f"solving a layer of d_ff {D_FF} needs", check_room, replace(tiny_lm("llama"), memory=8 * D_FF**2 - 1))


def test_kept_matrices_are_views_of_their_files(tmp_path):
    """So that the layers of a large model need no memory of their own."""
    lm = tiny_lm("llama")
    kept, held = measured(lm, cache_dir=tmp_path), measured(lm)
    assert equal(kept, held)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or maps.read_text().count(str(tmp_path)) >= len(kept)


def test_edits_are_left_out():
    """The statistics are the base model's, as their fingerprint says."""
    model = tiny_model("gpt2")
    lm = open_tiny(model)
    edited = lm.with_edit(make_edit(model))
    base, made = (measured(x, [2]) for x in (lm, edited))
    assert equal(base, made)
    assert made[2].fingerprint == lm.fingerprint


def test_nan_in_the_keys_is_an_error(tmp_path):
    lm = open_tiny(tiny_model("gpt2"))
    with torch.no_grad():
        lm.model.transformer.h[0].mlp.c_fc.bias[3] = torch.nan
    with pytest.raises(ValueError, match="is nan"):
        measured(lm, [0], cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_layers_from_disk_give_the_same_bits(tmp_path):
    assert equal(*map(measured, disk_and_resident(save_tiny(tmp_path, tiny_model("olmo2")))))


# --- condition -------------------------------------------------------------------------------------------------------


def test_the_condition_of_a_moment():
    lm = tiny_lm("gpt2")
    moment = second_moments(lm, [1], LINES * 3, n_tokens=600)[1]
    exact = torch.linalg.cond(moment.matrix.double(), 1).item()
    assert exact / 3 <= moment.condition <= exact * 1.0001


@pytest.mark.parametrize("n_tokens", [1, D_FF // 2, D_FF - 1])
def test_too_few_tokens_are_singular(n_tokens):
    moment = second_moments(tiny_lm("llama"), [1], LINES, n_tokens=n_tokens)[1]
    assert moment.condition == float("inf")


def test_rounding_does_not_make_a_moment_regular():
    """A zero eigenvalue that fp32 turned into a small positive one."""
    matrix = torch.diag(torch.linspace(1.0, 2.0, D_FF))
    matrix[0, 0] = 1e-8
    assert SecondMoment(matrix, D_FF - 1, 0).condition == float("inf")
    assert SecondMoment(matrix, D_FF, 0).condition == pytest.approx(2e8)


# --- the cache -------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """What a test throws."""


def interrupt(lm, layers, folder, after=2):
    """A pass that stops in the middle of a batch, with so many kept: its sums are there, its checkpoint is not."""
    sweep, calls = moments_module.sweep, []

    def stopping(*args, **kwargs):
        calls.append(1)
        sweep(*args, **kwargs)
        if len(calls) == after + 1:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(moments_module, "sweep", stopping)
        measured(lm, layers, cache_dir=folder)


@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_interrupted_pass_goes_on_with_the_same_bits(after, tmp_path, monkeypatch):
    monkeypatch.setattr(moments_module, "BATCH_TOKENS", 40)
    lm, folder = tiny_lm("llama"), tmp_path / "made" / "here"
    expected = measured(lm)
    interrupt(lm, LAYERS, folder, after)
    assert sorted(path.name[:5] for path in folder.glob("*.run/*")) == ["run.j", "sums-"]
    calls, sweep = [], moments_module.sweep
    monkeypatch.setattr(moments_module, "sweep", lambda *a, **k: calls.append(1) or sweep(*a, **k))
    assert equal(measured(lm, cache_dir=folder), expected)
    batches = list(together(moments_module.read_corpus(lm, LINES, N_TOKENS).windows, len, 40))
    assert after + len(calls) == len(batches)
    assert sorted(p.name.split("-")[0] for p in folder.iterdir()) == ["moment", "moment"]


def test_an_interrupted_pass_of_other_layers_or_text_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(moments_module, "BATCH_TOKENS", 40)
    lm = tiny_lm("llama")
    interrupt(lm, LAYERS, tmp_path)
    for layers, texts, n_tokens in (((0, 1), LINES, N_TOKENS), (LAYERS, LINES[1:], N_TOKENS), (LAYERS, LINES, 190)):
        asked = (lm, layers, texts, n_tokens)
        assert equal(measured(*asked, cache_dir=tmp_path), measured(*asked))


@pytest.mark.parametrize("corpus", ["self", LINES, "file"])
def test_finished_statistics_are_found_again(corpus, tmp_path, monkeypatch):
    if corpus == "file":
        corpus = tmp_path / "text.txt"
        corpus.write_text(TEXT)
    lm, cache = tiny_lm("gpt2"), tmp_path / "cache"
    made = measured(lm, LAYERS, corpus, cache_dir=cache)
    monkeypatch.setattr(moments_module, "sweep", None)
    monkeypatch.setattr(moments_module, "begun", None)  # nor is the run's folder claimed: another process may read too
    if corpus == "self":
        monkeypatch.setattr(moments_module, "read_corpus", None)
    assert equal(measured(lm, LAYERS, corpus, cache_dir=cache), made)
    assert equal(measured(lm, [2], corpus, cache_dir=cache), {2: made[2]})


@pytest.mark.parametrize("below", ["", "below"])
def test_a_cache_that_is_a_file_is_refused_before_any_work(below, tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setattr(moments_module, "read_corpus", lambda *a, **k: pytest.fail("text was read"))
    monkeypatch.setattr(moments_module, "sweep", None)
    place = tmp_path / "cache" / below
    with pytest.raises(OSError, match=f"{place} cannot be written: .* is no folder"):
        measured(tiny_lm("gpt2"), cache_dir=place)


# What makes other statistics.
CHANGES = {
    "layer": {"layers": [2]},
    "model": {"lm": open_tiny(tiny_model("gpt2", seed=1))},
    "dtype": {"lm": tiny_lm("gpt2", torch.bfloat16)},
    "texts": {"corpus": LINES[1:]},
    "n_tokens": {"n_tokens": 100},
    "its own text": {"corpus": "self"},
    "seed": {"corpus": "self", "seed": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_under_another_ones_name_is_not_taken(change, tmp_path):
    """As after two files were swapped, or one copied over another."""
    asked = {"lm": tiny_lm("gpt2"), "layers": [1], "cache_dir": tmp_path}
    measured(**asked)
    (path,) = tmp_path.iterdir()
    measured(**asked | CHANGES[change])
    (foreign,) = set(tmp_path.iterdir()) - {path}
    foreign.replace(path)
    with pytest.raises(ValueError, match=f"{path} is not what its name says; delete it"):
        measured(**asked)


def test_what_is_in_the_cache_is_not_taken_for_something_else(tmp_path):
    asked = {"lm": tiny_lm("gpt2"), "layers": [1], "cache_dir": tmp_path}
    made = [moment.matrix for change in ({}, *CHANGES.values()) for moment in measured(**asked | change).values()]
    assert len(list(tmp_path.iterdir())) == len(made) == len(CHANGES) + 1
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(made, 2))


def test_names_of_data_sets_and_of_many_layers_make_file_names(tmp_path, monkeypatch):
    monkeypatch.setattr(moments_module, "BATCH_TOKENS", 40)
    lm = tiny_lm("gpt2", layers=20)
    monkeypatch.setattr("kedit_fast.moments.corpus._data_set", lambda name: iter(LINES))
    made = second_moments(lm, range(20), "hf:owner/data set#part", n_tokens=80, cache_dir=tmp_path)
    assert len(made) == len(list(tmp_path.iterdir())) == 20
    assert made[0].corpus == "hf:owner/data set#part"


def test_a_damaged_checkpoint_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(moments_module, "BATCH_TOKENS", 40)
    lm = tiny_lm("gpt2")
    interrupt(lm, [1], tmp_path)
    (sums,) = tmp_path.glob("*.run/*.safetensors")
    sums.write_bytes(sums.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"is damaged.*delete it, and it is made again") as error:
        measured(lm, [1], cache_dir=tmp_path)
    assert str(sums) in str(error.value)


def test_a_run_that_was_killed_when_all_was_saved_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(moments_module, "BATCH_TOKENS", 40)
    lm = tiny_lm("gpt2")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        watched(patch, moments_module, "remove_parts", break_at=(1,), error=Interrupted)
        measured(lm, LAYERS, "self", cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(LAYERS) + 1
    monkeypatch.setattr(moments_module, "sweep", None)
    measured(lm, LAYERS, "self", cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(LAYERS)


def test_a_second_run_is_refused_while_the_first_lives(tmp_path, monkeypatch):
    lm, sweep = tiny_lm("gpt2"), moments_module.sweep

    def twice(*args, **how):
        monkeypatch.setattr(moments_module, "sweep", sweep)
        refused("another run works there; wait for it", measured, lm, cache_dir=tmp_path)
        sweep(*args, **how)

    monkeypatch.setattr(moments_module, "sweep", twice)
    assert equal(measured(lm, cache_dir=tmp_path), measured(lm))


@pytest.mark.parametrize("kept", [True, False])
def test_out_of_memory_counts_no_token_twice(kept, tmp_path, monkeypatch):
    """In the middle of the third batch, when its sums are there already."""
    monkeypatch.setattr(moments_module, "BATCH_TOKENS", 40)
    lm, calls, sweep = tiny_lm("llama"), [], moments_module.sweep
    expected = measured(lm)

    def short(now, *args, **how):
        calls.append(now.memory)
        sweep(now, *args, **how)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(moments_module, "sweep", short)
    with pytest.warns(UserWarning, match="out of memory: what is not done yet is cut for"):
        made = measured(lm, cache_dir=tmp_path / "cache" if kept else None)
    assert equal(made, expected) and calls[:3] == [lm.memory] * 3 and set(calls[3:]) == {lm.memory // 2}
    n_batches = len(list(together(moments_module.read_corpus(lm, LINES, N_TOKENS).windows, len, 40)))
    assert len(calls) == n_batches + (1 if kept else 3)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"fingerprint": "gpt2-4-48-0", "corpus": "texts-Zürich", "dtype": "bfloat16"}])
def test_a_saved_moment_is_the_moment(fields, tmp_path):
    moment = SecondMoment(torch.randn(D_FF, D_FF).fill_diagonal_(9.0).cov(), 123, 4, **fields)
    moment.save(tmp_path / "m.safetensors")
    assert same(SecondMoment.load(tmp_path / "m.safetensors"), moment)


def test_a_file_with_the_older_header_is_read(tmp_path):
    """It had its record in an entry of its own, beside the format's name."""
    matrix, record = torch.eye(3), {"layer": 1, "n_tokens": 9, "fingerprint": "x", "corpus": "self", "dtype": "float32"}
    header = {"format": moments_module.FORMAT, "record": json.dumps(record)}
    save_file({"matrix": matrix}, tmp_path / "old.safetensors", header)
    old = SecondMoment.load(tmp_path / "old.safetensors")
    assert torch.equal(old.matrix, matrix) and (old.layer, old.n_tokens, old.fingerprint) == (1, 9, "x")


def published(path, **changes):
    """A file as the rome and memit repositories write it: the SUM of k kᵀ and the count. -> the sum."""
    keys = torch.randn(300, D_FF, generator=torch.Generator().manual_seed(0))
    total = (keys.T @ keys).numpy()
    fields = {
        "mom2.constructor": np.array("util.runningstats.SecondMoment()"),
        "mom2.count": np.array(300),
        "mom2.mom2": total,
        "sample_size": np.array(100_000),
    }
    np.savez(path, **{name: value for name, value in (fields | changes).items() if value is not None})
    return torch.from_numpy(total)


def test_published_statistics_are_sums(tmp_path):
    total = published(tmp_path / "stats.npz")
    moment = SecondMoment.load(tmp_path / "stats.npz", layer=3)
    close("mean", moment.matrix, total / 300)
    assert (moment.n_tokens, moment.layer, moment.fingerprint, moment.corpus) == (300, 3, None, None)
    editor = kf.Rome(layers=(3,), v_num_grad_steps=1)
    fact = kf.Fact(prompt="{} is in", subject="Big Ben", target_new="Rome")
    with pytest.warns(UserWarning, match="unchecked"):
        editor.edit(tiny_lm("gpt2"), fact, moments={3: moment}, contexts=["{}"])


def test_a_published_file_does_not_say_its_layer(tmp_path):
    published(tmp_path / "stats.npz")
    with pytest.raises(ValueError, match="give layer="):
        SecondMoment.load(tmp_path / "stats.npz")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mom2.count": None}, r"lacks \['mom2.count'\]"),
        ({"mom2.mom2": None}, r"lacks \['mom2.mom2'\]"),
        ({"mom2.count": np.array(0)}, "over at least one token"),
        ({"mom2.mom2": np.zeros((80, 79))}, r"expected a square sum.*\[80, 79\]"),
        ({"mom2.mom2": np.zeros(80)}, r"expected a square sum.*\[80\]"),
        ({"mom2.mom2": np.tri(80)}, "layer 0 is not symmetric"),
        ({"mom2.mom2": np.array([{}], dtype=object)}, "damaged or not a statistics file"),
    ],
)
def test_npz_files_that_hold_something_else(changes, says, tmp_path):
    published(tmp_path / "stats.npz", **changes)
    with pytest.raises(ValueError, match=says) as error:
        SecondMoment.load(tmp_path / "stats.npz", layer=0)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("place", [(0, 1), (79, 0), (70, 3)])
def test_what_is_not_symmetric_is_no_second_moment(place, tmp_path, monkeypatch):
    monkeypatch.setattr(moments_module, "ROWS", 32)
    matrix = 2 * torch.eye(D_FF)
    matrix[place] = 1e-5  # as sums made on a GPU may be
    SecondMoment(matrix, 100, 5)
    matrix[place] = 1e-3
    with pytest.raises(ValueError, match=r"layer 5 is not symmetric \(mirrored entries differ by 0.001\)"):
        SecondMoment(matrix, 100, 5)
    with pytest.raises(ValueError, match=r"layer 5 is \[80, 79\]; expected a square matrix"):
        SecondMoment(matrix[:, 1:], 100, 5)
    path, record = tmp_path / "m.safetensors", json.dumps({"layer": 5, "n_tokens": 100})
    for wrong, says in (
        (matrix, "not symmetric"),
        (torch.zeros(3, 4), r"layer 5 is \[3, 4\]; expected a square matrix"),
    ):
        save_file({"matrix": wrong}, path, {"format": moments_module.FORMAT, "record": record})
        with pytest.raises(ValueError, match=rf"{path} is damaged .*{says}"):
            SecondMoment.load(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_published_projection_is_named_and_not_read(legacy, tmp_path):
    path = tmp_path / "null_space_project.pt"
    torch.save(torch.eye(3)[None], path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"null_space_project.pt is a pickle of torch.*AlphaEdit.*is not needed"):
        SecondMoment.load(path)
    for place in (tmp_path, path):
        with pytest.raises(ValueError, match="is not needed"):
            find_moments(tiny_lm("gpt2"), place, [1])
    with pytest.raises(TypeError, match=r"expected \{layer: SecondMoment\}; a projection is not needed"):
        kf.Rome(layers=(1,)).edit(tiny_lm("gpt2"), kf.Fact("{} is", "Big Ben", "Rome"), moments=torch.eye(3)[None])


@pytest.mark.parametrize("name", ["m.safetensors", "m.npz"])
@pytest.mark.parametrize("length", [0, 5, 100, -3])
def test_truncated_files(name, length, tmp_path):
    path = tmp_path / name
    if name.endswith("npz"):
        published(path)
    else:
        SecondMoment(torch.eye(D_FF), 100, 0).save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="damaged") as error:
        SecondMoment.load(path, layer=0)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "record", [None, "3", "[]", "{", '{"layer": 1}', '{"n_tokens": 9}', '{"layer": "1", "n_tokens": 9}']
)
def test_records_that_say_too_little(record, tmp_path):
    path = tmp_path / "m.safetensors"
    said = {} if record is None else {"record": record}
    save_file({"matrix": torch.eye(3)}, path, {"format": moments_module.FORMAT} | said)
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        SecondMoment.load(path)


def test_saving_where_that_cannot_be_names_the_file_asked_for(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "m.safetensors"):
        with pytest.raises(OSError, match=str(place)) as error:
            SecondMoment(torch.eye(3), 9, 1).save(place)
        assert "unfinished" not in str(error.value)


def test_files_that_are_no_statistics(tmp_path):
    make_edit(tiny_model("gpt2")).save(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match=r"is not a second moment; expected what SecondMoment.save wrote"):
        SecondMoment.load(tmp_path / "edit.safetensors")
    for name in ("absent.safetensors", "absent.npz"):
        with pytest.raises(FileNotFoundError, match="absent"):
            SecondMoment.load(tmp_path / name, layer=0)
