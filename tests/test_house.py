"""The house rules that a machine can check: which way imports go, what library code leaves alone, how long it gets."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kedit_fast"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]

# Floors, highest first: a file imports files of its own floor or of lower ones, also inside its functions.
FLOORS = (
    ("__main__",),
    ("commands",),
    ("experiments", "gating"),
    ("editors",),
    ("evaluation", "shipping", "tracing"),
    ("moments", "pictures"),
    ("jobs",),
    ("edits",),
    ("sweep",),
    ("model",),
    ("facts", "kernels"),
    ("basics",),
    ("__init__",),
)
# The one arrow that runs back up.
UPWARDS = {("model", "jobs"): "an LM generates and names its likeliest tokens, and is compared when it is opened"}
# Lower floors, or the same one, of which a room knows nothing all the same.
STRANGERS = {
    ("evaluation", "tracing"), ("evaluation", "shipping"), ("tracing", "evaluation"), ("tracing", "edits"),
    ("editors", "tracing"), ("editors", "shipping"), ("jobs", "facts"), ("sweep", "facts"), ("kernels", "facts"),
    ("shipping", "tracing"), ("shipping", "evaluation"), ("pictures", "moments"), ("moments", "pictures"),
}  # fmt: skip

# Exceptions, with the reason.
LONG_FILES: dict[str, str] = {
    "facts/fact.py": "what a fact may hold, and what must hold for facts together",
    "facts/formats.py": "every published format of a fact, a reader each",
    "jobs/finetune.py": "one optimization, read from its tasks to what it holds",
    "model/family.py": "the table of families, and what is asked of an entry",
    "jobs/values.py": "one optimization, read from its tasks to what it holds",
}
LONG_FUNCTIONS: dict[str, str] = {}
DEVICE_NAMES = {
    "kernels/dispatch.py": "`kedit-fast info` lists the devices that are present",
    "commands/info.py": "the same",
}
TALKING = ("commands",)  # rooms that print

TESTS = PACKAGE.parent / "tests"
# Modules without a test file of their own name, by the one that tests them.
TESTED_IN = {
    "commands/test_chat.py": "commands/generate",
    "commands/test_cli.py": "commands/arguments",
    "commands/test_completion.py": "commands/tool_arguments",
    "commands/test_demo.py": "commands/demo_page",
    "commands/test_edit.py": "commands/edit_arguments commands/eval commands/stats",
    "commands/test_edits.py": "commands/history commands/merge",
    "commands/test_parser.py": "__main__ commands/argument_types",
    "basics/test_parts.py": "basics/bits",
    "commands/test_rounds.py": "commands/layers",
    "commands/test_scale.py": "commands/unfinished",
    "edits/test_retrieval.py": "edits/text_routes",
    "evaluation/test_report.py": "evaluation/stored",
    "edits/test_routes.py": "model/edited",
    "editors/test_crispedit.py": "moments/gradient_moment",
    "editors/test_checks.py": "edits/chain moments/given",
    "editors/test_finetune.py": "jobs/finetune",
    "editors/test_grace.py": "editors/memory",
    "editors/test_ice.py": "editors/in_context",
    "editors/test_wise.py": "edits/memory_routes",
    "editors/test_neurons.py": "facts/wordings jobs/neurons",
    "editors/test_unlearn.py": "facts/forgetting jobs/losses",
    "editors/test_leace.py": "edits/erasures",
    "tracing/test_neurons.py": "pictures/neurons",
    "tracing/test_page.py": "pictures/trace_page tracing/doubts",
    "editors/test_memit.py": "editors/located editors/spread",
    "editors/test_mend.py": "editors/networks editors/trained",
    "editors/test_training.py": "editors/training_settings editors/training_step",
    "evaluation/test_probes.py": "evaluation/written",
    "evaluation/test_compare.py": "evaluation/aligned pictures/comparison",
    "evaluation/test_evaluate.py": "evaluation/perplexity",
    "evaluation/test_harness.py": "commands/capability evaluation/harness_lm",
    "evaluation/test_logit_lens.py": "pictures/lens",
    "evaluation/test_moved.py": "evaluation/benchmarks/distractors evaluation/moved_questions evaluation/moved_report",
    "experiments/test_by_layer.py": "pictures/by_layer",
    "evaluation/test_questions.py": "evaluation/readings "
    + " ".join(
        f"evaluation/benchmarks/{name}"
        for name in ["halluedit", "knowedit", "knowgic", "mquake", "qaedit", "rippleedits", "wikibigedit", "zsre"]
    ),
    "experiments/test_edit_summary.py": "commands/summary pictures/summary",
    "experiments/test_forecast.py": "commands/forecast",
    "experiments/test_implied.py": "experiments/claims",
    "experiments/test_rounds.py": "pictures/rounds",
    "facts/test_formats.py": "facts/files",
    "gating/test_forms.py": "model/overlaid",
    "gating/test_judge.py": "gating/ask gating/questions gating/report gating/thresholds",
    "jobs/test_gradients.py": "jobs/below",
    "jobs/test_values.py": "sweep/ascent",
    "kernels/test_dispatch.py": "basics/settings",
    "kernels/test_linear.py": "kernels/openblas",
    "editors/test_experts.py": "edits/experts moments/blocks",
    "model/test_lm.py": "model/around",
    "model/test_opening.py": "model/folder",
    "model/test_streamed.py": "model/host",
    "model/test_source.py": "model/disk model/fingerprint",
    "moments/test_second_moment.py": "jobs/moments moments/published",
    "pictures/test_page.py": "pictures/style",
    "pictures/test_traces.py": "pictures/figure pictures/labels pictures/terminal",
    "shipping/test_merge.py": "model/stored_tensors",
    "sweep/test_engine.py": "sweep/attend sweep/hooks sweep/sites",
    "sweep/test_parity.py": "model/family",
    "sweep/test_rows.py": "sweep/runs sweep/store",
    "tracing/test_attribution.py": "jobs/attribute",
    "tracing/test_trace.py": "tracing/exact tracing/tasks",
}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(module: tuple[str, ...]) -> str:
    """The room that a module belongs to: the folder at the top of the package, or the file there."""
    return module[1] if len(module) > 1 else "__init__"


def part_of(name: str) -> str:
    """The room of a file, by its name in the package."""
    return Path(name).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    floors = [i for i, floor in enumerate(FLOORS) if room in floor]
    assert floors, f"kedit_fast/{room} is new; give it a floor in this test"
    return floors[0]


def module_of(path: Path) -> tuple[str, ...]:
    """A file's module: of a folder's __init__ the folder's."""
    parts = ("kedit_fast", *path.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path: Path, modules: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports, at any time: also inside functions and behind conditions; not those
    that only a type checker reads."""
    package = ("kedit_fast", *path.relative_to(PACKAGE).parts[:-1])
    found, nodes = set(), list(tree_of(path).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            named = [(tuple(alias.name.split(".")), ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            named = [((*base, alias.name), base) for alias in node.names]
        else:
            continue
        found |= {next((m for m in either if m in modules), ()) for either in named}
    return found - {(), module_of(path)}


def graph() -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """{module: the modules that it imports}."""
    files = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {module: imports_of(path, set(files)) for module, path in files.items()}


def circle_in(arrows: dict) -> list:
    """Nodes that lead back to the first of them; none where nothing does."""
    left = {node: set(to) for node, to in arrows.items()}
    while ends := {node for node, to in left.items() if not to & left.keys()}:
        left = {node: to for node, to in left.items() if node not in ends}
    way = [min(left)] if left else []
    while way and way[-1] not in way[:-1]:
        way.append(min(left[way[-1]] & left.keys()))
    return way[way.index(way[-1]) :] if way else []


def test_imports_go_down():
    for module, others in graph().items():
        room = room_of(module)
        for other in map(room_of, others):
            up = floor_of(other) < floor_of(room)
            assert not up or (room, other) in UPWARDS, f"{'.'.join(module)} imports {other}, which stands above it"
            assert (room, other) not in STRANGERS, f"{'.'.join(module)} imports {other}, of which it knows nothing"


def test_no_file_imports_itself_by_others():
    assert [".".join(module) for module in circle_in(graph())] == []


def test_there_are_few_rooms():
    rooms = {room_of(module) for module in graph()} - {"__init__", "__main__"}
    assert len(rooms) <= 16 and rooms == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}


def test_imports_that_are_not_allowed_would_be_seen(tmp_path, monkeypatch):
    """Absolute and relative ones, behind conditions and inside functions; those for a type checker are none."""
    (tmp_path / "jobs").mkdir()
    for name in ("tracing", "edits", "sweep", "facts", "model", "basics"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "model.py").write_text("def f():\n    from kedit_fast.jobs.some import f\n")
    file = tmp_path / "jobs" / "some.py"
    file.write_text(
        "from ..tracing import trace\nfrom .. import edits\nimport kedit_fast.sweep\n"
        "if True:\n    from kedit_fast import facts\ndef f():\n    from ..model import lm\n"
        "if TYPE_CHECKING:\n    from ..basics import checks\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    found = {room_of(m) for m in graph()["kedit_fast", "jobs", "some"]}
    assert found == {"tracing", "edits", "sweep", "facts", "model"}
    assert set(circle_in(graph())) == {("kedit_fast", "jobs", "some"), ("kedit_fast", "model")}


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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "basics/settings.py"])
def test_the_environment_is_read_in_one_file(name):
    doors = {"environ", "getenv", "putenv"}
    read = [
        node.lineno
        for node in ast.walk(tree_of(PACKAGE / name))
        if (isinstance(node, ast.Attribute) and node.attr in doors)
        or (isinstance(node, ast.alias) and node.name in doors)
    ]
    assert not read, f"{name} reads the environment in lines {read}; ask kedit_fast.basics.settings"


def test_ranks_meet_in_one_file():
    """torch.distributed is imported, or reached through torch, nowhere else."""
    speaking = [name for name in NAMES if "torch.distributed" in names_in(tree_of(PACKAGE / name))]
    assert speaking == ["basics/ranks.py"]


def names_in(tree: ast.Module) -> set[str]:
    """Dotted names that code imports or reads."""
    imported = {
        each for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
        for each in (alias.name, f"{getattr(node, 'module', None)}.{alias.name}", getattr(node, "module", None))
    }  # fmt: skip
    return imported | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


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
    given = [(call.lineno, k) for call in calls_of(tree) for k in call.keywords if k.arg == "allow_pickle"]
    allowed = [line for line, k in given if not is_false(k.value)]
    assert not allowed, f"{name} allows pickle in lines {allowed}"
    trusting = trusting_calls(tree)
    assert not trusting, f"{name} lacks trust_remote_code=False in lines {trusting}: transformers asks or runs"
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


def test_every_module_has_its_test():
    """One of its own name, or a line that says where else it is tested."""
    modules = [Path(name) for name in NAMES if not name.endswith("__init__.py")]
    without = [m for m in modules if not (TESTS / m.parent / f"test_{m.name}").exists()]
    assert sorted(f"{m}.py" for line in TESTED_IN.values() for m in line.split()) == sorted(map(str, without))
    assert all((TESTS / name).exists() for name in TESTED_IN)


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


def test_what_reads_files_alone_waits_for_torch_alone():
    """transformers' attention interface takes two seconds more than torch; the first sweep imports it."""
    held = modules_after("import kedit_fast; kedit_fast.Edit, kedit_fast.Fact, kedit_fast.EditHistory")
    assert "torch" in held and not held & {"transformers", "scipy", "sklearn", "matplotlib", "sympy"}


def test_public_names_are_there():
    import kedit_fast

    for name in kedit_fast.__all__:
        assert getattr(kedit_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kedit_fast.nothing
