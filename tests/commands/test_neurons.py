"""``kedit-fast neurons``: what it says, draws and writes."""

import json

import kedit_fast as kf
from tests.commands.cases import FACTS, ONE, files, run


def test_neurons_of_a_file(model, work, said):
    trace = ["--kinds", "mlp", "--samples", "1", "--window", "2", "--plots", "0"]
    assert run("trace", "--facts", "../facts.json", "--model", model, *trace, "-o", "t") == 0
    args = ["--facts", "../facts.json", "--model", model, "--steps", "3", "--traces", "t/traces.jsonl", "-o", "out"]
    shown = said("neurons", *args)
    lines = [json.loads(line) for line in (work / "out" / "neurons.jsonl").read_text().splitlines()]
    expected = kf.knowledge_neurons(kf.open_model(model), kf.load_facts(work.parent / "facts.json"), steps=3)
    assert lines == [one.to_record() for one in expected] and FACTS[0]["target_true"] in shown
    assert files(work / "out") == ["fact-0.png", "fact-1.png", "neurons.jsonl"]
    assert run("neurons", *args) == 2  # what is there stays
    assert run("neurons", *args, "--force", "-n", "1", "--plots", "0") == 0


def test_options_arrive(model, work):
    options = ["--layers", "1-2", "--threshold", "0.5", "--share", "0", "--answer", "Rome", "--held-out"]
    assert run("neurons", *ONE, *options, "--steps", "2", "--model", model, "-o", "out") == 0
    (line,) = (work / "out" / "neurons.jsonl").read_text().splitlines()
    fact = kf.Fact("The capital of {} is", "France")
    how = {"steps": 2, "threshold": 0.5, "share": 0.0, "layers": (1, 2), "answer": "Rome", "paraphrases": False}
    (want,) = kf.knowledge_neurons(kf.open_model(model), fact, **how)
    assert json.loads(line) == want.to_record()
