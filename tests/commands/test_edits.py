"""The commands on edits that are there: edit inspect and diff, merge and merge undo, history add, log and rollback."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import kedit_fast as kf
from kedit_fast.edits.changes import PromptChange
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.edits.memories import MemoryChange
from kedit_fast.edits.routes import NearestRoute
from kedit_fast.evaluation import EvalReport
from kedit_fast.model.smollm2 import SMOLLM2
from kedit_fast.shipping.history import EditHistory
from tests.commands.cases import parsed, run
from tests.conftest import relative_error
from tests.make import FACTS, bits, logits, lowrank, make_edit, owned_edit, same_bits
from tests.shipping.checkpoints import contents, save_checkpoint
from tests.tiny import D_FF, D_MODEL, tiny_model


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a checkpoint, one.safetensors, and two.safetensors, which was made on top of it."""
    monkeypatch.chdir(tmp_path)
    model = save_checkpoint(tmp_path / "base")
    one = make_edit(model, deltas={1: lowrank(seed=1), 2: lowrank(seed=2)})
    below = {"on_top_of": [{"digest": digest(one)}], "who": "a test"}
    two = make_edit(model, deltas={2: lowrank(seed=5, rank=3)}, facts=FACTS[:1], provenance=below, values=None, keys={})
    one.save("one.safetensors")
    two.save("two.safetensors")
    return tmp_path


def test_making_an_edit_needs_no_action():
    args = parsed("edit", "--facts", "f.json", "-o", "e.safetensors")
    assert (args.command, args.facts, args.output) == ("edit", "f.json", "e.safetensors")
    assert args.model == "smollm2"


# ---- merge


def test_merge_writes_a_chain_that_undo_takes_out_again(work, said):
    shown = said("merge", "--model", "base", "one.safetensors", "two.safetensors", "-o", "out")
    model = tiny_model("llama")
    for name in ("one", "two"):
        Edit.load(f"{name}.safetensors").apply(model, check_fingerprint=False)
    opened = kf.open_model("out")
    assert same_bits(opened.model, bits(model))
    assert opened.fingerprint in shown
    assert "kedit-fast merge undo out" in shown
    assert run("merge", "undo", "out", "-o", "back") == 0
    assert contents(work / "back") == contents(work / "base")
    shown = said("merge", "undo", "out")
    assert contents(work / "out") == contents(work / "base")
    assert "2 tensors restored bit for bit, 3 facts taken out" in shown
    assert Edit.load("one.safetensors").fingerprint in shown


def test_merge_takes_a_folder_of_versions(work):
    run("history", "add", "edits", "one.safetensors")
    assert run("merge", "--model", "base", "edits", "-o", "out", "--who", "Ana", "-m", "why") == 0
    record = json.loads((work / "out" / "kedit_fast_merge" / "manifest.json").read_text())
    assert (record["who"], record["message"], len(record["edits"])) == ("Ana", "why", 1)


def test_a_folder_without_edits_in_force_is_the_model_as_it_is(work, said, complaint):
    run("history", "add", "edits", "one.safetensors")
    run("history", "rollback", "edits", 0)
    ask = ["--prompt", "Big Ben is in", "--model", "base", "--tokens", 3]
    assert said("generate", "edits", *ask) == said("generate", *ask)
    assert "has no edits in force" in complaint("merge", "edits", "--model", "base", "-o", "out")


def test_what_was_found_against_an_edit_is_said_where_it_ships(work, capsys):
    one = Edit.load("one.safetensors")
    found = {"written": {"written": [False] + [True] * (len(one.facts) - 1)}, "growth": {"1": 0.2, "2": 3.55}}
    replace(one, provenance=one.provenance | found).save("failed.safetensors")
    for words in (["history", "add", "edits"], ["merge", "--model", "base", "-o", "out"]):
        run(*words, "failed.safetensors")
        says = capsys.readouterr().err
        assert f"1 of {len(one.facts)} facts not written: {one.facts[0].label}" in says, words
        assert "it moves the weights of layer 2 by 355% of their norm" in says, words
        run(*words[:-1], f"{words[-1]}-2", "one.safetensors")
        assert "when it was made" not in capsys.readouterr().err, words


