"""``kedit-fast implied``: what an edit implies, asked of a tiny model, and the rest as facts for the next edit."""

import json

import kedit_fast as kf
from kedit_fast.experiments.consistency import consistency
from tests.commands.cases import run
from tests.facts.test_knowledge import TABLE

FACTS = [
    {"prompt": "{} is in the city of", "subject": "The Eiffel Tower", "target_new": "Rome", "target_true": "Paris"},
    {"prompt": "{} is in the country of", "subject": "The Eiffel Tower", "target_new": "Spain"},
    {"prompt": "The capital of {} is", "subject": "France", "target_new": "London", "target_true": "Paris"},
]


def made(model, work, n=3):
    """An edit of the first facts, and a table beside it."""
    (work / "facts.json").write_text(json.dumps(FACTS[:n]))
    (work / "ft.json").write_text(json.dumps({"layers": [1], "num_steps": 3}))
    (work / "table.json").write_text(json.dumps(TABLE))
    assert run("edit", "--facts", "facts.json", "--method", "ft", "--hparams", "ft.json", "--model", model) == 0
    return kf.Edit.load(work / "edit.safetensors")


def test_the_table_the_conflicts_and_the_rest(model, work, said):
    edit = made(model, work)
    args = [
        "implied",
        "edit.safetensors",
        "--relations",
        "table.json",
        "--hops",
        "2",
        "--generate",
        "3",
        "--model",
        model,
    ]
    shown = said(*args, "-o", "rest.json", "--html", "page.html")
    expected = consistency(kf.open_model(model), edit, TABLE, hops=2, generate=3)
    *_, table, conflicts = str(expected).partition("1 conflict")
    assert str(expected).splitlines()[1:] == shown.splitlines()[2:-2] and table and "Spain, because" in conflicts
    rest = kf.load_facts(work / "rest.json")
    assert [fact.text for fact in rest] == [fact.text for fact in expected.rest] and rest
    assert "What the edit implies" in (work / "page.html").read_text()
    assert shown.splitlines()[-2:] == ["written: rest.json", "written: page.html"]
    assert run(*args, "-o", "rest.json") == 2  # what is there stays
    how = ["--method", "ft", "--hparams", "ft.json", "--model", model, "--on-top-of", "edit.safetensors"]
    assert run("edit", "--facts", "rest.json", *how, "-o", "more.safetensors") == 0
    assert run("implied", "edit.safetensors", "more.safetensors", "--by", "success", "--ask", "--model", model) == 0


def test_several_tables_and_the_packages_own(model, work, said):
    edit = made(model, work, 1)
    more = {"format": TABLE["format"], "known": [{"subject": "Rome", "relation": "P17", "object": "Norway"}]}
    (work / "more.json").write_text(json.dumps(more))
    both = ["--relations", "builtin", "--relations", "more.json"]
    shown = said("implied", "edit.safetensors", *both, "--generate", "0", "--model", model)
    assert "located in the country of Norway" in shown and "Italy" not in shown
    assert "Italy" in said("implied", "edit.safetensors", "--generate", "0", "--model", model)
    assert edit.facts[0].target_new == "Rome"


def test_what_is_refused(model, work, complaint):
    made(model, work, 1)
    args = ["implied", "edit.safetensors", "--model", model]
    (work / "bad.json").write_text(json.dumps(TABLE | {"known": [{"subject": "Rome"}]}))
    assert "bad.json: known, entry 0: relation = None" in complaint(*args, "--relations", "bad.json")
    assert "--hops = 4: expected" in complaint(*args, "--hops", "4") or "--hops 4" in complaint(*args, "--hops", "4")
    assert "would replace what --relations reads" in complaint(*args, "--relations", "table.json", "-o", "table.json")
    assert "'luck'" in complaint(*args, "--by", "luck")
