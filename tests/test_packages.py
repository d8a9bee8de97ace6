"""What makes packages of this tree: pyproject.toml, the workflows, the Dockerfiles. They run elsewhere; here they are
held against each other and against the files that they name."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
WHEELS = PROJECT["tool"]["cibuildwheel"]
MODULES = {"pip", "build", "cibuildwheel"}  # that a workflow runs; what it installs of them has a version
CONTAINER = {"/src", "/work", "/wheels"}  # folders of the images


def jobs(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def steps(path: Path) -> list[dict]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def pythons_of_classifiers() -> list[str]:
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in classifiers())
    return [match[1] for match in found if match]


def classifiers() -> list[str]:
    return PROJECT["project"]["classifiers"]


def test_the_pythons_are_the_same_everywhere():
    pythons = pythons_of_classifiers()
    assert PROJECT["project"]["requires-python"] == f">={pythons[0]}"
    assert WHEELS["build"] == [f"cp{python.replace('.', '')}-*" for python in pythons]
    (test,) = (path for path in WORKFLOWS if path.stem == "test")
    assert jobs(test)["test"]["strategy"]["matrix"]["python"] == pythons
    assert f"Python {pythons[0]} or later" in (ROOT / "README.md").read_text(encoding="utf-8")
    images = [re.search(r"^FROM python:([\d.]+)-slim$", path.read_text(), re.M)[1] for path in DOCKERFILES]
    assert images and set(images) <= set(pythons)


def test_this_python_is_one_that_is_promised():
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in pythons_of_classifiers()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_to_a_commit_and_say_their_version(path):
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert len(lines) == len([step for step in steps(path) if "uses" in step]) > 0
    loose = [line for line in lines if not re.fullmatch(r"- uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)]
    assert not loose


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_of_workflows_are_there(path):
    for command in (step["run"] for step in steps(path) if "run" in step):
        problem = unknown(shlex.split(command))
        assert not problem, f"{path.name}: {command!r}: {problem}"


def unknown(words: list[str]) -> str:
    """What of a command does not exist in this tree, or has no version; empty where all is well."""
    match words:
        case ["make", target, *_]:
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
            return "" if target in targets else f"no target {target}"
        case ["python", "-m", "pip", "install", *what]:
            files = [word for word in what if word == "constraints.txt" or word.startswith("dist/")]
            loose = [word for word in what if word not in files and word != "-c" and "==" not in word]
            return f"{loose} without a version" if loose else missing(["constraints.txt"])
        case ["python", "-m", module, *_]:
            return "" if module in MODULES else f"no module {module}"
        case ["python", file, *_]:
            return missing([file])
        case [file]:
            return missing([file]) or ("" if os.access(ROOT / file, os.X_OK) else f"{file} cannot be run")
    return "a command that this test does not know"


def missing(names: list[str]) -> str:
    gone = [name for name in names if not (ROOT / name).exists()]
    return f"{gone} are not there" if gone else ""


def test_a_wrong_command_would_be_seen():
    wrong = ("make all", "python -m pip install cibuildwheel", "python tests/smoky.py", "README.md", "./run", "cmake .")
    assert all(unknown(shlex.split(command)) for command in wrong)


def test_wheels_are_tried_with_the_smoke_test():
    named = re.findall(r"\{project\}/(\S+)", " ".join([WHEELS["before-test"], WHEELS["test-command"]]))
    assert named == ["constraints.txt", "tests/smoke.py"] and not missing(named)
    assert WHEELS["test-command"].endswith("--native yes") and WHEELS["environment"] == {"KEDIT_FAST_NATIVE": "1"}


@pytest.mark.filterwarnings("ignore")
def test_the_smoke_test_runs_on_this_tree():
    run = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "smoke.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    refused = subprocess.run(run, capture_output=True, text=True, env=env)
    assert refused.returncode == 1 and "is a checkout" in refused.stderr
    done = subprocess.run([*run, "--checkout"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "works" in done.stdout, done.stderr


def test_every_file_of_the_package_goes_into_a_wheel():
    (package,) = PROJECT["tool"]["setuptools"]["package-data"].items()
    folder, patterns = ROOT / package[0], package[1]
    assert patterns and all(list(folder.glob(pattern)) for pattern in patterns), "a pattern that finds nothing"
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    skipped = (".py", ".pyc", ".so", ".pyd")
    others = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in skipped}
    assert others == packed
    assert all((path.parent / "__init__.py").exists() for path in folder.rglob("*.py"))


def test_the_source_distribution_has_what_a_build_needs():
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()]
    named = [name for words in lines if words[0] in ("graft", "include") for name in words[1:]]
    assert all(list(ROOT.glob(name)) for name in named)
    # In a Python of its own: setuptools refuses to be loaded where another test has loaded distutils.
    code = (
        "import json, runpy; found = runpy.run_path('setup.py'); print(json.dumps(found['SOURCES'] + found['HEADERS']))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".h")}
    assert "csrc" in named and sources == set(json.loads(told))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_lines_of_dockerfiles_name_what_is_there(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not path.relative_to(ROOT).is_absolute() and f"-f docker/{path.name}" in lines[0]
    kinds = [line.split()[0] for line in lines if not line.startswith("#")]
    assert kinds[0] == "FROM" and set(kinds) <= {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENTRYPOINT"}
    text = "\n".join(lines)
    assert "\nCOPY . .\n" in text  # all that .dockerignore leaves, so what stands below lies in /src
    assert not missing(re.findall(r"/src/(\S+)", text) + re.findall(r"-c (\S+)", text.split("FROM", 1)[1]))
    extras = re.findall(r"'\.\[(\w+)\]'", text)
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert set(re.findall(r"^WORKDIR (\S+)$", text, re.M)) <= CONTAINER
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not {"tests", "csrc", "constraints.txt", "kedit_fast"} & set(ignored)