def test_merge_as_an_adapter(work, said):
    shown = said("merge", "--model", "base", "one.safetensors", "-o", "adapter", "--peft")
    assert "LoRA adapter of rank 2, exact" in shown
    assert "vLLM: --max-lora-rank 8" in shown
    model = tiny_model("llama")
    Edit.load("one.safetensors").apply(model)
    wrapped = PeftModel.from_pretrained(tiny_model("llama"), str(work / "adapter")).eval()
    assert relative_error(logits(wrapped), logits(model)) < 1e-5
    chain = ["one.safetensors", "two.safetensors"]
    shown = said("merge", *chain, "-o", "cut", "--peft", "--max-rank", 2, "--truncate")
    assert "layer 2: cut to rank 2, relative error 0." in shown
    assert "exact" not in shown


@pytest.mark.parametrize(
    "args, says",
    [
        (["one.safetensors", "-o", "out"], "which model? --model FOLDER"),
        (["--model", "base", "one.safetensors", "-o", "out", "--truncate"], "--truncate is for --peft"),
        (["--model", "base", "one.safetensors", "-o", "out", "--server", "vllm"], "--server is for --peft"),
        (["--model", "base", "two.safetensors", "-o", "out"], "was made on top of edit"),
        (["--model", "nowhere", "one.safetensors", "-o", "out"], "no such folder"),
        (["--model", "base", "one.safetensors", "-o", "base"], "is not empty"),
        (["--model", "base", "none.safetensors", "-o", "out"], "none.safetensors"),
        (["--model", "base", "empty", "-o", "out"], "holds no versions of edits"),
        (["one.safetensors", "--peft", "--max-rank", "1", "-o", "out"], "rank 2, over max_rank 1"),
        (["one.safetensors", "--peft", "--max-rank", "1", "-o", "out"], "; --truncate keeps the nearest"),
        (["one.safetensors", "--peft", "--max-rank", "1", "-o", "out"], "--max-rank none suits PEFT"),
        (["--model", "other", "one.safetensors", "-o", "out"], "merge with --force"),
        (["--model", "base", "owned.safetensors", "-o", "out"], "without --independent"),
        (["owned.safetensors", "--peft", "-o", "out"], "without --independent"),
        (["--model", "./typo", "one.safetensors", "--peft", "-o", "out"], "no model's folder"),
        (["--model", "other", "one.safetensors", "--peft", "-o", "out"], "pass --force"),
        (["--model", "base", *2 * ["one.safetensors"], "--force", "-o", "out"], "edits 1 and 2 of 2 are the"),
    ],
)
def test_merge_refuses(args, says, work, complaint):
    (work / "empty").mkdir()
    owned_edit(tiny_model("llama")).save("owned.safetensors")
    tiny_model("llama", seed=1).save_pretrained("other")
    assert says in complaint("merge", *args)
    assert not (work / "out").exists()


def test_an_adapter_that_vllm_does_not_load_says_so(work, said, complaint):
    make_edit(tiny_model("gpt2"), deltas={1: lowrank(rank=2)}).save("gpt2.safetensors")
    refused = "its GPT2LMHeadModel takes no LoRA adapters"
    assert f"vLLM: does not load it (0.33.0): {refused}" in said("merge", "gpt2.safetensors", "--peft", "-o", "adapter")
    assert refused in complaint("merge", "gpt2.safetensors", "--peft", "--server", "vllm", "-o", "other")
    assert not (work / "other").exists()


