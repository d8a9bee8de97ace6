"""Evaluation: what an edit changed, and what it should not have changed."""

from kedit_fast.evaluation.evaluate import evaluate
from kedit_fast.evaluation.report import EvalReport

__all__ = ["EvalReport", "evaluate"]
