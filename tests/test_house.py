"""The house rules that a machine can check: which way imports go, what library code leaves alone, how long it gets."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kedit_fast"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]

# Floors, highest first: a file imports files of its own floor or of lower ones (when it is loaded; what a function
# imports for itself is its own affair).
FLOORS = (
    ("__main__",),
    ("cli", "commands", "demo"),
    ("rounds", "rounds_plot", "layer_sweep", "layer_sweep_plot", "gating"),
    ("tracing", "attribution", "trace_tasks", "editors"),
    ("plots", "lens_plot", "terminal", "trace_labels", "html_report", "demo_report"),
    ("evaluation",),
    ("traces", "moments", "corpus", "sampled_text"),
    ("jobs",),
    ("sweep",),
    ("apply", "model", "shipping"),
    ("edit", "deltas"),
    ("tokens",),
    ("facts", "fact_files", "fact_formats", "subjects"),
    ("kernels", "sites"),
    ("files", "unfinished", "printing", "checkpoint", "progress", "settings", "state", "__init__"),
    ("checks",),
    ("words",),
)
# Not even inside a function: (who, of whom it knows nothing).
STRANGERS = {
    ("evaluation", "editors"), ("evaluation", "tracing"), ("editors", "tracing"), ("tracing", "editors"),
    ("jobs", "facts"), ("sweep", "facts"), ("sweep", "jobs"), ("kernels", "facts"), ("kernels", "model"),
    ("jobs", "tokens"), ("sweep", "tokens"), ("kernels", "tokens"),
}  # fmt: skip

# Exceptions, with the reason.
LONG_FILES: dict[str, str] = {"fact_formats.py": "every published format of a fact, a reader each"}
LONG_FUNCTIONS: dict[str, str] = {}
DEVICE_NAMES = {
    "kernels/dispatch.py": "`kedit-fast info` lists the devices that are present",
    "commands/info.py": "the same",
}
TALKING = ("cli", "commands", "demo")  # parts that print


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part_of(name: str) -> str:
    """The part of the package that a file belongs to: its folder, or itself."""
    return Path(name).parts[0].removesuffix(".py")


def floor_of(part: str) -> int:
    floors = [i for i, floor in enumerate(FLOORS) if part in floor]
    assert floors, f"kedit_fast/{part} is new; give it a floor in this test"
    return floors[0]


def imported_by(path: Path, inside_functions: bool = False) -> set[str]:
    """Parts of the package that a file imports: when it is loaded, or at any time."""
    package = ("kedit_fast", *path.relative_to(PACKAGE).parts[:-1])
    found, nodes = set(), list(tree_of(path).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            modules = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found |= {m[1] for m in modules if m[0] == "kedit_fast" and len(m) > 1}
    return {part for part in found if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()}


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_down(name):
    part = part_of(name)
    for other in imported_by(PACKAGE / name):
        assert floor_of(other) >= floor_of(part), f"{name} imports {other}, which stands above it"
    for other in imported_by(PACKAGE / name, inside_functions=True):
        assert (part, other) not in STRANGERS, f"{name} imports {other}, of which it knows nothing"


def test_an_import_upwards_would_be_seen(tmp_path, monkeypatch):
    """The reader of imports sees absolute and relative ones, also behind conditions, and tells those of functions."""
    (tmp_path / "jobs").mkdir()
    for name in ("tracing", "edit", "sites", "facts", "model"):
        (tmp_path / f"{name}.py").write_text("")
    file = tmp_path / "jobs" / "some.py"
    file.write_text(
        "from ..tracing import trace\nfrom .. import edit\nimport kedit_fast.sites\n"
        "if True:\n    from kedit_fast import facts\ndef f():\n    from ..model import lm\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert imported_by(file) == {"tracing", "edit", "sites", "facts"}
    assert imported_by(file, inside_functions=True) == {"tracing", "edit", "sites", "facts", "model"}


def calls_of(tree: ast.Module):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("name", [name for name in NAMES if part_of(name) not in TALKING])
def test_library_code_does_not_print(name):
    printed = [c.lineno for c in calls_of(tree_of(PACKAGE / name)) if getattr(c.func, "id", "") == "print"]
    assert not printed, f"{name} prints in lines {printed}"


def docstrings(tree: ast.Module) -> set[int]:
    """Ids of the constants that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    return {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}


