"""What an installed package must do, in a minute and without pytest: `python tests/smoke.py`. CI runs it on each wheel.

It is of the package that Python finds, not of the checkout that this file lies in (--checkout allows that one): import,
the command line, then a tiny model traced, edited, generated from, and its weights put back bit for bit.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

import kedit_fast as kf  # torch is imported below, where it is used: a checkout is refused at once

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("--version", "--help", "info")
MADE = (".pyc", ".so", ".pyd")  # by a build or a run, so not in the checkout's text


def find_package(checkout: bool) -> None:
    """Where the package lies, that every file of it is there, and that nothing else was installed beside it."""
    package = Path(kf.__file__).parent
    if (package.parent / "pyproject.toml").exists() and not checkout:
        raise SystemExit(f"{package} is a checkout; install a wheel, or give --checkout")
    written = [path for path in (ROOT / "kedit_fast").rglob("*") if path.is_file() and path.suffix not in MADE]
    missing = [name for path in written if not (package / (name := path.relative_to(ROOT / "kedit_fast"))).is_file()]
    assert written and not missing, f"not in the package: {missing}"
    strangers = {"tests", "bench", "csrc"} & {path.parts[0] for path in files("kedit-fast") or ()}
    assert checkout or not strangers, f"{strangers} were installed beside the package"


def call_commands() -> None:
    for command in COMMANDS:
        run = subprocess.run([sys.executable, "-m", "kedit_fast", command], capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout, (command, run.stderr)


def trace_and_edit(folder: Path) -> None:
    """A trace, an edit as a file, a view, and the edit written and taken out."""
    import torch
    from tiny import tiny_model, tiny_tokenizer  # beside this file

    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lm = kf.open_model(model, tokenizer=tiny_tokenizer())
    fact = kf.Fact("{} is in the city of", "The Eiffel Tower", target_new="Rome", target_true="Paris")
    (state,) = kf.trace(lm, [fact], kinds=("state",), samples=2)
    assert state.p_restored.shape[1] == len(model.model.layers)
    editor = kf.Rome.for_model(lm)
    edit = editor.edit(lm, [fact], moments=kf.second_moments(lm, editor.layers, n_tokens=200))
    edit.save(folder / "edit.safetensors")
    edit = kf.Edit.load(folder / "edit.safetensors")
    assert lm.with_edit(edit).generate(fact.text, max_new_tokens=4)
    with edit.apply(model):
        assert not torch.equal(before[changed(edit)], model.state_dict()[changed(edit)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def changed(edit: kf.Edit) -> str:
    return f"model.layers.{edit.layers[0]}.mlp.down_proj.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", action="store_true", help="the package of this checkout is meant")
    parser.add_argument("--native", choices=("yes", "no"), help="the extension must be there, or must not")
    args = parser.parse_args()
    find_package(args.checkout)
    from kedit_fast.kernels.dispatch import why_not_native

    why = why_not_native()
    assert not args.native or bool(why) == (args.native == "no"), why or "the native extension is there"
    call_commands()
    with tempfile.TemporaryDirectory() as folder:
        trace_and_edit(Path(folder))
    print(f"kedit_fast {kf.__version__} works; native extension: {why or 'there'}")


if __name__ == "__main__":
    main()
