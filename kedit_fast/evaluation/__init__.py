"""Evaluation: what an edit changed, and what it should not have changed."""

from kedit_fast.basics import catalog
from kedit_fast.evaluation.benchmark import Benchmark, Case
from kedit_fast.evaluation.compare import Comparison, compare
from kedit_fast.evaluation.easyedit import Columns, load_easyedit
from kedit_fast.evaluation.evaluate import evaluate
from kedit_fast.evaluation.report import EvalReport

BENCHMARKS: dict[str, Benchmark] = catalog.loaded(catalog.BENCHMARKS)

__all__ = [
    "BENCHMARKS", "Benchmark", "Case", "Columns", "Comparison", "EvalReport", "compare", "evaluate", "load_easyedit",
]  # fmt: skip
