"""``kedit-fast stats``, ``edit`` and ``eval``: from statistics to a report."""

import json

import torch

import kedit_fast as kf
from kedit_fast.commands import edit as edit_command
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation import EvalReport
from kedit_fast.moments.second_moment import SecondMoment
from tests.commands.cases import ONE, files, raising, run
from tests.make import make_edit, owned_edit
from tests.tiny import D_FF, TEXT, tiny_model
from tests.tracing.test_results import result


def test_from_statistics_to_a_report(model, work, said):
    shown = said("stats", "--layers", "1-2", "--tokens", "600", "--model", model, "-o", "stats")
    assert "600" in shown and "condition number" in shown and len(files(work / "stats")) == 2

    hparams = work.parent / "memit.json"
    args = ["edit", "--facts", "../facts.json", "--hparams", hparams, "--stats", "stats", "--model", model]
    shown = said(*args, "-o", "deep/edit.safetensors")
    assert f"read from {hparams}" in shown and "g / d_ff" in shown and "P(new) at the value" in shown
    lm = kf.open_model(model)
    edit = Edit.load(work / "deep" / "edit.safetensors")
    facts = kf.load_facts(work.parent / "facts.json")
    moments = {layer: SecondMoment.load(p) for layer, p in enumerate(sorted((work / "stats").iterdir()), 1)}
    want = kf.Memit.from_json(hparams).edit(lm, facts, moments=moments)
    for layer in (1, 2):
        assert torch.equal(edit.deltas[layer].dense(), want.deltas[layer].dense())
    assert run(*args, "-o", "deep/edit.safetensors") == 2  # not replaced
    assert run(*args, "-o", "deep/edit.safetensors", "--force") == 0

    (work / "text.txt").write_text(TEXT)
    files_ = ["-o", "report.json", "--html", "report.html", "--log", "log.jsonl"]
    args = ["deep/edit.safetensors", "--text", "text.txt", "--generate", "3", "--model", model, *files_]
    shown = said("eval", *args)
    assert "efficacy" in shown and "perplexity" in shown and "before:" in shown and "after:" in shown
    report = EvalReport.load(work / "report.json")
    expected = kf.evaluate(lm, facts, edit)
    assert torch.equal(report.edited["p_new"], expected.edited["p_new"]) and report.perplexity is not None
    assert "<table" in (work / "report.html").read_text()
    assert [json.loads(line)["edited"]["p_new"] for line in (work / "log.jsonl").read_text().splitlines()]

    assert "no edit" in said("eval", "--facts", "../facts.json", "-n", "1", "--model", model)  # the model as it is
    some = ["deep/edit.safetensors", "-n", "1", "-o", "some.json"]
    assert run("eval", *some, "--model", model) == 0
    assert EvalReport.load(work / "some.json").facts == tuple(facts[:1])


def test_the_seed_and_the_corpus_of_statistics_arrive(model, work):
    (work / "text.txt").write_text(TEXT)
    layer = ["--layers", "1", "--tokens", "90", "--model", model, "-o", "stats"]
    assert run("stats", *layer, "--seed", "5") == run("stats", *layer, "--corpus", "text.txt") == 0
    corpora = {SecondMoment.load(path).corpus for path in (work / "stats").iterdir()}
    assert "self-seed5" in corpora and any(corpus.startswith("text.txt-") for corpus in corpora) and len(corpora) == 2


def test_the_seed_and_the_corpus_of_an_edit_arrive(model, work):
    (work / "text.txt").write_text(TEXT)
    args = ["edit", *ONE, "--target", "Rome", "--hparams", "../memit.json", "--tokens", "90", "--model", model]
    kept = work.parent / "cache" / "statistics"
    assert run(*args, "--seed", "5", "-o", "a.safetensors") == 0
    assert {SecondMoment.load(path).corpus for path in kept.iterdir()} == {"self-seed5"}
    lm = kf.open_model(model)
    moments = {i: SecondMoment(torch.eye(D_FF), 90, i, lm.fingerprint) for i in (1, 2)}
    editor, fact = kf.Memit.from_json(work.parent / "memit.json"), kf.Fact("The capital of {} is", "France", "Rome")
    contexts = [editor.edit(lm, [fact], moments=moments, seed=seed).contexts for seed in (5, 0)]
    assert Edit.load("a.safetensors").contexts == contexts[0] != contexts[1]

    for path in kept.iterdir():
        path.unlink()
    assert run(*args, "--corpus", "text.txt", "-o", "b.safetensors") == 0
    assert [SecondMoment.load(path).corpus.split("-")[0] for path in kept.iterdir()] == ["text.txt"] * 2


def test_statistics_without_layers_are_of_both_editors(model, work, said, monkeypatch):
    for editor, layers in ((kf.Rome, (3,)), (kf.Memit, (0, 2)), (kf.AlphaEdit, (2,))):
        monkeypatch.setattr(editor, "for_model", classmethod(lambda cls, lm, layers=layers: cls(layers=layers)))
    shown = said("stats", "--tokens", "20", "--model", model, "-o", "stats")
    assert f"20 tokens are fewer than d_ff = {D_FF}" in shown
    assert sorted(SecondMoment.load(path).layer for path in (work / "stats").iterdir()) == [0, 2, 3]
    shown = said("stats", "--tokens", D_FF, "--layers", "1", "--model", model, "-o", "enough")
    assert "fewer than" not in shown


