"""An edit as a LoRA adapter: what PEFT makes of it is what the edit is."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file

import kedit_fast as kf
from kedit_fast.edits.deltas import Dense, LowRank
from kedit_fast.edits.edit import digest
from kedit_fast.jobs.score import next_token_probs
from kedit_fast.model.family import as_out_in, projection
from kedit_fast.model.smollm2 import SMOLLM2
from kedit_fast.shipping.adapter import CONFIG, RECORD, WEIGHTS, check_adapter, export_peft, load_peft
from tests.conftest import on_disk, open_tiny, refused, relative_error
from tests.make import bits, logits, lowrank, make_edit, owned_edit, same_bits
from tests.shipping.checkpoints import contents, save_checkpoint
from tests.tiny import D_FF, D_MODEL, DISTINCT, tiny_model

IDS = [5, 17, 23, 42]
# measured: float32 3e-7 to 4e-7; bfloat16 6e-3 to 8e-3, for the weights round(W + Δ) and the outputs of an adapter
# round at other places, here and in ``with_edit`` alike
LOGITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def low_rank_edit(model, **changes):
    return make_edit(model, deltas={1: lowrank(seed=1, rank=3), 2: lowrank(seed=2, rank=2)}, **changes)


def written(model, edit):
    """Logits with the edit written into the weights, which are put back."""
    with edit.apply(model):
        return logits(model)


@pytest.mark.parametrize("dtype", LOGITS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
def test_peft_computes_what_the_edited_model_computes(family, dtype, tmp_path):
    model = tiny_model(family, dtype)
    edit, base = low_rank_edit(model), logits(model)
    lm = open_tiny(model)
    applied, viewed = written(model, edit), lm.with_edit(edit)
    made = export_peft(edit, tmp_path / "adapter")
    assert (made.rank, made.ranks, made.errors) == (3, {1: 3, 2: 2}, {1: 0.0, 2: 0.0})
    wrapped = PeftModel.from_pretrained(tiny_model(family, dtype), str(tmp_path / "adapter")).eval()
    got = logits(wrapped)
    error = relative_error(got, applied)
    print(f"relative RMS difference of logits, {family} {dtype}: {error:.1e}")
    assert error < LOGITS[dtype]
    assert relative_error(base, applied) > 0.05  # the edit is not lost in the tolerance
    logprobs = next_token_probs(viewed, [IDS])[0].log()
    assert relative_error(got[0, -1].float().log_softmax(0), logprobs) < LOGITS[dtype]


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
def test_merging_the_adapter_gives_the_edited_weights(family, tmp_path):
    model = tiny_model(family)
    edit = low_rank_edit(model)
    export_peft(edit, tmp_path / "adapter")
    merged = PeftModel.from_pretrained(tiny_model(family), str(tmp_path / "adapter")).merge_and_unload()
    with edit.apply(model):
        wanted = bits(model)
    found = merged.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert relative_error(found[name], tensor) < 1e-7, name
    assert not same_bits(model, wanted)


def test_merging_in_bfloat16_differs_by_single_steps(tmp_path):
    """PEFT sums in fp32 and rounds, as ``apply`` does in fp64: hardly a weight may differ, and by one step only."""
    model = tiny_model("llama", torch.bfloat16)
    edit = low_rank_edit(model)
    export_peft(edit, tmp_path / "adapter")
    merged = PeftModel.from_pretrained(tiny_model("llama", torch.bfloat16), str(tmp_path / "adapter"))
    got = as_out_in(projection(merged.merge_and_unload(), 2))
    with edit.apply(model):
        wanted = as_out_in(projection(model, 2)).clone()
    assert (got != wanted).float().mean() < 0.001
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=0)


@pytest.mark.parametrize("family", DISTINCT)
def test_paths_from_the_fingerprint_are_those_of_the_model(family, tmp_path):
    model = tiny_model(family)
    edit = low_rank_edit(model)
    for name, base in (("skeleton", None), ("model", model), ("lm", open_tiny(model))):
        export_peft(edit, tmp_path / name, model=base)
    config = json.loads((tmp_path / "skeleton" / CONFIG).read_text())
    modules = dict(model.named_modules())
    assert [modules[path] for path in config["target_modules"]] == [projection(model, i) for i in (1, 2)]
    for other in ("model", "lm"):
        assert json.loads((tmp_path / other / CONFIG).read_text())["target_modules"] == config["target_modules"]
    wrapped = PeftModel.from_pretrained(tiny_model(family), str(tmp_path / "skeleton"))
    adapted = [name for name, _ in wrapped.named_modules() if name.endswith("lora_A.default")]
    assert len(adapted) == 2
    assert relative_error(logits(wrapped.eval()), written(model, edit)) < 1e-5


def test_files_and_base_name(tmp_path):
    edit = low_rank_edit(tiny_model("gpt2"))
    export_peft(edit, tmp_path / "adapter", model="me/my-gpt2")
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["adapter", CONFIG, WEIGHTS, RECORD])
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["fan_in_fan_out"]) == ("me/my-gpt2", True)
    assert config["r"] == config["lora_alpha"] == 3
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {tuple(t.shape) for t in tensors.values()} == {(3, D_FF), (D_MODEL, 3)}
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    record = check_adapter(tmp_path / "adapter")
    assert record["edits"][0]["provenance"] == edit.provenance
    assert record["edits"][0]["digest"] == digest(edit)
    assert record["edits"][0]["facts"] == [fact.to_record() for fact in edit.facts]


def test_a_models_folder_is_named_so_that_peft_finds_it_from_anywhere(tmp_path, monkeypatch):
    model = save_checkpoint(tmp_path / "base")
    edit = low_rank_edit(model)
    monkeypatch.chdir(tmp_path)
    in_memory, streamed = kf.open_model("base"), on_disk("base")
    given = {"name": "base", "path": Path("./base"), "loaded": in_memory.model, "lm": in_memory, "disk": streamed}
    for name, base in given.items():
        assert export_peft(edit, name, model=base).base == str(tmp_path / "base")
    monkeypatch.chdir(tmp_path.parent)
    for name in given:
        found = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / name)).eval()
        assert relative_error(logits(found), written(model, edit)) < 1e-5


def test_the_demo_models_name_becomes_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    model = save_checkpoint(SMOLLM2.folder)
    made = export_peft(low_rank_edit(model), tmp_path / "adapter", model="smollm2")
    assert made.base == str(SMOLLM2.folder)


def test_no_base_is_named_that_cannot_be_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    edit = low_rank_edit(model)
    (tmp_path / "empty").mkdir()
    for name in ("./nowhere", "~/no/such/folder", "./empty"):
        with pytest.raises(ValueError, match=r"no model's folder; give a folder with config.json, or a hub id"):
            export_peft(edit, "adapter", model=name)
    for base in (None, model):  # a model that was never in a folder
        made = export_peft(edit, f"adapter-{base is None}", model=base)
        assert made.base == ""
        assert json.loads((made.folder / CONFIG).read_text())["base_model_name_or_path"] is None
    model.config._name_or_path = "./moved-since"
    assert export_peft(edit, "of-moved", model=model).base == ""
    assert export_peft(edit, "of-hub", model="empty").base == "empty"  # a hub id; the folder of that name is no model's
    assert export_peft(edit, "elsewhere", model="/srv/models/llama").base == "/srv/models/llama"


def test_factors_are_balanced_and_their_product_keeps_every_bit(tmp_path):
    model, delta = tiny_model("llama"), lowrank(seed=1)
    lopsided = LowRank(delta.u * 2.0**-20, delta.v * 2.0**20)
    export_peft(make_edit(model, deltas={1: lopsided}), tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter" / WEIGHTS)
    a, b = (next(t for name, t in factors.items() if part in name) for part in ("lora_A", "lora_B"))
    ratio = a.norm(dim=1) / b.norm(dim=0)
    assert ((ratio > 0.5) & (ratio < 2.0)).all()
    for i in range(delta.rank):  # factor by factor: one product each, no sum to round
        assert torch.equal(torch.outer(b[:, i], a[i]), torch.outer(lopsided.u[:, i], lopsided.v[:, i]))


def test_a_chain_is_its_sum(tmp_path):
    model = tiny_model("llama")
    first, second = low_rank_edit(model), make_edit(model, deltas={2: lowrank(seed=7), 3: lowrank(seed=8)})
    made = export_peft([first, second], tmp_path / "adapter")
    assert made.ranks == {1: 3, 2: 4, 3: 2}
    with first.apply(model), second.apply(model, check_fingerprint=False):
        wanted = logits(model)
    got = logits(PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "adapter")).eval())
    assert relative_error(got, wanted) < 1e-5


# ---- ranks


def test_a_rank_over_the_limit_names_the_way_out(tmp_path):
    model = tiny_model("llama")
    edit = make_edit(model, deltas={1: lowrank(rank=9)})
    rank = r"rank 9, over max_rank 4.*merge_checkpoint.*truncate=True.*relative error"
    says = refused(rank, export_peft, edit, tmp_path / "adapter", max_rank=4)
    assert all(way in says for way in ("without --peft", "(--truncate)", "max_rank=None (--max-rank none)"))
    dense = Dense(torch.randn(D_MODEL, D_FF, generator=torch.Generator().manual_seed(0)))
    full = make_edit(model, deltas={1: dense})
    refused(f"rank {D_MODEL}, over max_rank 8", export_peft, full, tmp_path / "adapter", max_rank=8)
    assert not any(tmp_path.iterdir())
    assert export_peft(edit, tmp_path / "adapter", max_rank=None).rank == 9
    assert 0.5 < export_peft(full, tmp_path / "full", max_rank=8, truncate=True).errors[1] < 1


def test_truncation_is_the_best_of_its_rank_and_its_error_is_told(tmp_path):
    model, delta = tiny_model("llama"), lowrank(rank=9)
    edit = make_edit(model, deltas={1: delta})
    made = export_peft(edit, tmp_path / "adapter", max_rank=4, truncate=True)
    sizes = torch.linalg.svdvals(delta.dense().double())
    best = float(sizes[4:].norm() / sizes.norm())
    factors = load_file(tmp_path / "adapter" / WEIGHTS)
    a, b = (next(t for name, t in factors.items() if part in name) for part in ("lora_A", "lora_B"))
    kept = b.double() @ a.double()
    found = float((kept - delta.dense().double()).norm() / delta.norm())
    assert made.rank == 4
    assert found == pytest.approx(best, rel=1e-4)
    assert made.errors[1] == pytest.approx(best, rel=1e-6)
    record = json.loads((tmp_path / "adapter" / RECORD).read_text())
    assert record["relative_errors"]["1"] == made.errors[1]


@pytest.mark.parametrize("kind", ["repeated factors", "dense"])
def test_what_fits_in_the_limit_is_exact_without_truncation(kind, tmp_path):
    model, delta = tiny_model("llama"), lowrank(rank=3)
    if kind == "dense":
        delta = Dense(delta.dense())
    else:
        delta = LowRank(torch.cat([delta.u] * 4, 1), torch.cat([delta.v] * 4, 1))
    edit = make_edit(model, deltas={1: delta})
    made = export_peft(edit, tmp_path / "adapter", max_rank=4)
    assert made.rank == 3
    assert made.errors[1] < 1e-6
    got = logits(PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "adapter")).eval())
    assert relative_error(got, written(model, edit)) < 1e-5


# ---- refusals


def test_the_wrong_base_is_refused(tmp_path):
    model = tiny_model("llama")
    export_peft(low_rank_edit(model), tmp_path / "adapter")
    assert isinstance(load_peft(model, tmp_path / "adapter"), PeftModel)
    other = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match=r"was made for model llama-4-.*this is llama-4-.*check_fingerprint=False"):
        load_peft(other, tmp_path / "adapter")
    assert isinstance(load_peft(other, tmp_path / "adapter", check_fingerprint=False), PeftModel)
    with pytest.raises(ValueError, match="this is llama-4-"):
        export_peft(low_rank_edit(tiny_model("llama")), tmp_path / "second", model=tiny_model("llama", seed=1))
    assert not (tmp_path / "second").exists()


def test_a_folder_given_as_the_base_is_the_edits_own(tmp_path):
    edit, folder = low_rank_edit(save_checkpoint(tmp_path / "base")), tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"was made for model llama-4-.*{folder} is llama-4-.*\(--force\)"):
        export_peft(edit, tmp_path / "adapter", model=folder)
    assert export_peft(edit, tmp_path / "forced", model=folder, check_fingerprint=False).base == str(folder)
    config = json.loads((folder / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantized))
    with pytest.warns(UserWarning, match="llama-4-48 as the edit's model is, and .* is unchecked: .* is quantized"):
        assert export_peft(edit, tmp_path / "beside-4-bits", model=folder).base == str(folder)
    (folder / "config.json").write_text(json.dumps(quantized | {"num_hidden_layers": 3}))
    refused(r"is llama-3-48-\.\.\.", export_peft, edit, tmp_path / "adapter", model=folder)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_that_was_changed_or_is_none_is_refused(tmp_path):
    model = tiny_model("llama")
    export_peft(low_rank_edit(model), tmp_path / "adapter")
    weights = tmp_path / "adapter" / WEIGHTS
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    refused("is not the file that was exported", load_peft, model, tmp_path / "adapter")
    (tmp_path / "adapter" / RECORD).write_text("{}")
    refused("is damaged", check_adapter, tmp_path / "adapter")
    refused("has no kedit_fast", check_adapter, tmp_path)


@pytest.mark.parametrize(
    "make, says",
    [
        (owned_edit, r"edit\.only\(i\).*--independent"),
        (lambda model: make_edit(model, deltas={}), "changes nothing"),
        (lambda model: make_edit(model, deltas={1: LowRank(torch.zeros(D_MODEL, 0), torch.zeros(D_FF, 0))}), "nothing"),
        (lambda model: low_rank_edit(None), "which model it was made: export_peft"),
        (lambda model: low_rank_edit(model, provenance={"on_top_of": [{"digest": "12"}]}), "made on top of edit 12"),
    ],
    ids=["independent", "no layers", "rank 0", "no fingerprint", "not on the bare model"],
)
def test_edits_that_make_no_adapter(make, says, tmp_path):
    refused(says, export_peft, make(tiny_model("llama")), tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_a_folder_in_use_and_a_wrong_limit_are_refused(tmp_path):
    edit = low_rank_edit(tiny_model("llama"))
    (tmp_path / "adapter").mkdir()
    export_peft(edit, tmp_path / "adapter")  # an empty folder will do
    refused("is not empty", export_peft, edit, tmp_path / "adapter")
    refused("max_rank = 0: expected a whole number of at least 1", export_peft, edit, tmp_path / "other", max_rank=0)
    export_peft(edit, tmp_path / "new" / "adapter")  # what is missing is made
    assert contents(tmp_path / "new" / "adapter") == contents(tmp_path / "adapter")
