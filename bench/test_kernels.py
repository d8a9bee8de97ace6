"""The cases of ``bench.kernels`` under pytest-benchmark: ``pytest bench --benchmark-only``. Not among the tests.

On a GPU all shapes; on the CPU the quick ones. Here only wall times are taken; rates and marks are ``bench.kernels``'.
"""

import pytest
import torch

from bench.common import device_of
from bench.kernels import Plan, checked, problems

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

DEVICE = device_of("auto")
PROBLEMS = list(problems(Plan.of(DEVICE, quick=DEVICE.type == "cpu")))


@pytest.mark.parametrize("provider", ["kedit_fast", "reference", "rival"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_kernel(benchmark, problem, provider):
    case = problem.made()
    name = provider if provider in case.providers else list(case.providers)[-1]
    benchmark.group = problem.name
    with torch.no_grad():
        checked(problem, case, name)
        benchmark(_to_its_end, case.providers[name])


def _to_its_end(work):
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
