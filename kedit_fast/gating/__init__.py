"""The production gate: what an edit must reach before it ships, measured on the form in which it ships."""

from .draft import draft_suite
from .judge import gate
from .report import GateReport
from .suite import Suite, load_suite
from .thresholds import Check, Thresholds

__all__ = ["Check", "GateReport", "Suite", "Thresholds", "draft_suite", "gate", "load_suite"]