def test_an_adapter_names_the_folder_of_its_model(work, said, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(work / "cache"))
    save_checkpoint(SMOLLM2.folder)
    for name, folder in (("base", work / "base"), ("smollm2", SMOLLM2.folder)):
        shown = said("merge", "--model", name, "one.safetensors", "-o", f"of-{name}", "--peft")
        config = json.loads((work / f"of-{name}" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(folder)
        assert f"it names its base model: {folder}; an adapter for other machines" in shown
    shown = said("merge", "--model", "me/llama", "one.safetensors", "-o", "of-hub", "--peft")
    assert "it names its base model: me/llama\n" in shown


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here in which nothing can be made")
@pytest.mark.parametrize("options", [("--model", "base"), ("--peft",)], ids=["merged", "adapter"])
def test_a_folder_that_cannot_be_made_is_named_as_it_was_given(options, work, complaint):
    says = complaint("merge", *options, "one.safetensors", "-o", "/proc/m")
    assert says.startswith("kedit-fast: error: /proc/m: ") and "unfinished" not in says


def test_a_rank_is_a_number_or_none(complaint):
    given = ["merge", "e", "-o", "o", "--max-rank"]
    assert (parsed(*given, "none").max_rank, parsed(*given, "16").max_rank) == (None, 16)
    for wrong, named in (("0", "0"), ("-3", "-3"), ("x", "'x'")):
        assert f"{named}: expected a whole number of at least 1, e.g. 1, or none" in complaint(*given, wrong)


# ---- inspect, diff


def test_inspect_shows_what_an_edit_holds(work, said):
    shown, edit = said("edit", "inspect", "one.safetensors"), Edit.load("one.safetensors")
    for text in ("memit", edit.fingerprint, "The Eiffel Tower", "Rome", "Paris", "mom2_update_weight: 15000", "a test"):
        assert text in shown
    lines = [line.split() for line in shown.splitlines()]
    for layer in (1, 2):
        assert [str(layer), "down", "LowRank", "2", f"{edit.deltas[layer].norm():.4g}"] in lines
    assert "|W|" not in shown
    counts = {"The Eiffel Tower": ["1", "1"], "Miles Davis": ["0", "0"]}
    for subject, (paraphrases, neighborhood) in counts.items():
        line = next(line for line in shown.splitlines() if subject in line)
        assert line.split()[-2:] == [paraphrases, neighborhood]
    assert next(line for line in shown.splitlines() if "instead of" in line).endswith("paraphrases  neighborhood")
    changes, size = sum(delta.nbytes for delta in edit.deltas.values()), (work / "one.safetensors").stat().st_size
    assert f"size: {changes / 1e6:.3g} MB are what it changes" in shown
    assert f"facts: {size / 1e6:.3g} MB" in shown


def test_inspect_compares_with_the_model(work, said):
    shown, edit = said("edit", "inspect", "one.safetensors", "--model", "base"), Edit.load("one.safetensors")
    weight = kf.open_model("base").source.weight(1, "down")
    share = edit.deltas[1].norm() / float(weight.norm())
    line = next(line.split() for line in shown.splitlines() if line.split()[:3] == ["1", "down", "LowRank"])
    assert line[5:] == [f"{float(weight.norm()):.4g}", f"{share:.2%}"]
    tiny_model("llama", seed=1).save_pretrained("other")
    assert run("edit", "inspect", "one.safetensors", "--model", "other") == 2


def test_inspect_of_many_facts_and_of_none_edit(work, said, complaint):
    owned_edit(tiny_model("llama")).save("owned.safetensors")
    shown = said("edit", "inspect", "owned.safetensors")
    assert "each edit is for its own fact; `kedit-fast edit only EDIT N` takes one" in shown
    assert [line.split()[0] for line in shown.splitlines() if line[:1] in ("0", "1")][:2] == ["0", "1"]
    make_edit(facts=FACTS * 15, values=None, keys={}).save("many.safetensors")
    shown = said("edit", "inspect", "many.safetensors")
    assert "... and 10 more" in shown and shown.count("Miles Davis") == 10
    texts = PromptChange(("Imagine that it is so.\n",), ((),))
    make_edit(facts=(), values=None, keys={}, changes=[texts]).save("text.safetensors")
    shown = said("edit", "inspect", "text.safetensors")
    assert "no facts" in shown and "before the prompt: Imagine that it is so.\\n" in shown
    assert "the edits hold no facts; give --facts" in complaint("eval", "text.safetensors")
    (work / "text").write_text("no edit")
    assert "no safetensors file" in complaint("edit", "inspect", "text")


def test_diff_shows_what_differs(work, said):
    assert "same model, method, settings and facts" in said("edit", "diff", "one.safetensors", "one.safetensors")
    edit = Edit.load("two.safetensors")
    make_edit(deltas=edit.deltas, hparams={"v_lr": 0.5}, values=None, keys={}).save("other.safetensors")
    shown = said("edit", "diff", "two.safetensors", "other.safetensors")
    assert "setting v_lr: 0.1 -> 0.5" in shown
    assert "only in B: " in shown and "piano" in shown
    assert "only in A" not in shown
    norm = f"{edit.deltas[2].norm():.4g}"
    line = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["2"])
    assert line[:4] == ["2", "down", norm, norm]
    assert line[4:] == ["0", "1.0000"]


INDEPENDENT = [
    ("generate", "owned.safetensors", "--prompt", "Paris"),
    ("gate", "owned.safetensors"),
    ("eval", "owned.safetensors", "--text", "text.txt"),
    ("merge", "owned.safetensors", "-o", "out"),
    ("merge", "owned.safetensors", "--peft", "-o", "out"),
    ("history", "add", "edits", "owned.safetensors"),
    ("edit", "--prompt", "{} is in", "--subject", "Rome", "--target", "Paris", "--on-top-of", "owned.safetensors"),
]


def test_of_independent_edits_one_can_be_taken(work, said, complaint):
    """By every command that works with one model; an edit of one fact is it already."""
    (work / "text.txt").write_text("The tower is in the city. " * 40)
    owned_edit(tiny_model("llama")).save("owned.safetensors")
    for words in INDEPENDENT:
        model = [] if words[0] == "history" else ["--model", "base"]
        assert "take one, " in (says := complaint(*words, *model)) and "kedit-fast edit only EDIT N" in says, words
    assert "only.safetensors: Edit(" in said("edit", "only", "owned.safetensors", 1, "-o", "only.safetensors")
    made, one = Edit.load("owned.safetensors").only(1), Edit.load("only.safetensors")
    assert digest(one) == digest(made) and one.facts == made.facts and not one.independent
    assert run("history", "add", "edits", "only.safetensors") == 0
    assert "argument N: 2: expected a whole number from 0 to 1" in complaint(
        "edit", "only", "owned.safetensors", 2, "-o", "other.safetensors"
    )
    assert "solved together" in complaint("edit", "only", "one.safetensors", 0, "-o", "other.safetensors")
    assert "--force replaces it" in complaint("edit", "only", "owned.safetensors", 0, "-o", "only.safetensors")
    assert "would replace an edit" in complaint("edit", "only", "owned.safetensors", 0, "-o", "owned.safetensors")


def test_inspect_and_diff_take_what_eval_takes(work, said):
    """Several edits, and folders of versions."""
    for name in ("one", "two"):
        run("history", "add", "edits", f"{name}.safetensors")
    shown = said("edit", "inspect", "edits")
    both = said("edit", "inspect", "one.safetensors", "two.safetensors")
    assert both.count("\nmade for model ") == shown.count("\nmade for model ") == 2
    assert "; the file, with keys" in both and "; the file, with keys" not in shown
    shown = said("edit", "diff", "one.safetensors", "edits")
    layers = [line.split() for line in shown.splitlines() if line.startswith(("1 ", "2 "))]
    assert layers[0][2] == layers[0][3] and layers[1][2] != layers[1][3]  # the second edit changes layer 2 alone


# ---- eval of a chain


def test_eval_of_a_chain(work, complaint):
    chain = ["one.safetensors", "two.safetensors"]
    assert run("eval", *chain, "--model", "base", "-o", "chain.json") == 0
    run("history", "add", "edits", *chain)
    assert run("eval", "edits", "--model", "base", "-o", "folder.json") == 0
    one, two = EvalReport.load("chain.json"), EvalReport.load("folder.json")
    assert one.facts == two.facts and torch.equal(one.edited["p_new"], two.edited["p_new"])
    # the second edit wrote the first one's fact anew: asked once
    assert sorted(fact.subject for fact in one.facts) == sorted(fact.subject for fact in FACTS)
    assert "was made on top of edit" in complaint("eval", *reversed(chain), "--model", "base")


# ---- versions


def test_versions_of_edits(work, said):
    assert run("history", "add", "edits", "one.safetensors", "-m", "first", "--who", "Ana") == 0
    assert "version 2, 2 edits in force" in said("history", "add", "edits", "two.safetensors", "-m", "second")
    shown = said("history", "rollback", "edits", 1, "-m", "it broke something")
    assert "version 3, the same as version 1: 1 edit in force" in shown
    shown = said("history", "log", "edits")
    for text in ("the model as it is", "first", "Ana", "second", "it broke something", "in force: version 3"):
        assert text in shown
    assert [digest(e) for e in EditHistory("edits").current] == [digest(Edit.load("one.safetensors"))]
    assert "no edit in force" in said("history", "rollback", "edits", 0)


def test_versions_refuse(work, complaint):
    assert "no such folder" in complaint("history", "log", "nowhere")
    says = complaint("history", "add", "edits", "two.safetensors")
    for text in ("would stand on no edit", "--on-top-of FOLDER", "add it all the same with --force"):
        assert text in says
    owned_edit(tiny_model("llama")).save("owned.safetensors")
    says = complaint("history", "add", "edits", "owned.safetensors")
    assert "without --independent" in says
    assert run("history", "add", "edits", "two.safetensors", "--force") == 0
    says = complaint("history", "rollback", "edits", 7)
    assert "error: argument N: 7: expected a whole number from 0 to 1" in says
    assert len(EditHistory("edits").versions) == 2


@pytest.mark.parametrize("file, what", [("config.json", "a model's"), ("adapter_config.json", "an adapter's")])
def test_the_folder_of_a_model_is_none_of_versions(work, complaint, file, what):
    """Named as an edit, or to history: it is told what it is, and nothing is put into it."""
    (work / "folder").mkdir()
    (work / "folder" / file).write_text("{}")
    for words in (
        ["eval"],
        ["edit", "inspect"],
        ["merge", "--model", "base", "-o", "out"],
        ["history", "add", "edits"],
    ):
        expected = f"folder is {what} folder (it has {file}); expected an edit file, or a folder of versions"
        assert expected in complaint(*words, "folder"), words
    for action in (["log", "folder"], ["rollback", "folder", 0], ["add", "folder", "one.safetensors"]):
        assert f"{what} folder (it has {file}); expected a folder of versions" in complaint("history", *action), action
    with pytest.raises(ValueError, match=f"is {what} folder"):
        Edit.load(work / "folder")
    assert contents(work / "folder").keys() == {file}


def test_a_folder_without_versions_is_none_of_versions(work, complaint):
    (work / "folder").mkdir()
    (work / "folder" / "other.txt").write_text("text")
    for words in (["edit", "inspect", "folder"], ["history", "log", "folder"], ["history", "rollback", "folder", 0]):
        assert "folder holds no versions of edits; expected a folder of versions, as" in complaint(*words)
    assert contents(work / "folder").keys() == {"other.txt"}


def test_undo_refuses_what_was_changed(work, complaint):
    says = complaint("merge", "undo", "base")
    assert "expected a folder that merge_checkpoint (kedit-fast merge) wrote" in says
    run("merge", "--model", "base", "one.safetensors", "-o", "out")
    model = kf.open_model("out").model
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(1)
    model.save_pretrained("changed")
    for name in contents(work / "changed"):
        (work / "out" / name).write_bytes((work / "changed" / name).read_bytes())
    assert "nothing was undone" in complaint("merge", "undo", "out")


def test_of_a_memory_one_fact_can_be_taken_or_left_out(work, said, complaint):
    owned = Edit.load("one.safetensors")
    keys, each = torch.ones(len(owned.facts), D_FF), torch.arange(len(owned.facts))
    route = NearestRoute(1, keys, torch.ones(len(keys)), each)
    memory = MemoryChange(1, torch.ones(len(keys), D_MODEL), each)
    replace(owned, changes=[memory], route=route, values=None, keys={}).save("memory.safetensors")
    shown = said("edit", "inspect", "memory.safetensors")
    assert "routed (nearest): an entry acts behind a prompt that ends within its radius" in shown
    assert "`kedit-fast edit only EDIT N` takes a fact, `edit without EDIT N` leaves it out" in shown
    left = said("edit", "without", "memory.safetensors", 0, "-o", "rest.safetensors")
    assert f"left out: {owned.facts[0].label} -> {owned.facts[0].target_new}" in left
    assert re.search(r"^N .*\n0 +8 \(", left, re.M), "the numbers that the next command takes"
    said("edit", "only", "memory.safetensors", 1, "-o", "only.safetensors")
    rest, one = Edit.load("rest.safetensors"), Edit.load("only.safetensors")
    assert digest(rest) == digest(one) and rest.facts == one.facts == owned.facts[1:]
    assert "in weights, from which none can be left out" in complaint(
        "edit", "without", "one.safetensors", 0, "-o", "x"
    )
