"""The notebooks of examples/: their cells run, on a tiny model for the demo model and on that itself where it is at
hand, and what is stored in them was made by these cells."""

import copy
import json
import re

import pytest

import kedit_fast as kf
from tests import notebooks
from tests.notebooks import NOTEBOOKS, ROOT, alike, code_cells, differing, kinds, main, outputs_of, read, run, shown_now
from tests.tiny import tiny_model, tiny_tokenizer

LAYERS = {"trace": 23}  # of the tiny model, which that notebook edits at layer 22; else 8, a third of the time
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:\n"
NAMES = [path.stem for path in NOTEBOOKS]


@pytest.fixture
def work(path, tmp_path, monkeypatch):
    """A folder with its own cache, in which "smollm2" opens a tiny model with a chat template."""
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tokenizer, real = copy.deepcopy(tiny_tokenizer()), kf.open_model
    tokenizer.chat_template = TEMPLATE
    tiny = kf.open_model(tiny_model("llama", layers=LAYERS.get(path.stem, 8)), tokenizer=tokenizer)
    monkeypatch.setattr(kf, "open_model", lambda name: tiny if name == "smollm2" else real(name))
    return tmp_path


def test_there_are_three():
    assert NAMES == ["languages", "ship", "trace"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_the_cells_run_on_a_tiny_model(path, work):
    """Each shows what it shows on the demo model, as text and as picture, whatever the numbers."""
    for cell, outputs in run(path):
        assert kinds(outputs) == kinds(cell["outputs"]), "".join(cell["source"])


@pytest.mark.smollm2
def test_what_is_stored_comes_again(smollm2):
    """Of the notebook that takes a minute of a core; ``python -m tests.notebooks --check`` takes all of them, seven."""
    (path,) = [path for path in NOTEBOOKS if path.stem == "languages"]
    assert differing(path, shown_now(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_is_stored_whole(path):
    text, notebook = path.read_text(encoding="utf-8"), read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [cell["metadata"] for cell in notebook["cells"] if cell["metadata"]]
    assert {output["output_type"] for cell in cells for output in cell["outputs"]} <= {"stream", "execute_result"}
    without_pictures = re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"/(tmp|home|root|work|Users|usr|opt|mnt)\b|[A-Z]:\\\\", without_pictures)
    assert text == json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"  # as it is stored again


def test_all_of_them_are_small():
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 600_000  # half a MB are the five pictures of the trace


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_links_of_a_notebook_lead_to_files(path):
    text = "".join("".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
    assert all((path.parent / name).exists() for name in re.findall(r"\]\((?!https?:)([^)#]+)", text))


# ---- the runner


def test_a_cell_shows_what_a_notebook_would_show():
    names: dict = {}
    assert outputs_of("x = 2\nprint('a\\nb')", "here", names, 1) == [
        {"name": "stdout", "output_type": "stream", "text": ["a\n", "b\n"]}
    ]
    (shown_now,) = outputs_of("x + 1", "here", names, 2)
    assert shown_now["data"] == {"text/plain": ["3"]} and shown_now["execution_count"] == 2
    assert outputs_of("import warnings\nwarnings.warn('no')\nNone", "here", names, 3) == []
    names["rich"] = type("Rich", (), {"__repr__": lambda self: "R", "_repr_html_": lambda self: "<b>R</b>"})()
    assert kinds(outputs_of("print(1)\nrich", "here", names, 4)) == [["stream"], ["text/html", "text/plain"]]
    with pytest.raises(ZeroDivisionError):
        outputs_of("1 / 0", "here", names, 5)


@pytest.fixture
def one(tmp_path, monkeypatch):
    """A notebook of one cell, the only one there is, in the current folder."""
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": []}
    source = ["from pathlib import Path\n", "Path('left').write_text('x')\n", "Path('left').exists()"]
    path = tmp_path / "examples" / "one.ipynb"
    path.parent.mkdir()
    path.write_text(json.dumps({"cells": [cell | {"source": source}], "metadata": {}}), encoding="utf-8")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", [path])
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return path


def test_a_notebook_is_run_in_a_folder_of_its_own_and_stored(one, capsys):
    assert main(["--check"]) == 1 and "one.ipynb, cell 1: 0% alike" in capsys.readouterr().out
    assert main(["one"]) == 0
    (made,) = code_cells(read(one))
    assert made["execution_count"] == 1 and made["outputs"][0]["data"] == {"text/plain": ["True"]}
    assert [each.name for each in one.parent.parent.rglob("*")] == ["examples", "one.ipynb"]
    assert main(["--check"]) == 0
    one.write_text(one.read_text().replace('"True"', '"False"'))
    assert main(["--check"]) == 1


def test_texts_are_compared_word_by_word_and_numbers_are_not():
    def said(text):
        return [{"output_type": "stream", "text": [text]}]

    assert alike(said("P 0.91, -3% of 1,000 tokens"), said("P 0.2, +12.5% of 90 tokens")) == 1
    assert alike(said("Rome is old"), said("Paris is old")) == pytest.approx(2 / 3)
    assert alike(said("refused: drift"), said("passed")) == 0


def test_an_unknown_name_is_refused_before_anything_runs(capsys):
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "there are languages, ship, trace" in capsys.readouterr().err


def test_what_stores_them_is_said():
    assert "python -m tests.notebooks" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for page in ("README.md", "docs/index.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert all(f"examples/{name}.ipynb" in text for name in NAMES)