@pytest.mark.parametrize("name", NAMES)
def test_no_device_is_written_in(name):
    tree = tree_of(PACKAGE / name)
    prose = docstrings(tree)
    written = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in prose
        and isinstance(node.value, str) and node.value.split(":")[0] == "cuda"
    ]  # fmt: skip
    assert not written or name in DEVICE_NAMES, f'{name} names "cuda" in lines {written}; take the device of a tensor'


@pytest.mark.parametrize("name", [name for name in NAMES if name != "settings.py"])
def test_the_environment_is_read_in_one_file(name):
    doors = {"environ", "getenv", "putenv"}
    read = [
        node.lineno
        for node in ast.walk(tree_of(PACKAGE / name))
        if (isinstance(node, ast.Attribute) and node.attr in doors)
        or (isinstance(node, ast.alias) and node.name in doors)
    ]
    assert not read, f"{name} reads the environment in lines {read}; ask kedit_fast.settings"


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_are_short(name):
    text = (PACKAGE / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350 or name in LONG_FILES, f"{name} has {len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60 or f"{name}:{node.name}" in LONG_FUNCTIONS, f"{name}:{node.name} has {lines} lines"


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_and_no_remote_code(name):
    tree = tree_of(PACKAGE / name)
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    allowed = [
        c.lineno for c in calls_of(tree) for k in c.keywords if k.arg == "allow_pickle" and not is_false(k.value)
    ]
    assert not allowed, f"{name} allows pickle in lines {allowed}"
    trusting = trusting_calls(tree)
    assert not trusting, (
        f"{name} needs trust_remote_code=False in lines {trusting}: without it transformers asks or runs"
    )
    loads = [c.lineno for c in calls_of(tree) if ast.unparse(c.func) in ("torch.load", "torch.save")]
    assert not loads, f"{name} uses torch.load or torch.save in lines {loads}"


# Calls of transformers, datasets and peft that may run code which a model or a data set brings along.
LOADERS = {"from_pretrained", "from_config", "load_dataset", "load_dataset_builder", "pipeline"}


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def trusting_calls(tree: ast.Module) -> list[int]:
    """Lines of the loaders' calls that do not say trust_remote_code=False, or say anything else anywhere."""
    lines = []
    for call in calls_of(tree):
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = [k.value for k in call.keywords if k.arg == "trust_remote_code"]
        if (called in LOADERS and not given) or not all(map(is_false, given)):
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize(
    ("code", "trusting"),
    [
        ("AutoConfig.from_pretrained(name, trust_remote_code=False)", False),
        ("AutoConfig.from_pretrained(name)", True),
        ("transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)", True),
        ("classes.from_config(config, **options)", True),
        ("load_dataset(name, trust_remote_code=None)", True),
        ("anything(trust_remote_code=True)", True),
        ("json.load(file)", False),
    ],
)
def test_a_call_that_may_run_code_is_seen(code, trusting):
    assert bool(trusting_calls(ast.parse(code))) is trusting


def test_exceptions_are_needed():
    for table in (LONG_FILES, DEVICE_NAMES, {key.split(":")[0]: why for key, why in LONG_FUNCTIONS.items()}):
        assert set(table) <= set(NAMES)
    assert all(len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) > 350 for name in LONG_FILES)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_says_what_it_is(name):
    tree = tree_of(PACKAGE / name)
    assert not tree.body or ast.get_docstring(tree), f"{name} has no docstring"


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded once the code has run in a fresh Python."""
    made = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sorted(sys.modules))"],
        capture_output=True, text=True, cwd=PACKAGE.parent, check=True, timeout=60,
    )  # fmt: skip
    return {name.split(".")[0] for name in made.stdout.split("\n")[-2].split()}


HEAVY = {"torch", "transformers", "numpy", "matplotlib", "safetensors"}


def test_import_is_light():
    assert not modules_after("import kedit_fast; dir(kedit_fast)") & HEAVY
    assert "torch" in modules_after("import kedit_fast; kedit_fast.open_model")


@pytest.mark.skipif(not (PACKAGE / "cli.py").exists(), reason="there is no command line yet")
def test_help_is_light():
    code = (
        "import contextlib\nfrom kedit_fast.cli import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])"
    )
    assert not modules_after(code) & HEAVY


def test_public_names_are_there():
    import kedit_fast

    for name in kedit_fast.__all__:
        assert getattr(kedit_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kedit_fast.nothing
