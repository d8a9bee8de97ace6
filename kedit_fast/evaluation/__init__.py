"""Evaluation: what an edit changed, and what it should not have changed."""

from .evaluate import evaluate
from .report import EvalReport

__all__ = ["EvalReport", "evaluate"]
