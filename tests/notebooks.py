"""``python -m tests.notebooks [NAME ...]``: runs the notebooks of examples/ and stores in them what they show; with
``--check`` it stores nothing, and says of each cell that shows something else than is stored.

A cell is run as a notebook runs it: what it prints is kept, and what its last line gives is shown as text, and as HTML
where the value has some. That needs no Jupyter, here or in a test, and keeps the cells plain Python. No kernel either,
for what one adds here is its own: warnings that name its files, times of each cell, the version of each of its parts.
"""

import argparse
import ast
import contextlib
import difflib
import io
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
ALIKE = 0.8  # of a cell's words; what a model writes goes another way after one token that rounds otherwise
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def lines(text: str) -> list[str]:
    """A text as the format has it: its lines, each with its end."""
    return text.splitlines(keepends=True)


def outputs_of(source: str, where: str, names: dict, number: int) -> list[dict]:
    """Runs a cell in ``names``: its outputs, in the notebook format's form."""
    tree = ast.parse(source, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they name the file that gave them, on this machine
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    made = []
    if printed.getvalue():
        made.append({"name": "stdout", "output_type": "stream", "text": lines(printed.getvalue())})
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = lines(value._repr_html_())
        made.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return made


def run(path: Path) -> Iterator[tuple[dict, list[dict]]]:
    """(a code cell as it is stored, what it shows now) of a notebook, cell by cell, in the current folder."""
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(read(path)), 1):
        yield cell, outputs_of("".join(cell["source"]), f"{path.name}, cell {number}", names, number)


def shown_now(path: Path) -> list[list[dict]]:
    """What each code cell of a notebook shows, run in a folder of its own."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return [outputs for _, outputs in run(path)]
        finally:
            os.chdir(before)


def store(path: Path, made: list[list[dict]]) -> None:
    """Writes what its code cells show into a notebook."""
    notebook = read(path)
    for number, (cell, outputs) in enumerate(zip(code_cells(notebook), made, strict=True), 1):
        cell["execution_count"], cell["outputs"] = number, outputs
    text = json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def kinds(outputs: list[dict]) -> list[list[str]]:
    """Of each output what it is: printed, or the forms that a value is shown in."""
    return [sorted(output.get("data", [output["output_type"]])) for output in outputs]


def differing(path: Path, made: list[list[dict]]) -> list[str]:
    """A line for each cell that shows something else than is stored: of another kind, or fewer of its words than
    ``ALIKE``. Numbers are not compared: they move with a machine's threads and instructions."""
    said = []
    for number, (cell, outputs) in enumerate(zip(code_cells(read(path)), made, strict=True), 1):
        same = alike(cell["outputs"], outputs) if kinds(cell["outputs"]) == kinds(outputs) else 0.0
        if same < ALIKE:
            now = f"\n--- now\n{shown(outputs)}"
            said.append(f"{path.name}, cell {number}: {same:.0%} alike\n{shown(cell['outputs'])}{now}")
    return said


def shown(outputs: list[dict]) -> str:
    """What outputs show as text, each number as "#"."""
    parts = [output["text"] if "text" in output else output["data"]["text/plain"] for output in outputs]
    return NUMBER.sub("#", "\n".join("".join(part) for part in parts))


def alike(one: list[dict], other: list[dict]) -> float:
    """Share of the words that two cells' outputs have in common, in their order; numbers are all one word."""
    return difflib.SequenceMatcher(None, shown(one).split(), shown(other).split(), autojunk=False).ratio()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a notebook, without .ipynb (default: all)")
    parser.add_argument("--check", action="store_true", help="compare, store nothing; exit status 1 where it differs")
    args = parser.parse_args(argv)
    known = {path.stem: path for path in NOTEBOOKS}
    if unknown := set(args.names) - set(known):
        parser.error(f"no notebook {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    found = []
    for name in args.names or known:
        path, began = known[name], time.monotonic()
        made = shown_now(path)
        if args.check:
            found += differing(path, made)
        else:
            store(path, made)
        print(f"{path.relative_to(ROOT)}: {time.monotonic() - began:.0f} s", flush=True)
    print(*found, sep="\n\n", end="\n" * bool(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