def test_an_edit_that_needs_no_statistics_measures_none(model, work, said):
    hparams = work.parent / "rome.json"
    hparams.write_text(json.dumps(json.loads(hparams.read_text()) | {"mom2_adjustment": False}))
    args = ["edit", *ONE, "--target", "Rome", "--method", "rome", "--hparams", hparams, "--model", model]
    assert "condition of C" not in said(*args) and not (work.parent / "cache").exists()


def test_the_table_of_an_edit_shows_steps_and_probability(capsys):
    fact = kf.Fact("The capital of {} is", "France", "Rome")
    provenance = {"layers": {}, "found": {"steps": [7], "loss": [1.5], "p_new": [0.25]}}
    asked = {"written": {"written": [False], "p_new": [0.125], "says": [" Paris"]}}
    edit_command.say_facts(Edit("memit", {}, "", (fact,), {}, provenance=provenance | asked))
    header, row, written = capsys.readouterr().out.splitlines()
    assert header.split() == ["fact", "new", "answer", "steps", "P(new)", "at", "the", "value", "P(new)", "it", "says"]
    assert row.split()[-6:] == ["Rome", "7", "0.250", "0.125", "'", "Paris'"]
    assert written.startswith("written: 0 of 1 facts")


def test_the_facts_of_a_mixture_that_are_routed_otherwise_are_said(capsys):
    notes = {"g": 40.0, "against": 80.0, "fit": 0.33, "condition": 2.0}
    layers = {"1": notes | {"rerouted": 0.0}, "2": notes | {"rerouted": 0.25}}
    edit_command.say_layers(make_edit(provenance={"layers": layers}), D_FF)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "facts that go to other experts since the layers below were edited: layer 1: 0%, layer 2: 25%"
    )
    edit_command.say_layers(make_edit(provenance={"layers": {"1": notes}}), D_FF)
    assert "experts" not in capsys.readouterr().out


def test_an_edit_in_context_has_no_layers_and_no_steps(model, work, said, capsys):
    edit = ["edit", *ONE, "--target", "Rome", "--method", "ice", "--model", model]
    shown = said(*edit, "-o", "ice.safetensors")
    header = next(line for line in shown.splitlines() if "new answer" in line)
    assert "layers" not in shown.splitlines()[1] and "steps" not in header and "at the value" not in header
    assert "routed (retrieval)" in shown
    made, lm = Edit.load("ice.safetensors"), kf.open_model(model)
    prompt = "The capital of France is"
    text = said("generate", "ice.safetensors", "--prompt", prompt, "--tokens", "3", "--model", model)
    assert text.strip() == lm.generate(made.changes[0].texts[0] + prompt, 3).strip()
    assert run(*edit, "--layers", "1", "-o", "other.safetensors") == 2
    assert "--layers (1,): in-context editing changes no layer; leave it out" in capsys.readouterr().err


def test_strict_refuses_what_is_not_written(model, work, capsys):
    """The file is there all the same: what to do about it is asked of a person."""
    hparams = work.parent / "ft.json"
    args = ["edit", *ONE, "--target", "Rome", "--method", "ft", "--hparams", hparams, "--model", model, "--force"]
    for steps, lr, written in ((1, 1e-6, False), (25, 1e-2, True)):
        hparams.write_text(json.dumps({"layers": [1], "num_steps": steps, "lr": lr}))
        assert run(*args) == 0
        assert run(*args, "--strict") == (0 if written else 1)
        out, err = capsys.readouterr()
        assert f"written: {int(written)} of 1 facts" in out
        assert ("warning: facts not written: 1 of 1: 'The capital of France is' -> 'Rome' (P 0.0" in err) != written
        assert Edit.load("edit.safetensors").provenance["written"]["written"] == [written]


def test_rome_with_statistics_from_the_cache(model, work, said, monkeypatch):
    args = ["edit", *ONE, "--target", "Rome", "--method", "rome", "--hparams", "../rome.json", "--tokens", "200"]
    assert "the value is written exactly" in said(*args, "--model", model, "-o", "a.safetensors")
    assert len(files(work.parent / "cache" / "statistics")) == 1
    monkeypatch.setattr("kedit_fast.moments.corpus._sampled", raising(AssertionError("sampled again")))
    assert run(*args, "--model", model, "-o", "b.safetensors") == 0
    assert torch.equal(Edit.load("a.safetensors").deltas[1].dense(), Edit.load("b.safetensors").deltas[1].dense())
    assert run(*args, "--layers", "2", "--tokens", "20", "--model", model) == 2  # other statistics are asked for


def test_what_can_be_refused_is_before_statistics_are_measured(model, work, complaint, no_sweep):
    """They take minutes: an edit of another model, independent ones, a trace of another model's depth."""
    make_edit(tiny_model("llama", seed=1)).save("foreign.safetensors")
    edit = ("edit", *ONE, "--target", "Rome", "--model", model)
    assert "this edit was made on" in complaint(*edit, "--on-top-of", "foreign.safetensors")
    owned_edit(kf.open_model(model).model).save("owned.safetensors")
    assert "edit only EDIT N" in complaint(*edit, "--on-top-of", "owned.safetensors")
    trace = result([[0.1] * 3] * 4, (1, 3), fact=kf.Fact(*ONE[1::2], target_new="Rome"))  # of 3 layers
    (work / "traces.jsonl").write_text(json.dumps(trace.to_record()))
    (work / "one.json").write_text(json.dumps([dict(prompt=ONE[1], subject=ONE[3], target_new="Rome")]))
    layers = ("layers", "--facts", "one.json", "--model", model, "--traces", "traces.jsonl")
    assert "has 3 layers, this model 4" in complaint(*layers)
