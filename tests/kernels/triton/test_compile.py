"""Every kernel compiles for GPUs that are not here, and keeps what it computes in registers.

A kernel that spills is right in every numeric test; only this one sees it.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "kedit_fast" / "kernels" / "triton"

pytest.importorskip("triton", reason="Triton is not installed")
compile_all = pytest.importorskip("tests.kernels.triton.compile_all", reason="this Triton has no NVIDIA back end")

# Registers a thread: loose, since versions of Triton differ by tens. Attention holds its queries and its sums besides
# the keys and takes all there are (255), so of it only spills tell.
CEILING, CEILINGS = 224, {"attention": 255, "attention_backward": 255}
EXPECTED = [(case[0], capability) for case in compile_all.cases() for capability in compile_all.CAPABILITIES]


@pytest.fixture(scope="module")
def rows() -> dict:
    """{(kernel, capability): what ptxas said}, from one process that does not interpret."""
    try:
        for capability in compile_all.CAPABILITIES:
            compile_all.get_ptxas(capability)
    except RuntimeError as error:
        pytest.skip(f"no ptxas: {error}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton.compile_all"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return {(row["kernel"], row["capability"]): row for row in json.loads(done.stdout)}


@pytest.mark.parametrize(("kernel", "capability"), EXPECTED)
def test_no_spills(rows, kernel, capability):
    row = rows[kernel, capability]
    assert row["spill_stores"] == row["spill_loads"] == 0, row
    assert row["registers"] <= CEILINGS.get(kernel.split()[0], CEILING), row


def test_nothing_else_is_compiled(rows):
    assert sorted(rows) == sorted(EXPECTED) and len(set(EXPECTED)) == len(EXPECTED), "two cases have one name"


def test_every_kernel_has_a_case():
    """A file beside the others, and a kernel in it, is compiled here or this fails."""
    assert {path.stem for path in KERNELS.glob("*.py")} - {"__init__"} == set(compile_all.MODULES)
    compiled = {case[1].__name__ for case in compile_all.cases()}
    for path in KERNELS.glob("*.py"):
        functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
        written = {function.name for function in functions if function.name.endswith("_kernel")}
        assert written <= compiled, f"{path.name}: {sorted(written - compiled)} in no compile_cases()"
